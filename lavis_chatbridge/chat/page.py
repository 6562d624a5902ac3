"""The page of ``chatbridge web``: gradio's `ChatInterface`, its buttons, and the conversion of its messages.

The conversation is stored in the browser, not in the engine. Import this module after `web.quiet_gradio`. It
imports gradio at the top, because gradio resolves the annotations of actions to find the parameter ``request``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lavis_chatbridge.chat.attachments import media_of, modality_of
from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
from lavis_chatbridge.chat.engine import Answer, Engine, Reply
from lavis_chatbridge.chat.messages import to_json
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ChatBridgeError
from lavis_chatbridge.models.sampling import Sampling

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EXAMPLES = ASSETS / "examples"
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("what colour is it?", ("picture.jpg",)),
    ("how does it move?", ("video.mp4",)),
    ("how does the sound go on?", ("sound.mp3",)),
    ("tell me the pitch of the audio and the colour of the image", ("picture.jpg", "sound.mp3")),
)
"""Questions about media of the embedded world, which the tiny model knows."""
TINY_KNOWS = "It knows the embedded world only: small coloured shapes that lie or move, tones and noises."
_INVISIBLE = "\N{ZERO WIDTH SPACE}"
_ERROR, _NOTE = "Not answered", "The model got"


class Page:
    """The actions of the page's parts; ``knows`` describes what the model has learnt, if it learnt the examples."""

    def __init__(self, engine: Engine, title: str, knows: str = "") -> None:
        self.engine, self.title, self.knows = engine, title, knows
        self._replies: dict[str, Reply] = {}

    def respond(
        self,
        message: dict[str, Any],
        history: list[dict[str, Any]],
        system: str,
        tokens: float,
        temperature: float,
        top_p: float,
        seed: float | None,
        hear: bool,
        request: gr.Request | None = None,
    ) -> Iterator[Any]:
        """Messages of the assistant as the answer comes; a fault is a message with a title, as a note is."""
        key = str(getattr(request, "session_hash", ""))
        self.stop(request)
        files = [{"path": str(file)} for file in message.get("files") or []]
        asked = {"role": "user", "content": [*files, message.get("text") or ""]}
        own_seed = None if seed is None or seed < 0 else int(seed)
        reply: Reply | None = None
        try:
            chosen = {"max_new_tokens": tokens, "temperature": temperature, "top_p": top_p, "seed": own_seed}
            sampling = parse(Sampling, chosen, "settings")
            conversation = conversation_of([*history, asked], system, hear)
            reply = self._replies[key] = self.engine.reply(conversation, sampling)
            text = ""
            yield ""
            for piece in reply:
                text += piece
                if self._replies.get(key) is reply:
                    yield text
            if self._replies.get(key) is reply:
                yield [text, *_notes(reply.answer)]
        except ChatBridgeError as error:
            yield [{"role": "assistant", "content": str(error), "metadata": {"title": _ERROR}}]
        finally:
            if reply is not None:
                reply.cancel()

    def stop(self, request: gr.Request | None = None) -> None:
        """End the answer of a page at its next token; nothing more of it is shown."""
        reply = self._replies.pop(str(getattr(request, "session_hash", "")), None)
        if reply is not None:
            reply.cancel()

    def undo(self, history: list[dict[str, Any]], *settings: Any) -> dict[str, Any]:
        """The page without the last question and its answer; the question is back in the box."""
        end = next((i + 1 for i in reversed(range(len(history))) if history[i]["role"] == "user"), len(history))
        begin = end
        while begin and history[begin - 1]["role"] == "user":
            begin -= 1
        taken = [part for message in history[begin:end] for part in _parts(message)]
        text = "\n".join(part for part in taken if isinstance(part, str))
        box = {"text": text, "files": [part["path"] for part in taken if isinstance(part, dict)]}
        return {"messages": history[:begin], "box": box, "settings": settings}

    def restore(self, kept: dict[str, Any] | None, left: dict[str, Any] | None) -> list[Any]:
        """Values of the page's parts when it is loaded: as undo or new left it, or else as it was."""
        page = left or kept
        if page is None:  # a skipped conversation is rebuilt by gradio, without its shield
            return [None, [], [], *[gr.skip()] * 7]
        return [None, page["messages"], page["messages"], page["box"] or gr.skip(), *page["settings"]]

    def export(self, history: list[dict[str, Any]], system: str) -> str:
        """The conversation as JSON that `Session.load` and ``/load`` read, media inside."""
        conversation = conversation_of(history, system, hear=True)
        for message in conversation.messages:
            for medium in message.media:
                medium.content = Path(medium.content).read_bytes()  # type: ignore[arg-type]
        return to_json(conversation)


def conversation_of(history: Sequence[dict[str, Any]], system: str, hear: bool) -> Conversation:
    """gradio's messages as a conversation; what failed, and notes on answers, are left out."""
    result = Conversation(system=system.strip())
    for message in history:
        title = (message.get("metadata") or {}).get("title") or ""
        if title == _ERROR:
            while result.messages and result.messages[-1].role == "user":
                result.messages.pop()
        if title:
            continue
        parts = _parts(message)
        text = "\n".join(part for part in parts if isinstance(part, str))
        files = [(modality_of(part["path"]), part["path"]) for part in parts if isinstance(part, dict)]
        result.add(ChatMessage(message["role"], text, tuple(media_of(media=files, hear_videos=hear))))
    return result


def _parts(message: dict[str, Any]) -> list[str | dict[str, Any]]:
    """The texts of gradio's message that are not empty, and its files (each with a ``path``)."""
    content = message["content"]
    result: list[str | dict[str, Any]] = []
    for part in content if isinstance(content, list) else [content]:
        found = part if isinstance(part, str) else part.get("file", part if "path" in part else part.get("text", ""))
        if found:
            result.append(found)
    return result


