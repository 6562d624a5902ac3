"""Kill -9 at random moments: nothing that was answered is asked again, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lavis_chatbridge.multis.generate import workers_for
from lavis_chatbridge.multis.journal import read_journal
from lavis_chatbridge.multis.ledger import answers
from tests.multis.killed_generation import CONCURRENCY
from tests.multis.openai_server import OpenAIServer

COUNT, KILLS = 120, 4


def killed_run(folder: Path, server: OpenAIServer, repository: Path, mode: str) -> str:
    program = [sys.executable, "-m", "tests.multis.killed_generation"]
    arguments = [server.url, str(folder), str(COUNT), str(KILLS), mode, "7"]
    done = subprocess.run([*program, *arguments], cwd=repository, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("killed after") >= KILLS
    return done.stdout


@pytest.mark.parametrize("mode", ["ask", "recover"])
def test_kills_lose_nothing_and_repeat_nothing_answered(tmp_path: Path, repository: Path, mode: str) -> None:
    with OpenAIServer(latency=0.05, remember=False) as server:
        killed_run(tmp_path, server, repository, mode)
    assert len(server.asked) == COUNT, "every request reached the server"
    recorded = [record["id"] for record in answers(tmp_path)]
    assert len(recorded) == len(set(recorded)) == COUNT, "every request has one answer"

    sent: Counter[str] = Counter()
    closed: set[str] = set()
    for record in read_journal(tmp_path / "journal.jsonl"):
        if record["event"] == "sent":
            assert record["id"] not in closed, "asked again although its answer was written down"
            sent[record["id"]] += 1
        elif record["event"] == "answer":
            closed.add(record["id"])
    assert all(server.asked[request] <= sent[request] for request in sent), "nothing is sent before it is written down"
    repeated = server.asked.total() - COUNT
    assert repeated <= KILLS * workers_for(CONCURRENCY), "only what was under way at a kill"
    if mode == "recover":
        assert set(server.answered.values()) == {1}, "with stored answers, no work is done twice at all"
