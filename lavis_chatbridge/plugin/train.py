"""``python -m lavis.train`` and ``chatbridge train``: train as a configuration file says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from lavis_chatbridge.plugin.launch import launch, run_command


def command(
    cfg_path: Annotated[str, typer.Option("--cfg-path", metavar="YAML", help="The configuration file.")],
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Settings that override the file's; repeatable.")
    ] = None,
) -> None:
    """Train as a configuration file says."""
    launch(cfg_path, options or [], evaluate=False)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.train``: returns the exit status."""
    return run_command("lavis.train", command, argv)


if __name__ == "__main__":
    sys.exit(main())
