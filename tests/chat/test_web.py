"""``chatbridge web``: what its parts do, and the page in a real browser where there is one."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn

from lavis_chatbridge.chat import Session, web
from lavis_chatbridge.chat.attachments import modality_of
from lavis_chatbridge.chat.messages import load
from lavis_chatbridge.chat.server import command as server
from lavis_chatbridge.errors import ConfigError
from tests.chat import building
from tests.chat.building import slow_down

USUAL = ("", 8, 0.0, 0.9, -1, True)  # system prompt, tokens, temperature, top-p, seed, hearing


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    web.quiet_gradio(str(tmp_path_factory.mktemp("gradio")))
    from lavis_chatbridge.chat import page

    return page


@pytest.fixture(scope="module")
def page(parts: Any, model: Any) -> Any:
    return parts.Page(building.engine(model), "ChatBridge small", "It knows nothing.")


def message(role: str, *parts: Any, title: str | None = None) -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": role, "content": content, "metadata": {"title": title} if title else None}


def attached(path: str) -> dict[str, Any]:
    return {"type": "file", "file": {"path": path}}


def test_an_answer_streams_with_a_note_on_its_media(parts: Any, page: Any, model: Any, files: Path):
    asked = {"text": "What is it?", "files": [str(files / "a b.png"), str(files / "e.mp4")]}
    *states, (text, note) = page.respond(asked, [], *USUAL)
    whole = Session(model, engine=page.engine).ask("What is it?", *asked["files"], max_new_tokens=8)
    assert text == whole.text == states[-1]
    assert states[0] == ""
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(states))
    assert note["metadata"]["title"] == "The model got: image a b.png, video e.mp4, audio e.mp4's sound track"
    # The second question is asked in the same conversation.
    history = [message("user", attached(str(files / "a b.png")), attached(str(files / "e.mp4")), "What is it?")]
    history += [message("assistant", text), message("assistant", note["content"], title=note["metadata"]["title"])]
    conversation = parts.conversation_of([*history, message("user", "And?")], " S ", hear=True)
    found = [(m.role, m.text, len(m.media)) for m in conversation.messages]
    assert found == [("user", "What is it?", 3), ("assistant", text, 0), ("user", "And?", 0)]
    assert conversation.system == "S"


def test_a_broken_medium_is_told_without_its_path_and_then_left_out(parts: Any, page: Any, files: Path):
    asked: dict[str, Any] = {"text": "What is it?", "files": [str(files / "broken.png")]}
    *_, (fault,) = page.respond(asked, [], *USUAL)
    assert fault["metadata"]["title"] == "Not answered"
    assert "broken.png: it is not an image" in fault["content"]
    assert str(files) not in fault["content"]
    *_, (unfit,) = page.respond({"text": "What is it?"}, [], "", 8, 0.0, 0.9, 1e30, True)
    assert "settings.seed is" in unfit["content"]
    history = [message("user", "A"), message("assistant", "B"), message("user", attached(str(files / "broken.png")))]
    history += [message("assistant", fault["content"], title="Not answered"), message("user", "D")]
    assert [m.text for m in parts.conversation_of(history, "", hear=True).messages] == ["A", "B", "D"]


def test_undo_and_new_say_what_the_next_page_shows(page: Any, files: Path):
    history = [message("user", "A"), message("assistant", "B"), message("user", attached(str(files / "c.wav")), "C")]
    for shown in (history, [*history, message("assistant", "D")]):  # an answer may not have begun
        left = page.undo(shown, *USUAL)
        assert left["messages"] == history[:2]
        assert left["box"] == {"text": "C", "files": [str(files / "c.wav")]}
        assert page.restore({"messages": shown, "box": None, "settings": USUAL}, left)[4:] == list(USUAL)
    assert page.undo([], *USUAL)["messages"] == []
    assert page.restore({"messages": history, "box": None, "settings": USUAL}, None)[1] == history


def test_a_stopped_answer_shows_nothing_more_and_the_next_question_is_answered(page: Any):
    def ask(text: str, tokens: int, request: Any = None) -> Iterator[Any]:
        return page.respond({"text": text, "files": []}, [], "", tokens, 1.9, 1.0, 1, True, request)

    request: Any = SimpleNamespace(session_hash="a page")
    stopped = ask("Tell me much", 400, request)
    assert next(stopped) == ""
    next(stopped)
    page.stop(request)
    assert list(stopped) == []
    assert page.engine.present == 0
    first = ask("Tell me much", 400, request)
    next(first)
    second = ask("What is it?", 40, request)  # although the first is still being closed
    next(second)
    list(first)
    assert list(second)[-1] == list(ask("What is it?", 40))[-1]


def test_gradio_passes_the_request_so_that_visitors_do_not_stop_each_other(page: Any):
    from gradio import Request
    from gradio.helpers import special_args

    request = Request(session_hash="a page")
    assert special_args(page.respond, [*range(8)], request)[0][-1] is request
    assert special_args(page.stop, [], request)[0] == [request]


def test_an_exported_conversation_can_be_loaded(page: Any, files: Path, tmp_path: Path):
    history = [message("user", attached(str(files / "a b.png")), "C"), message("assistant", "D")]
    (tmp_path / "talk.json").write_text(page.export(history, "S"))
    loaded = load(tmp_path / "talk.json")
    assert (loaded.system, [m.text for m in loaded.messages]) == ("S", ["C", "D"])
    assert loaded.messages[0].media[0].content == (files / "a b.png").read_bytes()


def test_passwords(tmp_path: Path):
    (tmp_path / "good").write_text("# who\nme:a:b\n")
    (tmp_path / "bad").write_text("me\n")
    assert web.passwords(str(tmp_path / "good")) == [("me", "a:b")]
    for name in ("bad", "missing"):
        with pytest.raises(ConfigError, match=name):
            web.passwords(str(tmp_path / name))
    with pytest.raises(ConfigError, match="--password-file"):
        web.command(host="0.0.0.0")


def test_the_examples_are_shipped_and_answered(parts: Any):
    session = Session.open("tiny", device="cpu")
    answers = []
    for text, names in parts.QUESTIONS:
        session.clear()
        media = [(modality_of(name), str(parts.EXAMPLES / name)) for name in names]
        answers.append(session.ask(text, media=media).text)
    # A red star on the left, a blue circle that rises, a rising sound of middle pitch.
    assert answers == ["red", "up", "rising", "middle and red"]


@pytest.fixture(scope="module")
def served(page: Any, model: Any) -> Iterator[str]:
    """The page behind a real port, its model slow enough to be stopped."""
    line = server.listen("127.0.0.1", 0)
    app = web.build_app(page, web.WebOptions(max_medium=1))
    running = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=lambda: running.run(sockets=[line]), daemon=True)
    with pytest.MonkeyPatch.context() as patched:
        slow_down(model, patched, 0.05)
        thread.start()
        yield server.address_of(line)
        running.should_exit = True
        thread.join(20)


def test_the_page_names_nothing_elsewhere_and_answers_its_own_address_only(served: str):
    found = httpx.get(served, timeout=60)
    assert found.status_code == 200
    assert "connect-src 'self'" in found.headers["content-security-policy"]
    assert re.findall(r"<(?:script|link)[^>]+(?:src|href)=\"(https?:)?//[^\"]+\"", found.text) == []
    assert httpx.get(served, headers={"Host": "evil.example"}, timeout=60).status_code == 403
    assert httpx.post(f"{served}/gradio_api/queue/join", headers={"Origin": "http://evil.example"}).status_code == 403


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as tools:
        yield tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Visitor:
    """A person at the page."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844})
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(60_000)
        self.faults, self.requested = list[str](), list[str]()
        self.tab.on("pageerror", lambda error: self.faults.append(str(error)))
        self.tab.on("request", lambda request: self.requested.append(request.url))
        self.tab.goto(address)
        self.ready()

    @property
    def box(self) -> Any:
        return self.tab.locator("#message textarea")

    def ready(self) -> None:
        self.tab.locator("#message button[aria-label=Submit]").wait_for()
        self.tab.wait_for_timeout(700)

    def ask(self, text: str, *files: str) -> None:
        if files:
            self.tab.locator("#message input[type=file]").first.set_input_files(list(files))
            self.tab.locator("#message .thumbnail-item, #message .thumbnail-wrapper").first.wait_for()
        self.box.fill(text)
        self.box.press("Enter")

    def begun(self) -> None:
        self.tab.locator("#message button[aria-label=Stop]").wait_for()
        self.tab.wait_for_timeout(300)

    def press(self, name: str) -> None:
        with self.tab.expect_navigation():
            self.tab.locator(f"#{name}").click()
        self.ready()

    def said(self, role: str) -> list[str]:
        shown = self.tab.locator(f"#conversation .{role}.message").all()
        return [bubble.inner_text().replace("\u200b", "").partition("\n")[0] for bubble in shown]


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_a_person_at_the_page(served: str, browser: Any, files: Path, width: int):
    visitor = Visitor(browser, served, width)
    assert visitor.tab.locator("#conversation").get_by_text("what colour is it?").is_visible()
    visitor.ask("What is a<b and <form> it?", str(files / "a b.png"), str(files / "c.wav"))
    visitor.tab.locator("#conversation").get_by_text("The model got: image a b.png, audio c.wav").wait_for()
    visitor.ready()
    shown = visitor.tab.locator("#conversation").inner_text().replace("\u200b", "")
    assert "What is a<b and <form> it?" in shown
    assert visitor.tab.locator("#conversation form").count() == 0
    [first] = visitor.said("bot")
    assert first.strip()
    assert visitor.box.get_attribute("aria-label") == "Your message"  # the placeholder is gone by now
    assert visitor.tab.locator("#conversation [aria-label='a b.png']").count() >= 1  # media have names
    with visitor.tab.expect_download() as download:
        visitor.tab.locator("#export").click()
    exported = json.loads(Path(download.value.path()).read_text())
    assert [part["type"] for part in exported["messages"][0]["content"]] == ["image_url", "audio_url", "text"]
    visitor.ask("Tell me more")
    visitor.begun()
    assert not visitor.box.is_enabled()  # a question cannot be lost in an answer
    visitor.tab.reload()  # in the middle of the answer
    visitor.ready()
    assert visitor.said("user")[-1] == "Tell me more"
    assert visitor.said("bot")[0] == first
    visitor.press("undo")
    assert visitor.box.input_value() == "Tell me more"
    visitor.box.press("Enter")
    visitor.begun()
    visitor.press("undo")  # in the middle of the answer
    assert visitor.box.input_value() == "Tell me more"
    assert len(visitor.said("bot")) == 1
    visitor.box.press("Enter")
    visitor.begun()
    visitor.tab.locator("#message button[aria-label=Stop]").click()
    visitor.ready()
    visitor.ask("And now?")
    visitor.begun()
    visitor.press("new")  # in the middle of the answer
    visitor.tab.wait_for_timeout(1500)
    assert visitor.said("user") == visitor.said("bot") == []
    assert visitor.tab.evaluate("document.documentElement.scrollWidth") <= width
    assert visitor.faults == []
    assert [url for url in visitor.requested if not url.startswith((served, "data:", "blob:"))] == []
    visitor.context.close()
