"""``chatbridge check-data`` on a file of a million lines: seconds and peak memory, beside plain ``json.loads``.

    python benchmarks/check_data.py [--lines 1000000] [--write benchmarks/check_data.md]

Goal: at most 60 s and 1 GB. The file has captions, questions and chat over 100,000 distinct (small, real) files. The
ratio is that of CPU seconds to those of the baseline, ``json.loads``, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import circumstances, tell

FILES_PER_FOLDER = 1000
SAMPLES_PER_FILE = 10


def write(folder: Path, lines: int) -> Path:
    """The file and its media (which are looked for, not opened)."""
    files = max(1, lines // SAMPLES_PER_FILE)
    for number in range(files):
        path = folder / f"{number // FILES_PER_FOLDER:04d}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    target = folder / "data.jsonl"
    with open(target, "w", encoding="utf-8") as out:
        for number in range(lines):
            place = f"{number % files // FILES_PER_FOLDER:04d}/{number % files}.jpg"
            record: dict = {"id": f"sample-{number}", "source": "bench", "media": [{"type": "image", "path": place}]}
            if number % 3 == 0:
                record["captions"] = [f"a picture of thing number {number} on a table"]
            else:
                record["task"] = "image_qa"
                question = {"role": "user", "text": f"What is thing number {number}?", "media": [0]}
                record["turns"] = [question, {"role": "assistant", "text": "It is a cup of tea."}]
            out.write(json.dumps(record) + "\n")
    return target


def measured(*command: str) -> tuple[float, float, float]:
    """Seconds, CPU seconds (which other work on the machine does not stretch) and peak memory (MB) of a process."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "used = resource.getrusage(resource.RUSAGE_CHILDREN); print(used.ru_utime + used.ru_stime, used.ru_maxrss)"
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    cpu, memory = map(float, done.stdout.split())
    return seconds, cpu, memory / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(write(Path(folder), args.lines))
        plain = "import json, sys\nfor line in open(sys.argv[1]): json.loads(line)"
        check = (
            "import sys; from lavis_chatbridge.datasets.check import check_file; assert check_file(sys.argv[1]).usable"
        )
        rows = {"json.loads only": measured(sys.executable, "-c", plain, path)}
        rows["check-data"] = measured(sys.executable, "-c", check, path)
    baseline = rows["json.loads only"][1]
    how = circumstances("check_data.py", f"--lines {args.lines}")
    lines = [
        f"# `chatbridge check-data` on {args.lines:,} lines\n",
        how,
        "Goal for a million: at most 60 s and 1 GB.\n",
    ]
    lines += ["| | seconds | CPU s | ratio | peak MB |", "|---|---:|---:|---:|---:|"]
    for name, (seconds, cpu, memory) in rows.items():
        lines.append(f"| {name} | {seconds:.1f} | {cpu:.1f} | {cpu / baseline:.1f} | {memory:.0f} |")
    tell("\n".join(lines) + "\n", args.write)


if __name__ == "__main__":
    main()
