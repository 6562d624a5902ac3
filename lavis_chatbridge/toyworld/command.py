"""``chatbridge world``: build the embedded world, and report what a demo on it found."""

from __future__ import annotations

import argparse
from importlib import import_module

ACTIONS = {
    "build": ("lavis_chatbridge.toyworld.build", "write the world to a folder"),
    "report": ("lavis_chatbridge.toyworld.report", "write report.html and report.json of a demo's runs"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each of `ACTIONS`."""
    actions = parser.add_subparsers(dest="action", required=True)
    for name, (module, words) in ACTIONS.items():
        action = actions.add_parser(name, help=words)
        owner = import_module(module)
        owner.add_arguments(action)
        action.set_defaults(act=owner.run)


def run(args: argparse.Namespace) -> int:
    """Run the chosen one; returns the exit status."""
    return args.act(args)
