"""The training loop: what it learns, logs and saves, what it survives and what it stops at."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from lavis_chatbridge.errors import ConfigError, TrainingError
from lavis_chatbridge.runners.checkpoints import step_of
from tests.runners import runner_parts
from tests.runners.runner_parts import ToyModel, ToySource, after_step, log_of, logged, pictures, runner, same, weights


def test_the_loss_falls_and_the_log_is_lavis_own(tmp_path):
    runner(tmp_path, max_iters=60, log_every=10, valid_splits=["val"]).train()
    lines = log_of(tmp_path)
    train = [line for line in lines if "train_loss" in line]
    assert [line["train_step"] for line in train] == [10, 20, 30, 40, 50, 60]
    assert train[-1]["train_loss"] < 0.9 * train[0]["train_loss"]
    assert {"train_lr", "train_samples_per_second", "train_tokens_per_second", "train_data_wait_share"} <= set(train[0])
    assert {"train_loss_pictures", "train_loss_sounds"} <= {key for line in train for key in line}
    (val,) = [line for line in lines if "val_agg_metrics" in line]
    assert val["val_agg_metrics"] == -val["val_loss"]
    assert (tmp_path / "model.safetensors").is_file()


def test_frozen_weights_and_unused_queries_do_not_move(tmp_path):
    before = {name: tensor.clone() for name, tensor in ToyModel().state_dict().items()}
    one = runner(tmp_path, data=pictures(), weight_decay=0.5, decay_all=True)
    one.train()
    still = {name for name, tensor in one.model.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if name.startswith(("frozen", "words", "audio_query"))}


def test_parts_that_cannot_be_trained_are_named(tmp_path):
    for names, fault in ((["audio"], "found audio"), ([], "found none")):
        with pytest.raises(ConfigError, match=f"run.train: expected some of images, sounds, bridge, {fault}"):
            runner(tmp_path, train=names)
    with pytest.raises(ConfigError, match="no trainable parameters"):
        runner(tmp_path, ToyModel().requires_grad_(False), max_iters=2).train()


def test_a_few_unreadable_samples_are_counted_at_the_end(tmp_path, caplog):
    runner(tmp_path, data=pictures(12, bad=tuple(range(6))), max_epoch=1, max_iters=None, batch_size_train=4).train()
    assert caplog.messages.count("6 samples could not be read (check-data --decode lists them)") == 1


@pytest.mark.parametrize("fault", ["bad", "poison"])
def test_a_run_that_trains_nothing_writes_no_weights(tmp_path, fault):
    with pytest.raises(TrainingError, match="nothing was trained"):
        runner(tmp_path, data=pictures(5, **{fault: tuple(range(5))}), max_iters=2).train()
    assert not (tmp_path / "model.safetensors").exists()


def test_a_non_finite_loss_skips_its_step_and_names_its_samples_and_too_many_stop_the_run(tmp_path, caplog):
    one = runner(tmp_path / "one", data=pictures(poison=(5,)), max_iters=3)
    caplog.set_level("INFO")
    one.train()
    assert one.state.nonfinite_steps == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(one).values())
    (line,) = [line for line in caplog.messages if "not finite" in line]
    assert "pictures-5" in line
    one = runner(tmp_path / "all", data=pictures(poison=tuple(range(12))), max_iters=9, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="3 steps had a non-finite loss"):
        one.train()
    assert one.state.step == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_fp32_weights(tmp_path, precision):
    one = runner(tmp_path, ToyModel().half(), precision=precision, max_iters=40, log_every=20)
    one.train()
    first, last = logged(tmp_path, "train_loss")
    assert last < first
    assert {tensor.dtype for tensor in weights(one).values()} == {torch.float32}
    assert one.train_step.scaler.is_enabled() == (precision == "fp16")


def test_an_fp16_overflow_lowers_the_scale_and_is_no_fault(tmp_path):
    one = runner(tmp_path, precision="fp16", max_iters=6)
    one.train_step.scaler._init_scale = 2.0**40
    one.train()
    assert one.state.nonfinite_steps == 0
    assert one.train_step.scaler.get_scale() < 2.0**40


def test_a_validation_changes_nothing_that_training_draws(tmp_path):
    for name, more in (("plain", {}), ("validated", {"eval_every": 1, "valid_splits": ["val"]})):
        runner(tmp_path / name, ToyModel(0.5), max_iters=6, **more).train()
    last = [load_file(tmp_path / n / "checkpoints/step_00000006/model.safetensors") for n in ("plain", "validated")]
    assert same(*last)


def test_best_weights_are_kept_although_every_metric_is_negative(tmp_path):
    one = runner(tmp_path, max_iters=8, eval_every=2, valid_splits=["val"], test_splits=["val"], init_lr=0.5)
    one.train()
    scores = {line["val_step"]: line["val_agg_metrics"] for line in log_of(tmp_path) if "val_best_step" in line}
    assert one.state.best_metric == max(scores.values()) < 0
    assert scores[one.state.best_step] == one.state.best_metric
    (tested,) = [line for line in log_of(tmp_path) if "val_agg_metrics" in line and "val_best_step" not in line]
    assert tested["val_agg_metrics"] == pytest.approx(one.state.best_metric)
    assert step_of(tmp_path / "model.safetensors") == one.state.best_step


class LavisData:
    """A data set in LAVIS's form: it has no sources and no ids."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return ToySource("pictures", "image", 10).item(index)

    def collater(self, items):
        return {key: [item[key] for item in items] for key in ("image", "audio", "target")}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_of_lavis_trains_and_resumes_exactly(tmp_path, workers):
    options = {"data": {"lavis": {"train": LavisData()}}, "num_workers": workers, "accum_grad_iters": 2}
    whole = runner(tmp_path / "whole", save_every_steps=4, keep_last=9, **options)
    whole.train()
    resumed = runner(tmp_path / "b", resume=str(tmp_path / "whole/checkpoints/step_00000004"), **options)
    resumed.train()
    assert same(weights(whole), weights(resumed))
    assert resumed.state.counts["lavis"].samples == 64
    with pytest.raises(ConfigError, match="cannot mix LAVIS's data sets with this package's"):
        runner(tmp_path / "c", data=pictures() | options["data"]).train()


