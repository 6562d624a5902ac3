"""The ``chatbridge`` command: a table of subcommands; only the requested one is imported.

A subcommand's module has either a function ``command``, with arguments annotated for typer, or a typer application
``app``. A command raises `ChatBridgeError` for a user's mistake and returns an exit status or None.

``plugin/autoload.py`` serves this file also as ``lavis.train`` and ``lavis.evaluate``.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer

from lavis_chatbridge import __version__
from lavis_chatbridge.errors import INSTALL_LAVIS, ChatBridgeError, one_line
from lavis_chatbridge.launchers import set_thread_defaults
from lavis_chatbridge.plugin import quick


class Command(NamedTuple):
    """One subcommand: its name, its module in this package, one line of help, and whether it only answers."""

    name: str
    module: str
    help: str
    answers: bool = False


COMMANDS = (
    Command("train", "plugin.launch", "Train with a configuration file (also lavis.train)."),
    Command("evaluate", "plugin.evaluate", "Score a model on test splits (also lavis.evaluate)."),
    Command("compare", "plugin.compare", "Compare two evaluations sample by sample."),
    Command("world", "toyworld.build", "Build the embedded world, a small synthetic data set."),
    Command("weights", "models.weights", "List and download weights."),
    Command("export-llm", "plugin.export_llm", "Write the language model with LoRA merged."),
    Command("convert", "plugin.convert", "Convert a run, a Hugging Face folder or a checkpoint."),
    Command("check-data", "datasets.check", "Check a data file and count its samples."),
    Command("convert-data", "datasets.convert", "Write annotations of any format as our JSONL."),
    Command("shard", "plugin.shard", "Write data sets as webdataset shards."),
    Command("cache-features", "plugin.cache_features", "Store the frozen encoders' outputs."),
    Command("doctor", "plugin.doctor", "Check packages, devices, files and memory before a run."),
    Command("chat", "chat.terminal", "Talk with a model about images, videos and sounds.", True),
    Command("ask", "chat.ask", "Ask one question, or a file of them.", True),
    Command("serve", "chat.server.command", "Answer over HTTP like OpenAI's chat completions.", True),
    Command("web", "chat.web", "Chat in the browser.", True),
    Command("multis", "multis.command", "Make chat data: annotate, generate, check, build."),
)

SERVED_AS = __spec__.name.rpartition(".")[2] if __spec__ is not None and __spec__.name.startswith("lavis.") else ""
"""The subcommand, if this file runs as ``lavis.train`` or ``lavis.evaluate``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status: 0, 2 after a user's mistake, or the subcommand's own."""
    if argv is None:  # called as a program
        set_thread_defaults(os.environ)
    words = [*([SERVED_AS] if SERVED_AS else []), *(sys.argv[1:] if argv is None else argv)]
    return exit_status(lambda: _run(words))


def exit_status(action: Callable[[], int | None]) -> int:
    """The status that ``action`` returns or exits with.

    For a user's mistake, or a file that cannot be read or written, print ``error: ...`` and return 2.
    """
    try:
        return action() or 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except ChatBridgeError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: cannot read or write {error.filename}: {error.strerror or one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run(words: Sequence[str]) -> int | None:
    app = typer.Typer(
        name="chatbridge",
        help="ChatBridge for LAVIS: images, videos and sounds for one language model.",
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        result_callback=_exit,
    )
    app.callback(invoke_without_command=True)(_version)
    try:
        for entry in COMMANDS:
            if words[:1] != [entry.name]:  # not requested: its import may take seconds
                app.command(entry.name, help=entry.help)(lambda: None)
                continue
            if entry.answers:
                quick.start()
            module = import_module(f"lavis_chatbridge.{entry.module}")
            if hasattr(module, "app"):
                app.add_typer(module.app, name=entry.name, help=entry.help)
            else:
                app.command(entry.name, help=entry.help)(module.command)
        return app(spread(words), prog_name="chatbridge")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lavis":
            raise ChatBridgeError(f"LAVIS is not installed: {INSTALL_LAVIS}") from error
        raise


def _exit(status: Any, **options: Any) -> None:
    """Exit with the status that a subcommand returns, which typer ignores."""
    if status:
        raise typer.Exit(status)


def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Options of ``chatbridge`` itself."""
    if version:
        typer.echo(f"chatbridge {__version__}")
        raise typer.Exit


def spread(words: Sequence[str]) -> list[str]:
    """Rewrite LAVIS's lists for typer: ``--options A=1 B 2`` becomes ``--options A=1 --options B=2``.

    A last word of ``--options`` without a value is an argument of the command, such as a file. ``--ablate`` without a
    value becomes ``--ablate all``.
    """
    result: list[str] = []
    waiting = list(words)
    while waiting:
        option = waiting.pop(0)
        if option not in ("--options", "--ablate", "--splits", "--against"):
            result.append(option)
            continue
        values = list(itertools.takewhile(lambda word: not word.startswith("-"), waiting))
        del waiting[: len(values)]
        if option == "--options":
            rest = iter(values)
            values = [word if "=" in word else "=".join([word, *itertools.islice(rest, 1)]) for word in rest]
            if len(values) > 1 and "=" not in values[-1]:
                waiting.insert(0, values.pop())
        if option == "--ablate":
            values = values or ["all"]
        result += [word for value in values for word in (option, value)] or [option]
    return result


if __name__ == "__main__":
    sys.exit(main())
