"""A model of a few hundred weights, its data and its configuration: real torch, small enough for tests."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import nn

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.prompting.conversation import Modality, Slot, Text
from lavis_chatbridge.runners.chatbridge_runner import ChatBridgeRunner
from lavis_chatbridge.runners.config import Config
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.tasks.base import ChatBridgeTask

WIDTH, WORDS = 8, 12
YAML = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets:
  chatbridge_world_caption: {{data_root: {world}}}
run:
  task: {task}
  max_iters: 4
  batch_size_train: 2
  batch_size_eval: 4
  accum_grad_iters: 2
  init_lr: 1e-3
  num_workers: 0
  log_every: 1
  output_dir: {output}
  job_id: ""
"""
"""A short run of the tiny ChatBridge on an embedded world."""


@dataclasses.dataclass
class ToySource:
    """A source of ``size`` vectors, with ``1 + index % 5`` targets; ``bad`` ones are unreadable, ``poison`` NaN."""

    name: str
    modality: Modality
    size: int
    bad: tuple[int, ...] = ()
    poison: tuple[int, ...] = ()
    ratio: float | None = None

    def __len__(self) -> int:
        return self.size

    @property
    def lengths(self) -> np.ndarray:
        return np.array([1 + index % 5 for index in range(self.size)])

    def sample(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(id=f"{self.name}-{index}")

    def item(self, index: int, epoch: int = 0) -> dict[str, Any]:
        if index in self.bad:
            raise MediaError(f"{self.name}-{index}.png", "truncated")
        rng = np.random.default_rng([index, epoch, len(self.name)])
        vector = torch.from_numpy(rng.standard_normal(WIDTH)).float()
        word = int(vector.argmax())
        if index in self.poison:
            vector = vector * float("nan")
        return {
            "sample_id": f"{self.name}-{index}",
            "source": self.name,
            "pieces": [Slot(self.modality), Text("colour", target=True)],
            "image": [vector] if self.modality == "image" else [],
            "video": [],
            "audio": [vector] if self.modality == "audio" else [],
            "target": [word] * (1 + index % 5),
        }


@dataclasses.dataclass
class ToyGroup:
    sources: list[ToySource]
    ratio: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self.sources))


class ToyModel(nn.Module):
    """A frozen stack between trained parts; one query vector per modality, so that a step uses only one of them."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image_query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.audio_query = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.bridge = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.frozen = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(2))
        self.words = nn.Linear(WIDTH, WORDS)
        for part in (self.frozen, self.words):
            part.requires_grad_(False)

    def forward(self, samples: dict[str, Any]) -> dict[str, torch.Tensor]:
        modality = "image" if samples["image"] and samples["image"][0] else "audio"
        query = self.image_query if modality == "image" else self.audio_query
        vectors = torch.stack([media[0] for media in samples[modality]])
        hidden = self.dropout(self.norm(self.bridge(vectors) + query[0]))
        for block in self.frozen:
            hidden = hidden + block(hidden)
        rows = [row for row, words in enumerate(samples["target"]) for _ in words]
        words = torch.tensor([word for words in samples["target"] for word in words])
        loss = nn.functional.cross_entropy(self.words(hidden)[rows].float(), words)
        return {"loss": loss, "target_tokens": torch.tensor(len(words))}

    def blocks(self) -> list[nn.Module]:
        return list(self.frozen)

    def parts(self) -> dict[str, list[nn.Parameter]]:
        bridge = [*self.bridge.parameters(), *self.norm.parameters()]
        return {"images": [self.image_query], "sounds": [self.audio_query], "bridge": bridge}


def toy_data() -> dict[str, dict[str, ToyGroup]]:
    """Two data sets, pictures and sounds, with a training and a validation split."""
    sounds = {"train": ToyGroup([ToySource("sounds", "audio", 17)]), "val": ToyGroup([ToySource("sounds", "audio", 6)])}
    return {"pictures": {**pictures(23)["pictures"], **pictures(7, "val")["pictures"]}, "sounds": sounds}


def pictures(size: int = 12, split: str = "train", source: type = ToySource, **more: Any) -> dict[str, Any]:
    return {"pictures": {split: ToyGroup([source("pictures", "image", size, **more)])}}


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def logged(folder: Path, key: str) -> list[Any]:
    """The values of a key in a run's log, in their order."""
    return [line[key] for line in log_of(folder) if key in line]


def config(folder: Path, **run: Any) -> Config:
    values = {
        "task": "chatbridge_alignment",
        "max_iters": 8,
        "batch_size_train": 4,
        "batch_size_eval": 3,
        "num_workers": 0,
        "init_lr": 0.05,
        "min_lr": 0.001,
        "warmup_steps": min(2, run.get("max_iters") or 2),
        "output_dir": str(folder),
        "job_id": "",
        "log_every": 2,
        "device": "cpu",
        "save_every_minutes": None,
    }
    settings = RunSettings(**values | run)
    sections = {"run": settings.model_dump(), "model": {"arch": "toy", "model_type": "toy"}, "datasets": {}}
    return Config(OmegaConf.create(sections), settings)


def runner(folder: Path, model: nn.Module | None = None, data: Any = None, **run: Any) -> ChatBridgeRunner:
    cfg = config(folder, **run)
    task = ChatBridgeTask.setup_task(cfg)
    task.datasets = data or toy_data()
    return ChatBridgeRunner(cfg=cfg, job_id="job", task=task, model=model or ToyModel(), datasets=task.datasets)


class Stop(Exception):
    """Ends a run as a machine that goes away does."""


def stop() -> None:
    raise Stop


def after_step(one: ChatBridgeRunner, step: int, action: Callable[[], object] = stop) -> None:
    """Call ``action`` once a runner has counted ``step``, before it is saved."""
    check = one._check_progress

    def checked(*arguments: Any) -> None:
        check(*arguments)
        if one.state.step == step:
            action()

    one._check_progress = checked  # type: ignore[method-assign]


def weights(one: ChatBridgeRunner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are equal, bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def in_processes(work: Any, count: int, *arguments: Any) -> None:
    """Run ``work(rank, *arguments)`` in ``count`` processes that torchrun could have started."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with preloaded():
        mp.start_processes(_as_rank, (count, port, work, arguments), count, start_method="forkserver")


@contextmanager
def preloaded() -> Iterator[None]:
    """A server that has imported everything once forks the processes that are started meanwhile."""
    multiprocessing.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python up to 3.11.9 forgets sys.path when it preloads
        yield


def _as_rank(rank: int, count: int, port: int, work: Any, arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    work(rank, *arguments)
