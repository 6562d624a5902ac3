"""Requests before any model: fields that are refused by name, accepted, or ignored; options and tokens."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.chat.messages import Access
from lavis_chatbridge.chat.server import command
from lavis_chatbridge.chat.server.command import ServerOptions
from lavis_chatbridge.chat.server.requests import ChatRequest, RequestError, TextRequest, read_request, refusal_of
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError, DataError
from tests.chat.building import asked, image_part

HELLO = asked("Hello")


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, json.dumps({"messages": HELLO, **fields}).encode())


@pytest.mark.parametrize(
    ("fields", "code", "param", "message"),
    [
        ({"messages": []}, "invalid_value", "messages", "at least 1 item"),
        ({"messages": {}}, "invalid_value", "messages", "valid array, found {}"),
        ({"temperature": float("nan")}, "invalid_value", "temperature", "finite number"),
        ({"seed": True}, "invalid_value", "seed", "valid integer, found true"),
        ({"seed": 1 << 63}, "invalid_value", "seed", "less than or equal to 9223372036854775807"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens", "greater than or equal to 1, found 0"),
        ({"max_completion_tokens": 0}, "invalid_value", "max_completion_tokens", "greater than or equal to 1, found 0"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids[0]", "greater than or equal to 0, found -1"),
        ({"stop": ["a", 3]}, "invalid_value", "stop[1]", "valid string"),
        ({"tools": [{"type": "x"}]}, "unsupported_parameter", "tools", '[{"type": "x"}] is not supported'),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format", "json_object"),
        ({"best_of": 3}, "unsupported_parameter", "best_of", "best_of 3 is not supported"),
    ],
)
def test_a_refusal_names_the_field_and_its_value(fields: dict[str, Any], code: str, param: str, message: str):
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert (refused.value.status, refused.value.code, refused.value.param) == (400, code, param)
    assert message in refused.value.message


def test_neutral_and_unknown_fields_are_accepted_and_logged_once(caplog: pytest.LogCaptureFixture):
    neutral = {"tools": [], "functions": [], "response_format": {"type": "text"}, "logit_bias": {}, "echo": False}
    neutral |= {"max_tokens": -1, "max_completion_tokens": None, "stop": "", "top_k": -1, "best_of": 1, "n": None}
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            chat(**neutral, odd_field=3, reasoning_effort="low")
        chat(n=3, best_of=3, **{f"field_{number}": 1 for number in range(1000)})
    assert caplog.text.count("odd_field") == 1
    assert len(caplog.records) <= 100


def test_fields_become_a_sampling():
    values = {"temperature": 0.5, "top_p": 0.8, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2}
    values |= {"presence_penalty": 0.3, "frequency_penalty": 0.4, "ignore_eos": True}
    more = {"seed": 7, "stop": "x", "stop_token_ids": [9], "n": 2, "logprobs": True, "top_logprobs": 2}
    first, second = chat(**values, **more, max_tokens=50, min_tokens=3).samplings(40)
    assert {name: getattr(first, name) for name in values} == values
    assert (first.max_new_tokens, first.min_new_tokens, first.stop, first.stop_token_ids) == (40, 3, ("x",), (9,))
    assert (first.seed, second.seed, first.logprobs) == (7, 8, 2)
    [usual] = chat().samplings(1024)
    assert (usual.max_new_tokens, usual.temperature, usual.seed) == (256, 0.0, None)
    assert chat(max_completion_tokens=5, max_tokens=9).samplings(64)[0].max_new_tokens == 5
    assert chat(top_p=0).samplings(64)[0].top_p > 0


def test_conversations_and_their_faults():
    [begun] = chat(messages=[{"role": "assistant", "content": "A"}]).prompts(Access(), 4)
    assert [message.role for message in begun.messages] == ["user", "assistant", "user"]
    for parts, param in (([image_part()] * 2, "messages"), ([{"type": "file"}], "messages[0].content[0].type")):
        with pytest.raises(DataError) as refused:
            chat(messages=asked(*parts)).prompts(Access(), 1)
        assert refusal_of(refused.value, "1").param == param


def test_prompts_of_completions():
    def read(prompt: Any) -> TextRequest:
        return read_request(TextRequest, json.dumps({"prompt": prompt, "logprobs": 3}).encode())

    assert read("a").reported == 3
    for prompt, prompts in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]])):
        assert read(prompt).prompts(Access(), 0) == prompts
    for prompt in (None, "", [""]):
        with pytest.raises(RequestError, match="prompt: expected"):
            read(prompt).prompts(Access(), 0)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_bodies_that_are_no_request(body: bytes):
    with pytest.raises(RequestError, match="JSON") as refused:
        read_request(ChatRequest, body)
    assert refused.value.code == "invalid_json"


def test_options_tokens_and_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tokens").write_text("# for tests\none\n\ntwo\n")
    (tmp_path / "empty").write_text("")
    monkeypatch.setenv(command.TOKENS, "zero")
    assert ServerOptions(token_file=str(tmp_path / "tokens"), host="0.0.0.0").tokens == ("zero", "one", "two")
    for name in ("empty", "absent"):
        with pytest.raises(ConfigError, match=name):
            parse(ServerOptions, {"token_file": str(tmp_path / name)}, "options")
    monkeypatch.setenv(command.TOKENS, " ")
    with pytest.raises(ConfigError, match=r"no folder .*others can reach host 0\.0\.0\.0: give tokens"):
        parse(ServerOptions, {"host": "0.0.0.0", "files": [str(tmp_path / "none")]}, "options")
    with pytest.raises(ConfigError, match="--decode-memory is 8"):
        command.command(decode_memory=8)
    with command.listen("127.0.0.1", 0) as line, pytest.raises(ConfigError, match="cannot listen"):
        command.listen("127.0.0.1", line.getsockname()[1])