def _notes(answer: Answer) -> list[dict[str, Any]]:
    """The new media of an answer and its warnings, as one folded message."""
    reached = [f"{note.modality} {note.name}" for note in answer.media if note.new and note.reached]
    lines = list(answer.warnings)
    if answer.finish == "length":
        lines.append("The answer was cut off at the limit of tokens.")
    if not reached and not lines:
        return []
    metadata = {"title": f"{_NOTE}: {', '.join(reached) or 'no medium'}"}
    content = "\n".join(lines) or "Every medium reached the model."
    return [{"role": "assistant", "content": content, "metadata": metadata}]


def build_blocks(page: Page) -> gr.Blocks:
    given = [[{"text": text, "files": [str(EXAMPLES / name) for name in names]}] for text, names in QUESTIONS]
    settings: list[Any] = [
        gr.Textbox("", label="System prompt", lines=2, render=False),
        gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens", render=False),
        gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 takes the likeliest token", render=False),
        gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p", render=False),
        gr.Number(value=-1, precision=0, label="Seed", info="-1: a new answer each time", render=False),
        gr.Checkbox(value=True, label="Hear the videos' sound tracks", render=False),
    ]
    with gr.Blocks(title=page.title, analytics_enabled=False, delete_cache=(3600, 86_400), fill_height=True) as blocks:
        gr.Markdown(f"# {page.title}\nTalk about pictures, videos and sounds. {page.knows}", elem_id="page-title")
        talk = gr.ChatInterface(
            page.respond,
            multimodal=True,
            chatbot=_chatbot(),
            textbox=gr.MultimodalTextbox(
                label="Your message",
                show_label=False,
                placeholder="Ask something...",
                sources=["upload", "microphone"],
                file_types=["image", "video", "audio"],
                file_count="multiple",
                elem_id="message",
                autofocus=True,
                stop_btn=True,
                render=False,
            ),
            editable=True,
            examples=given if page.knows else None,
            cache_examples=False,
            additional_inputs=settings,
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            flagging_mode="never",
            analytics_enabled=False,
            show_progress="hidden",
            api_visibility="private",
        )
        _wire(page, blocks, talk, settings)
    return blocks


def _chatbot() -> gr.Chatbot:
    """The conversation. Its texts are shielded on their way to the browser: gradio would read a tag in them as HTML."""
    chat = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="conversation",
        placeholder="Add a picture, a video or a sound below and ask about it.",
        buttons=["copy"],
        feedback_options=None,
        render_markdown=False,  # text of a model is text; as Markdown it could name pictures elsewhere
        sanitize_html=True,
        latex_delimiters=[],
        allow_tags=False,
        layout="bubble",
        render=False,
    )
    pack, unpack = chat.postprocess, chat.preprocess
    chat.postprocess = lambda value: _each_text(pack(value), _shielded)  # type: ignore[method-assign]
    chat.preprocess = lambda payload: unpack(_each_text(payload, _bare))  # type: ignore[method-assign]
    return chat


def _shielded(text: str) -> str:
    """``text`` with an invisible character behind what could begin a tag or an entity of HTML."""
    return re.sub(f"([<&]){_INVISIBLE}*", rf"\1{_INVISIBLE}", text)


def _bare(text: str) -> str:
    """``text`` before `_shielded`."""
    return re.sub(f"([<&]){_INVISIBLE}+", r"\1", text)


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """Apply ``change`` to every text of gradio's chatbot data."""
    for message in value.root if value is not None else ():
        for part in message.content:
            if getattr(part, "type", "") == "text":
                part.text = change(part.text)
    return value


def _wire(page: Page, blocks: gr.Blocks, talk: gr.ChatInterface, settings: list[Any]) -> None:
    """Undo, new, export, and the memory of the browser.

    Undo and new load the page again from what they leave: an unfinished answer cannot write into a new page.
    """
    kept = gr.BrowserState(None, storage_key="chatbridge")
    left = gr.BrowserState(None, storage_key="chatbridge-left")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    exported = gr.Textbox(visible=False)
    chat: Any = talk.chatbot

    def as_it_is(messages: list[dict[str, Any]], *chosen: Any) -> dict[str, Any]:
        return {"messages": messages, "box": None, "settings": chosen}

    with gr.Row(elem_id="actions"):
        for name, action in (("Undo", page.undo), ("New conversation", lambda _, *chosen: as_it_is([], *chosen))):
            button = gr.Button(name, elem_id=name.partition(" ")[0].lower())
            pressed = button.click(page.stop, None, None, **quiet)
            changed = pressed.then(action, [chat, *settings], [left], **quiet)
            changed.then(None, None, None, js="() => location.reload()", **quiet)
        export = gr.Button("Export", elem_id="export")
    export.click(page.export, [chat, settings[0]], [exported], **quiet).then(
        None, [exported], None, js=asset("download.js"), **quiet
    )
    box: Any = talk.textbox
    box.stop(page.stop, None, None, **quiet)
    changes = [chat.change, *(setting.change for setting in settings)]
    gr.on(changes, as_it_is, [chat, *settings], [kept], trigger_mode="always_last", **quiet)
    blocks.unload(page.stop)
    blocks.load(page.restore, [kept, left], [left, chat, talk.chatbot_state, box, *settings], **quiet)


def asset(name: str) -> str:
    """A script or a style sheet of the page."""
    return (ASSETS / "page" / name).read_text(encoding="utf-8")
