"""``chatbridge serve`` as its clients see it: the official ``openai`` client and bare HTTP against one process."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lavis_chatbridge.chat.server.command import ServerOptions
from tests.chat import building
from tests.chat.serving import MAX_BODY, MODEL, TOKEN, Served, asked, audio, clip, data_url, image, serving, text
from tests.media.making import encoded

httpx = pytest.importorskip("httpx", reason="the server's tests need the extra 'test'")
pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")
pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")
openai = pytest.importorskip("openai", reason="the server's tests need the extra 'test'")

GUIDE = (Path(__file__).resolve().parents[3] / "docs" / "server.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    limits = "--decode-workers 1 --decode-seconds 20 --max-medium 1 --allowed-origins https://page.example"
    with serving(tmp_path_factory.mktemp("server"), *limits.split()) as running:
        yield running
        assert running.process.poll() is None  # whatever the tests sent, it lives
    assert list(running.temporary.iterdir()) == []


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url, api_key=TOKEN, max_retries=0, timeout=120) as made:
        yield made


def ask(client: Any, messages: Any, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=messages, **{"max_tokens": 8, **more})


def post(server: Served, body: Any, **headers: str) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    usual = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    return httpx.post(f"{server.url}/chat/completions", content=content, headers={**usual, **headers}, timeout=120)


def get(server: Served, path: str, token: str = TOKEN) -> Any:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return httpx.get(server.url.replace("/v1", path), headers=headers, timeout=120)


def chat(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": asked(*parts), "max_tokens": 4, **more}


PARTS = {
    "text": [text("What can you see?")],
    "video": [clip("nothing"), text("What is it?")],
    "heard video": [clip(), text("What is it?")],
    "image and audio": [image(), audio(), text("Do they fit?")],
}


@pytest.mark.parametrize("name", PARTS, ids=lambda name: name.replace(" ", "-"))
def test_the_official_client_is_answered(client: Any, name: str):
    reply = ask(client, asked(*PARTS[name]))
    (choice,) = reply.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert 1 <= reply.usage.completion_tokens <= 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    reached = [medium["type"] for medium in reply.chatbridge["media"] if medium["reached"]]
    expected = {"heard video": ["video", "audio"], "image and audio": ["image", "audio"], "text": []}
    assert reached == expected.get(name, [name])
    missing = ["messages[0].content[0]'s sound track: the video has no audio track"]
    assert reply.chatbridge["warnings"] == (missing if name == "video" else [])


def test_a_stream_says_the_same_as_the_whole(client: Any):
    messages = asked(image(), text("What is it?"))
    whole = ask(client, messages, max_tokens=20)
    chunks = list(ask(client, messages, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[0].choices[0].delta.role == "assistant"


def test_the_guides_curl_is_answered(server: Served):
    curl, bash = shutil.which("curl"), shutil.which("bash")
    if curl is None or bash is None:
        pytest.skip("needs curl and bash")
    (command,) = re.findall(r"^```bash\n(curl .*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE)
    command = command.replace("http://127.0.0.1:8000/v1", f"{server.url}", 1)
    command = command.replace("curl ", f"curl -sS --noproxy '*' -H 'Authorization: Bearer {TOKEN}' ", 1)
    done = subprocess.run([bash, "-c", command], cwd=server.files, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert [medium["reached"] for medium in reply["chatbridge"]["media"]] == [True]
    assert reply["usage"]["completion_tokens"] >= 1


def test_the_guides_python_is_answered(server: Served, monkeypatch: pytest.MonkeyPatch):
    code = next(block for block in re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE))
    monkeypatch.chdir(server.files)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000/v1", server.url).replace('"none"', repr(TOKEN)), names)
    with names["client"]:
        assert names["reply"].usage.completion_tokens >= 1


def metrics(server: Served) -> dict[str, float]:
    page = get(server, "/metrics").text
    lines = [line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_models_health_and_metrics(client: Any, server: Served):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    assert get(server, "/health", "").json() == {"status": "ok"}
    before = metrics(server)
    ask(client, asked(text("Hello")), max_tokens=3)
    after = metrics(server)
    tokens = 'chatbridge_tokens_total{kind="generated"}'
    assert 1 <= after[tokens] - before[tokens] <= 3
    assert after["chatbridge_reply_seconds_count"] == before["chatbridge_reply_seconds_count"] + 1


LARGE = encoded(Image.new("1", (9000, 9000)), "PNG")
BROKEN = {
    "no picture": (image(data_url(b"this is no picture", "image/png")), 400, "invalid_media"),
    "a web page": (image("http://127.0.0.1:1/a.png"), 400, "invalid_media"),
    "a server's file": (image("file:///etc/passwd"), 400, "invalid_media"),
    "a link out": (image("file:link.png"), 400, "invalid_media"),
    "too large": (image("data:image/png;base64," + "A" * 1_600_000), 413, "too_large"),
    "too many pixels": (image(data_url(LARGE, "image/png")), 400, "invalid_media"),
}


@pytest.mark.parametrize("fault", BROKEN, ids=lambda name: name.replace(" ", "-"))
def test_media_that_cannot_be_had_are_refused_without_a_path(server: Served, fault: str):
    part, status, code = BROKEN[fault]
    reply = post(server, chat(text("What is it?"), part, stream=fault.startswith("a")))
    assert reply.status_code == status
    error = reply.json()["error"]
    assert error["code"] == code
    assert error["param"] == "messages[0].content[1]"
    assert not re.search(r"/(tmp|home|work|root|etc)/", reply.text)
    assert logged(server, error["message"])


def logged(server: Served, words: str) -> str:
    """The line of the log that has these words; it is written just after the answer is sent."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        server.errors.seek(0)
        found = [line for line in server.errors.read().splitlines() if words in line]
        if found:
            return found[-1]
        time.sleep(0.05)
    return ""


