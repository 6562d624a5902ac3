"""One evaluation as one of several processes; importable by a process that knows no test."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lavis_chatbridge import cli


def evaluate(rank: int, cfg_path: str, options: list[str], folder: str) -> None:
    """Evaluate as a configuration file says, keep what is printed; ``rank`` comes from the launcher's environment."""
    with open(Path(folder) / f"printed{rank}.txt", "w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        status = cli.main(["evaluate", "--cfg-path", cfg_path, "--options", *options])
    if status:
        raise SystemExit(status)


def evaluate_suites(rank: int, words: list[str], folder: str) -> None:
    """Evaluate suites and keep the exit status."""
    status = cli.main(["evaluate", *words])
    (Path(folder) / f"status{rank}.txt").write_text(str(status), encoding="utf-8")
