"""Metrics: means and rates, the log file, TensorBoard, Weights & Biases, lines on the console."""

from __future__ import annotations

import sys
import types

import pytest

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.runners import logs
from lavis_chatbridge.runners.checkpoints import TrainState
from lavis_chatbridge.runners.logs import Meter, Reporter
from lavis_chatbridge.runners.step import StepResult
from tests.runners.runner_parts import config, log_of, logged


def result(loss, tokens, outcome="ok"):
    return StepResult(outcome, loss, tokens, samples=4, skipped=1, rate=0.1)


def test_means_are_over_tokens_and_leave_out_what_was_not_finite():
    meter = Meter()
    meter.record("a", result(1.0, 10), waited=0.1)
    meter.record("b", result(4.0, 30), waited=0.1)
    meter.record("a", result(float("nan"), 5, "nonfinite"), waited=0.1)
    stats = meter.summary()
    assert stats["loss"] == pytest.approx((10 + 120) / 40)
    assert (stats["loss_a"], stats["loss_b"], stats["skipped"]) == (1.0, 4.0, 3)
    assert stats["tokens_per_second"] / stats["samples_per_second"] == pytest.approx(45 / 12)
    assert 0 < stats["data_wait_share"] <= 1


def test_a_resumed_log_has_every_step_once_and_no_line_that_was_cut_off(tmp_path):
    path = tmp_path / "log.txt"
    for step in (2, 4, 6):
        logs.write(path, "train", {"loss": 1.0}, step)
    logs.write(path, "val", {"loss": 2.0, "best_step": 4}, 6)
    with open(path, "a") as file:
        file.write('{"train_step": 8, "tr')
    logs.drop_after(path, 4)
    logs.write(path, "train", {"loss": 0.5}, 6)
    assert logged(tmp_path, "train_step") == [2, 4, 6]
    assert log_of(tmp_path)[-1] == {"train_step": 6, "train_loss": 0.5}


def test_a_log_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    def full(path, lines):
        raise OSError(28, "No space left on device")

    with Reporter(config(tmp_path).run, tmp_path, 4, TrainState(step=3)) as reporter:
        with monkeypatch.context() as patched:
            patched.setattr(logs, "append_lines", full)
            reporter.write("train", {"loss": 1.5})
        reporter.write("train", {"loss": 1.4})
    assert caplog.text.count("training continues without it: [Errno 28] No space left on device") == 1


def test_tensorboard_and_the_console(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    caplog.set_level("INFO")
    with Reporter(config(tmp_path, tensorboard=True).run, tmp_path, 4, TrainState(step=3)) as reporter:
        reporter.write("train", {"loss": 1.5, "note": "text"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)
    assert any(line.startswith("train step 3/4 loss 1.5 eta 0:00:0") for line in caplog.messages)


def test_weights_and_biases_is_offline_by_default_and_a_failed_start_is_one_clear_error(tmp_path, monkeypatch):
    """With a stand-in for the package, whose arguments decide whether anything is sent."""
    asked, sent = [], []

    def init(**words):
        asked.append(words)
        if words["mode"] == "online":
            raise RuntimeError("api_key not configured")
        return types.SimpleNamespace(
            log=lambda values, step: sent.append((values, step)), finish=lambda: sent.append(0)
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = config(tmp_path, wandb=True).run
    with Reporter(settings, tmp_path, 4, TrainState(step=3)) as reporter:
        reporter.write("train", {"loss": 1.5, "note": "text"})
    assert (asked[0]["mode"], asked[0]["dir"], asked[0]["config"]["seed"]) == ("offline", str(tmp_path / "wandb"), 42)
    assert sent == [({"train/loss": 1.5}, 3), 0]
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match=r"run\.wandb: W&B cannot start .*api_key not configured.*run\.wandb=false"):
        Reporter(settings, tmp_path, 4, TrainState())
