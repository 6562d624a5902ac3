"""A run's folder: it has one of its own, nothing of two trainings is mixed, and one training at a time writes there."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.plugin import launch, train
from lavis_chatbridge.runners import distributed, folder
from lavis_chatbridge.runners.folder import EARLIER, LOCK, WEIGHTS, RunFolder, new_job_id
from tests.runners.runner_parts import in_processes, runner

YAML = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets: {{chatbridge_world_caption: {{data_root: {folder}/world}}}}
run: {{task: chatbridge_alignment, max_iters: 2, output_dir: {folder}/out}}
"""


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in (folder / "checkpoints").glob("step_*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("left", ["all", "weights"])
def test_a_second_training_is_refused_and_changes_nothing(tmp_path, left):
    runner(tmp_path, max_iters=2).train()
    if left == "weights":
        shutil.rmtree(tmp_path / "checkpoints")  # to save space, say
    before = contents(tmp_path)
    found = "checkpoints up to step 2" if left == "all" else "trained weights, model.safetensors"
    remedies = f"run.resume=auto), set another run.output_dir, or run.anew=true (moves it to {tmp_path / EARLIER})"
    with pytest.raises(ConfigError) as caught:
        runner(tmp_path, max_iters=2, init_lr=0.5).train()
    assert str(caught.value) == f"{tmp_path} holds {found} of an earlier training: go on with it ({remedies}"
    assert contents(tmp_path) == before


def test_anew_keeps_the_earlier_training_apart(tmp_path):
    first, alone = tmp_path / "r", tmp_path / "alone"
    runner(first, max_iters=10, save_every_steps=2, valid_splits=["val"], eval_every=5).train()
    (first / "own.txt").write_text("of the user")
    before = contents(first)
    options = {"max_iters": 6, "save_every_steps": 2, "init_lr": 0.01}
    runner(first, anew=True, **options).train()
    runner(alone, **options).train()
    assert same(final(first), final(alone))
    assert steps(first) == steps(alone) == [4, 6]
    assert not list((first / "checkpoints").glob("best_*"))
    log = [json.loads(line) for line in (first / "log.txt").read_text().splitlines()]
    assert [line["train_step"] for line in log if "train_step" in line] == [2, 4, 6]
    moved = contents(first / EARLIER / "1")
    assert moved == {name: content for name, content in before.items() if name != "own.txt"}
    resumed = runner(first, resume="auto", **options | {"max_iters": 8})
    assert resumed.continued == first / "checkpoints" / "step_00000006"
    runner(first, anew=True, max_iters=1).train()
    assert sorted(path.name for path in (first / EARLIER).iterdir()) == ["1", "2"]


def test_anew_in_a_new_folder_moves_nothing(tmp_path):
    runner(tmp_path, anew=True, max_iters=1).train()
    assert not (tmp_path / EARLIER).exists()


def test_auto_does_not_start_anew_over_another_configurations_run(tmp_path):
    runner(tmp_path, seed=7, max_iters=1).train()
    before = contents(tmp_path)
    message = r"no sound checkpoint of this .* seed, but checkpoints up to step 1 .*run.anew=true in the place of"
    with pytest.raises(ConfigError, match=message):
        runner(tmp_path, resume="auto", max_iters=1).train()
    assert contents(tmp_path) == before


def test_a_checkpoint_of_another_folder_does_not_go_on_over_a_run(tmp_path):
    for name in ("a", "b"):
        runner(tmp_path / name, max_iters=2).train()
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000002"
    with pytest.raises(ConfigError, match="holds checkpoints up to step 2 of an earlier training"):
        runner(tmp_path / "b", resume=str(checkpoint), max_iters=3).train()
    went_on = runner(tmp_path / "c", resume=str(checkpoint), max_iters=3)
    went_on.train()
    assert steps(tmp_path / "c") == [3]


def test_going_back_keeps_later_checkpoints_apart(tmp_path):
    """Another learning rate from step 4 on: the checkpoints of steps 6 and 8 are of the former course."""
    options = {"max_iters": 8, "save_every_steps": 2, "keep_last": 9}
    runner(tmp_path, **options).train()
    former = final(tmp_path)
    runner(tmp_path, resume=str(tmp_path / "checkpoints" / "step_00000004"), init_lr=0.01, **options).train()
    assert steps(tmp_path) == [2, 4, 6, 8]
    assert steps(tmp_path / EARLIER / "1") == [6, 8]
    assert not same(final(tmp_path), former)
    assert same(final(tmp_path), load_file(tmp_path / "checkpoints" / "step_00000008" / "model.safetensors"))


def test_a_run_does_not_go_on_from_beyond_its_end(tmp_path, caplog):
    runner(tmp_path, max_iters=8).train()
    with pytest.raises(CheckpointError, match=r"is of step 8, but this run ends at step 6: raise run.max_iters"):
        runner(tmp_path, max_iters=6, resume="auto").train()
    caplog.set_level("INFO")
    runner(tmp_path, max_iters=8, resume="auto").train()
    assert "after step 8 of 8: there is nothing left to train" in caplog.text


def test_best_weights_come_from_this_run_alone(tmp_path):
    """Those beside the checkpoint where it goes on elsewhere; the last ones, with a warning, where they are gone."""
    options = {"max_iters": 4, "eval_every": 2, "valid_splits": ["val"], "keep_last": 1}
    one = runner(tmp_path / "a", **options)
    one.train()
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000004"
    one.state.best_metric, one.state.best_step = 1e9, 2  # which no later validation beats
    one.checkpoints.save_best(one._checkpoint([], [], True), 2)
    one.checkpoints.add_validation(4, one.state.validation())
    other = runner(tmp_path / "b", resume=str(checkpoint), **options | {"max_iters": 6})
    other.train()
    assert (other.state.best_step, other._best_weights()) == (2, tmp_path / "a" / "checkpoints" / "best_00000002")
    assert same(final(tmp_path / "b"), final(tmp_path / "a"))
    other.state.best_step = 3
    assert other._best_weights() is None


HOLD = """
import fcntl, json, os, sys
handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(handle, fcntl.LOCK_EX)
os.write(handle, json.dumps({"host": sys.argv[2], "process": os.getpid(), "since": "2026-01-02 03:04"}).encode())
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(folder: Path, host: str) -> Iterator[subprocess.Popen]:
    """Another process that has the lock of a folder."""
    command = [sys.executable, "-c", HOLD, str(folder / LOCK), host]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_two_trainings_do_not_share_a_folder_and_a_killed_one_leaves_no_lock(tmp_path):
    host = socket.gethostname()
    with held(tmp_path, host) as holder:
        message = rf"another training \(process {holder.pid} on {re.escape(host)}, since 2026-01-02 03:04\) writes into"
        with pytest.raises(ConfigError, match=message):
            runner(tmp_path, max_iters=1).train()
        with pytest.raises(ConfigError, match=message):
            runner(tmp_path, max_iters=1, resume="auto").train()
        assert not (tmp_path / "checkpoints").exists()
        runner(tmp_path, evaluate=True, test_splits=["val"]).train()  # which writes other files
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).exists()
    runner(tmp_path, max_iters=1, resume="auto").train()
    assert steps(tmp_path) == [1]
    assert not (tmp_path / LOCK).exists()


def test_the_lock_of_a_machine_that_vanished_is_waited_for(tmp_path, monkeypatch, caplog):
    """A file server gives it back after a while; only then, or when it does not, is there an answer."""
    caplog.set_level("INFO")
    with held(tmp_path, "gpu3") as holder:
        with monkeypatch.context() as patch:
            patch.setattr(folder, "PATIENCE", 0.0)
            with pytest.raises(ConfigError, match=rf"another training \(process {holder.pid} on gpu3, since"):
                runner(tmp_path, max_iters=1).train()
        waited = []

        def pause(seconds):
            waited.append(seconds)
            holder.kill()
            holder.wait()

        monkeypatch.setattr(folder, "sleep", pause)
        runner(tmp_path, max_iters=1).train()
    assert (len(waited), steps(tmp_path)) == (1, [1])
    assert f"waiting for the lock of {tmp_path}, which gpu3 has" in caplog.text


def test_a_claim_within_a_claim_keeps_the_lock(tmp_path):
    one = RunFolder(tmp_path)
    with one.claimed():
        with one.claimed():
            assert json.loads((tmp_path / LOCK).read_text())["process"] > 0
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def _refused_on_a_rank(rank, folder):
    try:
        runner(folder, max_iters=2).train()
    except ConfigError as error:
        (folder / f"refused{rank}").write_text(str(error))
    runner(folder, max_iters=1, anew=True).train()
    distributed.close()


def test_all_processes_refuse_alike(tmp_path):
    runner(tmp_path, max_iters=2).train()
    in_processes(_refused_on_a_rank, 2, tmp_path)
    first, second = ((tmp_path / f"refused{rank}").read_text() for rank in (0, 1))
    assert first == second
    assert "holds checkpoints up to step 2" in first
    assert (steps(tmp_path), steps(tmp_path / EARLIER / "1")) == ([1], [2])


def command(tmp_path: Path, *options: str) -> int:
    """The status of ``lavis.train`` for a configuration of the embedded world."""
    (tmp_path / "run.yaml").write_text(YAML.format(folder=tmp_path))
    return train.main(["--cfg-path", str(tmp_path / "run.yaml"), "--options", "run.device=cpu", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["run.job_id=''"], r"error: \S+/out holds checkpoints up to step 3 of an earlier training"),
        (["run.test_splits=[test,tset]"], r"run.test_splits: no data set has the split 'tset'; there are .*heldout"),
        (["run.valid_splits=[vla]"], "run.valid_splits: no data set has the split 'vla'"),
        (["run.train_splits=[train,trian]"], "run.train_splits: no data set has the split 'trian'"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is_loaded(tmp_path, capsys, options, message):
    (tmp_path / "out" / "checkpoints" / "step_00000003").mkdir(parents=True)
    assert command(tmp_path, *options) == launch.USER_ERROR
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "world").exists()  # which is built before anything is loaded


def test_each_run_without_a_name_has_a_folder_of_its_own(tmp_path, monkeypatch):
    chosen = []

    def build(_session, cfg, _runner_class, job_id, _evaluate):
        chosen.append((cfg.folder.path, job_id, (cfg.folder.path / LOCK).exists()))
        return SimpleNamespace(train=lambda: None)

    monkeypatch.setattr(launch.Session, "_runner", build)
    for options in ([], [], ["run.job_id=12_3"]):
        assert command(tmp_path, *options) == 0
    (first, name, locked), (second, other, _), (named, _, _) = chosen
    assert locked
    assert name != other
    assert (first, second) == (tmp_path / "out" / name, tmp_path / "out" / other)
    assert re.fullmatch(r"\d{8}_\d{6}_[0-9a-f]{6}", name)  # the time to the second
    assert named == tmp_path / "out" / "12_3"
    assert len({new_job_id() for _ in range(50)}) == 50


def test_splits_of_data_sets_that_were_built_elsewhere_are_looked_for_before_the_first_step(tmp_path):
    one = runner(tmp_path, train_splits=["train", "trian"], test_splits=["tset"], max_iters=1)
    message = r"train_splits: no data set has the split 'trian'; there are train, val; run.test_splits: .*'tset'"
    with pytest.raises(ConfigError, match=message):
        one.train()
    assert not (tmp_path / "checkpoints").exists()
