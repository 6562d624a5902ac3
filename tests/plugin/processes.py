"""Processes of the plugin's tests: what to run, where, and what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Ran:
    """What a process left behind."""

    status: int
    out: str
    err: str

    @property
    def facts(self) -> dict:
        """The JSON object that the last line of its output is."""
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])


@dataclass
class Install:
    """An environment in which the plugin is installed: its interpreter and its scripts."""

    python: Path
    scripts: Path


@dataclass
class Probe:
    """A process to run: the words after the interpreter, or after a script's name."""

    words: list[str]
    install: str = "editable"
    script: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Changes to this process's own; a PYTHONPATH is relative to the working directory."""
    files: dict[str, str] = field(default_factory=dict)
    """Files to lay into its working directory, which is its own and elsewhere empty."""


def python_of(facts: str) -> list[str]:
    """The words that run a piece of Python and print the dictionary ``facts`` which it fills."""
    return ["-c", f"import json\nfacts = {{}}\n{facts}\nprint(json.dumps(facts))"]


def run(probe: Probe, install: Install, folder: Path) -> Ran:
    """Run a probe in an install, with ``folder`` as its working directory, and wait for it."""
    for name, text in probe.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    first = install.python if probe.script is None else install.scripts / probe.script
    # A PYTHONPATH to the checkout would stand in for the install under test.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**inherited, **probe.environment}
    if "PYTHONPATH" in probe.environment:
        environment["PYTHONPATH"] = str(folder / probe.environment["PYTHONPATH"])
    ran = subprocess.run(
        [first, *probe.words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)
