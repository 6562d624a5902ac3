"""What the plugin adds to ``import torch``.

    python benchmarks/import_cost.py [--runs 9]

Goal: at most 3 ms; the exit status is 1 where the median is more. The baseline is ``import torch`` alone. Each run is a
fresh process. The plugin's part is timed by itself, since it is lost in the scatter of the whole: after ``import
torch`` without plugins, the two things that torch does for a plugin (load its entry point, call it) are done by hand.
Looking for entry points is torch's own cost, with plugins or without.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

PROBE = """
import time
start = time.perf_counter()
import torch
whole = time.perf_counter() - start
from importlib.metadata import entry_points
entry = next(iter(entry_points(group="torch.backends", name="lavis_chatbridge")))
start = time.perf_counter()
entry.load()()
print(whole * 1e3, (time.perf_counter() - start) * 1e3)
"""
LIMIT_MS = 3.0


def measure() -> tuple[float, float]:
    """Milliseconds of ``import torch`` without plugins, and of what this plugin adds to it, in one fresh process."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    ran = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"install lavis-chatbridge into this environment first:\n{ran.stderr}")
    whole, added = map(float, ran.stdout.split())
    return whole, added


def main() -> int:
    """Print the table; the exit status is 1 where the plugin costs more than the limit."""
    parser = argparse.ArgumentParser(description="What the plugin adds to `import torch`.")
    parser.add_argument("--runs", type=int, default=9, help="processes to measure")
    runs = [measure() for _ in range(parser.parse_args().runs)]
    whole, added = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"{'':26}{'median':>12}{'quickest':>12}{'slowest':>12}{'of import torch':>18}")
    for name, column, share in (("import torch, no plugin", 0, 1.0), ("added by the plugin", 1, added / whole)):
        values = [run[column] for run in runs]
        figures = "".join(f"{value:>9.2f} ms" for value in (statistics.median(values), min(values), max(values)))
        print(f"{name:26}{figures}{share:>18.2%}")
    return int(added > LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())
