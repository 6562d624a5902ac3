"""The ``chatbridge`` command: a table of subcommands; only the requested one is imported.

A subcommand's module has either a function ``command``, with arguments annotated for typer, or a typer application
``app``. A command raises `ChatBridgeError` for a user's mistake and returns an exit status or None.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Annotated, NamedTuple

import typer

from lavis_chatbridge import __version__
from lavis_chatbridge.errors import INSTALL_LAVIS, ChatBridgeError
from lavis_chatbridge.launchers import calm_threads
from lavis_chatbridge.plugin.launch import exit_status, returning_status, spread


class Command(NamedTuple):
    """One subcommand: its name, its module in this package, and one line of help."""

    name: str
    module: str
    help: str


COMMANDS = (
    Command("train", "plugin.train", "Train with a configuration file (as python -m lavis.train)."),
    Command("evaluate", "plugin.evaluate", "Score a model on test splits (as python -m lavis.evaluate)."),
    Command("compare", "plugin.compare", "Compare two evaluations sample by sample."),
    Command("world", "toyworld.command", "Build the embedded world, a small synthetic data set."),
    Command("weights", "models.weights", "List, download and convert weights."),
    Command("export-llm", "plugin.export_llm", "Write the language model with LoRA merged."),
    Command("convert", "plugin.convert", "Convert a run, a Hugging Face folder or a checkpoint."),
    Command("check-data", "datasets.check", "Check a data file and count its samples."),
    Command("convert-data", "datasets.convert", "Write annotations of any format as our JSONL."),
    Command("shard", "plugin.shard", "Write data sets as webdataset shards."),
    Command("cache-features", "plugin.cache_features", "Store the frozen encoders' outputs."),
    Command("doctor", "plugin.doctor", "Check packages, devices, files and memory before a run."),
    Command("chat", "chat.terminal", "Talk with a model about images, videos and sounds."),
    Command("ask", "chat.ask", "Ask one question, or a file of them."),
    Command("serve", "chat.server.command", "Answer over HTTP like OpenAI's chat completions."),
    Command("web", "chat.web", "Chat in the browser."),
    Command("multis", "multis.command", "Make chat data: annotate, generate, check, build."),
)

ANSWERING = ("chat", "ask", "serve", "web")
"""Commands that load a model for inference and should start quickly."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 2 after a user's mistake, or the subcommand's own."""
    if argv is None:  # called as a program
        calm_threads(os.environ)
    words = list(sys.argv[1:] if argv is None else argv)
    return exit_status(lambda: _run(words))


def _run(words: Sequence[str]) -> int | None:
    app = typer.Typer(
        name="chatbridge",
        help="ChatBridge for LAVIS: images, videos and sounds for one language model.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_version)
    try:
        for entry in COMMANDS:
            if words[:1] != [entry.name]:  # not requested: its import may take seconds
                app.command(entry.name, help=entry.help)(lambda: None)
                continue
            module = _imported(entry)
            if hasattr(module, "app"):
                app.add_typer(module.app, name=entry.name, help=entry.help)
            else:
                app.command(entry.name, help=entry.help)(returning_status(module.command))
        return app(spread(words), prog_name="chatbridge")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lavis":
            raise ChatBridgeError(f"LAVIS is not installed: {INSTALL_LAVIS}") from error
        raise


def _imported(entry: Command) -> ModuleType:
    if entry.name in ANSWERING:
        from lavis_chatbridge.plugin import quick

        quick.start()
    return import_module(f"lavis_chatbridge.{entry.module}")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chatbridge {__version__}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of ``chatbridge`` itself."""


if __name__ == "__main__":
    sys.exit(main())
