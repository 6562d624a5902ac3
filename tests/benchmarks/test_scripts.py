"""Every benchmark opens with its command, whose options its parser has; tables state date, versions and command."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "common"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_opens_with_its_command_and_knows_its_options(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    opening = ast.get_docstring(ast.parse(text)) or ""
    commands = re.findall(rf"^    .*python benchmarks/{script.name}(?:.|\n {{5,}})*", opening, flags=re.MULTILINE)
    assert commands
    shown = {option for command in commands for option in re.findall(r"--[a-z][a-z-]*", command)}
    assert shown <= {"--write", *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text)}


@pytest.mark.parametrize("table", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_table_names_an_existing_script(table: Path) -> None:
    named = re.findall(
        r"`(?:OMP_NUM_THREADS=\d+ )?python benchmarks/(\w+\.py)[^`]*`", table.read_text(encoding="utf-8")
    )
    assert named
    assert all((FOLDER / name).is_file() for name in named)


def test_circumstances_name_the_command(benchmark: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    common = benchmark("common")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = common.circumstances("a.py", "--rounds 2", modules=(np,))
    assert told.endswith(f", numpy {np.__version__}; `OMP_NUM_THREADS=1 python benchmarks/a.py --rounds 2`.\n")
    assert re.match(r"\d{4}-\d\d-\d\d, \d+ CPU core\(s\), Python 3\.", told)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert common.circumstances("a.py").endswith("; `python benchmarks/a.py`.\n")
