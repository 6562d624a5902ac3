"""Requests before any model: fields that are refused by name, accepted, or ignored; settings and tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")

from lavis_chatbridge.chat.server import command
from lavis_chatbridge.chat.server.app import ServerSettings
from lavis_chatbridge.chat.server.requests import ChatRequest, RequestError, TextRequest, read_request
from lavis_chatbridge.chat.sources import Access
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError
from tests.chat.serving import asked, image, text

HELLO = asked(text("Hello"))


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": {}}, "messages", "valid list, found {}"),
        ({"messages": [3]}, "messages[0]", "found 3"),
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": float("nan")}, "temperature", "finite number"),
        ({"top_p": 2}, "top_p", "less than or equal to 1"),
        ({"seed": "a"}, "seed", 'valid integer, found "a"'),
        ({"seed": True}, "seed", "valid integer"),
        ({"n": 99}, "n", "less than or equal to 16"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items"),
        ({"stop": ["a", 3]}, "stop[1]", "valid string"),
        ({"max_tokens": -3}, "max_tokens", "greater than or equal to 1"),
        ({"top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"stream_options": {"include_usage": 3}}, "stream_options.include_usage", "valid boolean"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_found(fields: dict[str, Any], param: str, message: str):
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "invalid_value", param)
    assert message in refused.value.message


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format json_object"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format json_schema"),
        ({"logit_bias": {"1": 2.0}}, "logit_bias"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
    ],
)
def test_what_this_server_cannot_do_is_refused_by_name(fields: dict[str, Any], name: str):
    with pytest.raises(RequestError, match=f"{name} is not supported by this server") as refused:
        chat(**fields)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name.partition(" ")[0])


def test_neutral_and_unknown_fields_are_accepted_and_logged_once(caplog: pytest.LogCaptureFixture):
    neutral = {"tools": [], "functions": [], "response_format": {"type": "text"}, "logit_bias": {}, "echo": False}
    neutral |= {"max_tokens": -1, "max_completion_tokens": None, "stop": "", "top_k": -1, "best_of": 1, "n": None}
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            chat(**neutral, odd_field=3, reasoning_effort="low")
    assert caplog.text.count("odd_field") == 1


def test_fields_that_work_become_a_sampling():
    values = {"temperature": 0.5, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    values |= {"presence_penalty": 0.3, "frequency_penalty": 0.4, "ignore_eos": True}
    request = chat(
        **values, max_tokens=50, min_tokens=3, seed=7, stop="x", stop_token_ids=[9], n=2, logprobs=True, top_logprobs=2
    )
    first, second = request.sampling(40, request.reported)
    assert {name: getattr(first, name) for name in values} == values
    assert (first.max_new_tokens, first.min_new_tokens, first.stop, first.stop_token_ids) == (40, 3, ("x",), (9,))
    assert (first.seed, second.seed, first.logprobs) == (7, 8, 2)
    [usual] = chat().sampling(1024, None)
    assert (usual.max_new_tokens, usual.temperature, usual.seed) == (256, 0.0, None)
    assert chat(max_completion_tokens=5, max_tokens=9).sampling(64, None)[0].max_new_tokens == 5
    assert chat(top_p=0).sampling(64, None)[0].top_p > 0


def test_conversations_and_their_faults():
    begun = chat(messages=[{"role": "assistant", "content": "A"}]).conversation(Access(), 4)
    assert [message.role for message in begun.messages] == ["user", "assistant", "user"]
    with pytest.raises(RequestError, match="limit is 1") as refused:
        chat(messages=asked(image(), image())).conversation(Access(), 1)
    assert refused.value.param == "messages"
    with pytest.raises(RequestError) as refused:
        chat(messages=[{"role": "user", "content": [{"type": "file"}]}]).conversation(Access(), 1)
    assert refused.value.param == "messages[0].content[0].type"


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), (None, None), ("", None), ([""], None)],
)
def test_prompts_of_completions(prompt: Any, prompts: list[Any] | None):
    request = read_request(TextRequest, json.dumps({"prompt": prompt, "logprobs": 3}).encode())
    assert request.reported == 3
    if prompts is not None:
        assert request.prompts == prompts
    else:
        with pytest.raises(RequestError, match="prompt: expected"):
            _ = request.prompts


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_bodies_that_are_no_request(body: bytes):
    with pytest.raises(RequestError, match="JSON") as refused:
        read_request(ChatRequest, body)
    assert refused.value.code == "invalid_json"


def test_errors_have_openais_types():
    found = {status: RequestError(status, "m").body()["error"]["type"] for status in (400, 401, 404, 429, 500, 502)}
    assert found[400] == "invalid_request_error"
    assert (found[401], found[404], found[429]) == ("authentication_error", "not_found_error", "rate_limit_error")
    assert found[500] == found[502] == "server_error"


def test_settings_name_all_faults_together(tmp_path: Path):
    wrong = {"host": "0.0.0.0", "timeout": 0, "port": 99_999, "access": {"folders": [str(tmp_path / "none")]}}
    with pytest.raises(ConfigError) as faults:
        parse(ServerSettings, wrong, "serve")
    for part in ("timeout", "port", "no folder", "give tokens"):
        assert part in str(faults.value)
    assert parse(ServerSettings, {"host": "0.0.0.0", "tokens": ["a"]}, "serve").tokens == ("a",)


def test_the_command_reads_tokens_and_takes_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokens").write_text("# for tests\none\n\ntwo\n")
    (tmp_path / "empty").write_text("")
    monkeypatch.setenv(command.TOKENS, "zero")
    assert command._tokens(str(tmp_path / "tokens")) == ("zero", "one", "two")
    monkeypatch.delenv(command.TOKENS)
    for name in ("empty", "absent"):
        with pytest.raises(ConfigError, match=name):
            command._tokens(str(tmp_path / name))
    with command.listen("127.0.0.1", 0) as line:
        line.listen()
        with pytest.raises(ConfigError, match="cannot listen"):
            command.listen("127.0.0.1", line.getsockname()[1])
    with pytest.raises(ConfigError, match="--decode-workers -1"), command.decoding(None, workers=-1):  # type: ignore[arg-type]
        pass
