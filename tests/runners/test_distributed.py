"""Several processes: how they meet, that they train as one, and that all end where one fails."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import fsdp

from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, TrainingError
from lavis_chatbridge.launchers import ProcessRank
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.settings import RunSettings
from tests.runners.runner_parts import ToyModel, ToySource, after_step, in_processes, pictures, runner, same, weights


def test_a_device_that_is_not_there(monkeypatch):
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        distributed.choose_device("cuda", ProcessRank())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="local rank 3 has no CUDA device of its own: 2 found"):
        distributed.choose_device("auto", ProcessRank(3, 4, 3))


def test_a_process_logs_what_it_waits_for_and_one_alone_does_not_wait(tmp_path, monkeypatch, capfd):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu1", "MASTER_PORT": "9"}.items():
        monkeypatch.setenv(name, value)

    def nobody(*_arguments, **_more):
        raise dist.DistNetworkError("timed out after 30s")

    monkeypatch.setattr(dist, "init_process_group", nobody)
    with pytest.raises(TrainingError, match="rank 1 of 4 cannot join the others: timed out after 30s"):
        distributed.init(RunSettings(task="t", max_iters=1))
    said = "rank 1 of 4, announced by torchrun (RANK, WORLD_SIZE), waits for the others at gpu1:9 for up to 30 minutes"
    assert said in capfd.readouterr().err
    assert distributed.init(RunSettings(task="t", max_iters=1, distributed=False)) == torch.device("cpu")
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match=r"export MASTER_ADDR=\$\(scontrol show hostnames .* MASTER_PORT=29500"):
        distributed.init(RunSettings(task="t", max_iters=1))
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert distributed.init(RunSettings(task="t", max_iters=1)) == torch.device("cpu")
    assert distributed.world_size() == 1


def told(folder: Path, work: Any, *arguments: Any) -> list[str]:
    """What ``work(rank, folder, *arguments)`` returns or raises on two processes, as text."""
    folder.mkdir(exist_ok=True)
    in_processes(_tell, 2, folder, work, arguments)
    return [(folder / f"told{rank}").read_text() for rank in (0, 1)]


def _tell(rank: int, folder: Path, work: Any, arguments: tuple) -> None:
    try:
        answer = work(rank, folder, *arguments)
    except ChatBridgeError as error:
        answer = error
    (folder / f"told{rank}").write_text(str(answer))
    distributed.close()


def both(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in (0, 1)]


def _train(rank: int, folder: Path, options: dict[str, Any], stop_at: int | None = None) -> Any:
    one = runner(folder, ToyModel(0.3), **options)
    if stop_at is not None:
        after_step(one, stop_at, lambda: os._exit(0))
    one.train()
    torch.save(weights(one), folder / f"weights{rank}.pt")
    return one.state


def test_two_processes_resume_exactly(tmp_path):
    options = {"max_iters": 9, "save_every_steps": 2}
    told(tmp_path / "whole", _train, options)
    (tmp_path / "cut").mkdir()
    in_processes(_train, 2, tmp_path / "cut", options, 5)
    told(tmp_path / "cut", _train, options | {"resume": "auto"})
    for first, second in zip(both(tmp_path / "whole"), both(tmp_path / "cut"), strict=True):
        assert same(first, second)


@pytest.mark.parametrize("parallel_by", ["ddp", "fsdp"])
def test_processes_stay_together_when_one_has_nothing_to_read(tmp_path, parallel_by):
    options = {"data": pictures(40, bad=tuple(range(0, 40, 2))), "batch_size_train": 1, "max_bad_share": 1.0}
    first, second = told(tmp_path, _train, options | {"parallel": parallel_by})
    assert first == second
    assert 0 < int(re.search(r"skipped=(\d+)", first)[1]) < 16
    assert same(*both(tmp_path))


class Malformed(ToySource):
    """Its samples from the sixth on have no form."""

    def item(self, index, epoch=0):
        if index > 5:
            raise DataError(f"sample {index} has no text")
        return super().item(index, epoch)


def _malformed(rank: int, folder: Path, parallel_by: str) -> None:
    data = pictures(40, source=Malformed if rank == 1 else ToySource)
    runner(folder, data=data, max_iters=12, save_every_steps=1, parallel=parallel_by).train()


@pytest.mark.parametrize("parallel_by", ["ddp", "fsdp"])
def test_data_that_fail_on_one_process_end_the_training_of_all(tmp_path, parallel_by):
    first, second = told(tmp_path, _malformed, parallel_by)
    assert second.endswith("has no text")
    assert first == f"process 1: {second}"


@pytest.mark.parametrize("count", [2, 3])
def test_the_share_of_unreadable_samples_is_that_of_all_processes(tmp_path, count):
    """All of them are in the fifth batch of process 1, whose own share is then 10 or 15 %."""
    fifth = MixturePlan({"pictures": 400}, batch_size=4, world_size=2, seed=42).batch(4, 1)[1]
    data = pictures(400, bad=tuple(index for index, _ in fifth[:count]))
    first, second = told(tmp_path, _train, {"data": data, "max_iters": 10, "save_every_steps": 1, "keep_last": 20})
    assert first == second
    newest = max(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    if count == 2:
        assert "Count(samples=78, skipped=2," in first
        assert newest == "step_00000010"
    else:
        assert first.startswith("pictures: 3 of 40 samples could not be read, more than the 5% that max_bad_share")
        assert newest == "step_00000004"  # its counts are below the limit: a mended source can be resumed


def _evaluated(_rank: int, folder: Path, bad: tuple[int, ...]) -> Any:
    one = runner(folder, data=pictures(60, "test", bad=bad), evaluate=True, test_splits=["test"])
    return one.evaluate()["test"]["samples"]


def test_the_share_of_unreadable_samples_of_an_evaluation_is_that_of_all_processes(tmp_path):
    assert told(tmp_path, _evaluated, (0, 5, 10)) == ["57", "57"]
    fault = "pictures: 4 of 60 samples could not be read, more than the 5%"
    assert all(text.startswith(fault) for text in told(tmp_path, _evaluated, (0, 5, 10, 1)))


def _other_frozen_weights(rank: int, folder: Path) -> None:
    model = ToyModel()
    with torch.no_grad():
        model.frozen[0][0].weight[0, 0] += rank
    runner(folder, model, max_iters=2).train()


def test_all_processes_refuse_alike(tmp_path):
    runner(tmp_path / "used", max_iters=2).train()
    first, second = told(tmp_path / "used", _train, {"max_iters": 2})
    assert "has step_00000002 of an earlier training" in first
    assert second == f"process 0: {first}"
    assert all("have loaded different frozen weights" in text for text in told(tmp_path / "new", _other_frozen_weights))


def test_fsdp_needs_processes_a_new_torch_and_a_model_with_blocks(tmp_path, caplog, monkeypatch):
    runner(tmp_path, parallel="fsdp", max_iters=1).train()
    assert caplog.text.count("run.parallel is fsdp, but this is the only process") == 1
    with pytest.raises(ConfigError, match="gradient_checkpointing is for ChatBridge, but the model is Linear"):
        runner(tmp_path / "a", torch.nn.Linear(2, 2), max_iters=1, gradient_checkpointing=True).train()
    monkeypatch.delattr(fsdp.FSDPModule, "set_reshard_after_forward", raising=False)
    with pytest.raises(ConfigError, match=r"run.parallel fsdp needs torch 2.8 or newer, found .*: use ddp"):
        distributed._shard([torch.nn.Linear(2, 2)], torch.device("cpu"))
