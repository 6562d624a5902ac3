"""``python -m lavis.train`` and ``chatbridge train``: train as a configuration file says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_chatbridge.plugin.launch import add_arguments, exit_status, launch

__all__ = ["add_arguments", "main", "run"]


def run(args: argparse.Namespace) -> int:
    """Train; the arguments are those of :func:`add_arguments`."""
    launch(args.cfg_path, args.options, evaluate=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.train``.

    Args:
        argv: Arguments, by default the process's own.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser("lavis.train", description="Train a LAVIS model as a configuration file says.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
