"""All stages by the command, on media of the embedded world, against a server that fails; test_guide.py also trains."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.schema import read_jsonl
from tests.multis.openai_server import OpenAIServer, Reply, failure

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
def server() -> Iterator[OpenAIServer]:
    """A server that fails in each way once."""
    with OpenAIServer(lambda number, body: FAULTS.get(number, Reply())) as running:
        yield running


def test_from_media_to_multis(
    world: Path, tmp_path: Path, server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, generated, checked = tmp_path / "notes", tmp_path / "generated", tmp_path / "checked"
    grit = {"both0/0": [{"box": [0, 0, 28, 56], "description": "a plain background", "score": 0.9}]}
    (tmp_path / "grit.json").write_text(json.dumps(grit))
    assert run("annotate", world / "items.jsonl", "--out", notes, "--with", f"grit={tmp_path}/grit.json") == 0
    _generate(notes, generated, server, capsys)
    assert all(body["top_k"] == 5 for body in server.bodies)
    (tmp_path / "check.yaml").write_text(
        "limits: {conversation: {pairs: [2, 9], question_words: [1, 60], answer_words: [2, 99]}}"
    )
    assert run("check", generated, "--annotations", notes, "--out", checked, "--config", tmp_path / "check.yaml") == 2
    (tmp_path / "check.yaml").write_text("duplicate_from: 0.85")
    assert run("check", generated, "--annotations", notes, "--out", checked, "--config", tmp_path / "check.yaml") == 0
    counts = json.loads((checked / "statistics.json").read_text())
    assert counts["accepted"] + counts["rejected"] == 24
    assert counts["accepted"] >= 19, counts["reasons"]
    assert counts["reasons"]["truncated"] == 1
    (tmp_path / "build.yaml").write_text(
        f"sources: [{{name: chat, samples: [checked/accepted.jsonl], media_root: {world}, licence: CC0}}]"
    )
    assert run("build", tmp_path / "build.yaml", "--out", tmp_path / "multis") == 0
    samples = list(read_jsonl(tmp_path / "multis" / "chat" / "annotations.jsonl"))
    assert len(samples) == counts["accepted"]
    assert {sample.task for sample in samples} == {"conversation", "detail", "reasoning"}
    both = next(sample for sample in samples if sample.modality == "video+audio")
    assert [turn.media for turn in both.turns[:2]] == [("video", "audio"), ()]
    assert {sample.modality for sample in samples} == {"image", "video", "audio", "video+audio"}


def _generate(notes: Path, generated: Path, server: OpenAIServer, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run, a run in which one fault remains, one that asks again, and one that finds everything answered."""
    asked = ("generate", notes, "--out", generated, "--model", "m", "--base-url", server.url)
    asked += ("--price-of", "gpt-4o", "--timeout", "5", "--extra-body", "top_k=5")
    assert run(*asked, "--dry-run") == 0
    assert "requests to send:      24" in capsys.readouterr().out
    assert server.asked.total() == 0
    assert run(*asked) == 0
    assert "answered 23, known 0, failed 1" in capsys.readouterr().out, "the malformed answer costs its request"
    assert run(*asked) == 0
    assert "answered 1, known 23, failed 0; $0.0840 spent" in capsys.readouterr().out  # 24 * (1000 * 2.5 + 100 * 10)
    assert len(server.asked) == 24 == len(server.answered)
    total = server.asked.total()
    assert total >= 24 + 5, "failed requests were sent again"
    assert run(*asked) == 0
    assert server.asked.total() == total
