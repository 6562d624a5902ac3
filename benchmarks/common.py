"""What the benchmarks share: how a figure was got, in words; this process's memory; a text that is told and kept.

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
    """When, on how many cores, with which versions and by which command something was measured: a line of Markdown."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = [f"Python {platform.python_version()}", *(f"{one.__name__} {one.__version__}" for one in modules)]
    threads = os.environ.get("OMP_NUM_THREADS")
    command = " ".join(
        [*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", f"benchmarks/{script}", *options]
    )
    return f"{datetime.date.today()}, {cores} CPU core(s), {', '.join(versions)}; `{command}`.\n"


def status(key: str) -> int:
    """A line of this process's ``/proc`` status (``VmRSS``, ``VmHWM``, ``RssAnon`` ...), in bytes.

    Raises:
        SystemExit: If the system has no such line.
    """
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.is_file() else ():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {key}: this needs Linux")


def tell(text: str, file: Path | None) -> None:
    """Print a text, and write it to a file where one is named."""
    sys.stdout.write(text)
    if file is not None:
        write_text(file, text)
