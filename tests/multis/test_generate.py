"""Generation against a server that fails in every way that servers fail."""

from __future__ import annotations

import asyncio
import email.utils
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import Annotation, MediumRef
from lavis_chatbridge.multis.endpoint import Endpoint, EndpointError, EndpointSettings
from lavis_chatbridge.multis.generate import GenerateSettings, Report
from lavis_chatbridge.multis.journal import Journal, read_journal
from lavis_chatbridge.multis.ledger import Ledger, answers
from lavis_chatbridge.multis.limits import Price, estimate_tokens
from lavis_chatbridge.multis.prompts import PromptBook
from tests.multis.openai_server import OpenAIServer, Reply, Script, failure

BOOK = PromptBook()
PRICE = Price(input=1000.0, output=10_000.0)  # an answer of the server costs 1000 * 0.001 + 100 * 0.01 = 2 dollars
ANSWER_COST = 2.0


def notes(count: int) -> list[Annotation]:
    return [
        Annotation(f"item{n}", (MediumRef("audio", f"{n}.wav"),), sound_captions=(f"A bell rings {n} times.",))
        for n in range(count)
    ]


def settings(**values: Any) -> GenerateSettings:
    return GenerateSettings(**{"kinds": ["detail"], "first_pause": 0.01, "concurrency": 4, **values})


def requests(count: int, options: GenerateSettings, endpoint: EndpointSettings | None = None) -> list[stage.Request]:
    return list(stage.plan(notes(count), BOOK, options, endpoint or EndpointSettings("m")))


def run(
    folder: Path, server: OpenAIServer, count: int, price: Price = PRICE, timeout: float = 5.0, **values: Any
) -> Report:
    options = settings(**values)
    endpoint = EndpointSettings("m", server.url, timeout=timeout, store=options.in_doubt == "recover")
    return stage.generate(requests(count, options), folder, endpoint, price, options)


def events(folder: Path, kind: str) -> list[dict]:
    return [record for record in read_journal(folder / "journal.jsonl") if record["event"] == kind]


def first_fails(reply: Reply, times: int = 1) -> Script:
    return lambda number, body: reply if number < times else Reply()


@pytest.mark.parametrize(
    ("reply", "paid"),
    [
        (failure(500), False),
        (failure(503), False),
        (failure(429), False),
        (failure(408), True),
        (Reply(b"{'choices': oops", headers={}), True),
        (Reply(b'{"choices": []}'), True),
        (Reply(b'{"choices": [{"message": {"content": 7}}]}'), True),
        (Reply(b"<html>gateway</html>", headers={"content-type": "text/html"}), True),
        (Reply(cut=0.5), True),
    ],
)
def test_a_failure_is_tried_again_and_accounted(tmp_path: Path, reply: Reply, paid: bool) -> None:
    with OpenAIServer(first_fails(reply)) as server:
        report = run(tmp_path, server, 1, concurrency=1)
    assert (report.answered, report.gave_up) == (1, 0)
    assert server.asked.total() == 2
    bound = events(tmp_path, "sent")[0]["bound"]
    assert report.spent == pytest.approx(ANSWER_COST + bound * paid)
    assert Ledger.read(tmp_path / "journal.jsonl").spent == pytest.approx(report.spent)
    assert bound > ANSWER_COST


def test_what_was_paid_for_but_cannot_be_read_is_kept(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(Reply(b'{"choices": [{"message": "half'))) as server:
        run(tmp_path, server, 1)
    assert events(tmp_path, "failed")[0]["body"] == '{"choices": [{"message": "half'


def test_a_timeout_is_tried_again(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(Reply(delay=30))) as server:
        report = run(tmp_path, server, 1, timeout=0.3)
    assert report.answered == 1
    assert "no answer within 0.3 s" in events(tmp_path, "failed")[0]["reason"]


@pytest.mark.parametrize("form", ["seconds", "milliseconds", "date"])
def test_retry_after_is_honoured_by_all_workers(tmp_path: Path, form: str) -> None:
    wait = 1.0

    def busy_once(number: int, body: dict[str, Any]) -> Reply:
        date = email.utils.formatdate(time.time() + wait + 1.0, usegmt=True)  # whole seconds, so up to one less
        header = {
            "seconds": ("retry_after", "1"),
            "milliseconds": ("retry_after_ms", "1000"),
            "date": ("retry_after", date),
        }
        return failure(429, **dict([header[form]])) if number == 0 else Reply()

    with OpenAIServer(busy_once) as server:
        report = run(tmp_path, server, 6, concurrency=2)
        pauses = sorted(after - before for before, after in zip(server.times, server.times[1:], strict=False))
    assert report.answered == 6
    assert pauses[-1] >= wait * 0.9


