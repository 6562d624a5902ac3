"""Generation against a server that fails in every way that servers fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import locked
from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.generate import EndpointError, GenerateSettings, Price, Report, Request, answers
from lavis_chatbridge.multis.prompts import PromptBook
from tests.multis.openai_server import OpenAIServer, Reply, Script, failure

BOOK = PromptBook()
PRICE = Price(input=1000.0, output=10_000.0)  # an answer of the server costs 1000 * 0.001 + 100 * 0.01 = 2 dollars
ANSWER_COST = 2.0


def notes(count: int) -> list[Annotation]:
    return [
        Annotation(
            id=f"item{n}",
            media=(MediumRef(type="audio", path=f"{n}.wav"),),
            sound_captions=(f"A bell rings {n} times.",),
        )
        for n in range(count)
    ]


def settings(server: OpenAIServer | None = None, **values: Any) -> GenerateSettings:
    defaults = {"model": "m", "base_url": server and server.url, "kinds": ("detail",), "concurrency": 4, "retries": 3}
    return GenerateSettings(**(defaults | values))


def requests(count: int, options: GenerateSettings) -> list[Request]:
    return list(stage.plan(lambda: notes(count), BOOK, options))


def run(folder: Path, server: OpenAIServer, count: int, **values: Any) -> Report:
    options = settings(server, **values)
    return stage.generate(requests(count, options), folder, PRICE, options)


def first_fails(reply: Reply, times: int = 1) -> Script:
    return lambda number, body: reply if number < times else Reply()


@pytest.mark.parametrize(
    "reply", [failure(500), failure(503), failure(429, retry_after_ms="50"), failure(408), Reply(cut=0.5)]
)
def test_a_failure_is_tried_again(tmp_path: Path, reply: Reply) -> None:
    with OpenAIServer(first_fails(reply)) as server:
        report = run(tmp_path, server, 1)
    assert (report.answered, report.gave_up, server.asked.total()) == (1, 0, 2)
    assert report.spent == ANSWER_COST


def test_a_timeout_is_tried_again(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(Reply(delay=30))) as server:
        assert run(tmp_path, server, 1, timeout=0.5).answered == 1


@pytest.mark.parametrize(
    "body", [b"{'choices': oops", b'{"choices": []}', b'{"choices": [{"message": {"content": 7}}]}', b"<html>no</html>"]
)
def test_what_is_no_completion_is_given_up_and_asked_by_the_next_run(tmp_path: Path, body: bytes) -> None:
    with OpenAIServer(first_fails(Reply(body))) as server:
        assert run(tmp_path, server, 1).gave_up == 1
        report = run(tmp_path, server, 1)
    assert (report.answered, report.known) == (1, 0)


@pytest.mark.parametrize("reply", [failure(401), failure(403), failure(404), failure(429, code="insufficient_quota")])
def test_a_refusal_ends_the_run(tmp_path: Path, reply: Reply) -> None:
    with (
        OpenAIServer(lambda number, body: reply) as server,
        pytest.raises(EndpointError, match="refuses the model 'm'"),
    ):
        run(tmp_path, server, 50, concurrency=1, retries=0)
    assert server.asked.total() == 1


def test_a_bad_request_is_given_up_without_a_second_try(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(failure(400, "context too long"))) as server:
        report = run(tmp_path, server, 3, concurrency=1)
        assert (report.answered, report.gave_up, server.asked.total()) == (2, 1, 3)
        assert run(tmp_path, server, 3).answered == 1, "the next run tries it again"


def test_a_dead_server_ends_the_run(tmp_path: Path) -> None:
    with OpenAIServer(lambda number, body: failure(500)) as server:
        report = run(tmp_path, server, 50, retries=0, stop_after=5, concurrency=1)
    assert "5 requests in a row" in report.stopped
    assert server.asked.total() == 5


def test_truncated_answers_are_kept_as_such(tmp_path: Path) -> None:
    with OpenAIServer(lambda number, body: Reply(finish="length")) as server:
        run(tmp_path, server, 1)
    assert next(answers(tmp_path))["finish"] == "length"


def test_nothing_is_asked_twice_over_runs_and_duplicates(tmp_path: Path, server: OpenAIServer) -> None:
    options = settings(server)
    every = requests(5, options)
    stage.generate(every[:3] + every[:3], tmp_path, PRICE, options)
    report = stage.generate(every + every, tmp_path, PRICE, options)
    assert (report.answered, report.known, report.spent) == (2, 8, 5 * ANSWER_COST)
    assert max(server.asked.values()) == 1
    assert len(list(answers(tmp_path))) == 5


def test_concurrency_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    with OpenAIServer(latency=0.6) as server:
        run(tmp_path, server, 16, concurrency=8)
    assert server.most_at_once == 8


def test_the_rate_limit_spreads_requests(tmp_path: Path, server: OpenAIServer) -> None:
    run(tmp_path, server, 12, requests_per_minute=600, concurrency=12)
    assert server.times[-1] - server.times[0] >= 0.9


def test_a_run_stops_at_its_budget_over_all_runs(tmp_path: Path, server: OpenAIServer) -> None:
    report = run(tmp_path, server, 20, max_cost=3 * ANSWER_COST, concurrency=1)
    assert (report.answered, report.spent) == (3, 3 * ANSWER_COST)
    assert "the limit (max_cost) is $6" in report.stopped
    assert run(tmp_path, server, 20, max_cost=3 * ANSWER_COST).answered == 0
    assert run(tmp_path / "b", server, 20, max_cost=4.0, concurrency=4).answered <= 2 + 3, (
        "those in flight may exceed it"
    )


def test_an_estimate_sends_nothing(tmp_path: Path, server: OpenAIServer) -> None:
    every = requests(10, settings(server))
    assert "requests to send:        10 (0 have" in stage.estimate(every, tmp_path, BOOK, PRICE)
    assert server.asked.total() == 0
    run(tmp_path, server, 4)
    after = stage.estimate(every, tmp_path, BOOK, PRICE)
    assert "requests to send:        6 (4 have" in after
    assert f"spent so far:            ${4 * ANSWER_COST:.2f}" in after


def test_counts_sample_the_same_items_each_time() -> None:
    options = GenerateSettings(model="m", counts={"detail": 3, "conversation": 5}, seed=1)
    chosen = requests(20, options)
    numbers = {kind: sum(r.kind == kind for r in chosen) for kind in ("detail", "conversation", "reasoning")}
    assert numbers == {"detail": 3, "conversation": 5, "reasoning": 20}
    assert [r.id for r in requests(20, options)] == [r.id for r in chosen]
    more = requests(20, GenerateSettings(model="m", counts={"detail": 6}, seed=1))
    assert {r.item for r in chosen if r.kind == "detail"} < {r.item for r in more if r.kind == "detail"}


def test_the_id_changes_with_whatever_affects_the_answer() -> None:
    base = requests(1, settings())[0]
    for change in ({"shots": 1}, {"model": "other"}, {"temperature": 0.1}):
        assert base.id != requests(1, settings(**change))[0].id
    assert base.id == requests(1, settings(concurrency=1))[0].id


def test_an_interrupt_waits_for_what_is_in_flight(tmp_path: Path) -> None:
    def interrupting(number: int, body: dict[str, Any]) -> Reply:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return Reply()

    with OpenAIServer(interrupting, latency=0.5) as server:
        report = run(tmp_path, server, 40)
    assert report.stopped == "interrupted"
    assert 7 <= report.answered < 40
    assert report.answered == server.answered.total() == len(list(answers(tmp_path)))


def test_a_killed_run_continues_and_repeats_only_what_was_in_flight(tmp_path: Path, repository: Path) -> None:
    program = (
        "import sys; from tests.multis.test_generate import *; server = type('S', (), {'url': sys.argv[1]})(); "
        "run(Path(sys.argv[2]), server, 60)"
    )
    with OpenAIServer(latency=0.05, remember=False) as server:
        for _ in range(2):
            before = server.answered.total()
            child = subprocess.Popen([sys.executable, "-c", program, server.url, str(tmp_path)], cwd=repository)
            while server.answered.total() < before + 12:
                time.sleep(0.005)
            child.kill()
            child.wait()
        report = run(tmp_path, server, 60)
    recorded = [record["id"] for record in answers(tmp_path)]
    assert report.known >= 16
    assert len(server.asked) == len(set(recorded)) == len(recorded) == 60
    assert server.asked.total() <= 60 + 2 * 4, "four requests are in flight"


def test_two_runs_cannot_share_a_folder(tmp_path: Path, server: OpenAIServer) -> None:
    with locked(tmp_path / stage.ANSWERS), pytest.raises(DataError, match="in use by another process"):
        run(tmp_path, server, 1)


def test_openai_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        stage.generate(requests(1, settings()), tmp_path, PRICE, settings())


def test_the_request_has_the_form_of_the_protocol(
    tmp_path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "of an administrator")
    more = {"token_limit_field": "max_completion_tokens", "extra_body": {"top_k": 5}, "kinds": ("conversation",)}
    run(tmp_path, server, 1, **more)
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system"] + 3 * ["user", "assistant"] + ["user"]
    assert body["messages"][-1]["content"] == "What people say about the sound:\n- A bell rings 0 times."
    assert (body["max_completion_tokens"], body["top_k"], "max_tokens" in body) == (700, 5, False)
    assert json.loads(json.dumps(body)) == body
    assert server.keys == {"Bearer mine"}


def test_prices_are_found_by_the_longest_prefix(tmp_path: Path) -> None:
    assert stage.price_of("gpt-4o-mini-2024-07-18").input == 0.15
    assert stage.price_of("gpt-4o").cost(1_000_000, 100_000) == 2.5 + 1.0
    with pytest.raises(ConfigError, match="no price for the model 'gpt-4omega'"):
        stage.price_of("gpt-4omega")
    (tmp_path / "p.yaml").write_text("mine: {input: 1, outptu: 2}")
    with pytest.raises(ConfigError, match="did you mean 'output'"):
        stage.price_of("mine", tmp_path / "p.yaml")


def test_token_estimates() -> None:
    chat = [{"role": "user", "content": "The quick brown fox jumps over 12 extraordinarily lazy dogs, twice."}]
    assert 14 <= stage.estimate_tokens(chat) - 8 <= 18
