"""What goes wrong beside the steps: logs, the last file, SIGUSR1 where nothing can be saved, numbers without an end."""

from __future__ import annotations

import errno
import json
import math
import signal
import sys
import types

import pytest
import torch

from lavis_chatbridge.errors import ConfigError, TrainingError
from lavis_chatbridge.runners import chatbridge_runner, distributed
from lavis_chatbridge.runners.progress import LogFile, Reporter, WeightsAndBiases, append_record, append_stats
from lavis_chatbridge.runners.settings import RunSettings, parse_run
from tests.runners import world_runs
from tests.runners.runner_parts import in_processes, runner


def full(*_arguments, **_more):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_log_that_takes_no_numbers_ends_no_training(tmp_path, monkeypatch, caplog):
    one = runner(tmp_path, max_iters=6, log_every=1)
    real = LogFile.write
    monkeypatch.setattr(LogFile, "write", lambda log, *rest: full() if rest[-1] in (2, 3) else real(log, *rest))
    one.train()
    lines = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert [line["train_step"] for line in lines if "train_step" in line] == [1, 4, 5, 6]
    assert caplog.text.count("LogFile does not take numbers, training goes on: [Errno 28]") == 1


def test_a_log_that_cannot_be_begun_is_named(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*log.txt"):
        Reporter(RunSettings(task="chatbridge_alignment"), tmp_path, 4, 0, {}, active=True)


def test_lines_that_were_cut_off_spoil_no_others(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text('{"train_step": 2, "train_loss": 1.0}\n{"train_step": 4, "trai')
    LogFile(path, 2).write("train", {"loss": 2.0}, 4)
    assert [json.loads(line)["train_step"] for line in path.read_text().splitlines()] == [2, 4]
    path.write_text('{"train_step": 2}\n{"tr')
    append_stats(path, "test", {}, 2)
    append_record(path, {"more": 1})
    assert path.read_text() == '{"train_step": 2}\n{"tr\n{"test_step": 2}\n{"more": 1}\n'


def test_weights_and_biases_that_does_not_begin_is_named(tmp_path, monkeypatch):
    stand_in = types.ModuleType("wandb")
    stand_in.init = lambda **_words: (_ for _ in ()).throw(RuntimeError("No API key configured"))
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(
        ConfigError, match=r"No API key configured\): log in \(wandb login\), or set run.wandb_mode=off"
    ):
        WeightsAndBiases(RunSettings(task="chatbridge_alignment", wandb_mode="online"), tmp_path, {})


def _no_place_for_weights(rank, folder):
    one = runner(folder, max_iters=2, test_splits=["val"])
    chatbridge_runner.save_file = full
    with pytest.raises(TrainingError, match=r"cannot write .*model.safetensors: the disk is full \(free some space"):
        one.train()
    (folder / f"told{rank}").touch()
    distributed.close()


def test_weights_that_cannot_be_written_are_named_on_all_processes(tmp_path):
    in_processes(_no_place_for_weights, 2, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("told*")) == ["told0", "told1"]
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()


def test_sigusr1_ends_no_evaluation(tmp_path):
    one = runner(tmp_path, max_iters=2, test_splits=["val"])
    before, seen = signal.signal(signal.SIGUSR1, signal.SIG_DFL), []
    score = one.eval_epoch

    def signalled(*arguments, **more):
        seen.append(signal.getsignal(signal.SIGUSR1))
        return score(*arguments, **more)

    one.eval_epoch = signalled
    try:
        one.train()
        assert [callable(handler) for handler in seen] == [True]
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("key", ["init_lr", "weight_decay", "clip_grad_norm", "save_every_minutes", "timeout_minutes"])
def test_numbers_without_an_end_are_refused(key):
    values = {"task": "chatbridge_alignment", "max_iters": 4}
    with pytest.raises(ConfigError, match=f"{key} must be a finite number, found inf"):
        parse_run(values | {key: math.inf})


@pytest.mark.parametrize("ratio", [0, -1.0, math.inf])
def test_shares_of_the_steps_are_positive(ratio):
    values = {"task": "chatbridge_alignment", "max_iters": 4, "train_dataset_ratios": {"a": 1.0, "b": ratio}}
    with pytest.raises(ConfigError, match=rf"train_dataset_ratios.b must be positive, found {float(ratio)}: leave"):
        parse_run(values)


def test_a_timeout_that_no_clock_holds_is_refused():
    with pytest.raises(ConfigError, match=r"timeout_minutes is at most 525600 \(a year\), found 1e\+18"):
        parse_run({"task": "chatbridge_alignment", "max_iters": 4, "timeout_minutes": 1e18})


def test_the_checkpoint_to_go_on_from_may_lie_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "step_00000002").mkdir()
    run = parse_run({"task": "chatbridge_alignment", "max_iters": 4, "resume": "~/step_00000002"})
    assert run.resume == "~/step_00000002"


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_a_missing_extra_is_told_before_anything_is_loaded(tmp_path, monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigError, match=rf"run.{extra} .*lavis-chatbridge\[{extra}\]"):
        world_runs.configured(tmp_path, tmp_path / "world", f"run.{extra}=true")


def test_a_device_without_memory_left_is_named_with_remedies(tmp_path):
    one = runner(tmp_path, max_iters=4, save_every_steps=1)
    loss = one._loss

    def large(model, samples):
        if one.state.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss(model, samples)

    one._loss = large
    with pytest.raises(TrainingError, match=r"lower run.batch_size_train .*resume=auto; CUDA out of memory. Tried"):
        one.train()
    assert (tmp_path / "checkpoints" / "step_00000002").is_dir()