def test_a_server_that_asks_for_a_day_ends_the_run(tmp_path: Path) -> None:
    with OpenAIServer(lambda number, body: failure(429, retry_after="86400")) as server:
        report = run(tmp_path, server, 3, concurrency=1)
    assert "86400 s" in report.stopped
    assert server.asked.total() == 1


@pytest.mark.parametrize("reply", [failure(401), failure(403), failure(404), failure(429, code="insufficient_quota")])
def test_a_refusal_ends_the_run_at_once(tmp_path: Path, reply: Reply) -> None:
    with (
        OpenAIServer(lambda number, body: reply) as server,
        pytest.raises(EndpointError, match="refuses the model 'm'"),
    ):
        run(tmp_path, server, 50, concurrency=1)
    assert server.asked.total() == 1


def test_a_bad_request_is_given_up_without_a_second_try(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(failure(400, "context too long"))) as server:
        report = run(tmp_path, server, 3, concurrency=1)
        assert (report.answered, report.gave_up, server.asked.total()) == (2, 1, 3)
        assert "context too long" in events(tmp_path, "gave_up")[0]["reason"]
        assert run(tmp_path, server, 3).answered == 1, "the next run tries it again"


def test_a_dead_server_ends_the_run(tmp_path: Path) -> None:
    with OpenAIServer(lambda number, body: failure(500)) as server:
        report = run(tmp_path, server, 50, attempts=2, stop_after=5, concurrency=1)
    assert "5 requests in a row" in report.stopped
    assert 10 <= server.asked.total() <= 12


def test_truncated_answers_are_kept_as_such(tmp_path: Path) -> None:
    with OpenAIServer(lambda number, body: Reply(finish="length")) as server:
        run(tmp_path, server, 1)
    assert next(answers(tmp_path))["finish"] == "length"


def test_nothing_is_asked_twice_over_runs_and_duplicates(tmp_path: Path, server: OpenAIServer) -> None:
    options = settings()
    plan = requests(5, options)
    endpoint = EndpointSettings("m", server.url)
    stage.generate(plan[:3] + plan[:3], tmp_path, endpoint, PRICE, options)
    report = stage.generate(plan + plan, tmp_path, endpoint, PRICE, options)
    assert (report.answered, report.known) == (2, 8)
    assert max(server.asked.values()) == 1
    assert len(list(answers(tmp_path))) == 5


def test_concurrency_is_reached_and_not_exceeded(tmp_path: Path) -> None:
    with OpenAIServer(latency=0.6) as server:
        run(tmp_path, server, 16, concurrency=8)
    assert server.most_at_once == 8


def test_the_rate_limit_spreads_requests(tmp_path: Path, server: OpenAIServer) -> None:
    run(tmp_path, server, 12, requests_per_minute=600, concurrency=12)
    assert server.times[-1] - server.times[0] >= 0.9


def test_the_rate_limit_counts_tokens(tmp_path: Path, server: OpenAIServer) -> None:
    request = requests(1, settings())[0]
    tokens = estimate_tokens(request.messages) + request.max_tokens
    began = time.monotonic()
    run(tmp_path, server, 6, tokens_per_minute=tokens * 600, concurrency=6)  # 0.1 s for each
    assert server.times[-1] - began >= 0.49


def test_many_requests_share_several_clients_and_all_are_closed(server: OpenAIServer) -> None:
    async def ask() -> list[bool]:
        endpoint = Endpoint(EndpointSettings("m", server.url), concurrency=33)
        clients = list(endpoint._clients)
        for number in range(6):
            await endpoint.ask(str(number), requests(1, settings())[0].messages, 5)
        await endpoint.close()
        return [client.is_closed() for client in clients]

    assert asyncio.run(ask()) == [True, True, True]
    assert len(server.peers) == 3, "in turn: one connection for each client"


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_budget_is_never_exceeded(tmp_path: Path, server: OpenAIServer, concurrency: int) -> None:
    bound = PRICE.cost(requests(1, settings())[0].bound, BOOK.max_tokens("detail"))
    limit = 3 * ANSWER_COST + bound * 1.01
    report = run(tmp_path, server, 20, max_cost=limit, concurrency=concurrency)
    assert report.answered == 4, "the bound of the next one must fit beside what is spent"
    assert report.spent == 4 * ANSWER_COST <= limit
    assert "is spent" in report.stopped
    again = run(tmp_path, server, 20, max_cost=limit, concurrency=concurrency)
    assert again.answered == 0, "the limit counts what earlier runs spent"


