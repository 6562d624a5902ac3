"""``python -m lavis.train`` and ``chatbridge train``: train as a configuration file says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_chatbridge.plugin.launch import add_arguments, command_line, launch

__all__ = ["add_arguments", "main", "run"]


def run(args: argparse.Namespace) -> int:
    """Train; the arguments are those of :func:`add_arguments`."""
    launch(args.cfg_path, args.options, evaluate=False)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.train``: returns the exit status."""
    what = "Train a LAVIS model as a configuration file says."
    return command_line("lavis.train", what, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
