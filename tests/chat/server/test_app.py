"""``chatbridge serve`` as its clients see it: the official ``openai`` client and bare HTTP against one process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import pytest
from PIL import Image

from lavis_chatbridge.chat.messages import data_url
from lavis_chatbridge.chat.server.command import ServerOptions
from tests.chat import building
from tests.chat.building import asked, audio_part, image_part, png, video_part, wait_until
from tests.media.making import encoded

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "server.md").read_text(encoding="utf-8")
TOKEN = "a-token-for-tests"
MODEL = "chatbridge-tiny"
OPTIONS = (
    "serve --port 0 --device cpu --options model.checkpoint=null --decode-workers 1 --decode-seconds 20 "
    "--max-body 2 --max-medium 1 --allowed-origins https://page.example --files"
)


class Served(NamedTuple):
    url: str
    files: Path
    temporary: Path
    log: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """``chatbridge serve`` with the tiny model, its bridge untrained."""
    files, temporary = tmp_path_factory.mktemp("offered"), tmp_path_factory.mktemp("temporary")
    log = tmp_path_factory.mktemp("log") / "errors"
    (files / "a.png").write_bytes(png())
    (files / "link.png").symlink_to(Path(__file__))
    command = [sys.executable, "-m", "lavis_chatbridge.cli", *OPTIONS.split(), str(files)]
    environment = {**os.environ, "CHATBRIDGE_TOKENS": TOKEN, "TMPDIR": str(temporary)}
    with (
        open(log, "w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
    ):
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+/v1", process.stdout.readline())
            assert found, log.read_text()[-3000:]
            yield Served(found.group(), files, temporary, log)
            assert process.poll() is None  # whatever the tests sent, it lives
        finally:
            process.terminate()
            process.wait(30)
    assert list(temporary.iterdir()) == []


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=120) as made:
        yield made


def ask(client: Any, messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 8, **more})


def post(server: Served, body: dict[str, Any], **headers: str) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", **headers}
    return httpx.post(f"{server.url}/chat/completions", json=body, headers=headers, timeout=120)


def get(server: Served, path: str, token: str = TOKEN) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(server.url.replace("/v1", path), headers=headers, timeout=120)


def chat(*parts: Any, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": asked(*parts), "max_tokens": 4, **more}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([video_part("nothing")], ["video"]),
        ([video_part()], ["video", "audio"]),
        ([image_part(), audio_part()], ["image", "audio"]),
    ],
)
def test_the_official_client_is_answered(client: Any, parts: list[dict[str, Any]], expected: list[str]):
    reply = ask(client, asked(*parts, "What is it?"))
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert 1 <= reply.usage.completion_tokens == reply.usage.total_tokens - reply.usage.prompt_tokens <= 8
    assert [medium["type"] for medium in reply.chatbridge["media"] if medium["reached"]] == expected
    missing = ["messages[0].content[0]'s sound track: the video has no audio track"]
    assert reply.chatbridge["warnings"] == (missing if expected == ["video"] else [])


def test_a_stream_says_the_same_as_the_whole(client: Any):
    messages = asked(image_part(), "What is it?")
    whole = ask(client, messages, max_tokens=20)
    chunks = list(ask(client, messages, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_guides_curl_and_python_are_answered(server: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(server.files)
    guide = GUIDE.replace("http://127.0.0.1:8000/v1", server.url)
    names: dict[str, Any] = {}
    code = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)[0]
    exec(code.replace('"none"', repr(TOKEN)), names)
    with names["client"]:
        assert names["reply"].usage.completion_tokens >= 1
    curl, bash = shutil.which("curl"), shutil.which("bash")
    if curl is None or bash is None:
        pytest.skip("needs curl and bash")
    (command,) = re.findall(r"^```bash\n(curl .*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    command = command.replace("curl ", f"curl -sS --noproxy '*' -H 'Authorization: Bearer {TOKEN}' ", 1)
    done = subprocess.run([bash, "-c", command], capture_output=True, text=True, timeout=120)
    reply = json.loads(done.stdout)
    assert [medium["reached"] for medium in reply["chatbridge"]["media"]] == [True]


def metrics(server: Served) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in get(server, "/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def test_models_health_and_metrics(client: Any, server: Served):
    assert [model.id for model in client.models.list()] == [client.models.retrieve(MODEL).id] == [MODEL]
    assert get(server, "/health", "").json() == {"status": "ok"}
    before = metrics(server)
    ask(client, asked("Hello"), max_tokens=3)
    gained = {name: value - before.get(name, 0) for name, value in metrics(server).items()}
    assert 1 <= gained['chatbridge_tokens_total{kind="generated"}'] <= 3
    assert gained["chatbridge_reply_seconds_count"] == 1


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        (data_url(b"this is no picture", "image/png"), 400, "invalid_media"),
        ("file:link.png", 400, "invalid_media"),
        ("data:image/png;base64," + "A" * 1_600_000, 413, "too_large"),
        (data_url(encoded(Image.new("1", (9000, 9000)), "PNG")), 400, "invalid_media"),
    ],
)
def test_media_that_cannot_be_had_are_refused_without_a_path(server: Served, url: str, status: int, code: str):
    reply = post(server, chat("What is it?", image_part(url), stream=status == 400))
    assert reply.status_code == status
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == (code, "messages[0].content[1]")
    assert not re.search(r"/(tmp|home|work|root|etc)/", reply.text)
    logged(server, error["message"])


def logged(server: Served, words: str) -> str:
    """The line of the log that has these words; it is written just after the answer is sent."""
    return wait_until(lambda: [line for line in server.log.read_text().splitlines() if words in line])[-1]


def test_every_request_has_an_id_and_a_line_in_the_log(server: Served):
    reply = post(server, chat("Hello", temperature=9), **{"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    line = logged(server, "mine-1")
    assert "POST /v1/chat/completions 400" in line
    assert "temperature: Input should be less than or equal to 2, found 9" in line
    assert len(post(server, chat("Hello", max_tokens=1)).headers["x-request-id"]) == 16


def test_pages_of_allowed_origins_may_call(server: Served):
    ask_first = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    url = f"{server.url}/chat/completions"
    allowed = httpx.options(url, headers={"Origin": "https://page.example", **ask_first})
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(url, headers={"Origin": "https://x.example", **ask_first})
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.post(url, headers={"Origin": "https://page.example"})  # the page can read why
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_completions_continue_a_text(client: Any):
    reply = client.completions.create(model=MODEL, prompt=["One", "Two"], max_tokens=4, n=2, seed=1, temperature=1.0)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert reply.usage.completion_tokens <= 16
    again = client.completions.create(model=MODEL, prompt="One", max_tokens=4, stream=True)
    whole = client.completions.create(model=MODEL, prompt="One", max_tokens=4)
    assert "".join(chunk.choices[0].text for chunk in again if chunk.choices).strip() == whole.choices[0].text.strip()
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\] is 99999, expected a token id from 0 to"):
        client.completions.create(model=MODEL, prompt=[1, 99999])


def test_a_conversation_reuses_its_keys_and_n_replies_are_equal(client: Any, server: Served):
    neutral = {"top_k": -1, "chat_template_kwargs": {}, "request_id": "a", "functions": [], "stop": "", "min_tokens": 0}
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *asked(image_part("file:a.png"), "What?")]
    first = ask(client, messages, n=2, tools=[], logit_bias={}, extra_body=neutral)
    said, same = (choice.message.content for choice in first.choices)
    assert said == same
    assert first.usage.prompt_tokens_details.image_tokens > 0
    messages += [{"role": "assistant", "content": said}, *asked("And what else?")]
    second = ask(client, messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_a_body_that_is_too_large(client: Any, server: Served):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, asked("a" * (2 << 20)))
    assert (refused.value.status_code, refused.value.code) == (413, "too_large")
    # More than is read at all: the answer may come, or the line break.
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head.encode() + b"{")
        assert line.recv(1000).startswith(b"HTTP/1.1 413")


def test_refusals_have_openais_form(server: Served):
    hello = chat("Hello")
    for status, code, reply in (
        (415, "unsupported_media_type", post(server, hello, **{"Content-Type": "text/plain"})),
        (401, "invalid_api_key", post(server, hello, Authorization="Bearer wrong")),
        (401, "invalid_api_key", get(server, "/metrics", "")),
        (404, "model_not_found", post(server, {**hello, "model": "gpt-4o"})),
        (404, "model_not_found", get(server, "/v1/models/org/name")),
        (405, None, get(server, "/v1/chat/completions")),
        (404, None, get(server, "/docs")),
    ):
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert reply.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_ended_and_foreign_names_are_refused(model: Any):
    from lavis_chatbridge.chat.server.app import build_app

    engine = building.engine(model)
    app = build_app(engine, ServerOptions(name=MODEL, timeout=0.3))
    endless = chat("Hello", max_tokens=1000, ignore_eos=True, temperature=1.9)

    async def ask_as(host: str) -> tuple[int, str]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            reply = await client.post("/v1/chat/completions", json=endless, headers={"Host": host})
        return reply.status_code, reply.json()["error"]["code"]

    for host in ("localhost", "127.0.0.1:80", "[::1]:1"):
        assert asyncio.run(ask_as(host)) == (504, "timeout")
    for host in ("evil.example:80", "localhost.evil", ""):
        assert asyncio.run(ask_as(host)) == (403, "host_not_allowed")
    wait_until(lambda: not engine.present)


def test_who_leaves_makes_room(client: Any, server: Served):
    endless = {"max_tokens": 1000, "temperature": 1.9, "seed": 1, "extra_body": {"ignore_eos": True}}
    stream = ask(client, asked(image_part(), "Tell me much"), stream=True, **endless)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client, asked("Tell me much"), timeout=0.5, **endless)
    logged(server, "POST /v1/chat/completions 499")
    wait_until(lambda: not metrics(server)["chatbridge_present"])
    assert list(server.temporary.iterdir()) == []  # nor does a file remain
