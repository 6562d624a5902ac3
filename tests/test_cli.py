"""The ``chatbridge`` command: its table, its help, and how it reports a user's mistake."""

from __future__ import annotations

import argparse
from importlib import import_module
from types import SimpleNamespace

import pytest

import lavis_chatbridge
from lavis_chatbridge import cli
from lavis_chatbridge.errors import ConfigError


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_every_command_has_arguments_and_help(command, capsys):
    module = import_module(command.module)
    module.add_arguments(argparse.ArgumentParser())
    with pytest.raises(SystemExit) as stopped:
        cli.main([command.name, "--help"])
    assert stopped.value.code == 0
    assert f"chatbridge {command.name}" in capsys.readouterr().out


def test_help_lists_every_command_and_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert all(command.name in printed for command in cli.COMMANDS)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"chatbridge {lavis_chatbridge.__version__}\n"


@pytest.mark.parametrize("words", [[], ["no-such-command"]])
def test_a_wrong_command_line_is_status_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: chatbridge" in capsys.readouterr().err


@pytest.fixture
def command(monkeypatch):
    """A command whose run() does what a test says."""
    module = SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--fast", action="store_true"))
    monkeypatch.setattr(cli, "COMMANDS", (cli.Command("try", "some.module", "try something"),))
    monkeypatch.setattr(cli, "import_module", {"some.module": module}.__getitem__)
    return module


def test_the_exit_status_is_the_commands(command):
    command.run = lambda args: 3 if args.fast else 0
    assert cli.main(["try", "--fast"]) == 3
    assert cli.main(["try"]) == 0


def test_a_users_mistake_is_one_line_and_a_fault_of_ours_a_traceback(command, capsys):
    def mistaken(args):
        raise ConfigError("run.sed is unknown;\ndid you mean run.seed?")

    command.run = mistaken
    assert cli.main(["try"]) == 2
    assert capsys.readouterr().err == "error: run.sed is unknown; did you mean run.seed?\n"
    command.run = lambda args: 1 // 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["try"])


def test_an_interrupt_is_no_traceback(command, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    command.run = interrupted
    assert cli.main(["try"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
