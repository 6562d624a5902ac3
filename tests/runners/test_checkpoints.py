"""Checkpoints: a resumed run equals an uninterrupted one bit for bit; damage and misfits are told, not used."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch

from lavis_chatbridge.errors import CheckpointError, TrainingError
from lavis_chatbridge.files import SHARED
from lavis_chatbridge.models import checkpoint as weight_files
from lavis_chatbridge.models.language_model import load_codec
from lavis_chatbridge.models.perceiver import build_perceiver
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.runners import checkpoints, distributed, snapshot
from lavis_chatbridge.runners.checkpoints import Checkpoint, CheckpointFolder
from tests.fuzzing.weights import assert_same_state, run_state, with_manifest
from tests.runners.runner_parts import ToyGroup, ToyModel, ToySource, in_processes, preloaded, runner, toy_data, weights

ASSETS = Path(weight_files.__file__).parents[1] / "assets"


class Stop(Exception):
    """Stands for a machine that goes away."""


class StoppingSource(ToySource):
    """A source that fails for good after a number of items, also in the middle of an accumulation."""

    left = 10**9

    def item(self, index, epoch=0):
        type(self).left -= 1
        if self.left < 0:
            raise Stop
        return super().item(index, epoch)


def same(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize(
    ("options", "items"),
    [
        ({"accum_grad_iters": 1}, 37),
        ({"accum_grad_iters": 3}, 53),
        ({"num_workers": 2, "accum_grad_iters": 2}, None),
        ({"precision": "bf16", "eval_every": 3, "valid_splits": ["val"]}, 44),
    ],
    ids=["mid-epoch", "mid-accumulation", "workers", "bf16-validation"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options, items, monkeypatch):
    options = {"max_iters": 14, "save_every_steps": 2, **options}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    cut = tmp_path / "cut"
    if items is None:
        part = runner(cut, ToyModel(0.3), **options)
        part.state.check = lambda run: (_ for _ in ()).throw(Stop) if part.state.step == 7 else None
    else:
        data = toy_data()
        for name, kind, size in (("pictures", "image", 23), ("sounds", "audio", 17)):
            data[name]["train"].sources[0] = StoppingSource(name, kind, size)
        monkeypatch.setattr(StoppingSource, "left", items)
        part = runner(cut, ToyModel(0.3), data=data, **options)
    with pytest.raises(Stop):
        part.train()
    assert 2 <= part.state.step < 14
    resumed = runner(cut, ToyModel(0.3), resume="auto", **options)
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state.to_dict() == whole.state.to_dict()
    first, second = (snapshot.optimizer_tensors(one.model, one.optimizer) for one in (whole, resumed))
    assert first.keys() == second.keys()
    assert same(first, second)
    steps = [json.loads(line).get("train_step") for line in (cut / "log.txt").read_text().splitlines()]
    assert [step for step in steps if step] == [2, 4, 6, 8, 10, 12, 14]


def _lines(folder, split):
    lines = map(json.loads, (folder / "log.txt").read_text().splitlines())
    return [line for line in lines if f"{split}_step" in line]


@pytest.mark.parametrize("cut", ["in the validation", "after its line in the log", "by SIGTERM", "after it"])
def test_a_run_that_ends_around_a_validation_resumes_exactly(tmp_path, cut):
    """Its step is saved before; what the validation finds, the best score above all, is found again or kept."""
    options = {"max_iters": 8, "eval_every": 2, "valid_splits": ["val"], "log_every": 1, "init_lr": 0.5}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    part = runner(tmp_path / "cut", ToyModel(0.3), **options)
    owner, name = {
        "in the validation": (part, "eval_epoch"),
        "after its line in the log": (part.checkpoints, "add_validation"),
        "by SIGTERM": (part.state, "check"),
        "after it": (part.state, "check"),
    }[cut]
    real, at = getattr(owner, name), 5 if cut == "after it" else 4

    def ends(*arguments):
        if part.state.step == at:
            raise SystemExit(143)
        return real(*arguments)

    setattr(owner, name, ends)
    with pytest.raises(SystemExit):
        part.train()
    validated = (tmp_path / "cut" / "checkpoints" / "step_00000004" / checkpoints.VALIDATION).exists()
    assert validated == (cut == "after it")
    resumed = runner(tmp_path / "cut", ToyModel(0.3), resume="auto", **options)
    assert resumed.continued.name == "step_00000004"
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state.to_dict() == whole.state.to_dict()
    for split in ("train", "val"):
        found, expected = (_lines(tmp_path / folder, split) for folder in ("cut", "whole"))
        keys = (f"{split}_step", f"{split}_loss", f"{split}_best_step")
        assert [[line.get(key) for key in keys] for line in found] == [[line.get(k) for k in keys] for line in expected]
    best = [sorted(p.name for p in (tmp_path / f / "checkpoints").glob("best_*")) for f in ("cut", "whole")]
    assert best[0] == best[1] == [f"best_{whole.state.best_step:08d}"]


@pytest.mark.parametrize("found", ["[1]", "{", '{"validated": 2, "best_metric": "x"}', '{"validated": 1}'])
def test_a_damaged_record_of_a_validation_makes_it_run_again(tmp_path, found):
    options = {"max_iters": 2, "valid_splits": ["val"]}
    one = runner(tmp_path, **options)
    one.train()
    (tmp_path / "checkpoints" / "step_00000002" / checkpoints.VALIDATION).write_text(found)
    resumed = runner(tmp_path, resume="auto", **options)
    resumed.train()
    assert resumed.state.to_dict() == one.state.to_dict()
    assert len(_lines(tmp_path, "val")) == 1


def _train_ranks(rank, folder, options, stop_at):
    one = runner(folder, ToyModel(0.3), **options)
    if stop_at:
        one.state.check = lambda run: (_ for _ in ()).throw(Stop) if one.state.step == stop_at else None
    try:
        one.train()
    except Stop:
        os._exit(0)
    torch.save(weights(one), folder / f"weights{rank}.pt")
    distributed.close()


def test_two_processes_resume_exactly(tmp_path):
    options = {"max_iters": 9, "save_every_steps": 2}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    in_processes(_train_ranks, 2, tmp_path / "whole", options, None)
    in_processes(_train_ranks, 2, tmp_path / "cut", options, 5)
    in_processes(_train_ranks, 2, tmp_path / "cut", options | {"resume": "auto"}, None)
    for rank in (0, 1):
        first, second = (
            torch.load(tmp_path / name / f"weights{rank}.pt", weights_only=True) for name in ("whole", "cut")
        )
        assert same(first, second)


def test_a_finished_run_resumes_to_nothing(tmp_path):
    runner(tmp_path).train()
    again = runner(tmp_path, resume="auto")
    again.train()
    assert again.state.step == 8


def test_auto_without_a_checkpoint_starts_anew_and_ignores_another_configuration(tmp_path):
    other = runner(tmp_path, seed=7)
    other.train()
    one = runner(tmp_path, resume="auto", job_id="mine")
    assert one.continued is None
    one.train()
    assert one.state.step == 8


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    one = runner(tmp_path, max_iters=6, save_every_steps=2, keep_last=3)
    one.train()
    newest = tmp_path / "checkpoints" / "step_00000006"
    content = bytearray((newest / checkpoints.MODEL).read_bytes())
    content[-1] ^= 1
    (newest / checkpoints.MODEL).write_bytes(content)
    assert checkpoints.verify(newest) == ["model.safetensors has other contents than were written"]
    with pytest.raises(CheckpointError, match=r"is damaged: model.safetensors has other contents"):
        runner(tmp_path, max_iters=6, resume=str(newest)).train()
    assert runner(tmp_path, max_iters=6, resume="auto").continued == tmp_path / "checkpoints" / "step_00000004"


@pytest.mark.parametrize("damage", ["no manifest", "half a file", "missing file", "not json"])
def test_verify_names_the_damage(tmp_path, damage):
    folder = tmp_path / "step_00000001"
    checkpoints.write(Checkpoint({"w": torch.ones(3)}, {}, {"a": 1}), folder)
    assert checkpoints.verify(folder) == []
    if damage == "no manifest":
        (folder / checkpoints.MANIFEST).unlink()
    elif damage == "half a file":
        (folder / checkpoints.STATE).write_text("{")
    elif damage == "missing file":
        (folder / checkpoints.OPTIMIZER).unlink()
    else:
        (folder / checkpoints.MANIFEST).write_text("[1, 2")
    assert len(checkpoints.verify(folder)) == 1
    assert checkpoints.newest_in(tmp_path) is None


def test_which_checkpoints_stay(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_last=2, keep_every=40)
    for step in range(10, 100, 10):
        folder.save(Checkpoint({"w": torch.ones(1)}, {}, {}), step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000040", "step_00000080", "step_00000090"]
    for step in (10, 30):
        folder.save_best(Checkpoint({"w": torch.ones(1)}, {}, {}), step)
    assert folder.best(10) == tmp_path / "best_00000010"  # the newest checkpoint may still name it
    folder.add_validation(90, {"best_step": 30})
    assert checkpoints.validation_of(tmp_path / "step_00000090") == {"best_step": 30}
    assert checkpoints.verify(tmp_path / "step_00000090") == []
    assert folder.best(30) == tmp_path / "best_00000030"
    assert not (tmp_path / "best_00000010").exists()
    assert (folder.best(10), folder.best(40)) == (None, tmp_path / "step_00000040")


def test_colleagues_can_read_a_checkpoint(tmp_path):
    runner(tmp_path, ToyModel(0.3), max_iters=2).train()
    [step] = (tmp_path / "checkpoints").glob("step_*")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (*step.iterdir(), tmp_path / "model.safetensors")}
    assert set(modes.values()) == {SHARED}, modes


def test_a_step_that_is_saved_again_replaces_the_former(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for value in (1.0, 2.0):
        for save in (folder.save, folder.save_best):
            found = checkpoints.read(save(Checkpoint({"w": torch.full((1,), value)}, {}, {}), 5))
            assert found.model["w"].item() == value


def test_a_crash_inside_a_save_leaves_the_last_one(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    folder.save(Checkpoint({"w": torch.ones(1)}, {}, {}), 1)
    monkeypatch.setattr(checkpoints.os, "rename", lambda *names: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        folder.save(Checkpoint({"w": torch.zeros(1)}, {}, {}), 2)
    monkeypatch.undo()
    assert checkpoints.newest_in(tmp_path) == tmp_path / "step_00000001"
    folder.save(Checkpoint({"w": torch.zeros(1)}, {}, {}), 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000003"]


def test_a_file_size_limit_ends_the_run_with_the_cause_and_the_last_good_one(tmp_path):
    one = runner(tmp_path, max_iters=2)
    one.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(
            TrainingError, match=r"cannot write the checkpoint .*larger than this system allows"
        ) as caught:
            one._save_checkpoint(3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the last good one is" in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002"]
    assert checkpoints.verify(tmp_path / "checkpoints" / "step_00000002") == []


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(TrainingError, match=r"the disk is full .*there is no earlier one"):
        folder.save(Checkpoint({"w": torch.ones(1)}, {}, {}), 1)
    assert list(tmp_path.iterdir()) == []


def test_other_frozen_weights_are_refused(tmp_path):
    runner(tmp_path).train()
    other = ToyModel()
    with torch.no_grad():
        other.frozen[0][0].weight[0, 0] += 0.5
    with pytest.raises(CheckpointError, match=r"trained with other frozen parts: frozen is .*, expected"):
        runner(tmp_path, other, resume="auto").train()


def test_other_dimensions_are_refused_with_the_difference(tmp_path):
    runner(tmp_path).train()
    other = ToyModel()
    other.norm = torch.nn.LayerNorm(8, elementwise_affine=True, bias=False)
    with pytest.raises(CheckpointError, match=r"is for another model: norm.bias is not expected"):
        runner(tmp_path, other, resume="auto").train()


def test_the_same_frozen_weights_in_another_precision_are_the_same():
    model, half = ToyModel(), ToyModel()
    half.frozen.to(torch.bfloat16)
    assert snapshot.fingerprints(model) == snapshot.fingerprints(half)


def test_a_change_anywhere_in_a_large_frozen_part_is_noticed():
    model = torch.nn.ModuleDict({"large": torch.nn.Linear(100, 100, bias=False).requires_grad_(False)})
    before = snapshot.fingerprints(model)
    for place in ((0, 0), (99, 99)):
        with torch.no_grad():
            model["large"].weight[place] += 1
        assert snapshot.fingerprints(model) != before
        before = snapshot.fingerprints(model)


def test_another_tokenizer_of_the_same_size_is_noticed(golden_dir):
    model, marks = ToyModel(), []
    for folder in (golden_dir / "tokenizer", ASSETS / "tiny" / "llm"):
        model.llama_tokenizer = load_codec(folder)
        marks.append(snapshot.fingerprints(model))
    assert marks[0].keys() == marks[1].keys() == {"frozen", "words", "tokenizer"}
    assert {name for name in marks[0] if marks[0][name] != marks[1][name]} == {"tokenizer"}


def test_random_generators_come_back():
    import random

    import numpy as np

    state = json.loads(json.dumps(snapshot.rng_state()))
    first = (torch.rand(1).item(), random.random(), np.random.rand())
    snapshot.set_rng_state(state)
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == first


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_save(tmp_path, number):
    one = runner(tmp_path, max_iters=6, log_every=100)
    take, before = one.state.record, signal.getsignal(number)

    def record(source, result):
        take(source, result)
        if one.state.step == 2:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    one.state.record = record
    if number == signal.SIGTERM:
        with pytest.raises(SystemExit) as caught:
            one.train()
        assert caught.value.code == 143
        assert one.state.step == 3
    else:
        one.train()
        assert one.state.step == 6
    assert (tmp_path / "checkpoints" / "step_00000003").is_dir()
    assert signal.getsignal(number) == before


def test_the_clock_saves(tmp_path):
    runner(tmp_path, max_iters=4, save_every_minutes=1e-9, keep_last=10).train()
    assert len(list((tmp_path / "checkpoints").glob("step_*"))) == 4


class Recorder(ToySource):
    """A source that notes which samples were taken, and the epoch."""

    taken: ClassVar[list[tuple[str, int, int]]] = []

    def item(self, index, epoch=0):
        self.taken.append((self.name, index, epoch))
        return super().item(index, epoch)


def test_another_number_of_samples_per_step_goes_on_at_the_same_sample(tmp_path, monkeypatch):
    """As another number of processes does: what a step takes of a source is what all processes take together."""
    monkeypatch.setattr(Recorder, "taken", [])
    data = {"pictures": {"train": ToyGroup([Recorder("pictures", "image", 24)])}}
    data["sounds"] = {"train": ToyGroup([Recorder("sounds", "audio", 12)])}
    for steps, batch in ((5, 4), (8, 2), (13, 3)):
        one = runner(tmp_path, data=data, max_iters=steps, batch_size_train=batch, resume="auto")
        one.train()
    positions = one.train_loader.plan.positions(13)
    assert sum(positions.values()) == 5 * 4 + 3 * 2 + 5 * 3
    for name, size in (("pictures", 24), ("sounds", 12)):
        taken = [(index, epoch) for source, index, epoch in Recorder.taken if source == name]
        assert len(taken) == len(set(taken)) == positions[name]
        assert [epoch for _, epoch in taken] == [number // size for number in range(len(taken))]


def test_other_data_are_refused(tmp_path):
    runner(tmp_path).train()
    data = toy_data()
    data["sounds"]["train"].sources[0].size = 99
    with pytest.raises(CheckpointError, match=r"was trained on other data: sizes is \{.*'sounds': 17\}, expected"):
        runner(tmp_path, data=data, resume="auto").train()


def _lavis_checkpoint(path, groups, **progress):
    """A checkpoint as LAVIS's runners write it, after two steps of AdamW on every parameter."""
    model = ToyModel()
    named = dict(model.named_parameters())
    order = groups(named)
    optimizer = torch.optim.AdamW([{"params": [named[name] for name in names]} for names in order], lr=0.1)
    for number, parameter in enumerate(named.values()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": None, "config": {}}
    torch.save(content | progress, path)
    return {name: optimizer.state[parameter]["exp_avg"] for name, parameter in named.items() if parameter.requires_grad}


def _lavis_groups(named):
    trained = {name: p for name, p in named.items() if p.requires_grad}
    matrices = [name for name, p in trained.items() if p.ndim >= 2 and "bias" not in name]
    return [matrices, [name for name in trained if name not in matrices]]


@pytest.mark.parametrize(
    ("groups", "progress", "step"),
    [
        (_lavis_groups, {"iters": 3}, 3),
        (_lavis_groups, {"epoch": 0}, 10),
        (lambda named: [list(named)], {"epoch": 1}, 20),
    ],
    ids=["lavis-iterations", "lavis-epochs", "original"],
)
def test_a_checkpoint_of_lavis_or_the_original_goes_on(tmp_path, groups, progress, step):
    averages = _lavis_checkpoint(tmp_path / "checkpoint.pth", groups, **progress)
    one = runner(tmp_path / "out", max_iters=25, resume=str(tmp_path / "checkpoint.pth"))
    one._load_checkpoint(one.continued)
    assert one.state.step == step
    tensors = snapshot.optimizer_tensors(one.model, one.optimizer)
    assert {name for name, _, part in (key.partition("|") for key in tensors) if part == "exp_avg"} == set(averages)
    assert all(torch.equal(tensors[f"{name}|exp_avg"], average) for name, average in averages.items())
    one.train()
    assert one.state.step == 25


def test_a_checkpoint_that_holds_code_is_refused(tmp_path):
    torch.save({"model": {}, "config": Stop()}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match="only tensors and plain values are read"):
        runner(tmp_path / "out", resume=str(tmp_path / "checkpoint.pth")).train()


def _end_of_time(folder):
    """A training whose whole process group is told to end, workers included, as Slurm does it."""
    os.setpgid(0, 0)
    one = runner(folder, num_workers=2, max_iters=500, save_every_steps=None)
    take = one.state.record

    def record(source, result):
        take(source, result)
        if one.state.step == 5:
            os.killpg(0, signal.SIGTERM)

    one.state.record = record
    one.train()


def test_the_end_of_a_jobs_time_saves_although_workers_are_signalled_too(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=_end_of_time, args=(tmp_path,))
    with preloaded():
        process.start()
    process.join(300)
    process.kill()  # where it has not ended, else nothing
    assert process.exitcode == 143
    (newest,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoints.verify(newest) == []


def test_a_checkpoint_of_the_13b_model_takes_less_than_one_and_a_half_gb(tmp_path):
    """The toy run's files are twelve bytes a value and the names; the large model's values are counted."""

    def size(tensors):
        values = sum(tensor.numel() for tensor in tensors.values())
        return 12 * values + 4 * len(tensors)  # weights, AdamW's two averages, and its count of steps, in fp32

    one = runner(tmp_path, max_iters=4)
    one.train()
    (newest,) = (tmp_path / "checkpoints").glob("step_00000004")
    found = sum((newest / name).stat().st_size for name in (checkpoints.MODEL, checkpoints.OPTIMIZER))
    trained = weights(one)
    assert 0 <= found - size(trained) < 4 * 200 * len(trained)

    settings = model_settings("vicuna13b")
    with torch.device("meta"):
        parts = torch.nn.ModuleList([torch.nn.Linear(768, 1408), torch.nn.Linear(768, 5120)])
        queries = {name: torch.empty(1, 32, 768) for name in ("image_query_tokens", "audio_query_tokens")}
        trained = {**parts.state_dict(), **queries}
        trained |= dict(build_perceiver(settings.perceiver, 1408).named_parameters())
    assert size(trained) + 4 * 200 * len(trained) < 1_500_000_000
    assert round(size(trained) / 1e9, 2) == 1.32


def _changed(folder, name, change):
    """Change a file of a checkpoint, and let the manifest agree: only its contents can betray it."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    for place, content in with_manifest({**files, name: change(files[name])}).items():
        (folder / place).write_bytes(content)


def _tensors(change):
    def changed(content):
        tensors = safetensors.torch.load(content)
        change(tensors)
        return safetensors.torch.save(tensors)

    return changed


def _state(change):
    def changed(content):
        state = json.loads(content)
        return json.dumps(change(state) or state).encode()

    return changed


def _exchange(tensors):
    tensors["bridge.weight"], tensors["norm.weight"] = tensors["norm.weight"], tensors["bridge.weight"]


DAMAGES = {
    "weights with NaN": (checkpoints.MODEL, _tensors(lambda t: t["norm.bias"].fill_(float("nan"))), "NaN or infinity"),
    "weights exchanged": (checkpoints.MODEL, _tensors(_exchange), "is for another model: bridge.weight is"),
    "weights of whole numbers": (
        checkpoints.MODEL,
        _tensors(lambda t: t.update({"norm.bias": t["norm.bias"].int()})),
        "norm.bias is int32, expected real numbers",
    ),
    "weights cut off": (checkpoints.MODEL, lambda content: content[:-8], "cannot be read"),
    "optimiser cut off": (checkpoints.OPTIMIZER, lambda content: content[:-8], "cannot be read"),
    "optimiser of another shape": (
        checkpoints.OPTIMIZER,
        _tensors(lambda t: t.update({"norm.bias|exp_avg": torch.ones(3)})),
        "exp_avg is .3., expected .8.",
    ),
    "optimiser without a part": (
        checkpoints.OPTIMIZER,
        _tensors(lambda t: t.pop("norm.bias|exp_avg_sq")),
        "exp_avg_sq is missing",
    ),
    "optimiser with infinity": (
        checkpoints.OPTIMIZER,
        _tensors(lambda t: t["norm.bias|exp_avg"].fill_(float("inf"))),
        "NaN or infinity",
    ),
    "state that is a list": (checkpoints.STATE, lambda content: b"[]", "has format 'list'"),
    "state too deep": (checkpoints.STATE, lambda content: b"[" * 100_000, "cannot be read"),
    "state without a scaler": (checkpoints.STATE, _state(lambda s: s.pop("scaler") and None), "KeyError: 'scaler'"),
    "steps that are words": (
        checkpoints.STATE,
        _state(lambda s: s["progress"].update(step="x")),
        "counted in whole numbers",
    ),
    "positions that are words": (
        checkpoints.STATE,
        _state(lambda s: s["data"]["plan"]["positions"].update(sounds="x")),
        "positions in the data are whole numbers",
    ),
    "random state cut off": (checkpoints.STATE, _state(lambda s: s["rng"][0].update(torch="AAAA")), "not of the form"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, whose checkpoint is copied and damaged."""
    folder = tmp_path_factory.mktemp("trained")
    runner(folder, max_iters=2).train()
    return folder / "checkpoints" / "step_00000002"


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, trained, damage):
    folder = tmp_path / "step_00000002"
    shutil.copytree(trained, folder)
    name, change, message = DAMAGES[damage]
    one = runner(tmp_path / "out", max_iters=6)
    before = run_state(one)
    _changed(folder, name, change)
    assert checkpoints.verify(folder) == []
    with pytest.raises(CheckpointError, match=message):
        one._load_checkpoint(folder)
    assert_same_state(run_state(one), before)
    _changed(folder, name, lambda content: (trained / name).read_bytes())
    one._load_checkpoint(folder)
    assert one.state.step == 2


def test_a_manifest_names_files_of_its_own_folder_only(tmp_path, trained):
    folder = tmp_path / "step_00000002"
    shutil.copytree(trained, folder)
    for name in ("../../secret", "/etc/passwd", "a/b"):
        (folder / checkpoints.MANIFEST).write_text(json.dumps({name: {"bytes": 1, "blake2b": "x"}}))
        assert "names files of other folders" in checkpoints.verify(folder)[0]
    (folder / checkpoints.MANIFEST).write_text("[" * 100_000)
    assert "is missing or unreadable" in checkpoints.verify(folder)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iters": "x"}, "iters is 'x', expected a number"),
        ({"epoch": float("nan")}, "epoch is 'nan', expected a number"),
        ({"epoch": -1}, "epoch is '-1', expected a number"),
        ({"optimizer": 3}, "an optimiser of a form that is not known"),
        ({"optimizer": {"state": {0: 3}, "param_groups": [{"params": []}, {}]}}, None),
        ({"model": {"norm.bias": torch.full((8,), float("nan"))}}, "NaN or infinity"),
        ({"model": {"norm.bias": torch.ones(3)}}, r"norm.bias is \[3\], expected \[8\]"),
        ({"model": {"norm.bias": torch.ones(8).to_sparse()}}, "other than plain tensors"),
        ({"model": {"norm.bias": torch.ones(8, dtype=torch.complex64)}}, "other than plain tensors"),
        ({"model": 3}, "has no weights under 'model'"),
    ],
)
def test_hostile_checkpoints_of_lavis_leave_the_run_as_it_was(tmp_path, changes, message):
    path = tmp_path / "checkpoint.pth"
    _lavis_checkpoint(path, _lavis_groups, iters=3)
    content = torch.load(path, weights_only=True)
    for key, value in changes.items():
        content[key] = {**content["model"], **value} if key == "model" and isinstance(value, dict) else value
    torch.save(content, path)
    one = runner(tmp_path / "out", max_iters=6)
    before = run_state(one)
    if message is None:
        one._load_checkpoint(path)
        return
    with pytest.raises(CheckpointError, match=message):
        one._load_checkpoint(path)
    assert_same_state(run_state(one), before)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="only tensors and plain values are read"):
        one._load_checkpoint(path)
    assert_same_state(run_state(one), before)
