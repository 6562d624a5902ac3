"""The ``chatbridge`` command: its table, its help, and how it reports a user's mistake."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Annotated

import pytest
import typer

import lavis_chatbridge
from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import write_text


@pytest.mark.parametrize("entry", cli.COMMANDS, ids=lambda entry: entry.name)
def test_every_command_has_help(entry, capsys):
    assert cli.main([entry.name, "--help"]) == 0
    assert f"chatbridge {entry.name}" in capsys.readouterr().out


def test_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"chatbridge {lavis_chatbridge.__version__}\n"


def test_help_lists_every_command_and_imports_none():
    program = (
        "import sys; from lavis_chatbridge import cli; cli.main(['--help']);"
        "print([m for m in ('torch', 'lavis', 'transformers', 'gradio', 'pydantic') if m in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert all(entry.name in printed for entry in cli.COMMANDS)
    assert printed.splitlines()[-1] == "[]"


@pytest.fixture
def run(monkeypatch):
    """Runs ``chatbridge try WORDS`` with a given function as its command."""
    module = SimpleNamespace()
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("try", "some.module", "try something"), cli.COMMANDS[0]))
    monkeypatch.setattr(cli, "import_module", {"lavis_chatbridge.some.module": module}.__getitem__)

    def run(function, *words):
        module.command = function
        return cli.main(["try", *words])

    return run


def test_laviss_options_are_lists_and_the_exit_status_is_the_commands(run):
    def command(options: Annotated[list[str], typer.Option("--options")], seed: int = 0) -> int:
        assert options == ["a=1", "b=-2", "c=3", "d=4"]
        return seed

    assert run(command, "--options", "a=1", "b=-2", "--seed", "7", "--options", "c", "3", "d", "4") == 7
    assert run(command, "--no-such-option") == 2

    def check(file: str, options: Annotated[list[str], typer.Option("--options")]) -> int:
        return 7 if (file, options) == ("FILE", ["a=b"]) else 1

    assert run(check, "--options", "a=b", "FILE") == 7


def test_a_users_mistake_is_one_line_and_a_fault_of_ours_a_traceback(run, capsys):
    def mistaken() -> None:
        raise ConfigError("run.sed is unknown;\ndid you mean run.seed?")

    def faulty() -> int:
        return 1 // 0

    assert run(mistaken) == 2
    assert capsys.readouterr().err == "error: run.sed is unknown; did you mean run.seed?\n"
    with pytest.raises(ZeroDivisionError):
        run(faulty)


def test_a_file_that_cannot_be_written_is_one_line(run, tmp_path, capsys):
    (tmp_path / "file").touch()

    def writing() -> None:
        write_text(tmp_path / "file" / "y", "text")

    assert run(writing) == 2
    assert capsys.readouterr().err == f"error: cannot read or write {tmp_path / 'file'}: File exists\n"


def test_an_interrupt_is_status_130_and_a_missing_lavis_one_line(run, capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    capsys.readouterr()

    def without_lavis() -> None:
        raise ModuleNotFoundError("No module named 'lavis'", name="lavis")

    assert run(without_lavis) == 2
    message = "error: LAVIS is not installed: pip install --no-deps salesforce-lavis==1.0.2\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("command", ["chat", "web", "serve"])
def test_a_line_says_at_once_what_is_loaded(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--model", "nope"]) == 2
    assert capsys.readouterr().err.startswith("loading nope ...\nerror: unknown model type 'nope'")
