"""``chatbridge web``: a page on which a person talks with ChatBridge about pictures, videos and sounds.

The page is gradio's `ChatInterface`, which holds the conversation; the engine holds nothing of it. The page's security
policy lets the browser load nothing from elsewhere. Uploads lie in a temporary folder that goes with the server.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.chat import loading
from lavis_chatbridge.chat.server import command as server
from lavis_chatbridge.chat.sources import MEBIBYTE, is_loopback, is_own_name, modality_of
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MissingExtraError

if TYPE_CHECKING:
    import gradio as gr
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply

log = logging.getLogger("chatbridge.web")

EXAMPLES = Path(__file__).resolve().parent.parent / "assets" / "examples"
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("what colour is it?", ("picture.jpg",)),
    ("how does it move?", ("video.mp4",)),
    ("how does the sound go on?", ("sound.mp3",)),
    ("tell me the pitch of the audio and the colour of the image", ("picture.jpg", "sound.mp3")),
)
"""Questions about media of the embedded world, which the tiny model knows."""
KNOWS = {"tiny": "It knows the embedded world only: small coloured shapes that lie or move, tones and noises."}
_INVISIBLE = "\N{ZERO WIDTH SPACE}"
_SETTINGS = 6  # components of the accordion
_ERROR, _NOTE = "Not answered", "The model got"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""What the browser may load: gradio writes its own scripts into the page and compiles some."""
STYLE = """
.gradio-container { width: 100% !important; max-width: 60rem !important; margin-inline: auto !important; }
footer, button[aria-label="Share"], #conversation button:is([aria-label="Undo"], [aria-label="Clear"]),
/* while an answer comes */
:has(#message button[aria-label="Stop"]) > * #conversation button:is([aria-label="Retry"], [aria-label="Edit"])
{ display: none !important; }
#conversation { height: clamp(18rem, 62dvh, 60rem) !important; }
#conversation img, #conversation video { max-height: 10rem; max-width: 14rem; width: auto; }
#conversation .image-container > button::after { content: attr(aria-label); display: block; font-size: 0.75rem; }
#conversation .minimal-audio-player, #conversation .waveform-wrapper { height: 3rem; overflow: hidden; }
#conversation .waveform-wrapper { display: flex; align-items: center; }
#conversation .waveform-wrapper > div { flex: 1; }
#actions { flex-wrap: wrap; gap: 0.5rem; }
#actions button { min-width: 0; min-height: 44px; flex: 1 1 6rem; }
.gradio-container * { min-width: 0; overflow-wrap: anywhere; }
:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 2px; }
"""
SCRIPT = """
() => {
  const name = (medium) => decodeURIComponent((medium.currentSrc || medium.src).split(/[/?#]/).pop() || 'medium');
  const label = () => document.querySelectorAll('#conversation :is(img, video, audio)').forEach((medium) => {
    if (medium.dataset.named || !(medium.currentSrc || medium.src)) return;
    medium.dataset.named = name(medium);
    medium.title = medium.ariaLabel = name(medium);
    if (medium.tagName === 'IMG') medium.alt = name(medium);
    const button = medium.closest('button');
    if (button && !button.innerText.trim()) button.ariaLabel = name(medium);
  });
  // What gradio leaves for screen readers to stumble over.
  const mend = () => {
    document.querySelectorAll('.examples[role=list]').forEach((one) => one.removeAttribute('role'));
    document.querySelectorAll('.example-icon[aria-label]:not([role])').forEach((one) => { one.role = 'img'; });
    document.querySelectorAll('#conversation button[aria-label=""]').forEach((one) => { one.ariaLabel = 'Download'; });
    document.querySelectorAll('#conversation [role=button]:has(button)').forEach((one) => {
      one.removeAttribute('role');
      one.removeAttribute('tabindex');
      const button = one.querySelector('button');
      if (!button.ariaLabel && !button.innerText.trim()) button.ariaLabel = 'Show or hide';
    });
  };
  const all = {childList: true, subtree: true, attributes: true};
  new MutationObserver(() => { label(); mend(); }).observe(document.body, all);
}
"""
_DOWNLOAD = """
(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'application/json'}));
  link.download = 'conversation.json';
  link.click();
}
"""


