"""Files appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lavis_chatbridge.files import PRIVATE, append_lines, atomic_file, atomic_text, read_json, write_json, write_text


def test_a_writer_that_fails_leaves_the_former_file_and_nothing_beside_it(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "former\n")
    for fail in (_text_halfway, _bytes_halfway):
        with pytest.raises(RuntimeError, match="halfway"):
            fail(target)
    assert target.read_text() == "former\n"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_made_and_who_may_read_is_the_writers_choice(tmp_path: Path) -> None:
    write_json(tmp_path / "x" / "y" / "shared.json", {"ü": [1, 2]})
    write_text(tmp_path / "private.txt", "a", mode=PRIVATE)
    assert read_json(tmp_path / "x" / "y" / "shared.json") == {"ü": [1, 2]}
    assert stat.S_IMODE((tmp_path / "private.txt").stat().st_mode) == 0o600


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_use_files_as_the_umask_has_it(tmp_path: Path, umask: int, mode: int) -> None:
    program = (
        "import sys, pathlib; from safetensors.numpy import save_file; from lavis_chatbridge import files\n"
        "folder = pathlib.Path(sys.argv[1]); files.write_text(folder / 'a.txt', 'a')\n"
        "save_file({}, folder / 'b.safetensors'); files.share(folder / 'b.safetensors')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, umask=umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"a.txt": mode, "b.safetensors": mode}


@pytest.mark.parametrize(
    ("found", "kept"), [(None, ""), ("", ""), ("one\n", "one\n"), ("one\ntw", "one\ntw\n"), ("\n", "\n")]
)
def test_lines_are_appended_behind_half_a_line(tmp_path: Path, found: str | None, kept: str) -> None:
    if found is not None:
        (tmp_path / "a.log").write_text(found)
    append_lines(tmp_path / "a.log", ["ü", "b"])
    assert (tmp_path / "a.log").read_text(encoding="utf-8") == f"{kept}ü\nb\n"


def test_halves_of_characters_are_refused_or_replaced(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a.txt", "\ud800")
    assert list(tmp_path.iterdir()) == []
    write_text(tmp_path / "a.txt", "\ud800b", errors="replace")
    assert (tmp_path / "a.txt").read_text() == "?b"


@pytest.mark.parametrize("content", [None, "{", "[" * 100_000])
def test_what_is_no_json_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert read_json(tmp_path / "a.json") is None


def _text_halfway(target: Path) -> None:
    with atomic_text(target) as file:
        file.write("new, but ")
        file.flush()
        assert target.read_text() == "former\n"
        raise RuntimeError("halfway")


def _bytes_halfway(target: Path) -> None:
    with atomic_file(target) as temporary:
        temporary.write_bytes(b"new, but ")
        raise RuntimeError("halfway")
