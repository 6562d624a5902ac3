"""One run from a configuration file to an exit status; what ``lavis.train`` and ``lavis.evaluate`` share.

It puts LAVIS's four parts together in LAVIS's order (task, data sets, model, runner); how they work is theirs.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lavis_chatbridge.errors import ChatBridgeError, ConfigError

USER_ERROR = 2
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """LAVIS's own two arguments."""
    parser.add_argument("--cfg-path", required=True, metavar="YAML", help="the configuration file")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="settings that override the file's, for example run.seed=1 model.model_type=vicuna7b",
    )


def launch(cfg_path: str, options: Sequence[str], evaluate: bool) -> None:
    """Build everything that the configuration names, and train or evaluate.

    Args:
        cfg_path: The configuration file.
        options: Overrides, ``KEY=VALUE`` each.
        evaluate: Score ``run.test_splits`` instead of training.

    Raises:
        ChatBridgeError: For anything that the user can mend.
    """
    if not Path(cfg_path).is_file():  # before LAVIS is imported, which takes seconds
        raise ConfigError(f"no configuration file at {cfg_path}")
    # `import lavis` leaves these two out, yet the registry needs their classes.
    import lavis.common.optims
    import lavis.runners  # noqa: F401
    from lavis.common.registry import registry
    from lavis.common.utils import now

    from lavis_chatbridge.plugin import world
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.runners.config import load_config

    cfg = load_config(cfg_path, [*options, *_evaluate_option(options)] if evaluate else options)
    distributed.init(cfg.run)
    try:
        _seed(cfg.run.seed)
        cfg.pretty_print()
        world.prepare(cfg.datasets_cfg)
        task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg)
        runner_class = registry.get_runner_class(cfg.run.runner)
        runner = runner_class(cfg=cfg, job_id=distributed.from_main(now()), task=task, model=model, datasets=datasets)
        if evaluate:
            runner.evaluate()
        else:
            runner.train()
    finally:
        distributed.close()


def exit_status(action: Callable[[], int]) -> int:
    """What ``action`` returns, or 2 after one line ``error: ...`` on stderr for a mistake that the user can mend."""
    try:
        return action()
    except ChatBridgeError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _evaluate_option(options: Sequence[str]) -> list[str]:
    """``run.evaluate=true``, which makes settings of training optional, in the form of the other options."""
    return ["run.evaluate", "true"] if options and "=" not in options[0] else ["run.evaluate=true"]


def _seed(seed: int) -> None:
    """The same seed on every process: they build the same weights, and the order of the data does not depend on it."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
