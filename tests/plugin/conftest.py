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
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "lavis_chatbridge")
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """A function that runs a program of an install in an empty folder; ``startup`` is a ``sitecustomize.py``."""

    def run(program: str, *words: str, wheel: bool = False, startup: str = "", **environment: str):
        scripts = request.getfixturevalue("wheel") if wheel else Path(sys.executable).parent
        (tmp_path / "sitecustomize.py").write_text(startup)
        # A PYTHONPATH to the checkout would stand in for the install under test.
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        path = {"PYTHONPATH": str(tmp_path)} if startup else {}
        return subprocess.run(
            [scripts / program, *words],
            cwd=tmp_path,
            env=inherited | path | environment,
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def facts_of(run: Run) -> Callable[..., tuple[dict, str]]:
    """A function that runs Python which fills a dictionary ``facts``: the dictionary, and what it wrote to stderr."""

    def facts_of(code: str, **options) -> tuple[dict, str]:
        ran = run("python", "-c", f"import json\nfacts = {{}}\n{code}\nprint(json.dumps(facts))", **options)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1]), ran.stderr

    return facts_of


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


def _pip(*arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
