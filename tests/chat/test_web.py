"""``chatbridge web``: what its buttons do, what it loads, and the page in a real browser where there is one."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lavis_chatbridge.chat import MediaReader, Session, web
from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.media.pool import DecodingPool
from tests.chat import building

USUAL = (8, 0.0, 0.9, -1, True)
"""The page's settings: tokens, temperature, top-p, seed, hearing."""


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return building.chat_model(golden_dir / "tokenizer")


@pytest.fixture
def page(model: Any) -> web.Page:
    return web.Page(model, MediaReader(model, building.processors()))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(building.picture()).save(folder / "a.png")
    (folder / "b.wav").write_bytes(building.sound())
    (folder / "c.mp4").write_bytes(building.video())
    (folder / "broken.png").write_bytes(b"no picture")
    return {path.name: str(path) for path in folder.iterdir()}


def said(page: web.Page, text: str, *media: str) -> tuple[web.Talk, list[Any]]:
    """Send a message on a new page; the states that the page then shows."""
    box, shown, talk, _ = page.send({"text": text, "files": list(media)}, None)
    assert box == {"text": "", "files": []}
    assert [m["content"] for m in shown if isinstance(m["content"], str)] == [text, "…"]
    return talk, list(page.answer(talk, *USUAL))


def test_an_answer_streams_into_the_conversation(page: web.Page, model: Any, files: dict[str, str]):
    talk, states = said(page, "What is it?", files["a.png"], files["c.mp4"])
    whole = Session(model, building.processors()).ask(
        "What is it?", media=[("image", files["a.png"]), ("video", files["c.mp4"])], max_new_tokens=8
    )
    back, messages, line = states[-1]
    assert back is None
    assert messages[-1] == {"role": "assistant", "content": whole.text}
    assert [m["content"]["path"] for m in messages[:2]] == [files["a.png"], files["c.mp4"]]
    assert "The model got: image, video, its sound." in line
    partial = [state[1][-1]["content"] for state in states]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(partial))
    # And once more with the same question, which greedy answers repeat.
    (messages, line) = list(page.retry(talk, *USUAL))[-1]
    assert messages[-1]["content"] == whole.text
    assert len(talk.session.turns) == 2
    assert "temperature 0" in line


def test_undo_brings_the_question_back(page: web.Page, files: dict[str, str]):
    talk, _ = said(page, "What is it?", files["c.mp4"])
    box, messages, _ = page.undo(talk)
    assert box == {"text": "What is it?", "files": [files["c.mp4"]]}
    assert messages == []
    _, _, line = page.undo(talk)
    assert "nothing to take back" in line
    assert "no question" in list(page.retry(talk, *USUAL))[-1][1]


def test_a_broken_medium_goes_back_into_the_box_without_its_path(page: web.Page, files: dict[str, str]):
    talk, states = said(page, "What is it?", files["broken.png"])
    ((back, messages, line),) = states
    assert back == {"text": "What is it?", "files": [files["broken.png"]]}
    assert messages == []
    assert "broken.png cannot be read" in line
    assert str(Path(files["broken.png"]).parent) not in line
    assert talk.session.turns == ()


def test_nothing_to_send_is_told(page: web.Page):
    _, shown, talk, line = page.send({"text": "  ", "files": []}, None)
    assert shown == []
    assert "Type a question" in line
    assert list(page.answer(talk, *USUAL)) == []


def test_stop_ends_the_answer_and_new_begins_anew(page: web.Page):
    _, _, talk, _ = page.send({"text": "Tell me much", "files": []}, None)
    states = page.answer(talk, 500, 1.9, 1.0, 1, True)
    next(states)
    page.stop(talk)
    _, messages, line = list(states)[-1]
    assert "Stopped." in line
    assert messages[-1]["role"] == "assistant"
    messages, same, _ = page.clear(talk)
    assert messages == []
    assert same.session.turns == ()


def test_kinds_of_files(tmp_path: Path):
    (tmp_path / "nameless").write_bytes(b"\x89PNG....")
    kinds = [web.kind_of(str(tmp_path / name)) for name in ("a.JPG", "b.wav", "c.webm", "nameless", "missing")]
    assert kinds == ["image", "audio", "video", "image", "video"]


def test_words_of_the_page_are_escaped_and_name_no_folder():
    assert "<script>" not in web.status("<script>")
    fault = MediaError("/secret/place/a.png", "cannot open '/secret/place/a.png'")
    assert web.told(fault) == "a.png cannot be read: cannot open 'a.png'"


def test_passwords(tmp_path: Path):
    (tmp_path / "good").write_text("# who\nme:a:b\n")
    assert web.passwords(str(tmp_path / "good")) == [("me", "a:b")]
    (tmp_path / "bad").write_text("me\n")
    for name in ("bad", "missing"):
        with pytest.raises(ConfigError, match=name):
            web.passwords(str(tmp_path / name))


