"""``chatbridge train``, also ``python -m lavis.train``; builds runs from configurations for other commands too.

A run builds LAVIS's four parts in LAVIS's order: task, data sets, model, runner.
"""

from __future__ import annotations

import datetime
import random
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.launchers import cores

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lavis_chatbridge.runners.config import Config
    from lavis_chatbridge.tasks.base import ChatBridgeTask

_CFG_PATH = typer.Option("--cfg-path", metavar="YAML", help="The configuration file.")
CfgPath = Annotated[str, _CFG_PATH]
CfgPathOrNone = Annotated[str | None, _CFG_PATH]
Options = Annotated[
    list[str] | None,
    typer.Option("--options", metavar="KEY=VALUE", help="Settings that override the file's; repeatable."),
]


def command(cfg_path: CfgPath, options: Options = None) -> None:
    """Train with a configuration file."""
    with Runs() as runs:
        runs.run(cfg_path, options or [], evaluate=False)


class Runs(ExitStack):
    """Runs configurations one after the other in one process group; evaluations with equal models share one.

    Attributes:
        cfg: The configuration of the last run.
    """

    cfg: Config

    def __init__(self) -> None:
        super().__init__()
        self._model: nn.Module | None = None
        self._built_from: dict[str, Any] | None = None

    def run(self, cfg_path: str, options: Sequence[str], evaluate: bool) -> Mapping[str, Any] | None:
        """Train with a configuration file and options, or score ``run.test_splits``: split -> its metrics."""
        self.cfg = cfg = load(cfg_path, [*options, "run.evaluate=true"] if evaluate else options)
        from lavis.common.registry import registry

        from lavis_chatbridge.runners import ChatBridgeRunner, distributed
        from lavis_chatbridge.runners.folder import RunFolder

        device = self.start(cfg)
        runner_class = registry.get_runner_class(cfg.run.runner)
        own = issubclass(runner_class, ChatBridgeRunner)
        if device.type == "cpu" and not own:
            raise ConfigError(
                f"run.runner {cfg.run.runner!r} is LAVIS's own, which needs a CUDA device: use chatbridge_runner"
            )
        cfg.run_cfg.distributed, cfg.run_cfg.world_size = distributed.world_size() > 1, distributed.world_size()
        cfg.run_cfg.rank, cfg.run_cfg.gpu = distributed.rank(), device.index or 0  # LAVIS's own runners read these
        digits = secrets.token_hex(3)  # distinguish runs of the same second
        job_id = distributed.from_main(f"{datetime.datetime.now():%Y%m%d_%H%M%S}_{digits}")
        if own and not evaluate and not cfg.run.evaluate:
            RunFolder(cfg.run, job_id).check()  # before anything is loaded
        task, datasets, model = self.build(cfg, evaluate)
        runner = runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)
        return runner.evaluate() if evaluate else runner.train()

    def start(self, cfg: Config) -> torch.device:
        """Join the process group, which ends with this object, and seed this process; returns its device."""
        import numpy
        import torch

        from lavis_chatbridge.runners import distributed

        torch.set_num_threads(min(torch.get_num_threads(), cores()))  # torch ignores the quota of a container
        self.callback(distributed.close)
        device = distributed.init(cfg.run)
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(cfg.run.seed)  # equally on every process, so that all initialise the same weights
        return device

    def build(self, cfg: Config, evaluate: bool = False) -> tuple[ChatBridgeTask, dict[str, Any], nn.Module]:
        """The task, data sets and model of a configuration; builds the embedded world if it needs it.

        An evaluation reuses the model of the previous one if its settings are equal.
        """
        from lavis.common.registry import registry

        from lavis_chatbridge.models import weights
        from lavis_chatbridge.models.chatbridge import ChatBridge
        from lavis_chatbridge.runners import distributed

        with distributed.together():
            if cfg.model_cfg.arch == "chatbridge":  # before the data sets are read
                weights.find_all(ChatBridge.check_config(cfg.model_cfg))
        prepare_world(cfg.datasets_cfg)
        with distributed.together():
            task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
            datasets = task.build_datasets(cfg)
            unchanged = evaluate and cfg.run.parallel == "ddp" and not cfg.run.compile  # by the run
            section = cfg.to_dict()["model"] if unchanged else None
            if self._model is None or section is None or section != self._built_from:
                self._model = self._built_from = None  # free its memory before the next one is built
                self._model, self._built_from = task.build_model(cfg), section
            return task, datasets, self._model


def prepare_world(datasets_cfg: Mapping[str, Any]) -> None:
    """Build the embedded world in the data roots of its data sets that have none yet; the main process does it."""
    from lavis_chatbridge.datasets.settings import WORLD_PREFIX, DataSettings
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.toyworld.build import build_world, is_world

    sections = [section for name, section in datasets_cfg.items() if name.startswith(WORLD_PREFIX)]
    with distributed.together():  # the others wait for the main process here
        for root in dict.fromkeys(DataSettings(data_root=section.get("data_root")).root for section in sections):
            if distributed.is_main() and not is_world(root):
                build_world(root)


def load(cfg_path: str, options: Sequence[str]) -> Config:
    """Load and check the configuration of a run."""
    from lavis_chatbridge.config import find_yaml

    find_yaml(cfg_path)  # before LAVIS is imported, which takes seconds
    from lavis_chatbridge.runners.config import load_config

    return load_config(cfg_path, options)
