"""Shared by the benchmarks: the circumstances of a measurement as a line of text, and printing a table to a file too.

``python benchmarks/NAME.py`` finds this module, since a script's own folder is first on the path.
"""

from __future__ import annotations

import datetime
import os
import platform
import sys
from pathlib import Path
from types import ModuleType

from lavis_chatbridge.files import write_text


def circumstances(script: str, *options: str, modules: tuple[ModuleType, ...] = ()) -> str:
    """Date, cores, versions and command of a measurement: a line of Markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"Python {platform.python_version()}", *(f"{one.__name__} {one.__version__}" for one in modules)]
    threads = os.environ.get("OMP_NUM_THREADS")
    command = " ".join(
        [*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", f"benchmarks/{script}", *options]
    )
    return f"{datetime.date.today()}, {cores} CPU core(s), {', '.join(versions)}; `{command}`.\n"


def write_table(text: str, file: Path | None) -> None:
    """Print a text, and write it to a file if one is given."""
    sys.stdout.write(text)
    if file is not None:
        write_text(file, text)
