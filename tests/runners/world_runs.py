"""Trainings and evaluations of the shipped tiny model on a small embedded world, as a configuration starts them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.common.registry import registry

from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.config import Config, load_config
from tests.runners.runner_parts import in_processes, weights

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


def configured(folder: Path, world: Path, *options: str, task: str = "chatbridge_alignment") -> Config:
    """The configuration of a run into ``folder/out``."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(YAML.format(world=world, output=folder / "out", task=task))
    return load_config(path, list(options))


def run(folder: Path, world: Path, *options: str, task: str = "chatbridge_alignment", evaluate: bool = False) -> Any:
    """Train, and return the runner; or evaluate, and return the scores."""
    cfg = configured(folder, world, *options, *(["run.evaluate=true"] if evaluate else []), task=task)
    torch.manual_seed(cfg.run.seed)
    setup = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
    datasets = setup.build_datasets(cfg)
    runner_class = registry.get_runner_class(cfg.run.runner)
    runner = runner_class(cfg=cfg, job_id="job", task=setup, model=setup.build_model(cfg), datasets=datasets)
    if evaluate:
        return runner.evaluate()
    runner.train()
    return runner


def logged(folder: Path, key: str) -> list[float]:
    """The values of a key in the log of a run into ``folder/out``, in their order."""
    lines = map(json.loads, (folder / "out" / "log.txt").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def equal_on_two_processes(folder: Path, world: Path, options: Sequence[str], alone: dict, atol: float) -> None:
    """Train on two processes; both end with the same weights, which are those of a single one to ``atol``."""
    in_processes(_on_a_rank, 2, folder, world, options)
    first, second = (torch.load(folder / f"weights{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=atol, msg=name)


def _on_a_rank(rank: int, folder: Path, world: Path, options: Sequence[str]) -> None:
    trained = run(folder, world, "run.batch_size_train=1", *options)
    torch.save(weights(trained), folder / f"weights{rank}.pt")
    distributed.close()