def test_a_killed_worker_is_named_and_the_last_checkpoint_resumes(tmp_path):
    """torch raises its error at any line of the main process, not only where it waits for data."""
    one = runner(tmp_path, max_iters=8, num_workers=1, save_every_steps=2)

    def kill():
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)
        time.sleep(120)  # which the error interrupts

    after_step(one, 5, kill)
    with pytest.raises(TrainingError, match=r"a data worker died: .*killed by signal.*run\.num_workers.*run\.resume"):
        one.train()
    assert runner(tmp_path, resume="auto").folder.resumed == tmp_path / "checkpoints" / "step_00000004"


def test_an_interrupt_says_how_to_resume(tmp_path, caplog):
    caplog.set_level("INFO")
    one = runner(tmp_path, max_iters=6, save_every_steps=2)
    after_step(one, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert "interrupted after step 3; resume from step_00000002 with run.resume=auto" in caplog.text


def test_a_training_in_a_thread_warns_about_sigterm(tmp_path, caplog):
    one = runner(tmp_path, max_iters=2)
    thread = threading.Thread(target=one.train)
    thread.start()
    thread.join(60)
    assert one.state.step == 2
    assert "outside the main thread: SIGTERM does not save" in caplog.text


def _end_of_time(folder):
    """A training whose process group is signalled, workers included, as Slurm does it."""
    os.setpgid(0, 0)
    one = runner(folder, num_workers=2, max_iters=500)
    after_step(one, 5, lambda: os.killpg(0, signal.SIGTERM))
    one.train()


def test_sigterm_saves_a_checkpoint_although_workers_receive_it_too(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=_end_of_time, args=(tmp_path,))
    with runner_parts.preloaded():
        process.start()
    process.join(300)
    process.kill()
    assert process.exitcode == 143
    assert runner(tmp_path, max_iters=500, resume="auto").folder.resumed == tmp_path / "checkpoints" / "step_00000006"