def test_the_budget_holds_with_64_in_flight_and_answers_that_get_lost(tmp_path: Path) -> None:
    """Every third answer is cut off: it may have been paid, so its bound counts."""
    bound = PRICE.cost(requests(1, settings())[0].bound, BOOK.max_tokens("detail"))
    limit = 80 * bound
    with OpenAIServer(lambda number, body: Reply(cut=0.5) if number % 3 == 0 else Reply(), latency=0.3) as server:
        report = run(tmp_path, server, 400, max_cost=limit, concurrency=64)
    bounds = {(record["id"], record["attempt"]): record["bound"] for record in events(tmp_path, "sent")}
    lost = [bounds[record["id"], record["attempt"]] for record in events(tmp_path, "failed") if record["paid"]]
    assert lost
    assert server.most_at_once > 8
    assert report.spent == pytest.approx(report.answered * ANSWER_COST + sum(lost))
    assert limit - 1.1 * bound < report.spent <= limit, "stops because the next bound no longer fits, not earlier"
    assert Ledger.read(tmp_path / "journal.jsonl").spent == pytest.approx(report.spent)


def test_an_estimate_sends_nothing_and_bounds_the_cost(tmp_path: Path, server: OpenAIServer) -> None:
    options = settings()
    plan = requests(10, options)
    before = stage.estimate(plan, BOOK, PRICE, Ledger())
    assert (before.requests, before.known, server.asked.total()) == (10, 0, 0)
    assert 0 < before.cost < before.bound
    run(tmp_path, server, 4)
    after = stage.estimate(plan, BOOK, PRICE, Ledger.read(tmp_path / "journal.jsonl"))
    assert (after.requests, after.known, after.spent) == (6, 4, 4 * ANSWER_COST)


def test_counts_draw_the_same_items_each_time() -> None:
    options = GenerateSettings(counts={"detail": 3, "conversation": 5}, seed=1)
    drawn = requests(20, options)
    assert {kind: sum(r.kind == kind for r in drawn) for kind in ("detail", "conversation", "reasoning")} == {
        "detail": 3,
        "conversation": 5,
        "reasoning": 20,
    }
    assert [r.id for r in requests(20, options)] == [r.id for r in drawn]
    more = {r.item for r in requests(20, GenerateSettings(counts={"detail": 6}, seed=1)) if r.kind == "detail"}
    assert {r.item for r in drawn if r.kind == "detail"} < more, "a larger count keeps the smaller one's items"


def test_the_id_changes_with_whatever_shapes_the_answer() -> None:
    base = requests(1, settings())[0]
    assert base.id != requests(1, settings(shots=1))[0].id
    assert base.id != requests(1, settings(), EndpointSettings("other"))[0].id
    assert base.id != requests(1, settings(), EndpointSettings("m", temperature=0.1))[0].id
    assert base.id == requests(1, settings(concurrency=1))[0].id


def in_doubt(folder: Path, count: int, at: float) -> list[stage.Request]:
    """A journal as a kill leaves it: ``count`` requests sent, none of them closed, the last line torn."""
    plan = requests(count, settings())
    with Journal(folder / "journal.jsonl") as journal:
        for request in plan:
            journal.append({"event": "sent", "id": request.id, "attempt": 0, "bound": 5.0, "at": at})
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"event": "answer", "id": "')
    return plan


def test_requests_in_doubt_count_as_spent_and_are_asked_again(tmp_path: Path, server: OpenAIServer) -> None:
    in_doubt(tmp_path, 3, time.time())
    assert Ledger.read(tmp_path / "journal.jsonl").spent == 15.0
    report = run(tmp_path, server, 3)
    assert report.answered == 3
    assert report.spent == 15.0 + 3 * ANSWER_COST
    assert Ledger.read(tmp_path / "journal.jsonl").spent == pytest.approx(report.spent)


