"""The training loop: one process and two agree, accumulation changes nothing, odd steps are survived."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import fsdp

from lavis_chatbridge.errors import ConfigError, DataError, TrainingError
from lavis_chatbridge.runners import distributed, parallel, step
from tests.runners.runner_parts import ToyGroup, ToyModel, ToySource, in_processes, runner, toy_data, weights


def train_losses(folder):
    lines = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def test_the_loss_falls_and_the_log_is_lavis_own(tmp_path):
    one = runner(tmp_path, max_iters=60, log_every=10, valid_splits=["val"])
    one.train()
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    train = [line for line in lines if "train_loss" in line]
    assert [line["train_step"] for line in train] == [10, 20, 30, 40, 50, 60]
    assert train[-1]["train_loss"] < 0.9 * train[0]["train_loss"]
    assert {"train_lr", "train_samples_per_second", "train_tokens_per_second", "train_data_wait_share"} <= set(train[0])
    assert {"train_loss_pictures", "train_loss_sounds"} <= {key for line in train for key in line}
    (val,) = [line for line in lines if "val_agg_metrics" in line]
    assert val["val_agg_metrics"] == -val["val_loss"]
    assert lines[0]["config"]["run"]["max_iters"] == 60
    assert (tmp_path / "model.safetensors").is_file()


def test_frozen_weights_do_not_move_and_trained_ones_do(tmp_path):
    before = {name: tensor.clone() for name, tensor in ToyModel().state_dict().items()}
    one = runner(tmp_path)
    one.train()
    for name, tensor in one.model.state_dict().items():
        frozen = name.startswith(("frozen", "words"))
        assert torch.equal(tensor, before[name]) == frozen, name


def test_a_query_that_no_step_used_stays_untouched(tmp_path):
    one = runner(tmp_path, data={"pictures": toy_data()["pictures"]}, weight_decay=0.5, decay_all=True)
    one.train()
    assert torch.equal(one.model.audio_query, ToyModel().audio_query)
    assert not torch.equal(one.model.image_query, ToyModel().image_query)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_micro_batches_are_one_batch(tmp_path, clip):
    """Their targets differ in length, so a mean of means would not do."""
    whole = runner(tmp_path / "a", batch_size_train=8, clip_grad_norm=clip)
    parts = runner(tmp_path / "b", batch_size_train=4, accum_grad_iters=2, clip_grad_norm=clip)
    whole.train()
    parts.train()
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(parts)[name], tensor, rtol=0, atol=1e-5)
    assert train_losses(tmp_path / "b") == pytest.approx(train_losses(tmp_path / "a"), abs=1e-5)


def _train_on_two(rank, folder, options):
    one = runner(folder, **options)
    one.train()
    torch.save(weights(one), folder / f"weights{rank}.pt")
    distributed.close()


@pytest.mark.parametrize("more", [{}, {"parallel": "fsdp"}], ids=["ddp", "fsdp"])
def test_two_processes_are_one_with_twice_the_batch(tmp_path, more):
    options = {"max_iters": 10, "valid_splits": ["val"], "log_every": 1}
    single = runner(tmp_path / "one", batch_size_train=8, **options)
    single.train()
    (tmp_path / "two").mkdir()
    in_processes(_train_on_two, 2, tmp_path / "two", options | {"batch_size_train": 4} | more)
    first, second = (torch.load(tmp_path / "two" / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in weights(single).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    assert train_losses(tmp_path / "two") == pytest.approx(train_losses(tmp_path / "one"), abs=1e-4)
    logs = [(tmp_path / name / "log.txt").read_text().splitlines() for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1])
    val = [[json.loads(line)["val_loss"] for line in log if "val_loss" in line] for log in logs]
    assert val[0] == pytest.approx(val[1], abs=1e-5)


def _train_with_bad_media(rank, folder):
    data = {"pictures": {"train": ToyGroup([ToySource("pictures", "image", 40, bad=tuple(range(0, 40, 2)))])}}
    one = runner(folder, data=data, max_iters=12, batch_size_train=1, max_bad_share=1.0)
    one.train()
    torch.save([weights(one), one.state.to_dict()], folder / f"state{rank}.pt")
    distributed.close()


def test_processes_stay_together_when_one_has_nothing_to_read(tmp_path):
    in_processes(_train_with_bad_media, 2, tmp_path)
    (first, state), (second, other) = (torch.load(tmp_path / f"state{rank}.pt", weights_only=True) for rank in (0, 1))
    assert state == other
    assert state["sources"]["pictures"]["skipped"] + state["sources"]["pictures"]["samples"] == 24
    assert state["sources"]["pictures"]["skipped"] > 0
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_too_many_unreadable_samples_stop_the_run(tmp_path):
    one = runner(tmp_path, data=toy_data(bad=tuple(range(10))), max_iters=30)
    with pytest.raises(DataError, match=r"pictures: .* samples could not be read"):
        one.train()


def _pictures(**more):
    return {"pictures": {"train": ToyGroup([ToySource("pictures", "image", 5, **more)])}}


def test_a_training_that_could_read_nothing_fails(tmp_path):
    """Also where it is too short to judge by its share of unreadable samples, and when it is resumed."""
    for more in ({}, {"resume": "auto"}):
        one = runner(tmp_path, data=_pictures(bad=tuple(range(5))), max_iters=3, batch_size_train=2, **more)
        with pytest.raises(DataError, match=r"nothing was trained on: none of 6 samples could be read\. Mend them"):
            one.train()
    assert not (tmp_path / "model.safetensors").exists()
    one = runner(tmp_path / "one", data=_pictures(bad=(1, 2, 3, 4)), max_iters=3, batch_size_train=2)
    one.train()
    assert one.state.sources["pictures"].samples == 1


def test_a_training_whose_steps_were_all_not_finite_fails(tmp_path):
    one = runner(tmp_path, data=_pictures(poison=tuple(range(5))), max_iters=3, batch_size_train=2)
    with pytest.raises(TrainingError, match="nothing was trained: none of 3 steps had a finite loss"):
        one.train()
    assert not (tmp_path / "model.safetensors").exists()


def test_fsdp_with_one_process_says_that_nothing_is_spread(tmp_path, caplog):
    runner(tmp_path, parallel="fsdp", max_iters=1).train()
    assert caplog.text.count("run.parallel is fsdp, but this is the only process") == 1


def test_fsdp_of_an_older_torch_is_refused(monkeypatch):
    monkeypatch.delattr(fsdp.FSDPModule, "set_reshard_after_forward", raising=False)
    with pytest.raises(ConfigError, match=r"run.parallel fsdp needs torch 2.8 or newer, found .*: use ddp"):
        parallel._shard(torch.nn.Linear(2, 2), torch.device("cpu"))


def test_a_non_finite_loss_skips_its_step_and_names_its_samples(tmp_path, caplog):
    data = {"pictures": {"train": ToyGroup([ToySource("pictures", "image", 12, poison=(5,))])}}
    one = runner(tmp_path, data=data, max_iters=3, batch_size_train=4)
    caplog.set_level("INFO")
    one.train()
    assert one.state.nonfinite_steps == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(one).values())
    (line,) = [line for line in caplog.messages if "not finite" in line]
    assert "pictures-5" in line


def test_too_many_non_finite_steps_stop_the_run(tmp_path):
    data = {"pictures": {"train": ToyGroup([ToySource("pictures", "image", 12, poison=tuple(range(12)))])}}
    one = runner(tmp_path, data=data, max_iters=9, max_nonfinite_steps=3)
    with pytest.raises(TrainingError, match="3 steps had a non-finite loss"):
        one.train()
    assert one.state.step == 3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_fp32_weights(tmp_path, precision):
    one = runner(tmp_path, precision=precision, max_iters=40, log_every=20)
    one.train()
    first, last = train_losses(tmp_path)
    assert last < first
    assert {tensor.dtype for tensor in weights(one).values()} == {torch.float32}
    assert one.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize(("slow", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_a_processor_that_is_slow_in_bf16_computes_in_fp32(monkeypatch, slow, dtype):
    monkeypatch.setattr(step, "slow_on_cpu", lambda dtype: slow)
    layer = torch.nn.Linear(2, 2)
    with step.autocast("bf16", torch.device("cpu")):
        assert layer(torch.ones(1, 2)).dtype == dtype
    with step.autocast("fp32", torch.device("cpu")):
        assert layer(torch.ones(1, 2)).dtype == torch.float32


def test_an_fp16_overflow_lowers_the_scale_and_is_no_fault(tmp_path):
    one = runner(tmp_path, precision="fp16", max_iters=6)
    one.scaler._init_scale = 2.0**40
    one.train()
    assert one.state.nonfinite_steps == 0
    assert one.scaler.get_scale() < 2.0**40


def test_half_precision_trained_weights_are_raised(tmp_path):
    one = runner(tmp_path, model=ToyModel().half())
    assert {p.dtype for p in one.model.parameters() if p.requires_grad} == {torch.float32}


def test_dropout_depends_on_the_step_only(tmp_path):
    """An evaluation between two steps draws nothing from what training draws."""
    for name, more in (("plain", {}), ("validated", {"eval_every": 1, "valid_splits": ["val"]})):
        runner(tmp_path / name, ToyModel(0.5), max_iters=6, **more).train()
    last = [load_file(tmp_path / n / "checkpoints/step_00000006/model.safetensors") for n in ("plain", "validated")]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(tensor, last[1][name]) for name, tensor in last[0].items())


def test_a_validation_draws_nothing_from_what_training_draws(tmp_path):
    left = []
    for valid in ([], ["val"]):
        one = runner(tmp_path / str(len(left)), max_iters=2, eval_every=1, valid_splits=valid)
        random.seed(1)
        np.random.seed(1)

        def draws(*_arguments):
            return {"agg_metrics": random.random() + np.random.rand() + torch.rand(1).item()}

        one.eval_epoch = draws
        one.train()
        left.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert left[0] == left[1]


def test_best_weights_are_kept_although_every_metric_is_negative(tmp_path):
    one = runner(tmp_path, max_iters=8, eval_every=2, valid_splits=["val"], test_splits=["val"])
    one.train()
    assert one.state.best_metric is not None
    assert one.state.best_metric < 0
    best = one.checkpoints.best(one.state.best_step)
    assert best is not None
    assert best.name == f"best_{one.state.best_step:08d}"


def test_epochs_count_passes_over_all_sources(tmp_path):
    assert runner(tmp_path, max_iters=None, max_epoch=2, batch_size_train=4).steps == 2 * math.ceil(40 / 4)


def test_an_unknown_split_names_the_known_ones(tmp_path):
    one = runner(tmp_path, valid_splits=["dev"], max_iters=1)
    with pytest.raises(ConfigError, match="no data set has the split 'dev'; there are train, val"):
        one.train()


def test_an_output_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to"):
        runner(tmp_path / "file" / "below")


def test_recomputed_blocks_change_nothing(tmp_path):
    plain = runner(tmp_path / "plain", max_iters=4)
    other = runner(tmp_path / "other", max_iters=4, gradient_checkpointing=True)
    plain.train()
    other.train()
    assert all(torch.equal(tensor, weights(other)[name]) for name, tensor in weights(plain).items())


def _train_and_lose_one(rank, folder, how):
    one = runner(folder, max_iters=6, timeout_minutes=0.05, save_every_steps=1)
    take = one.state.record

    def record(source, result):
        take(source, result)
        if rank == 1 and one.state.step == 3:
            end = time.monotonic() + 60
            while how == "hangs" and not (folder / "error0").exists() and time.monotonic() < end:
                time.sleep(0.05)
            os._exit(0)

    one.state.record = record
    try:
        one.train()
    except TrainingError as error:
        (folder / f"error{rank}").write_text(str(error))
    os._exit(0)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_process_is_named_and_the_last_checkpoint_goes_on(tmp_path, how):
    in_processes(_train_and_lose_one, 2, tmp_path, how)
    assert "process 0 has lost another one" in (tmp_path / "error0").read_text()
    resumed = runner(tmp_path, max_iters=6, resume="auto")
    assert resumed.continued == tmp_path / "checkpoints" / "step_00000002"  # the third was never agreed upon
    resumed.train()
    assert resumed.state.step == 6


def test_a_killed_worker_is_named_and_the_last_checkpoint_goes_on(tmp_path):
    """Torch's error then comes at any line of the main process, not only where it waits for data."""
    whole = runner(tmp_path / "whole", max_iters=8)
    whole.train()
    one = runner(tmp_path / "cut", max_iters=8, num_workers=1, save_every_steps=2)
    take = one.state.record

    def record(source, result):
        take(source, result)
        if one.state.step == 5:
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(120)  # which the error interrupts

    one.state.record = record
    with pytest.raises(TrainingError, match=r"a data worker died: .*killed by signal.*run\.num_workers.*run\.resume"):
        one.train()
    resumed = runner(tmp_path / "cut", max_iters=8, resume="auto")
    assert resumed.continued == tmp_path / "cut" / "checkpoints" / "step_00000004"
    resumed.train()
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())


def test_a_model_that_is_spread_over_devices_is_not_trained(tmp_path):
    model = ToyModel()
    model.settings = SimpleNamespace(language_model=SimpleNamespace(device_map="auto"))
    with pytest.raises(ConfigError, match=r"device_map is auto, which is for answering: set it to null to train"):
        runner(tmp_path, model).train()
    runner(tmp_path, model, evaluate=True, test_splits=["val"]).train()
