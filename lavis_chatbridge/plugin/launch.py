"""One run from a configuration file to an exit status; what ``lavis.train`` and ``lavis.evaluate`` share.

It puts LAVIS's four parts together in LAVIS's order (task, data sets, model, runner); how they work is theirs.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.launchers import announced

USER_ERROR = 2
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LAVIS's own two arguments."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="the configuration file")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The argument ``--options`` alone."""
    parser.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the file's, for example run.seed=1 model.model_type=vicuna7b; may be repeated",
    )


def launch(cfg_path: str, options: Sequence[str], evaluate: bool) -> dict[str, Any] | None:
    """Build everything that the configuration names, and train or evaluate.

    Args:
        cfg_path: The configuration file.
        options: Overrides, ``KEY=VALUE`` each.
        evaluate: Score ``run.test_splits`` instead of training.

    Returns:
        Split -> its metrics after an evaluation, else None.

    Raises:
        ChatBridgeError: For anything that the user can mend.
    """
    with Session() as session:
        return session.run(cfg_path, options, evaluate)


class Session:
    """Runs one after the other in one process group; evaluations with equal models share one, built once."""

    def __init__(self) -> None:
        self._meeting: Any = None
        self._model: Any = None
        self._built_from: Any = None

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if "lavis_chatbridge.runners.distributed" in sys.modules:
            from lavis_chatbridge.runners import distributed

            distributed.close()

    @contextmanager
    def together(self, cfg_path: str | Path, options: Sequence[str]) -> Iterator[None]:
        """Give up on all processes where one must, also before they have joined their group.

        Args:
            cfg_path: The configuration file, which says where processes meet.
            options: Its overrides.

        Raises:
            ChatBridgeError: On a process without a fault of its own, the first one of another.
        """
        place = announced(os.environ)
        if place is None or place.world_size == 1:
            yield
            return
        from lavis_chatbridge.runners import distributed

        if self._meeting is None:
            self._meeting = distributed.Meeting(_readable_run(cfg_path, options))
        with self._meeting.together():
            yield

    def join(self, run: Any) -> Any:
        """Join the group of processes where there are several; this process's device.

        Args:
            run: The ``run`` section.
        """
        from lavis_chatbridge.runners import distributed

        return distributed.init(run) if self._meeting is None else self._meeting.join(run)

    def run(self, cfg_path: str, options: Sequence[str], evaluate: bool) -> dict[str, Any] | None:
        """One run, as `launch` describes it."""
        with self.together(cfg_path, options):
            cfg = load(cfg_path, with_options(options, {"run.evaluate": "true"}) if evaluate else options)
        from lavis.common.registry import registry

        from lavis_chatbridge.runners import distributed, folder

        device = self.join(cfg.run)
        if device.type == "cpu" and not is_own_runner(cfg.run.runner):
            raise ConfigError(
                f"run.runner {cfg.run.runner!r} is LAVIS's own, which needs a CUDA device: use chatbridge_runner"
            )
        _seed(cfg.run.seed)
        cfg.pretty_print()
        runner_class = registry.get_runner_class(cfg.run.runner)
        job_id = distributed.from_main(folder.new_job_id())
        with _claimed(cfg, runner_class, job_id):
            runner = self._runner(cfg, runner_class, job_id, evaluate)
            if not evaluate:
                runner.train()
                return None
            return runner.evaluate()

    def _runner(self, cfg: Any, runner_class: type, job_id: str, evaluate: bool) -> Any:
        """Everything that the configuration names, in LAVIS's order."""
        from lavis.common.registry import registry

        from lavis_chatbridge.plugin import world
        from lavis_chatbridge.runners import ChatBridgeRunner, data, distributed

        world.prepare(cfg.datasets_cfg)
        with distributed.together():
            task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
            datasets = task.build_datasets(cfg)
            if issubclass(runner_class, ChatBridgeRunner):
                data.check_splits(datasets, cfg.run)
            model = self._model_of(task, cfg, evaluate)
        return runner_class(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets)

    def _model_of(self, task: Any, cfg: Any, evaluate: bool) -> Any:
        """The model of a configuration: the previous run's where that was the same one, and nothing has changed it."""
        sections = [cfg.to_dict()["model"], cfg.run.parallel, cfg.run.compile, cfg.run.resume]
        shareable = evaluate and cfg.run.parallel == "ddp" and not cfg.run.compile and cfg.run.resume is None
        if not shareable:
            self._model = self._built_from = None
            return task.build_model(cfg)
        if self._built_from != sections:
            self._model = None  # given back before the next one takes its place
            self._model, self._built_from = task.build_model(cfg), sections
        return self._model


