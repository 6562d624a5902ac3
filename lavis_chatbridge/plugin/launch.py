"""A run of a configuration file, for training, evaluation and the commands that read its data.

It builds LAVIS's four parts in LAVIS's order: task, data sets, model, runner.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.launchers import cores

if TYPE_CHECKING:
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


class Session:
    """Runs configurations one after the other in one process group; evaluations with equal models share one.

    Attributes:
        cfg: The configuration of the last run.
    """

    cfg: Config

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._built_from: dict[str, Any] | None = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if "lavis_chatbridge.runners.distributed" in sys.modules:
            from lavis_chatbridge.runners import distributed

            distributed.close()

    def run(self, cfg_path: str, options: Sequence[str], evaluate: bool) -> Mapping[str, Any] | None:
        """Train as a configuration file and options say, or score ``run.test_splits``: split -> its metrics."""
        self.cfg = cfg = load(cfg_path, [*options, "run.evaluate=true"] if evaluate else options)
        import numpy
        import torch
        from lavis.common.registry import registry

        from lavis_chatbridge.runners import ChatBridgeRunner, distributed
        from lavis_chatbridge.runners.folder import RunFolder, new_job_id

        torch.set_num_threads(min(torch.get_num_threads(), cores()))  # torch does not know the quota of a container
        device = distributed.init(cfg.run)
        own = issubclass(registry.get_runner_class(cfg.run.runner), ChatBridgeRunner)
        if device.type == "cpu" and not own:
            raise ConfigError(
                f"run.runner {cfg.run.runner!r} is LAVIS's own, which needs a CUDA device: use chatbridge_runner"
            )
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(cfg.run.seed)  # equally on every process, so that all initialise the same weights
        cfg.run_cfg.distributed, cfg.run_cfg.world_size = distributed.in_group(), distributed.world_size()
        cfg.run_cfg.rank, cfg.run_cfg.gpu = distributed.rank(), device.index or 0  # LAVIS's own runners read these
        job_id = distributed.from_main(new_job_id())
        if own and not evaluate and not cfg.run.evaluate:
            RunFolder(cfg.run, job_id).check()  # before anything is loaded
        prepare_world(cfg.datasets_cfg)
        runner = self._runner(cfg, job_id, evaluate)
        return runner.evaluate() if evaluate else runner.train()

    def _runner(self, cfg: Config, job_id: str, evaluate: bool) -> Any:
        """The runner, with its task, data sets and model."""
        from lavis.common.registry import registry

        from lavis_chatbridge.runners import distributed

        with distributed.together():
            task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
            datasets = task.build_datasets(cfg)
            model = self._model_of(task, cfg, evaluate)
        return registry.get_runner_class(cfg.run.runner)(
            cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets
        )

    def _model_of(self, task: ChatBridgeTask, cfg: Config, evaluate: bool) -> nn.Module:
        """The model: the previous run's if its settings are equal and nothing has changed it."""
        if not evaluate or cfg.run.parallel != "ddp" or cfg.run.compile or cfg.run.resume is not None:
            self._model = self._built_from = None
            return task.build_model(cfg)
        section = cfg.to_dict()["model"]
        if self._model is None or self._built_from != section:
            self._model = None  # free its memory before the next one is built
            self._model, self._built_from = task.build_model(cfg), section
        return self._model


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
