"""One run from a configuration file to an exit status: the common part of ``lavis.train`` and ``lavis.evaluate``.

It builds LAVIS's four parts in LAVIS's order: task, data sets, model, runner.
"""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.launchers import cores

if TYPE_CHECKING:
    from torch import nn

    from lavis_chatbridge.runners.config import Config
    from lavis_chatbridge.tasks.base import ChatBridgeTask

USER_ERROR = 2
INTERRUPTED = 130


def launch(cfg_path: str, options: Sequence[str], evaluate: bool) -> Mapping[str, Any] | None:
    """Train as a configuration file and options say, or score ``run.test_splits``: split -> its metrics."""
    with Session() as session:
        return session.run(cfg_path, options, evaluate)


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
        """Train or evaluate one configuration, as `launch` does."""
        self.cfg = cfg = load(cfg_path, with_options(options, {"run.evaluate": "true"}) if evaluate else options)
        import numpy
        import torch

        from lavis_chatbridge.runners import distributed
        from lavis_chatbridge.runners.folder import RunFolder, new_job_id

        torch.set_num_threads(min(torch.get_num_threads(), cores()))  # torch does not know the quota of a container
        device = distributed.init(cfg.run)
        own = is_own_runner(cfg.run.runner)
        if device.type == "cpu" and not own:
            raise ConfigError(
                f"run.runner {cfg.run.runner!r} is LAVIS's own, which needs a CUDA device: use chatbridge_runner"
            )
        for seed in (random.seed, numpy.random.seed, torch.manual_seed):
            seed(cfg.run.seed)  # equally on every process, so that all initialise the same weights
        cfg.run_cfg.distributed, cfg.run_cfg.world_size = distributed.in_group(), distributed.world_size()
        cfg.run_cfg.rank, cfg.run_cfg.gpu = distributed.rank(), device.index or 0  # LAVIS's own runners read these
        job_id = distributed.from_main(new_job_id())
        cfg.folder = RunFolder(cfg.run, job_id) if own else None
        if cfg.folder is not None and not evaluate:
            cfg.folder.check()  # before anything is loaded
        prepare_world(cfg.datasets_cfg)
        runner = self._runner(cfg, job_id, evaluate)
        return runner.evaluate() if evaluate else runner.train()

    def _runner(self, cfg: Config, job_id: str, evaluate: bool) -> Any:
        """The runner of a configuration, with its task, data sets and model, built in LAVIS's order."""
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
        """The model of a configuration: the previous run's if its settings are equal and nothing has changed it."""
        if not evaluate or cfg.run.parallel != "ddp" or cfg.run.compile or cfg.run.resume is not None:
            self._model = self._built_from = None
            return task.build_model(cfg)
        section = cfg.to_dict()["model"]
        if self._model is None or self._built_from != section:
            self._model = None  # free its memory before the next one is built
            self._model, self._built_from = task.build_model(cfg), section
        return self._model


def prepare_world(datasets_cfg: Mapping[str, Any]) -> None:
    """Build the embedded world in the data roots of its data sets that have none yet; the main process does it.

    Raises:
        DataError: If a data root holds something else.
    """
    from lavis_chatbridge.datasets.settings import WORLD_PREFIX, DataSettings
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.toyworld.build import build_world, is_world

    sections = [section for name, section in datasets_cfg.items() if name.startswith(WORLD_PREFIX)]
    with distributed.together():  # the others wait for the main process here
        for root in dict.fromkeys(DataSettings(data_root=section.get("data_root")).root for section in sections):
            if distributed.is_main() and not is_world(root):
                build_world(root)


def is_own_runner(name: str) -> bool:
    """Whether a registered runner is this package's or a subclass of it, not LAVIS's own."""
    import lavis.runners  # noqa: F401  (fills the registry with runners)
    from lavis.common.registry import registry

    from lavis_chatbridge.runners import ChatBridgeRunner

    return issubclass(registry.get_runner_class(name) or ChatBridgeRunner, ChatBridgeRunner)


def load(cfg_path: str, options: Sequence[str]) -> Config:
    """Load and check the configuration of a run."""
    from lavis_chatbridge.config import find_yaml

    find_yaml(cfg_path)  # before LAVIS is imported, which takes seconds
    from lavis_chatbridge.runners.config import load_config

    return load_config(cfg_path, options)


def with_options(options: Sequence[str], more: Mapping[str, str]) -> list[str]:
    """Append options, in the form of the existing ones (``K=V``, or LAVIS's ``K V``)."""
    pairs = options and "=" not in options[0]
    added = [word for key, value in more.items() for word in ([key, value] if pairs else [f"{key}={value}"])]
    return [*options, *added]


def exit_status(action: Callable[[], int | None]) -> int:
    """The status that ``action`` returns or exits with; for a user's mistake, print ``error: ...`` and return 2."""
    try:
        return action() or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except ChatBridgeError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def returning_status(function: Callable[..., int | None]) -> Callable[..., None]:
    """Wrap ``function`` for typer, which ignores return values: a status other than 0 or None exits the process."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        if status := function(*args, **options):
            raise SystemExit(status)

    return run


_LISTS = ("--options", "--ablate", "--splits", "--against")


def spread(words: Sequence[str]) -> list[str]:
    """Rewrite LAVIS's ``--options A B`` as ``--options A --options B``, which typer reads.

    ``--ablate`` without a value becomes ``--ablate all``.
    """
    result: list[str] = []
    current = ""
    for word, following in zip(words, [*words[1:], "-"], strict=False):
        if word in _LISTS:
            current = word
            if following.startswith("-"):
                result += [word, "all"] if word == "--ablate" else [word]
            continue
        if word.startswith("-"):
            current = ""
        result += [current, word] if current else [word]
    return result


def run_command(program: str, command: Callable[..., int | None], argv: Sequence[str] | None) -> int:
    """Run a function with annotated arguments as the command line of ``python -m``; returns the exit status."""
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(returning_status(command))
    words = spread(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: app(words, prog_name=program))