def test_the_examples_are_shipped_and_answered():
    session = Session.open("tiny", device="cpu")
    answers = []
    for text, names in web.QUESTIONS:
        session.clear()
        answers.append(session.ask(text, media=[(web.kind_of(name), str(web.EXAMPLES / name)) for name in names]).text)
    # A red star on the left, a blue circle that rises, a rising sound of middle pitch.
    assert answers == ["red", "up", "rising", "middle and red"]
    for _, names in web.QUESTIONS:
        for name in names:
            assert (web.EXAMPLES / name).stat().st_size < 100_000
            assert web.kind_of(name) == {"picture.jpg": "image", "video.mp4": "video", "sound.mp3": "audio"}[name]


@pytest.fixture
def started(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call ``chatbridge web`` with some arguments; a function in place of the server gets the processors."""
    pytest.importorskip("gradio", reason="the page needs the extra 'web'")
    uvicorn = pytest.importorskip("uvicorn", reason="the page needs the extra 'web'")
    processors = building.processors()
    monkeypatch.setattr("lavis_chatbridge.chat.loading.load_model", lambda *_: (model, processors))
    monkeypatch.setattr(web.signal, "signal", lambda *_: None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # is restored

    def start(serving: Any, *words: str) -> None:
        monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: serving(processors))
        parser = argparse.ArgumentParser()
        web.add_arguments(parser)
        web.run(parser.parse_args(["--port", "0", "--no-examples", *words]))

    return start


def test_media_are_opened_by_processes_that_end_with_the_page(started: Any, files: dict[str, str]):
    found: dict[str, Any] = {}

    def serving(processors: Any) -> None:
        image = processors["image"]["eval"]
        found["opener"] = image.opener
        found["picture"] = image(files["a.png"])
        with pytest.raises(MediaError):
            image(files["broken.png"])

    started(serving, "--decode-workers", "1")
    assert isinstance(found["opener"], DecodingPool)
    assert torch.equal(found["picture"], building.processors()["image"]["eval"](files["a.png"]))
    started(lambda processors: found.update(own=processors["image"]["eval"].opener), "--decode-workers", "0")
    assert not isinstance(found["own"], DecodingPool)


def test_costs_that_cannot_be_are_refused_before_the_model_is_loaded(started: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lavis_chatbridge.chat.loading.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=r"decode_workers is -1, expected at least 0; .*decode_seconds is 0"):
        started(lambda _: None, "--decode-workers", "-1", "--decode-seconds", "0")
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="need Linux: use 0"):
        started(lambda _: None, "--decode-workers", "1")


@pytest.fixture(scope="module")
def served(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page behind a real port, its model slow enough to be stopped."""
    web.quiet_gradio(str(tmp_path_factory.mktemp("uploads")))
    pytest.importorskip("gradio", reason="the page needs the extra 'web'")
    uvicorn = pytest.importorskip("uvicorn", reason="the page needs the extra 'web'")
    forward = model.llama_model.forward

    @functools.wraps(forward)
    def slowly(*args: Any, **more: Any) -> Any:
        time.sleep(0.02)
        return forward(*args, **more)

    model.llama_model.forward = slowly
    line = web.listen("127.0.0.1", 0)
    line.listen()
    app = web.build_app(web.Page(model, MediaReader(model, building.processors())), max_bytes=1 << 20)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=lambda: server.run(sockets=[line]), daemon=True)
    thread.start()
    yield web.address_of(line)
    server.should_exit = True
    thread.join(20)
    del model.llama_model.forward


def test_the_page_names_nothing_elsewhere(served: str):
    httpx = pytest.importorskip("httpx", reason="the page needs the extra 'web'")
    page = httpx.get(served, timeout=60)
    assert page.status_code == 200
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    loaded = re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(https?:)?//[^\"]+\"", page.text)
    assert loaded == []
    assert '"analytics_enabled":true' not in page.text.replace(" ", "")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as tools:
        started = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def test_a_person_asks_retries_and_stops(served: str, browser: Any, files: dict[str, str]):
    context = browser.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    page.set_default_timeout(60_000)
    requested: list[str] = []
    faults: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(served)
    box = page.locator("#message textarea")
    box.wait_for()
    page.locator("#message input[type=file]").first.set_input_files([files["a.png"], files["b.wav"]])
    page.locator("#message .thumbnail-item, #message .thumbnail-wrapper").first.wait_for()
    box.fill("What is it?")
    box.press("Enter")
    line = page.locator("#status")
    line.get_by_text("The model got: image, audio.").wait_for()
    answer = page.locator("#conversation [data-testid=bot]").last
    first = answer.inner_text()
    assert first.strip()
    page.locator("#retry").click()
    line.get_by_text("temperature 0").wait_for()
    assert answer.inner_text() == first
    # With the keyboard alone: write, send, and reach Stop while the answer comes.
    box.focus()
    page.keyboard.type("Tell me much more")
    page.keyboard.press("Enter")
    line.get_by_text("is answering").wait_for()
    page.locator("#stop").focus()
    page.keyboard.press("Enter")
    line.get_by_text(re.compile("Stopped|Done|Cut off")).wait_for()
    assert "Stopped" in line.inner_text()
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 390  # nothing has to be scrolled sideways on a phone
    assert faults == []
    outside = [url for url in requested if not url.startswith((served, "data:", "blob:"))]
    assert outside == []
    context.close()
