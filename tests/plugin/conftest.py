"""Real processes for the plugin's tests, in two installs: editable, and the wheel in an environment of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "lavis_chatbridge")
PROCESSES_AT_ONCE = 2


@dataclass
class Probe:
    """A process to run.

    Args:
        words: The words after the interpreter, or after a script's name.
        wheel: Whether it runs in the wheel's environment.
        script: An installed script that runs instead of the interpreter.
        environment: Changes to this process's own; a PYTHONPATH is relative to the working directory.
        files: Files of its working directory, which is otherwise empty.
    """

    words: list[str]
    wheel: bool = False
    script: str = "python"
    environment: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def python(cls, facts: str, **options) -> Probe:
        """A piece of Python that fills a dictionary ``facts``, which is printed."""
        return cls(["-c", f"import json\nfacts = {{}}\n{facts}\nprint(json.dumps(facts))"], **options)

    def run(self, scripts: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run it with ``folder`` as its working directory."""
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        # A PYTHONPATH to the checkout would stand in for the install under test.
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment = {**inherited, **self.environment}
        if "PYTHONPATH" in self.environment:
            environment["PYTHONPATH"] = str(folder / self.environment["PYTHONPATH"])
        command = [scripts / self.script, *self.words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def facts_of(ran: subprocess.CompletedProcess[str]) -> dict:
    """The dictionary that a probe has printed."""
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def wheel_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plugin's wheel, built from a copy, so that the checkout gets no build folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGED:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", target, source)
    return next(target.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a virtual environment with the wheel; it sees torch, LAVIS and the rest through a path."""
    folder = tmp_path_factory.mktemp("wheel-venv")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    # A line of a .pth file adds a folder to the path but reads no .pth file in it: the editable install stays out.
    Path(own, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _pip("--python", python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel_file)
    return python.parent


@pytest.fixture(scope="session")
def run_all(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """A function that starts a table of probes in the background; its result waits for one of them, by name."""
    pool = ThreadPoolExecutor(PROCESSES_AT_ONCE)

    def start(probes: dict[str, Probe]) -> Callable[[str], subprocess.CompletedProcess[str]]:
        futures: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        for name, probe in sorted(probes.items(), key=lambda item: item[1].wheel):  # the wheel needs building
            scripts = request.getfixturevalue("wheel") if probe.wheel else Path(sys.executable).parent
            futures[name] = pool.submit(probe.run, scripts, tmp_path_factory.mktemp("cwd"))
        return lambda name: futures[name].result()

    yield start
    pool.shutdown(cancel_futures=True)


def _pip(*arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
