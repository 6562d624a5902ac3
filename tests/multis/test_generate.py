"""Prompts, and generation against a server with the usual failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge import cli
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.files import locked
from lavis_chatbridge.multis import generate as stage
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, describe, from_json, read_annotations
from lavis_chatbridge.multis.generate import ANSWERS, GenerateSettings, Price, Report, price_of, read_answers
from lavis_chatbridge.multis.prompts import DATA_KINDS, PromptBook
from tests.multis.openai_server import OpenAIServer, Reply, failure

BOOK = PromptBook()
PRICE = Price(input=1000.0, output=10_000.0)  # an answer of the server costs 1000 * 0.001 + 100 * 0.01 = 2 dollars
ANSWER_COST = 2.0


CLIP = {
    "id": "v",
    "media": [{"type": "video", "path": "v.mp4"}, {"type": "audio", "path": "v.wav"}],
    "captions": ["A dog runs."],
    "sound_captions": ["Barking."],
    "tags": ["Dog", "Bark"],
    "frames": [
        {"position": 0.8, "caption": "late"},
        {"position": 0.2, "time": 1.25, "caption": "early", "semantics": {"grass": 0.5, "sky": 0.314}},
        {"position": 0.5, "regions": [{"text": "a ball", "box": [0, 0.25, 0.5, 1]}]},
    ],
}


def test_a_description_is_in_time_order_with_people_first() -> None:
    assert describe(from_json(CLIP, "x")).splitlines() == [
        "What people say about the clip:",
        "- A dog runs.",
        "Frame at 1.2 s: early",
        "  Areas: grass 50 %, sky 31 %",
        "Frame at 50 % of the clip:",
        "  - a ball at [0.00, 0.25, 0.50, 1.00]",
        "Frame at 80 % of the clip: late",
        "What people say about the sound:",
        "- Barking.",
        "Sounds recognised: Dog, Bark",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": ["x"]}, "did you mean 'captions'"),
        ({"media": []}, "found no media"),
        ({"media": [{"type": "image", "path": "a"}, {"type": "audio", "path": "b"}]}, r"found image\+audio"),
    ],
)
def test_a_faulty_annotation_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({**CLIP, **change}) + "\n")
    with pytest.raises(DataError, match=rf"x\.jsonl:1.*{message}"):
        list(read_annotations(tmp_path / "x.jsonl"))


def test_every_kind_has_three_examples_and_a_prompt() -> None:
    for modality in ITEM_MODALITIES:
        media = [{"type": medium, "path": "x"} for medium in modality.split("+")]
        annotation = from_json({"id": "x", "media": media, "captions": ["A dog {runs}."]}, "x")
        for kind in DATA_KINDS:
            assert len(BOOK.examples[kind, modality]) >= 3
            messages = BOOK.messages(kind, annotation)
            assert "{" not in messages[0]["content"]
            assert messages[-1]["content"].endswith("- A dog {runs}.")
            assert messages == BOOK.messages(kind, annotation)


def test_a_prompt_folder_is_checked(tmp_path: Path) -> None:
    words = (BOOK.folder / "kinds.yaml").read_text()
    for text, message in ((words, r"seeds/image\.yaml"), (words.replace("reasoning:", "detial:"), "'detial' is not")):
        (tmp_path / "kinds.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            PromptBook(tmp_path)


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer() as running:
        yield running


def settings(**values: Any) -> GenerateSettings:
    """One request per item, for a description, unless ``values`` have other counts."""
    only = {"conversation": 0, "reasoning": 0}
    return GenerateSettings(**{"model": "m", "counts": only, "concurrency": 4, "timeout": 5.0, "retries": 2, **values})


def requests(count: int, **values: Any) -> list[stage.Request]:
    bell = {"media": [{"type": "audio", "path": "bell.wav"}]}
    texts = [f"A bell rings {n} times." for n in range(count)]
    items = [from_json({"id": f"item{n}", "sound_captions": [text], **bell}, "") for n, text in enumerate(texts)]
    return list(stage.plan(items, BOOK, settings(**values)))


def run(folder: Path, server: OpenAIServer, asked: int | list[stage.Request], **values: Any) -> Report:
    planned = requests(asked, **values) if isinstance(asked, int) else asked
    return stage.generate(planned, folder, PRICE, settings(base_url=server.url, **values))


@pytest.mark.parametrize("reply", [failure(500), failure(429, retry_after_ms="10"), Reply(delay=30), Reply(cut=0.5)])
def test_a_temporary_failure_is_retried(tmp_path: Path, reply: Reply) -> None:
    with OpenAIServer(lambda number, body: Reply() if number else reply) as server:
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
    with OpenAIServer(lambda number, body: Reply() if number else reply) as server:
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
    plan = requests(5)
    run(tmp_path, server, plan[:3] + plan[:3])
    with locked(tmp_path / ANSWERS), pytest.raises(DataError, match="another process uses"):
        run(tmp_path, server, plan)
    with (tmp_path / ANSWERS).open("a") as file:
        file.write('{"id": "cut by a ki')
    report = run(tmp_path, server, plan + plan)
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
    assert stage.estimate(requests(10), PRICE, tmp_path)[::2] == (6, before.tokens * 0.6, 4 * ANSWER_COST)


def test_counts_sample_the_same_items_each_time() -> None:
    sampled, more = requests(20, counts={"detail": 3, "conversation": 5}), requests(20, counts={"detail": 6})
    kinds = [request.kind for request in sampled]
    assert [kinds.count(kind) for kind in ("detail", "conversation", "reasoning")] == [3, 5, 20]
    items = [{request.item for request in some if request.kind == "detail"} for some in (sampled, more)]
    assert items[0] < items[1], "a larger count keeps the smaller one's items"


def test_the_id_changes_with_everything_that_affects_the_answer() -> None:
    changes: list[dict] = [{"model": "other"}, {"temperature": 0.1}, {"extra_body": {"top_k": 5}}]
    ids = [requests(1, **change)[0].id for change in ({}, *changes)]
    assert len(set(ids)) == 4


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


def test_wrong_settings_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"timeout is 0, expected more than 0.*counts.detail: expected int, found ''"):
        parse(GenerateSettings, {"model": "m", "timeout": 0, "counts": {"detail": ""}}, "generate")
    assert cli.main(["multis", "generate", "notes", "--out", str(tmp_path), "--model", "m", "--extra-body", "k"]) == 2
    assert "option 'k' has no value; write KEY=VALUE" in capsys.readouterr().err
