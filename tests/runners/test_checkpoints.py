"""Checkpoints: a resumed run equals an uninterrupted one bit for bit; what does not fit is refused."""

from __future__ import annotations

import copy
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lavis_chatbridge.errors import CheckpointError, TrainingError
from lavis_chatbridge.runners import checkpoints
from lavis_chatbridge.runners.checkpoints import MODEL, OPTIMIZER, STATE
from tests.runners.runner_parts import Stop, ToyModel, after_step, log_of, runner, same, weights


def log_lines(folder: Path, split: str) -> list[list[object]]:
    """Step, loss and best step of each line of a split in the log."""
    keys = (f"{split}_step", f"{split}_loss", f"{split}_best_step")
    return [[line.get(key) for key in keys] for line in log_of(folder) if keys[0] in line]


@pytest.mark.parametrize(
    "options",
    [
        {"save_every_steps": 4},
        {"save_every_steps": 2, "num_workers": 2, "accum_grad_iters": 2},
        {"precision": "fp16", "eval_every": 3, "valid_splits": ["val"], "init_lr": 0.5},
        {"save_every_steps": 2, "train": ["bridge"], "group_by_length": True},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options):
    options = {"max_iters": 14, **options}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    part = runner(tmp_path / "cut", ToyModel(0.3), **options)
    after_step(part, 7)
    with pytest.raises(Stop):
        part.train()
    resumed = runner(tmp_path / "cut", ToyModel(0.3), **options | {"resume": "auto", "num_workers": 0})
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state == whole.state
    first, second = (checkpoints.optimizer_tensors(one.model, one.train_step.optimizer) for one in (whole, resumed))
    assert same(first, second)
    for split in ("train", "val"):
        found, expected = ([line[::2] for line in log_lines(tmp_path / name, split)] for name in ("cut", "whole"))
        assert found == expected


@pytest.mark.parametrize("cut", ["in the validation", "by SIGTERM at its step"])
def test_a_run_that_ends_around_a_validation_resumes_exactly(tmp_path, cut):
    """The validation is repeated, or made up for."""
    options = {"max_iters": 8, "eval_every": 2, "valid_splits": ["val"], "log_every": 1, "init_lr": 0.5}
    whole = runner(tmp_path / "whole", ToyModel(0.3), **options)
    whole.train()
    part = runner(tmp_path / "cut", ToyModel(0.3), **options)
    if cut == "in the validation":
        score = part.eval_epoch

        def ends(split, step):
            if step == 4:
                raise SystemExit(143)
            return score(split, step)

        part.eval_epoch = ends
    else:
        after_step(part, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        part.train()
    resumed = runner(tmp_path / "cut", ToyModel(0.3), resume="auto", **options)
    assert resumed.folder.resumed.name == ("step_00000002" if cut == "in the validation" else "step_00000004")
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state == whole.state
    for split in ("train", "val"):
        assert log_lines(tmp_path / "cut", split) == log_lines(tmp_path / "whole", split)


def test_a_finished_run_resumes_without_steps_and_a_later_checkpoint_is_refused(tmp_path, caplog):
    runner(tmp_path).train()
    caplog.set_level("INFO")
    again = runner(tmp_path, resume="auto")
    again.train()
    assert again.state.step == 8
    assert "after step 8; 0 steps are left" in caplog.text
    with pytest.raises(CheckpointError, match=r"is of step 8, but this run ends at step 6: raise run.max_iters"):
        runner(tmp_path, max_iters=6, resume="auto").train()


def test_a_full_disk_ends_the_run_with_the_cause_and_the_last_good_checkpoints(tmp_path):
    one = runner(tmp_path, max_iters=9, save_every_steps=1, keep_last=2)
    one.train()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    one.state.step = 10
    try:
        with pytest.raises(TrainingError, match=r"cannot write .*File too large.*older checkpoints are intact"):
            one._save_checkpoint(10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step_00000008", "step_00000009"}


class Words(tuple):
    """A tokenizer with these words."""

    def decode(self, ids):
        return self[ids[0]]


def test_frozen_hashes_ignore_precision_and_notice_changes_of_weights_and_vocabulary():
    model, half = (torch.nn.ModuleDict({"large": torch.nn.Linear(100, 100)}) for _ in range(2))
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    hashes = [checkpoints.frozen_hashes(model, []), checkpoints.frozen_hashes(half, [])]
    assert hashes[0] == hashes[1]
    for place in ((0, 0), (99, 99)):
        with torch.no_grad():
            model["large"].weight[place] += 1
        hashes.append(checkpoints.frozen_hashes(model, []))
    for words in (("a", "b"), ("a", "c")):
        model.llama_tokenizer = Words(words)
        hashes.append(checkpoints.frozen_hashes(model, []))
    assert len({str(found) for found in hashes}) == 5
    assert hashes[-1]["large"] == hashes[-2]["large"]


def test_passes_over_the_data_are_complete_although_the_batch_changes(tmp_path):
    """40 samples: 10 steps of 4 are a pass; after 5 of the 20 steps of two passes, batches of 2 need 30 more."""
    part = runner(tmp_path, max_iters=None, max_epoch=2, save_every_steps=5, keep_last=9)
    after_step(part, 6)
    with pytest.raises(Stop):
        part.train()
    resumed = runner(tmp_path, max_iters=None, max_epoch=2, batch_size_train=2, resume="auto")
    resumed.train()
    assert resumed.state.step == 5 + 30
    assert sum(resumed.train_loader.plan.positions(35).values()) == 80


DAMAGES = {
    "other weights": (MODEL, lambda tensors: tensors.pop("norm.bias"), "does not fit this model: missing: norm.bias"),
    "another optimiser": (
        OPTIMIZER,
        lambda tensors: tensors.update({"norm.bias|exp_avg": torch.ones(3)}),
        r"this run's optimiser: norm.bias\|exp_avg is \[3\], expected \[8\]",
    ),
    "no scaler": (STATE, lambda state: state.pop("scaler"), "scaler is missing"),
    "other data": (STATE, lambda state: state["plan"]["data"]["sizes"].update(sounds=99), "other data: sizes is .*99"),
    "other frozen parts": (STATE, lambda state: state["frozen"].update(frozen="x"), "frozen is x, expected"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("trained")
    runner(folder, max_iters=2).train()
    return folder / "checkpoints" / "step_00000002"


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_refused_leaves_the_run_as_it_was(tmp_path, trained, damage):
    folder = tmp_path / "step_00000002"
    shutil.copytree(trained, folder)
    name, change, message = DAMAGES[damage]
    content = json.loads((trained / name).read_text()) if name == STATE else safetensors.torch.load_file(trained / name)
    change(content)
    if name == STATE:
        (folder / name).write_text(json.dumps(content))
    else:
        safetensors.torch.save_file(content, folder / name)
    one = runner(tmp_path / "out", max_iters=6, resume=str(folder))
    before, progress = copy.deepcopy(one.model.state_dict()), copy.deepcopy(one.state)
    with pytest.raises(CheckpointError, match=message):
        one.train()
    assert same(one.model.state_dict(), before)
    assert (one.state, one.train_step.optimizer.state, one.train_loader.plan.origin[0]) == (progress, {}, 0)
    shutil.copy(trained / name, folder / name)
    one.train()
    assert one.state.step == 6