def test_requests_in_doubt_can_be_held_back(tmp_path: Path, server: OpenAIServer) -> None:
    in_doubt(tmp_path, 2, time.time())
    report = run(tmp_path, server, 4, in_doubt="hold")
    assert (report.answered, report.held, server.asked.total()) == (2, 2, 2)


def test_requests_in_doubt_are_fetched_where_the_server_stored_them(tmp_path: Path, server: OpenAIServer) -> None:
    plan = in_doubt(tmp_path, 3, time.time() - 60)
    body = {"model": "m", "messages": plan[0].messages}
    for request in plan[:2]:
        server.stored[request.id] = server._completion(request.id, body, "stop")
    report = run(tmp_path, server, 3, in_doubt="recover")
    assert (report.answered, report.recovered, server.asked.total()) == (3, 2, 1)
    assert server.bodies[0]["store"] is True
    assert report.spent == 5.0 + 3 * ANSWER_COST, "only the third was never found, so it may have been paid twice"
    assert Ledger.read(tmp_path / "journal.jsonl").spent == pytest.approx(report.spent)


@pytest.mark.parametrize("reply", [Reply(delay=1.0), Reply(cut=0.5), Reply(b"oops")])
def test_an_answer_that_got_lost_is_fetched_instead_of_bought_again(tmp_path: Path, reply: Reply) -> None:
    with OpenAIServer(first_fails(reply)) as server:
        options = settings()
        if reply.body is not None:  # the server made an answer and stored it; what it sent was garbled on its way
            plan = requests(1, options)
            server.stored[plan[0].id] = server._completion("x", {"model": "m", "messages": plan[0].messages}, "stop")
        report = run(tmp_path, server, 1, timeout=0.6, in_doubt="recover")
    assert (report.answered, report.recovered, server.asked.total()) == (1, 1, 1)
    assert report.spent == pytest.approx(ANSWER_COST)
    assert Ledger.read(tmp_path / "journal.jsonl").spent == pytest.approx(report.spent)


def test_hold_never_sends_twice(tmp_path: Path) -> None:
    with OpenAIServer(first_fails(Reply(cut=0.5))) as server:
        report = run(tmp_path, server, 1, in_doubt="hold")
        assert (report.answered, report.held) == (0, 1)
        assert run(tmp_path, server, 1, in_doubt="hold").held == 1
        assert server.asked.total() == 1
        assert run(tmp_path, server, 1, in_doubt="ask").answered == 1


def test_an_interrupt_waits_for_what_is_under_way(tmp_path: Path) -> None:
    def interrupting(number: int, body: dict[str, Any]) -> Reply:
        if number == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return Reply()

    with OpenAIServer(interrupting, latency=0.5) as server:
        report = run(tmp_path, server, 40, concurrency=4)
    assert report.stopped == "interrupted"
    assert 7 <= report.answered < 40
    assert report.answered == server.answered.total() == len(list(answers(tmp_path)))
    assert Ledger.read(tmp_path / "journal.jsonl").doubts == {}


def test_two_runs_cannot_share_a_journal(tmp_path: Path, server: OpenAIServer) -> None:
    with Journal(tmp_path / "journal.jsonl"), pytest.raises(DataError, match="written by another process"):
        run(tmp_path, server, 1)


def test_openai_needs_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        stage.generate(requests(1, settings()), tmp_path, EndpointSettings("gpt-4o"), PRICE, settings())


def test_the_request_is_what_the_protocol_wants(
    tmp_path: Path, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "too mighty")
    options = settings(kinds=["conversation"])
    endpoint = EndpointSettings("m", server.url, token_limit_field="max_completion_tokens", extra_body={"top_k": 5})
    plan = list(stage.plan(notes(1), BOOK, options, endpoint))
    stage.generate(plan, tmp_path, endpoint, PRICE, options)
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system"] + 3 * ["user", "assistant"] + ["user"]
    assert body["messages"][-1]["content"] == "What people say about the sound:\n- A bell rings 0 times."
    assert (body["max_completion_tokens"], body["top_k"], "max_tokens" in body) == (700, 5, False)
    assert json.loads(json.dumps(body)) == body
    assert server.keys == {"Bearer mine"}
