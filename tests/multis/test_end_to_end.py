"""All stages by the command, on media of the embedded world, against a server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.schema import read_jsonl
from tests.multis.openai_server import OpenAIServer, Reply, failure
from tests.multis.test_training_step import take_steps

FAULTS = {
    0: failure(500),
    1: failure(429, "slow down", retry_after_ms="200"),
    2: Reply(b'{"choices": [{"mess'),
    3: Reply(cut=0.5),
    4: Reply(delay=300),
    5: Reply(finish="length"),
}
"""By the number of the request: an error, a rate limit, malformed JSON, half a body, a time-out, a truncated answer."""


def run(*arguments: object) -> int:
    return cli.main(["multis", *map(str, arguments)])


@pytest.fixture
def annotated(world: Path, tmp_path: Path) -> Path:
    regions = {
        f"{item['id']}/{number}": [{"box": [0, 0, 28, 56], "description": "a plain background", "score": 0.9}]
        for item in map(json.loads, (world / "items.jsonl").read_text().splitlines())
        for number in range(3)
    }
    (tmp_path / "grit.json").write_text(json.dumps(regions))
    assert (
        run("annotate", world / "items.jsonl", "--out", tmp_path / "notes", "--with", f"grit={tmp_path}/grit.json") == 0
    )
    return tmp_path / "notes"


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A server that fails in each way once."""
    with OpenAIServer(lambda number, body: FAULTS.get(number, Reply())) as running:
        yield running


def test_from_media_to_a_training_step(
    world: Path, annotated: Path, tmp_path: Path, server: OpenAIServer, golden_dir: Path, capsys
) -> None:
    records = [json.loads(line) for file in annotated.glob("*.jsonl") for line in file.open()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == 8
    assert [frame["position"] for frame in by_id["both0"]["frames"]] == [0.1667, 0.5, 0.8333]
    assert by_id["both0"]["frames"][0]["regions"][0]["box"][2] < 1, "a share of the width, no pixels"
    assert by_id["both0"]["written_by"]["frames.regions"] == "grit import grit.json"
    assert by_id["both0"]["written_by"]["captions"] == "human"

    generated, checked = tmp_path / "generated", tmp_path / "checked"
    _generate(annotated, generated, server, capsys)
    accepted = _check(annotated, generated, checked, world)
    _build(world, tmp_path, accepted)
    kinds = take_steps(tmp_path / "multis", golden_dir, accepted + 1, batches=24)
    assert len(kinds) >= 4, "image, video, audio, and video with audio"


def _generate(annotated: Path, generated: Path, server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run, a run whose faults are all mended, and one that finds everything answered."""
    asked = ("generate", annotated, "--out", generated, "--model", "m", "--base-url", server.url)
    asked += ("--price-of", "gpt-4o", "--timeout", "5")
    assert run(*asked, "--dry-run") == 0
    assert "requests to send:      24" in capsys.readouterr().out
    assert server.asked.total() == 0
    assert run(*asked) == 0
    assert "answered 23, known 0, failed 1" in capsys.readouterr().out, "the malformed answer costs its request"
    assert run(*asked) == 0
    assert "answered 1, known 23, failed 0; $0.0840 spent" in capsys.readouterr().out, (
        "24 * (1000 * 2.5 + 100 * 10) / 1e6"
    )
    assert len(server.asked) == 24 == len(server.answered)
    total = server.asked.total()
    assert total >= 24 + 5, "failed requests were sent again"
    assert run(*asked) == 0, "a third run finds everything answered"
    assert server.asked.total() == total


def _check(annotated: Path, generated: Path, checked: Path, world: Path) -> int:
    """Rules, statistics and the page; the number of accepted samples."""
    assert run("check", generated, "--annotations", annotated, "--out", checked) == 0
    numbers = json.loads((checked / "statistics.json").read_text())
    assert numbers["accepted"] + numbers["rejected"] == 24
    assert numbers["accepted"] >= 19, numbers["reasons"]
    assert numbers["reasons"]["truncated"] == 1
    assert run("stats", checked) == 0
    assert (
        run("page", checked, "--media-root", world, "--out", checked.parent / "page.html", "--annotations", annotated)
        == 0
    )
    page = (checked.parent / "page.html").read_text()
    assert page.count("<figure") == 24
    assert all(f"<{tag} " in page for tag in ("img", "video", "audio"))
    return numbers["accepted"]


def _build(world: Path, tmp_path: Path, accepted: int) -> None:
    """What was accepted and a task's data as one MULTIS, whose shards hold the media byte for byte."""
    (tmp_path / "task.jsonl").write_text(
        json.dumps(
            {
                "id": "q1",
                "media": [json.loads((world / "items.jsonl").read_text().splitlines()[0])["media"][0]],
                "turns": [{"role": "user", "text": "What shape is it?"}, {"role": "assistant", "text": "a ring"}],
            }
        )
        + "\n"
    )
    (tmp_path / "build.yaml").write_text(
        f"""
sources:
  - {{name: chat, samples: [checked/accepted.jsonl], media_root: {world}, licence: CC0}}
  - {{name: shapes, samples: [task.jsonl], media_root: {world}, licence: CC0, task: image_qa}}
"""
    )
    assert run("build", tmp_path / "build.yaml", "--out", tmp_path / "multis") == 0
    manifest = json.loads((tmp_path / "multis" / "manifest.json").read_text())
    assert manifest["samples"] == accepted + 1
    assert manifest["sources"]["shapes"]["by_task"] == {"image_qa": 1}
    assert manifest["sources"]["chat"]["by_modality"].keys() == {"image", "video", "audio", "video+audio"}
    samples = list(read_jsonl(tmp_path / "multis" / "chat" / "annotations.jsonl"))
    assert {sample.task for sample in samples} == {"conversation", "detail", "reasoning"}
    both = next(sample for sample in samples if sample.modality == "video+audio")
    assert [turn.media for turn in both.turns[:2]] == [("video", "audio"), ()]
    original = world / json.loads((tmp_path / "checked/accepted.jsonl").read_text().splitlines()[0])["media"][0]["path"]
    with open(samples[0].media[0].path, "rb") as shard:
        shard.seek(samples[0].media[0].offset)
        assert shard.read(samples[0].media[0].size) == original.read_bytes()