class Page:
    """What the page's parts do.

    Args:
        engine: Answers.
        title: The model's name.
    """

    def __init__(self, engine: Engine, title: str) -> None:
        self.engine, self.title = engine, title
        self._running: dict[str, Reply] = {}

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
        from lavis_chatbridge.models.sampling import Sampling

        key = str(getattr(request, "session_hash", ""))
        self.stop(request)
        files = [{"path": str(file)} for file in message.get("files") or []]
        asked = {"role": "user", "content": [*files, message.get("text") or ""]}
        try:
            sampling = Sampling(
                max_new_tokens=int(tokens),
                temperature=float(temperature),
                top_p=float(top_p),
                seed=None if seed is None or seed < 0 else int(seed),
            )
            conversation = conversation_of([*history, asked], system, hear)
            reply = self._running[key] = self.engine.reply(conversation, sampling)
            text = ""
            yield ""
            for piece in reply:
                text += piece
                if self._running.get(key) is reply:
                    yield text
            if self._running.get(key) is reply:
                yield [text, *_notes(reply.answer)]
        except ChatBridgeError as error:
            yield [{"role": "assistant", "content": _told(error), "metadata": {"title": _ERROR}}]
        finally:
            reply_now = self._running.get(key)
            if reply_now is not None:
                reply_now.cancel()

    def stop(self, request: gr.Request | None = None) -> None:
        """End the answer of a page at its next token; nothing more of it is shown."""
        reply = self._running.pop(str(getattr(request, "session_hash", "")), None)
        if reply is not None:
            reply.cancel()

    def undo(self, history: list[dict[str, Any]], *settings: Any) -> dict[str, Any]:
        """The page without the last question and its answer; the question is back in the box."""
        asked = next((i for i in reversed(range(len(history))) if history[i]["role"] == "user"), len(history))
        begin = asked
        while begin and history[begin - 1]["role"] == "user":
            begin -= 1
        taken = [part for message in history[begin : asked + 1] for part in _parts(message)]
        box = {
            "text": "\n".join(part for part in taken if isinstance(part, str)),
            "files": [part["path"] for part in taken if isinstance(part, dict)],
        }
        return {"messages": history[:begin], "box": box, "settings": settings}

    def new(self, history: list[dict[str, Any]], *settings: Any) -> dict[str, Any]:
        """The page without its conversation."""
        return {"messages": [], "box": None, "settings": settings}

    def restore(self, kept: dict[str, Any] | None, left: dict[str, Any] | None) -> list[Any]:
        """Values of the page's parts when it is loaded: as undo or new left it, or else as it was."""
        import gradio as gr

        page = left or kept
        if page is None:
            return [None, *[gr.skip()] * (3 + _SETTINGS)]
        return [None, page["messages"], page["messages"], page["box"] or gr.skip(), *page["settings"]]

    def export(self, history: list[dict[str, Any]], system: str) -> str:
        """The conversation as JSON that `Session.load` and ``/load`` read, media inside."""
        conversation = conversation_of(history, system, hear=True)
        for message in conversation.messages:
            for medium in message.media:
                medium.source = Path(medium.source).read_bytes()  # type: ignore[arg-type]
        return conversation.to_json(template=self.engine.template)


def conversation_of(history: Sequence[dict[str, Any]], system: str, hear: bool) -> Conversation:
    """gradio's messages as a conversation; what failed, and notes on answers, are left out."""
    from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
    from lavis_chatbridge.chat.media import media_of

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
        held = part if isinstance(part, str) else part.get("file", part if "path" in part else part.get("text", ""))
        if held:
            result.append(held)
    return result


