"""What a run tells: rates, the log file, TensorBoard events, a bar or lines."""

from __future__ import annotations

import io
import json
import sys
import types

import pytest

from lavis_chatbridge.errors import MissingExtraError
from lavis_chatbridge.runners.progress import Console, LogFile, Meter, TensorBoard, WeightsAndBiases, append_record
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import StepResult


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


def test_a_resumed_log_has_every_step_once(tmp_path):
    path = tmp_path / "log.txt"
    log = LogFile(path)
    append_record(path, {"config": {"run": {"max_step": 9}}})
    for step in (2, 4, 6):
        log.write("train", {"loss": 1.0}, step)
    log.write("val", {"loss": 2.0, "best_step": 6}, 6)
    LogFile(path, step=4).write("train", {"loss": 0.5}, 6)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("train_step") for line in lines] == [None, 2, 4, 6]
    assert lines[-1] == {"train_step": 6, "train_loss": 0.5}


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path, 0)
    board.write("train", {"loss": 1.5, "note": "text"}, 3)
    board.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("train/loss")
    assert (event.step, event.value) == (3, 1.5)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"lavis-chatbridge\[tensorboard\]"):
        TensorBoard(tmp_path, 0)


def test_weights_and_biases_stays_offline_unless_told_otherwise(tmp_path, monkeypatch):
    """By a stand-in for the package: what it is asked for, which is all that decides whether anything is sent."""
    asked, logged = [], []
    stand_in = types.ModuleType("wandb")
    run = types.SimpleNamespace(
        log=lambda numbers, step: logged.append((numbers, step)), finish=lambda: logged.append(0)
    )
    stand_in.init = lambda **words: asked.append(words) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    sink = WeightsAndBiases(RunSettings(task="chatbridge_alignment"), tmp_path / "wandb", {"seed": 1})
    sink.write("train", {"loss": 1.5, "note": "text"}, 3)
    sink.close()
    WeightsAndBiases(RunSettings(task="chatbridge_alignment", wandb_mode="online"), tmp_path / "wandb", {})
    assert [words["mode"] for words in asked] == ["offline", "online"]
    assert (asked[0]["dir"], asked[0]["config"]) == (str(tmp_path / "wandb"), {"seed": 1})
    assert logged == [({"train/loss": 1.5}, 3), 0]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"lavis-chatbridge\[wandb\]"):
        WeightsAndBiases(RunSettings(task="chatbridge_alignment"), tmp_path, {})


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal_and_lines_elsewhere(caplog):
    caplog.set_level("INFO")
    screen = Terminal()
    bar = Console(4, 1, screen)
    bar.advance("pictures", result(1.25, 10))
    bar.write("train", {"loss": 1.25}, 2)
    bar.say("a word")
    bar.close()
    assert "loss 1.2500 lr 1.00e-01 pictures" in screen.getvalue()
    assert "2/4" in screen.getvalue()
    assert not caplog.messages
    lines = Console(4, 1, io.StringIO())
    lines.advance("pictures", result(1.25, 10))
    lines.write("train", {"loss": 1.25, "by_source": {}}, 2)
    assert caplog.messages[0].startswith("train step 2/4 loss 1.25 eta 0:00:0")
