"""Files appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from lavis_chatbridge.files import append_lines, atomic_text, read_json, write_json, write_text


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "former\n")
    with suppress(RuntimeError), atomic_text(target) as file:
        file.write("new, but ")
        file.flush()
        assert target.read_text() == "former\n"
        raise RuntimeError("halfway")
    with pytest.raises(UnicodeEncodeError):
        write_text(target, "\ud800")
    assert target.read_text() == "former\n"
    assert list(tmp_path.iterdir()) == [target]
    write_text(target, "\ud800b", errors="replace")
    assert target.read_text() == "?b"


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_of_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Also those that safetensors writes, which keeps them private."""
    program = (
        "import sys, pathlib; from safetensors.numpy import save_file; from lavis_chatbridge.files import atomic_file\n"
        "with atomic_file(pathlib.Path(sys.argv[1])) as temporary: save_file({}, temporary)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a")], check=True, umask=umask)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode


@pytest.mark.parametrize(
    ("found", "kept"), [(None, ""), ("", ""), ("one\n", "one\n"), ("one\ntw", "one\ntw\n"), ("\n", "\n")]
)
def test_lines_are_appended_behind_half_a_line(tmp_path: Path, found: str | None, kept: str) -> None:
    if found is not None:
        (tmp_path / "a.log").write_text(found)
    append_lines(tmp_path / "a.log", ["ü", "b"])
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == f"{kept}ü\nb\n"


def test_json_is_read_and_damaged_json_is_none(tmp_path: Path) -> None:
    write_json(tmp_path / "x" / "a.json", {"ü": [1, 2]})
    assert read_json(tmp_path / "x" / "a.json") == {"ü": [1, 2]}
    assert read_json(tmp_path / "none.json") is None
    for damaged in ("{", "[" * 100_000):
        (tmp_path / "a.json").write_text(damaged)
        assert read_json(tmp_path / "a.json") is None