def _notes(answer: Answer) -> list[dict[str, Any]]:
    """What the user should know about an answer, as one folded message."""
    own = [note for note in answer.media if note.turn == answer.turn]
    reached = [f"{note.modality} {note.name}" for note in own if note.reached]
    lines = [*answer.warnings]
    if answer.finish == "length":
        lines.append("The answer was cut off at the limit of tokens.")
    if not reached and not lines:
        return []
    metadata = {"title": f"{_NOTE}: {', '.join(reached) or 'no medium'}"}
    content = "\n".join(lines) or "Every medium reached the model."
    return [{"role": "assistant", "content": content, "metadata": metadata}]


def _told(error: ChatBridgeError) -> str:
    """A fault for the page, which names no folder."""
    return " ".join(os.path.basename(word) if word.startswith("/") else word for word in str(error).split())


def build_blocks(page: Page, examples: bool = True, knows: str = "") -> Any:
    """The page itself."""
    import gradio as gr

    settings: list[Any] = [
        gr.Textbox("", label="System prompt", lines=2, render=False),
        gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens", render=False),
        gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 takes the likeliest token", render=False),
        gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p", render=False),
        gr.Number(value=-1, precision=0, label="Seed", info="-1: a new answer each time", render=False),
        gr.Checkbox(value=True, label="Hear the videos' sound tracks", render=False),
    ]
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
    _show_text_as_text(chat)
    box = gr.MultimodalTextbox(
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
    )
    given = [[{"text": text, "files": [str(EXAMPLES / name) for name in names]}] for text, names in QUESTIONS]
    with gr.Blocks(title=page.title, analytics_enabled=False, delete_cache=(3600, 86_400), fill_height=True) as blocks:
        gr.Markdown(f"# {page.title}\nTalk about pictures, videos and sounds. {knows}", elem_id="page-title")
        talk = gr.ChatInterface(
            page.respond,
            multimodal=True,
            chatbot=chat,
            textbox=box,
            editable=True,
            examples=given if examples else None,
            cache_examples=False,
            additional_inputs=settings,
            additional_inputs_accordion=gr.Accordion("Settings", open=False, render=False),
            flagging_mode="never",
            analytics_enabled=False,
            show_progress="hidden",
            api_visibility="private",
        )
        _wire(gr, page, blocks, talk, settings)
    return blocks


def _show_text_as_text(chat: Any) -> None:
    """Shield texts on their way to the browser: gradio would read a tag in them as HTML."""
    pack, unpack = chat.postprocess, chat.preprocess
    chat.postprocess = lambda value: _each_text(pack(value), _shielded)
    chat.preprocess = lambda payload: unpack(_each_text(payload, _bare))


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


def _wire(gr: Any, page: Page, blocks: Any, talk: Any, settings: list[Any]) -> None:
    """Undo, new, export, and the memory of the browser.

    Undo and new load the page again from what they leave: an answer under way cannot write into a new page.
    """
    kept = gr.BrowserState(None, storage_key="chatbridge")
    left = gr.BrowserState(None, storage_key="chatbridge-left")
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    exported = gr.Textbox(visible=False)
    chat = talk.chatbot
    with gr.Row(elem_id="actions"):
        for name, action in (("Undo", page.undo), ("New conversation", page.new)):
            button = gr.Button(name, elem_id=name.partition(" ")[0].lower())
            pressed = button.click(page.stop, None, None, **quiet)
            changed = pressed.then(action, [chat, *settings], [left], **quiet)
            changed.then(None, None, None, js="() => location.reload()", **quiet)
        export = gr.Button("Export", elem_id="export")
    export.click(page.export, [chat, settings[0]], [exported], **quiet).then(
        None, [exported], None, js=_DOWNLOAD, **quiet
    )
    talk.textbox.stop(page.stop, None, None, **quiet)
    gr.on(
        [chat.change, *(setting.change for setting in settings)],
        lambda messages, *chosen: {"messages": messages, "box": None, "settings": chosen},
        [chat, *settings],
        [kept],
        trigger_mode="always_last",
        **quiet,
    )
    blocks.load(page.restore, [kept, left], [left, chat, talk.chatbot_state, talk.textbox, *settings], **quiet)