def test_every_request_has_an_id_and_a_line_in_the_log(server: Served):
    reply = post(server, chat(text("Hello"), temperature=9), **{"X-Request-Id": "mine-1"})
    assert reply.headers["x-request-id"] == "mine-1"
    line = logged(server, "mine-1")
    assert "POST /v1/chat/completions 400" in line
    assert "temperature: Input should be less than or equal to 2, found 9" in line
    assert len(post(server, chat(text("Hello"), max_tokens=1)).headers["x-request-id"]) == 16


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


def test_a_conversation_reuses_its_keys_and_n_replies_are_equal(client: Any, server: Served):
    neutral = {"top_k": -1, "chat_template_kwargs": {}, "request_id": "a", "functions": [], "stop": "", "min_tokens": 0}
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, *asked(image("file:a.png"), text("What?"))]
    first = ask(client, messages, n=2, tools=[], logit_bias={}, extra_body=neutral)
    said, same = (choice.message.content for choice in first.choices)
    assert said == same
    assert first.usage.prompt_tokens_details.image_tokens > 0
    messages += [{"role": "assistant", "content": said}, *asked(text("And what else?"))]
    second = ask(client, messages)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_a_body_that_is_too_large(client: Any, server: Served):
    with pytest.raises(openai.APIStatusError) as refused:
        ask(client, asked(text("a" * (MAX_BODY + 10))))
    assert (refused.value.status_code, refused.value.code) == (413, "too_large")
    # More than is read at all: the answer may come, or the line break.
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
    host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as line:
        line.sendall(head.encode() + b"{")
        assert line.recv(1000).startswith(b"HTTP/1.1 413")


def test_refusals_have_openais_form(server: Served):
    hello = chat(text("Hello"))
    found = [
        (415, "unsupported_media_type", post(server, hello, **{"Content-Type": "text/plain"})),
        (400, "invalid_json", post(server, b"{")),
        (401, "invalid_api_key", post(server, hello, Authorization="Bearer wrong")),
        (401, "invalid_api_key", get(server, "/metrics", "")),
        (404, "model_not_found", post(server, {**hello, "model": "gpt-4o"})),
        (404, "model_not_found", get(server, "/v1/models/org/name")),
        (405, None, get(server, "/v1/chat/completions")),
        (404, None, get(server, "/docs")),
    ]
    for status, code, reply in found:
        assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
        assert reply.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_ended(model: Any):
    from lavis_chatbridge.chat.server.app import build_app

    engine = building.engine(model)
    app = build_app(engine, ServerOptions(name=MODEL, timeout=0.3))
    endless = chat(text("Hello"), max_tokens=1000, ignore_eos=True, temperature=1.9)

    async def asked() -> Any:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.post("/v1/chat/completions", json=endless)

    reply = asyncio.run(asked())
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
    deadline = time.monotonic() + 30
    while engine.present and time.monotonic() < deadline:
        time.sleep(0.05)
    assert engine.present == 0


def test_who_leaves_makes_room(client: Any, server: Served):
    endless = {"max_tokens": 1000, "temperature": 1.9, "seed": 1, "extra_body": {"ignore_eos": True}}
    stream = ask(client, asked(image(), text("Tell me much")), stream=True, **endless)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        ask(client, asked(text("Tell me much")), timeout=0.5, **endless)
    assert logged(server, "POST /v1/chat/completions 499")
    deadline = time.monotonic() + 120
    while metrics(server)["chatbridge_present"] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert metrics(server)["chatbridge_present"] == 0
    assert list(server.temporary.iterdir()) == []  # nor does a file remain
