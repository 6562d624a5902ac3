"""A run's folder: it belongs to one run, and one training at a time writes there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.runners import folder as folders
from lavis_chatbridge.runners.folder import WEIGHTS
from tests.runners.runner_parts import YAML, logged, runner, same


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("_")[2]) for path in (folder / "checkpoints").glob("step_*"))


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_second_training_is_refused_unless_it_may_delete_the_first(tmp_path):
    first, alone = tmp_path / "r", tmp_path / "alone"
    runner(first, max_iters=10, save_every_steps=2, valid_splits=["val"], eval_every=5).train()
    (first / "own.txt").write_text("of the user")
    before, options = contents(first), {"max_iters": 6, "save_every_steps": 2, "init_lr": 0.01}
    with pytest.raises(ConfigError, match=r"has step_00000010 of an earlier training: resume it .*run.overwrite=true"):
        runner(first, **options).train()
    assert contents(first) == before
    runner(first, overwrite=True, **options).train()
    runner(alone, **options).train()
    assert same(load_file(first / WEIGHTS), load_file(alone / WEIGHTS))
    assert steps(first) == steps(alone) == [4, 6]
    assert logged(first, "train_step") == [2, 4, 6]
    assert contents(first).keys() == {*contents(alone), "own.txt"}


def test_resuming_elsewhere_keeps_both_runs_and_chooses_the_best_weights_of_its_own(tmp_path):
    options = {"eval_every": 2, "valid_splits": ["val"], "keep_last": 1}
    runner(tmp_path / "a", max_iters=4, **options).train()
    checkpoint = tmp_path / "a" / "checkpoints" / "step_00000004"
    before = contents(tmp_path / "a")
    resumed = runner(tmp_path / "b", resume=str(checkpoint), max_iters=6, **options)
    resumed.train()
    assert steps(tmp_path / "b") == [6]
    assert resumed.state.best_step == 6
    assert contents(tmp_path / "a") == before


def test_resuming_an_earlier_checkpoint_deletes_later_ones_only_if_told_to(tmp_path):
    options = {"max_iters": 8, "save_every_steps": 2, "keep_last": 9}
    runner(tmp_path / "r", **options).train()
    former = load_file(tmp_path / "r" / WEIGHTS)
    (tmp_path / "earlier").symlink_to(tmp_path / "r" / "checkpoints" / "step_00000004")
    with pytest.raises(ConfigError, match=r"has step_00000008 of an earlier training"):
        runner(tmp_path / "r", resume=str(tmp_path / "earlier"), **options).train()
    more = {"overwrite": True, "init_lr": 0.01, "max_iters": 6}
    runner(tmp_path / "r", resume=str(tmp_path / "earlier"), **options | more).train()
    assert steps(tmp_path / "r") == [4, 6]
    assert not same(load_file(tmp_path / "r" / WEIGHTS), former)


def test_auto_resumes_the_run_of_its_own_name_also_below_a_symbolic_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name, length in (("slow", 2), ("fast", 2), ("slow", 3)):
        runner(tmp_path / "link", job_id=name, max_iters=length, resume="auto").train()
    assert (steps(tmp_path / "real/slow"), steps(tmp_path / "real/fast")) == ([2, 3], [2])
    assert runner(tmp_path, job_id="new", max_iters=3, resume="auto").folder.resumed is None
    with pytest.raises(ConfigError, match="slow is not a checkpoint"):
        runner(tmp_path / "real", job_id="slow", max_iters=4, resume=str(tmp_path / "real/slow")).train()


LOCKS = """
import pathlib, sys, time
from lavis_chatbridge.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(600)
"""


def test_two_trainings_do_not_share_a_folder_and_a_killed_one_frees_it(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_WAIT", 0.1)
    with subprocess.Popen([sys.executable, "-c", LOCKS, tmp_path / "training"], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(DataError, match=f"another process uses {tmp_path} .it holds"):
            runner(tmp_path, max_iters=1, resume="auto").train()
        assert not (tmp_path / "checkpoints").exists()
        runner(tmp_path, evaluate=True, test_splits=["val"]).train()  # which writes other files
        other.kill()
    runner(tmp_path, max_iters=1, resume="auto").train()
    assert steps(tmp_path) == [1]


def test_an_output_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.output_dir: cannot write to"):
        runner(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"error: \S+/out has step_00000003 of an earlier training"),
        (["run.test_splits=[test,tset]"], r"no data set has the split 'tset' of run\..*; there are .*heldout"),
    ],
)
def test_what_cannot_be_trained_is_named_before_anything_is_loaded(tmp_path, capsys, options, message):
    (tmp_path / "out" / "checkpoints" / "step_00000003").mkdir(parents=True)
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(world=tmp_path / "world", output=tmp_path / "out", task="chatbridge_alignment"))
    assert cli.main(["train", "--cfg-path", str(path), "--options", "run.device=cpu", *options]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "world").exists()  # it is built before anything is loaded
