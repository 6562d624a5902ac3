"""The ``chatbridge`` command: a table of subcommands, each imported only when it is asked for.

A subcommand is one line of :data:`COMMANDS`. Its module has ``add_arguments(parser)`` and ``run(args) -> int`` (the
exit status), and raises ``ChatBridgeError`` for what the user can mend. This file does not know how any of them works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from lavis_chatbridge import __version__
from lavis_chatbridge.plugin.launch import exit_status


class Command(NamedTuple):
    """One subcommand: its name, the module that holds it, and one line of help."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("train", "lavis_chatbridge.plugin.train", "train as a configuration file says (python -m lavis.train)"),
    Command(
        "evaluate",
        "lavis_chatbridge.plugin.evaluate",
        "score a model on a configuration's test splits (python -m lavis.evaluate)",
    ),
    Command(
        "world", "lavis_chatbridge.toyworld.command", "build the embedded world, a small closed world with exact truth"
    ),
    Command(
        "weights",
        "lavis_chatbridge.models.weights_command",
        "say which weight files are there and what a file holds; convert checkpoints",
    ),
    Command("check-data", "lavis_chatbridge.datasets.check", "say what a JSONL of data holds and whether it is usable"),
    Command(
        "shard",
        "lavis_chatbridge.plugin.shard",
        "write data sets as webdataset shards, resumable and spread over processes",
    ),
    Command(
        "cache-features",
        "lavis_chatbridge.plugin.cache_features",
        "store the frozen encoders' outputs for a configuration, without training",
    ),
    Command(
        "doctor",
        "lavis_chatbridge.plugin.doctor",
        "look at packages, devices, files and memory before a run needs them",
    ),
    Command("chat", "lavis_chatbridge.chat.terminal", "talk with a model about images, videos and sounds"),
    Command("ask", "lavis_chatbridge.chat.ask", "ask one question, or a file of them, about images, videos and sounds"),
    Command("serve", "lavis_chatbridge.chat.server.command", "answer over HTTP like OpenAI's chat completions"),
    Command("web", "lavis_chatbridge.chat.web", "chat in the browser"),
    Command("multis", "lavis_chatbridge.multis.command", "make chat data: annotate, generate, check, build"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments, by default the process's own.

    Returns:
        The exit status: 0, 2 after a mistake that the user can mend, or what the subcommand says.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "chatbridge", description="ChatBridge for LAVIS: images, videos and sounds for one LLM."
    )
    parser.add_argument("--version", action="version", version=f"chatbridge {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help.capitalize() + ".")
        # Only the one that is asked for is imported: most take seconds, which `chatbridge --help` need not spend.
        if argv[:1] == [command.name]:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
