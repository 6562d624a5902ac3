"""Real processes for the plugin's tests: two installs (editable, wheel) and the probes that run in them.

One ``import lavis`` takes seconds, so each process answers many questions at once, and all start together as soon as
the first test asks for one.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.plugin.processes import Install, Probe, Ran, run

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGED = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "lavis_chatbridge")
PROCESSES_AT_ONCE = 2


@pytest.fixture(scope="session")
def editable() -> Install:
    """The environment of the tests themselves, into which ``make install`` put the plugin in editable mode."""
    return Install(Path(sys.executable), Path(sysconfig.get_path("scripts")))


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
def wheel(wheel_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """A virtual environment with the wheel; torch, LAVIS and the rest are seen through a path to this environment's."""
    folder = tmp_path_factory.mktemp("wheel-venv")
    venv.create(folder, with_pip=False, symlinks=True)
    install = Install(folder / "bin" / "python", folder / "bin")
    ask = [install.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    # A line of a .pth file adds a folder to the path but reads no .pth file in it: the editable install stays out.
    Path(own, "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    _pip("--python", install.python, "install", "--no-deps", "--no-index", "--ignore-installed", wheel_file)
    return install


@pytest.fixture(scope="session")
def run_all(editable: Install, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """A function that starts a table of probes in the background; its result gives what each of them left, by name."""
    pool = ThreadPoolExecutor(PROCESSES_AT_ONCE)

    def start(probes: dict[str, Probe]) -> Callable[[str], Ran]:
        futures: dict[str, Future[Ran]] = {}
        for name, probe in sorted(
            probes.items(), key=lambda item: item[1].install
        ):  # editable first: wheel needs building
            install = editable if probe.install == "editable" else request.getfixturevalue(probe.install)
            futures[name] = pool.submit(run, probe, install, tmp_path_factory.mktemp("cwd"))
        return lambda name: futures[name].result()

    yield start
    pool.shutdown(cancel_futures=True)


def _pip(*arguments: object) -> None:
    words = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
