"""Runs the files and commands of docs/multis.md in order; OPENAI_BASE_URL points the client at a server on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis_chatbridge import cli
from tests.media.making import tone, video_file
from tests.multis.openai_server import OpenAIServer

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "multis.md").read_text(encoding="utf-8")
SECTION = TEXT.split("## Your own, from a folder of clips")[1].split("\n## ")[0]
LATER = [line for line in re.findall(r"^    (chatbridge multis .*)$", TEXT, flags=re.M) if "/weights/" not in line]
"""The commands of the later sections, apart from annotators whose weights are not here."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's folder before the first command; the working directory is above it."""
    clips = tmp_path / "my_clips"
    (clips / "clips").mkdir(parents=True)
    texts = dict(zip(("items.jsonl", "frames.json"), blocks("json"), strict=True))
    texts |= dict(zip(("build.yaml", "run.yaml"), blocks("yaml"), strict=True))
    for name, text in texts.items():
        assert name in SECTION
        (clips / name).write_text(text, encoding="utf-8")
    for path in set(re.findall(r'"path": "(.*?)"', texts["items.jsonl"])):
        (clips / path).write_bytes(video_file(sound=tone(1.2, 48_000)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    return clips


def follow(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *rest = shlex.split(line)
    if program == "export":
        monkeypatch.setenv(*rest[0].split("=", 1))
    elif program == "chatbridge":
        assert cli.main(rest) == 0, line
    else:
        assert program == "python", line
        subprocess.run([sys.executable, *rest], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        monkeypatch.setenv("OPENAI_BASE_URL", running.url)
        yield running


def test_from_a_folder_of_clips_to_a_model(
    folder: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (line for block in blocks("bash") for line in block.splitlines()):
        follow(line, monkeypatch)
        assert not line.endswith("--dry-run") or server.asked.total() == 0
    assert server.asked.total() == 6, "each clip is asked about in three kinds"
    assert re.search(r"requests to send:      6(.*\n)*cost, about: +\$0.00[1-9]", capsys.readouterr().out)
    prompts = [body["messages"][-1]["content"] for body in server.bodies]
    assert sum("a pot with a wooden spoon" in prompt for prompt in prompts) == 3, "the frames' captions were read"
    assert sum("Brakes squeal, then doors hiss." in prompt for prompt in prompts) == 3
    assert (folder / "page.html").read_text(encoding="utf-8").count("accepted</span>") == 6
    manifest = json.loads((folder / "multis" / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["sources"]["my_chat"]["by_modality"] == {"video": 3, "video+audio": 3}
    assert (folder.parent / "output/my_chat/model.safetensors").stat().st_size > 0

    monkeypatch.chdir(folder)
    shutil.rmtree("multis")
    assert [line.split()[2] for line in LATER] == ["generate", "generate", "check", "page", "build"]
    for line in LATER:
        follow(line, monkeypatch)
    assert server.asked.total() == 6, "the same questions are not asked again"
    assert "requests to send:      0 (6 have an answer)" in capsys.readouterr().out
    assert Path("multis/manifest.json").is_file()
