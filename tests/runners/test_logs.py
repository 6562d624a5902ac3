"""Metrics: means and rates, the log file, TensorBoard, Weights & Biases, lines on the console."""

from __future__ import annotations

import errno
import json
import sys
import types

import pytest

from lavis_chatbridge.errors import ConfigError, MissingExtraError, TrainingError
from lavis_chatbridge.runners.logs import Console, LogFile, Meter, TensorBoard, WeightsAndBiases
from lavis_chatbridge.runners.step import StepResult, TrainState
from tests.runners.runner_parts import config, runner


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
    path.write_text('{"config": {"max_step": 9}}\n')
    for step in (2, 4, 6):
        LogFile(path).write("train", {"loss": 1.0}, step)
    LogFile(path).write("val", {"loss": 2.0, "best_step": 6}, 6)
    with open(path, "a") as file:
        file.write('{"train_step": 8, "tr')
    LogFile(path).drop_after(TrainState(step=4), validated=True)
    LogFile(path).write("train", {"loss": 0.5}, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("train_step") for line in lines] == [None, 2, 4, 6]
    assert lines[-1] == {"train_step": 6, "train_loss": 0.5}


def test_a_log_that_fails_ends_no_training(tmp_path, monkeypatch, caplog):
    one, write = runner(tmp_path, max_iters=6, log_every=1), LogFile.write

    def full(log, split, stats, step):
        if step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(log, split, stats, step)

    monkeypatch.setattr(LogFile, "write", full)
    one.train()
    lines = map(json.loads, (tmp_path / "log.txt").read_text().splitlines())
    assert [line["train_step"] for line in lines if "train_step" in line] == [1, 2]
    assert caplog.text.count("LogFile failed, training continues without it: [Errno 28]") == 1


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "log.txt").mkdir()
    with pytest.raises(TrainingError, match=r"cannot write .*log.txt"):
        runner(tmp_path, max_iters=1).train()


def test_tensorboard_events(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0)
    board.write("train", {"loss": 1.5, "note": "text"}, 3)
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install tensorboard"):
        TensorBoard(tmp_path, 0)


def test_weights_and_biases_stays_offline_by_default(tmp_path, monkeypatch):
    """With a stand-in for the package, whose arguments decide whether anything is sent."""
    asked, logged = [], []
    wandb = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: logged.append(0))
    wandb.init = lambda **words: asked.append(words) or run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = config(tmp_path).run
    sink = WeightsAndBiases(settings, tmp_path / "wandb", {"seed": 1})
    sink.write("train", {"loss": 1.5, "note": "text"}, 3)
    sink.close()
    WeightsAndBiases(config(tmp_path, wandb_mode="online").run, tmp_path / "wandb", {})
    assert [words["mode"] for words in asked] == ["offline", "online"]
    assert (asked[0]["dir"], asked[0]["config"]) == (str(tmp_path / "wandb"), {"seed": 1})
    assert logged == [({"train/loss": 1.5}, 3), 0]
    wandb.init = lambda **words: (_ for _ in ()).throw(RuntimeError("No API key configured"))
    with pytest.raises(
        ConfigError, match=r"No API key configured\): log in \(wandb login\), or set run.wandb_mode=off"
    ):
        WeightsAndBiases(settings, tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"pip install wandb"):
        WeightsAndBiases(settings, tmp_path, {})


def test_a_line_on_the_console(caplog):
    caplog.set_level("INFO")
    Console(4, 1).write("train", {"loss": 1.25, "by_source": {}}, 2)
    assert caplog.messages[0].startswith("train step 2/4 loss 1.25 eta 0:00:0")
