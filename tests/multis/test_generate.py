"""Generation against a server with the usual failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.files import locked
from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.generate import ANSWERS, GenerateSettings, Price, Report, price_of, read_answers
from lavis_chatbridge.multis.prompts import PromptBook
from tests.multis.openai_server import OpenAIServer, Reply, failure

BOOK = PromptBook()
PRICE = Price(input=1000.0, output=10_000.0)  # an answer of the server costs 1000 * 0.001 + 100 * 0.01 = 2 dollars
ANSWER_COST = 2.0


def settings(server: OpenAIServer | None = None, **values: Any) -> GenerateSettings:
    """One request per item, for a description, unless ``values`` have other counts."""
    only = {"conversation": 0, "reasoning": 0}
    given = {"model": "m", "counts": only, "concurrency": 4, "timeout": 5.0, "retries": 2, **values}
    return GenerateSettings(base_url=server.url if server else None, **given)


def requests(count: int, options: GenerateSettings | None = None) -> list[stage.Request]:
    bell = (MediumRef(type="audio", path="bell.wav"),)
    texts = {f"item{n}": f"A bell rings {n} times." for n in range(count)}
    items = [Annotation(id=name, media=bell, sound_captions=(text,)) for name, text in texts.items()]
    return list(stage.plan(items, BOOK, options or settings()))


def run(folder: Path, server: OpenAIServer, count: int, **values: Any) -> Report:
    options = settings(server, **values)
    return stage.generate(requests(count, options), folder, PRICE, options)


def first_fails(reply: Reply) -> OpenAIServer:
    return OpenAIServer(lambda number, body: reply if number == 0 else Reply())


@pytest.mark.parametrize("reply", [failure(500), failure(429, retry_after_ms="10"), Reply(delay=30), Reply(cut=0.5)])
def test_a_temporary_failure_is_retried(tmp_path: Path, reply: Reply) -> None:
    with first_fails(reply) as server:
        report = run(tmp_path, server, 1, timeout=0.5)
    assert (report.answered, report.failed, report.spent) == (1, 0, ANSWER_COST)
    assert server.asked.total() == 2


@pytest.mark.parametrize(
    "reply",
    [
        failure(400, "context too long"),
        Reply(b'{"choices": oops'),
        Reply(b'{"choices": []}'),
        Reply(b"<html>gateway</html>", headers={"content-type": "text/html"}),
    ],
)
def test_an_unusable_response_is_a_failed_request_that_the_next_run_repeats(tmp_path: Path, reply: Reply) -> None:
    with first_fails(reply) as server:
        report = run(tmp_path, server, 3, concurrency=1)
        assert (report.answered, report.failed, server.asked.total()) == (2, 1, 3)
        assert run(tmp_path, server, 3).answered == 1


@pytest.mark.parametrize("status", [401, 404])
def test_a_refusal_ends_the_run_at_once_and_every_answer_is_kept(tmp_path: Path, status: int) -> None:
    with OpenAIServer(lambda number, body: failure(status) if number == 8 else Reply()) as server:
        with pytest.raises(ChatBridgeError, match="refuses the model 'm'"):
            run(tmp_path, server, 40, concurrency=1)
        assert server.asked.total() == 9
        assert len(read_answers(tmp_path)) == 8, "an answer is written before the next request"
        assert run(tmp_path, server, 40, concurrency=8).known == 8


def test_a_dead_server_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "STOP_AFTER", 5)
    with OpenAIServer(lambda number, body: failure(500, retry_after_ms="1")) as server:
        report = run(tmp_path, server, 50, retries=1, concurrency=1)
    assert "5 requests in a row failed" in report.stopped
    assert server.asked.total() == 10


def test_nothing_is_asked_twice_over_runs_and_duplicates(tmp_path: Path, server: OpenAIServer) -> None:
    options = settings(server)
    plan = requests(5, options)
    stage.generate(plan[:3] + plan[:3], tmp_path, PRICE, options)
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"id": "cut by a ki')
    report = stage.generate(plan + plan, tmp_path, PRICE, options)
    assert (report.answered, report.known, report.spent) == (2, 8, 5 * ANSWER_COST)
    assert max(server.asked.values()) == 1
    assert sorted(record["item"] for record in read_answers(tmp_path).values()) == [f"item{n}" for n in range(5)]


def test_concurrency_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    with OpenAIServer(latency=0.6) as server:
        run(tmp_path, server, 16, concurrency=8)
    assert server.most_at_once == 8


def test_the_rate_limit_holds_requests_back(tmp_path: Path, server: OpenAIServer) -> None:
    run(tmp_path, server, 25, requests_per_minute=600, concurrency=25)  # 10 at once, then 10 a second
    assert server.times[-1] - server.times[0] >= 1.2


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_is_never_exceeded(tmp_path: Path, server: OpenAIServer, concurrency: int) -> None:
    limit = 3 * ANSWER_COST + requests(1)[0].greatest_cost(PRICE) * 1.01
    report = run(tmp_path, server, 20, max_cost=limit, concurrency=concurrency)
    assert report.spent == report.answered * ANSWER_COST <= limit
    assert "is spent" in report.stopped
    assert concurrency > 1 or report.answered == 4
    again = run(tmp_path, server, 20, max_cost=report.spent, concurrency=concurrency)
    assert again.answered == 0, "the limit includes what earlier runs spent"


def test_an_estimate_sends_nothing_and_counts_what_is_left(tmp_path: Path, server: OpenAIServer) -> None:
    before = stage.estimate(requests(10), PRICE, tmp_path)
    assert (before.requests, before.known, server.asked.total()) == (10, 0, 0)
    assert 0 < before.cost < sum(request.greatest_cost(PRICE) for request in requests(10))
    run(tmp_path, server, 4)
    after = stage.estimate(requests(10), PRICE, tmp_path)
    assert (after.requests, after.known, after.spent) == (6, 4, 4 * ANSWER_COST)


def test_counts_sample_the_same_items_each_time() -> None:
    options = settings(counts={"detail": 3, "conversation": 5})
    sampled = requests(20, options)
    kinds = [request.kind for request in sampled]
    assert [kinds.count(kind) for kind in ("detail", "conversation", "reasoning")] == [3, 5, 20]
    assert [r.id for r in requests(20, options)] == [r.id for r in sampled]
    more = requests(20, settings(counts={"detail": 6}))
    items = [{r.item for r in some if r.kind == "detail"} for some in (sampled, more)]
    assert items[0] < items[1], "a larger count keeps the smaller one's items"


def test_the_id_changes_with_everything_that_affects_the_answer() -> None:
    base = requests(1)[0].id
    changed = [settings(shots=1), settings(model="other"), settings(temperature=0.1), settings(extra_body={"top_k": 5})]
    assert base not in [requests(1, options)[0].id for options in changed]
    assert base == requests(1, settings(concurrency=1))[0].id


def test_two_runs_cannot_share_a_folder(tmp_path: Path, server: OpenAIServer) -> None:
    with locked(tmp_path / ANSWERS), pytest.raises(DataError, match="another process uses"):
        run(tmp_path, server, 1)


def test_the_request_follows_the_protocol(tmp_path: Path, server: OpenAIServer, monkeypatch: Any) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        stage.generate(requests(1), tmp_path, PRICE, settings())
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    more = {"token_limit_field": "max_completion_tokens", "extra_body": {"top_k": 5}}
    run(tmp_path, server, 1, counts={"detail": 0, "reasoning": 0}, **more)
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system"] + 3 * ["user", "assistant"] + ["user"]
    assert body["messages"][-1]["content"] == "What people say about the sound:\n- A bell rings 0 times."
    assert (body["max_completion_tokens"], body["top_k"], "max_tokens" in body) == (700, 5, False)
    assert server.keys == {"Bearer mine"}
    record = json.loads((tmp_path / ANSWERS).read_text())
    assert (record["finish"], record["prompt_tokens"], record["completion_tokens"]) == ("stop", 1000, 100)


def test_prices_are_found_by_the_longest_prefix() -> None:
    assert price_of("gpt-4o-mini-2024-07-18").input == 0.15
    assert price_of("gpt-4o").cost(1_000_000, 100_000) == 2.5 + 1.0
    with pytest.raises(ConfigError, match="no price for the model 'gpt-4omega'"):
        price_of("gpt-4omega")
    assert price_of("gpt-4omega", or_free=True).cost(1, 1) == 0


def test_settings_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"timeout is 0, expected more than 0.*counts.detail: expected int, found ''"):
        parse(GenerateSettings, {"model": "m", "timeout": 0, "counts": {"detail": ""}}, "generate")
    with pytest.raises(ConfigError, match=r"base_url is 'm:80', expected http://"):
        parse(GenerateSettings, {"model": "m", "base_url": "m:80"}, "generate")