def is_own_runner(name: str) -> bool:
    """Whether a registered runner is this package's, or made from it, and not LAVIS's own."""
    import lavis.runners  # noqa: F401  (fills the registry with runners)
    from lavis.common.registry import registry

    from lavis_chatbridge.runners import ChatBridgeRunner

    return issubclass(registry.get_runner_class(name) or ChatBridgeRunner, ChatBridgeRunner)


def load(cfg_path: str, options: Sequence[str]) -> Any:
    """The configuration of a run, checked.

    Raises:
        ConfigError: With all its faults, or if there is no such file.
    """
    if not Path(cfg_path).is_file():  # before LAVIS is imported, which takes seconds
        raise ConfigError(f"no configuration file at {cfg_path}")
    # `import lavis` leaves these two out, yet the registry needs their classes.
    import lavis.common.optims
    import lavis.runners  # noqa: F401

    from lavis_chatbridge.runners.config import load_config

    return load_config(cfg_path, options)


def _readable_run(cfg_path: str | Path, options: Sequence[str]) -> dict[str, Any]:
    """The ``run`` section as written, empty where it cannot be read: that is told by who needs all of it."""
    from lavis_chatbridge.runners.config import run_section

    try:
        return run_section(cfg_path, options)
    except ConfigError:
        return {}


def _claimed(cfg: Any, runner_class: type, job_id: str) -> AbstractContextManager[None]:
    """The folder of a training, chosen and kept before anything is loaded; LAVIS's own runners look after theirs."""
    from lavis_chatbridge.runners import ChatBridgeRunner
    from lavis_chatbridge.runners.folder import RunFolder

    if cfg.run.evaluate or not issubclass(runner_class, ChatBridgeRunner):
        return nullcontext()
    cfg.folder = RunFolder.choose(cfg.run, cfg.to_dict(), job_id)
    return cfg.folder.claimed()


def with_options(options: Sequence[str], more: Mapping[str, str]) -> list[str]:
    """Options with further ones behind them, in the form that they have (``K=V``, or LAVIS's ``K V``)."""
    pairs = options and "=" not in options[0]
    added = [word for key, value in more.items() for word in ([key, value] if pairs else [f"{key}={value}"])]
    return [*options, *added]


def command_line(
    program: str,
    description: str,
    add: Callable[[argparse.ArgumentParser], None],
    run: Callable[[argparse.Namespace], int],
    argv: Sequence[str] | None,
) -> int:
    """A module's own command line, as ``python -m`` calls it; returns the exit status.

    Args:
        program: Its name in messages.
        description: One sentence of help.
        add: Defines its arguments.
        run: Does what they say.
        argv: Arguments, by default the process's own.
    """
    parser = argparse.ArgumentParser(program, description=description)
    add(parser)
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


def exit_status(action: Callable[[], int | None]) -> int:
    """The status that ``action`` returns or exits with; 2 after one line ``error: ...`` for a user's mistake."""
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
    """``function`` for typer, which ignores what a command returns: a status other than 0 or None ends the process."""

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> None:
        if status := function(*args, **options):
            raise SystemExit(status)

    return run


def spread(words: Sequence[str], lists: Sequence[str] = ("--options", "--ablate")) -> list[str]:
    """A command line with LAVIS's ``--options A B`` as ``--options A --options B``, which typer reads.

    ``--ablate`` without a word behind it becomes ``--ablate all``.
    """
    result: list[str] = []
    current = ""
    for word, following in zip(words, [*words[1:], "-"], strict=False):
        if word in lists:
            current = word
            if following.startswith("-"):
                result += [word, "all"] if word == "--ablate" else [word]
            continue
        if word.startswith("-"):
            current = ""
        result += [current, word] if current else [word]
    return result


def run_command(program: str, command: Callable[..., int | None], argv: Sequence[str] | None) -> int:
    """A module's own command line, as ``python -m`` calls it; returns the exit status.

    Args:
        program: Its name in messages.
        command: A function with annotated arguments.
        argv: Arguments, by default the process's own.
    """
    import typer

    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(returning_status(command))
    words = spread(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: app(words, prog_name=program))


def _seed(seed: int) -> None:
    """The same seed on every process: they build the same weights, and the order of the data does not depend on it."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
