"""docs/api is what the docstrings say now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    sys.version_info < (3, 11), reason="griffe's last release for Python 3.10 writes signatures otherwise"
)
def test_the_reference_is_the_docstrings(repository: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(repository / "docs/make_api.py"), str(tmp_path)], check=True, cwd=tmp_path)
    kept = {path.name: path.read_text(encoding="utf-8") for path in (repository / "docs/api").glob("*.md")}
    made = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.md")}
    assert sorted(kept) == sorted(made)
    assert [name for name, text in made.items() if kept[name] != text] == [], "run `make docs`"
    assert "`Session." in made["chat.md"]
    assert "**Raises**\n\n- `MediaError`" in made["media.md"]
