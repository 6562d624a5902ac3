"""docs/data.md, "Your own data in three commands", followed to the letter: folder, JSONL, YAML, three commands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def blocks(language):
    section = GUIDE.read_text(encoding="utf-8").split("## Your own data in three commands")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


def sound(path):
    tone = (np.sin(np.arange(16_000) * 0.2) * 9000).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(tone.tobytes())


@pytest.fixture
def folder(tmp_path):
    """The guide's folder: its own lines, repeated to ten with other ids, and a file for each path they name."""
    lines = [json.loads(line) for line in blocks("json")[0].splitlines()]
    data = tmp_path / "my_data"
    for line in lines:
        path = data / line["media"][0]["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (200, 60, 0)).save(path) if path.suffix == ".jpg" else sound(path)
    ten = [{**lines[i % len(lines)], "id": str(i)} for i in range(10)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ten), encoding="utf-8")
    (data / "run.yaml").write_text(blocks("yaml")[0], encoding="utf-8")
    return tmp_path


def test_the_guides_three_commands(folder):
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": os.pathsep.join((scripts, os.environ["PATH"])), "OMP_NUM_THREADS": "1"}
    environment["CHATBRIDGE_CACHE"] = str(folder / "cache")
    commands = blocks("sh")[0].strip().splitlines()
    assert len(commands) == 3
    for command in commands:
        done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "output/mine/model.safetensors").stat().st_size > 0
    [path] = folder.glob("output/mine/result/test*.jsonl")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(record["sample_id"] for record in written) == [str(i) for i in range(10)]
    assert {record["source"] for record in written} == {"chatbridge_jsonl/image", "chatbridge_jsonl/audio"}