def build_app(page: Page, *, max_bytes: int, host: str = "127.0.0.1", password: Sequence[Any] = (), **look: Any) -> Any:
    """The page as a web application.

    Args:
        page: What its parts do.
        max_bytes: Bytes of an uploaded file.
        host: The address that the server listens on.
        password: Names and passwords, one of which a visitor must give; none asks for nothing.
        **look: For `build_blocks`.
    """
    import fastapi
    import gradio as gr

    blocks = build_blocks(page, **look).queue(default_concurrency_limit=16, max_size=64)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # Gradio's greys have too little contrast.
    light = {"body_text_color_subdued": "*neutral_600", "input_placeholder_color": "*neutral_600"}
    dark = {f"{name}_dark": "*neutral_300" for name in light}
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        server_name=host,
        auth=list(password) or None,
        footer_links=[],
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        theme=gr.themes.Default(**fonts).set(**light, **dark),  # type: ignore[arg-type]
        css=STYLE,
        js=SCRIPT,
        allowed_paths=[str(EXAMPLES)],
    )
    app.add_middleware(_Guard, host=host, named=not password)
    return app


class _Guard:
    """Adds the security policy to every answer, and refuses foreign names and foreign pages.

    Args:
        app: The application.
        host: The address that the server listens on.
        named: Answer under the names of that address only, since no password protects from DNS rebinding.
    """

    def __init__(self, app: ASGIApp, host: str, named: bool) -> None:
        self._app, self._host, self._named = app, host, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        headers = {name: value.decode("latin-1") for name, value in scope.get("headers", ())}
        host, origin = headers.get(b"host", ""), headers.get(b"origin", "")
        foreign = origin and urllib.parse.urlsplit(origin).netloc != host
        if scope["type"] in ("http", "websocket") and (foreign or (self._named and not is_own_name(host, self._host))):
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page answers only under its own address."})
            return
        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def command(
    model: loading.Model = "tiny",
    options: loading.Options = [],  # noqa: B006
    device: loading.Device = "auto",
    template: loading.TemplateName = None,
    engine: loading.EngineUrl = "",
    host: Annotated[str, typer.Option(help="The address to listen on; default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 7860,
    password_file: Annotated[
        str, typer.Option(help="NAME:PASSWORD, one a line; needed if others reach the page.")
    ] = "",
    max_medium: Annotated[float, typer.Option(help="MiB of one medium.")] = 64,
    no_examples: Annotated[bool, typer.Option("--no-examples", help="Leave out the tiny model's examples.")] = False,
) -> None:
    """Show the page until interrupted."""
    password = passwords(password_file)
    if not password and not is_loopback(host):
        raise ConfigError(f"others can reach host {host}: give --password-file, or listen on 127.0.0.1")
    server.log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="chatbridge-gradio-", ignore_cleanup_errors=True) as uploads:
        quiet_gradio(uploads)
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ModuleNotFoundError as error:
            raise MissingExtraError(str(error.name), "web", "chatbridge web") from error
        line = server.listen(host, port)
        own = loading.open_engine(model, options, device, template, engine)
        name = Path(model).stem
        page = Page(own, f"ChatBridge {name}")
        app = build_app(
            page,
            max_bytes=round(max_medium * MEBIBYTE),
            host=host,
            password=password,
            examples=not no_examples and model == "tiny",
            knows=KNOWS.get(name, ""),
        )
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        with server.decoding(own), closing(own):
            line.listen()
            print(f"open {server.address_of(line)} in a browser", flush=True)
            uvicorn.Server(config).run(sockets=[line])


def quiet_gradio(uploads: str) -> None:
    """Where gradio keeps uploads, and that it calls nobody outside; gradio reads this when it is imported."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def passwords(file: str) -> list[tuple[str, str]]:
    """Names and passwords of a file; none without a file.

    Raises:
        ConfigError: If it cannot be read, or a line has another form.
    """
    found = [line.partition(":") for line in (server.lines_of(file) if file else ())]
    if not all(name and password for name, _, password in found):
        raise ConfigError(f"{file}: expected NAME:PASSWORD in every line")
    return [(name, password) for name, _, password in found]
