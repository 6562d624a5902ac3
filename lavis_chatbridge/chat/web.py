"""``chatbridge web``: a page on which a person talks with ChatBridge about pictures, videos and sounds.

One `Session` per open page. Nothing is loaded from elsewhere: the page's own security policy forbids it. Uploads lie in
a temporary folder that goes with the server.
"""

from __future__ import annotations

import argparse
import html
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lavis_chatbridge.chat import options
from lavis_chatbridge.chat.server.command import (
    add_decoding_arguments,
    address_of,
    decoding,
    listen,
    narrow,
)
from lavis_chatbridge.chat.server.settings import MEBIBYTE, ServerSettings, is_loopback
from lavis_chatbridge.config import checked
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MediaError, MissingExtraError
from lavis_chatbridge.media.source import head_of, is_picture
from lavis_chatbridge.prompting import Modality

log = logging.getLogger(__name__)

EXAMPLES = Path(__file__).resolve().parent.parent / "assets" / "examples"
"""Media of the embedded world, which the shipped model knows."""
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("what colour is it?", ("picture.jpg",)),
    ("how does it move?", ("video.mp4",)),
    ("how does the sound go on?", ("sound.mp3",)),
    ("tell me the pitch of the audio and the colour of the image", ("picture.jpg", "sound.mp3")),
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""What the page's browser may load: gradio writes scripts into the page and compiles some, all of them its own."""
STYLE = """
.gradio-container { max-width: 64rem !important; margin-inline: auto !important; }
footer { display: none !important; }
/* Gradio's own would send what is shown to a hub; the policy forbids that, so it is not offered. */
button[aria-label="Share"], button[title="Share"] { display: none !important; }
#page-title { margin: 0; }
#conversation { height: clamp(16rem, 55dvh, 60rem) !important; }
#actions { flex-wrap: nowrap; }
#actions button { min-width: 0; min-height: 44px; padding-inline: 0.5rem; }
#status { min-height: 1.5em; }
@media (max-width: 600px) {
  .gradio-container .app { padding-inline: 0.75rem !important; }
  #examples .gallery-item { max-width: calc(100vw - 2rem); }
  #examples .gallery-item * { min-width: 0; }
  #examples audio { max-width: 7rem; }
}
:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 2px; }
"""
_SUFFIXES: dict[Modality, frozenset[str]] = {
    "image": frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}),
    "audio": frozenset({".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".aif", ".weba"}),
}


class Talk:
    """What one open page holds: its session, and what is being said."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.pending: tuple[str, list[tuple[Modality, str]]] | None = None

    def messages(self, partial: str | None = None) -> list[dict[str, Any]]:
        """The conversation as gradio shows it."""
        shown: list[dict[str, Any]] = []
        for turn in self.session.turns:
            media = [(medium.kind, str(medium.source)) for medium in turn.media if not medium.track]
            shown += _shown(turn.role, turn.text, media)
        if self.pending is not None:
            shown += _shown("user", *self.pending)
        if partial is not None:
            while self.pending is None and shown and shown[-1]["role"] == "assistant":
                shown.pop()  # an answer that is being made anew
            shown += _shown("assistant", partial or "…", [])
        return shown


class Page:
    """What the page's buttons do. Knows sessions; of gradio, only the form of its messages.

    Args:
        model: The ChatBridge.
        reader: Opens media, for all pages together.
        template: The conversation's format.
    """

    def __init__(self, model: Any, reader: Any, template: str = "human_assistant") -> None:
        self._model, self._reader, self._template = model, reader, template

    def open(self) -> Talk:
        """A new conversation."""
        from lavis_chatbridge.chat.session import Session

        return Talk(Session(self._model, template=self._template, reader=self._reader))

    def send(self, message: dict[str, Any] | None, talk: Talk | None) -> tuple[Any, list[dict[str, Any]], Talk, str]:
        """Take what was typed and dropped into the conversation; the box is emptied."""
        talk = talk or self.open()
        text = str((message or {}).get("text") or "").strip()
        files = [str(file) for file in (message or {}).get("files") or []]
        if not text and not files:
            return message, talk.messages(), talk, status("Type a question, or add a picture, a video or a sound.")
        talk.pending = (text, [(kind_of(file), file) for file in files])
        return {"text": "", "files": []}, talk.messages(""), talk, status("ChatBridge is looking and listening…")

    def answer(self, talk: Talk, *settings: Any) -> Iterator[tuple[Any, list[dict[str, Any]], str]]:
        """Answer what was sent, as it comes. What cannot be sent goes back into the box."""
        if talk.pending is None:
            return
        text, media = talk.pending
        *sampling, hear = settings
        talk.session.hear_videos = bool(hear)
        try:
            with talk.session.ask(text, media=media, stream=True, **chosen(*sampling)) as stream:
                partial = ""
                for piece in stream:
                    partial += piece
                    yield None, talk.messages(partial), status("ChatBridge is answering…")
                answer = stream.answer
        except ChatBridgeError as error:
            talk.pending = None
            yield {"text": text, "files": [path for _, path in media]}, talk.messages(), status(told(error), bad=True)
            return
        finally:
            talk.pending = None
        yield None, talk.messages(), status(summary(answer))

    def retry(self, talk: Talk | None, *settings: Any) -> Iterator[tuple[list[dict[str, Any]], str]]:
        """Answer the last question anew."""
        if talk is None or not talk.session.turns:
            yield [], status("There is no question to answer yet.")
            return
        *sampling, hear = settings
        talk.session.hear_videos = bool(hear)
        try:
            with talk.session.regenerate(stream=True, **chosen(*sampling)) as stream:
                partial = ""
                for piece in stream:
                    partial += piece
                    yield talk.messages(partial), status("ChatBridge is answering anew…")
                answer = stream.answer
        except ChatBridgeError as error:
            yield talk.messages(), status(told(error), bad=True)
            return
        again = "" if chosen(*sampling)["temperature"] else " (at temperature 0 the same question has the same answer)"
        yield talk.messages(), status(summary(answer) + again)

    def stop(self, talk: Talk | None) -> None:
        """End the answer at its next token."""
        if talk is not None:
            talk.session.cancel()

    def undo(self, talk: Talk | None) -> tuple[Any, list[dict[str, Any]], str]:
        """Take the last question back into the box."""
        taken = None if talk is None else talk.session.undo()
        if talk is None or taken is None:
            return {"text": "", "files": []}, [], status("There is nothing to take back.")
        files = [str(medium.source) for medium in taken.media if not medium.track]
        return {"text": taken.text, "files": files}, talk.messages(), status("The last question is back in the box.")

    def clear(self, talk: Talk | None) -> tuple[list[dict[str, Any]], Talk, str]:
        """Begin anew."""
        if talk is not None:
            talk.session.cancel()
            talk.session.clear()
        return [], talk or self.open(), status("A new conversation.")


def kind_of(path: str) -> Modality:
    """What a file is, by its name, and where that says nothing by its content; what is neither is tried as a video."""
    suffix = Path(path).suffix.lower()
    for kind, suffixes in _SUFFIXES.items():
        if suffix in suffixes:
            return kind
    try:
        return "image" if is_picture(head_of(path)) else "video"
    except OSError:
        return "video"


def chosen(tokens: float, temperature: float, top_p: float, seed: float | None) -> dict[str, Any]:
    """The page's settings as fields of `Sampling`; gradio's numbers may be floats."""
    return {
        "max_new_tokens": int(tokens),
        "temperature": float(temperature),
        "top_p": float(top_p),
        "seed": None if seed is None or seed < 0 else int(seed),
    }


def summary(answer: Any) -> str:
    """One line on what reached the model, and what the user should know."""
    own = [note for note in answer.media if note.turn == answer.turn]
    reached = [note.kind if not note.name.endswith("sound track") else "its sound" for note in own if note.reached]
    parts = [f"The model got: {', '.join(reached)}." if reached else ""]
    parts += [f"{warning}." for warning in answer.warnings]
    parts.append({"stop": "Done.", "length": "Cut off at the limit of tokens.", "cancelled": "Stopped."}[answer.finish])
    return " ".join(filter(None, parts))


def told(error: ChatBridgeError) -> str:
    """A fault in words for the page: a medium by its name, never by its path."""
    if isinstance(error, MediaError):
        name = os.path.basename(error.source)
        return f"{name} cannot be read: {error.cause.replace(error.source, name)}"
    return str(error)


def status(text: str, bad: bool = False) -> str:
    """The line under the conversation, which screen readers read out when it changes."""
    mark = "⚠ " if bad else ""
    return f'<p role="{"alert" if bad else "status"}" aria-live="polite">{mark}{html.escape(text)}</p>'


def _shown(role: str, text: str, media: Sequence[tuple[Modality, str]]) -> list[dict[str, Any]]:
    files = [
        {"role": role, "content": {"path": path, "alt_text": f"{kind}: {os.path.basename(path)}"}}
        for kind, path in media
    ]
    return [*files, *([{"role": role, "content": text}] if text else [])]


def build_blocks(page: Page, title: str = "ChatBridge", examples: bool = True) -> Any:
    """The page itself.

    Args:
        page: What its buttons do.
        title: Its heading.
        examples: Offer the embedded world's examples.
    """
    import gradio as gr

    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, delete_cache=(3600, 86_400)) as blocks:
        talk = gr.State(None, time_to_live=6 * 3600, delete_callback=_release)
        gr.Markdown(f"# {title}\nTalk about pictures, videos and sounds.", elem_id="page-title")
        chat = gr.Chatbot(
            label="Conversation",
            elem_id="conversation",
            placeholder="Drop a picture, a video or a sound into the box below and ask about it.",
            buttons=["copy"],
            feedback_options=None,
            render_markdown=False,  # what a model writes is text; as Markdown it could name pictures elsewhere
            latex_delimiters=[],
            allow_tags=False,
            layout="bubble",
        )
        line = gr.HTML(status(""), elem_id="status")
        box = gr.MultimodalTextbox(
            label="Your message",
            show_label=False,
            placeholder="Ask something…",
            sources=["upload", "microphone"],
            file_types=["image", "video", "audio"],
            file_count="multiple",
            elem_id="message",
            autofocus=True,
            html_attributes=gr.InputHTMLAttributes(enterkeyhint="send"),
        )
        with gr.Row(elem_id="actions"):
            stop = gr.Button("Stop", variant="stop", elem_id="stop")
            retry = gr.Button("Retry", elem_id="retry")
            undo = gr.Button("Undo", elem_id="undo")
            new = gr.Button("New", elem_id="new")
        with gr.Accordion("Camera", open=False, elem_id="camera"):
            gr.Markdown("Take a picture; it is added to your message.")
            camera = gr.Image(label="Camera", sources=["webcam"], type="filepath", height=280)
        if examples:
            given = [[{"text": text, "files": [str(EXAMPLES / name) for name in names]}] for text, names in QUESTIONS]
            gr.Examples(given, inputs=[box], label="Examples", elem_id="examples")
        settings = _settings(gr)
        _wire(page, [talk, chat, line, box], [stop, retry, undo, new, camera], settings)
    return blocks


def _settings(gr: Any) -> list[Any]:
    """How answers are chosen, folded away."""
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        return [
            gr.Slider(1, 1024, value=256, step=1, label="Longest answer, in tokens"),
            gr.Slider(0, 2, value=0, step=0.05, label="Temperature", info="0 always takes the likeliest word"),
            gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p", info="how many likely words are drawn from"),
            gr.Number(value=-1, precision=0, label="Seed", info="the same seed draws the same answer; -1 draws anew"),
            gr.Checkbox(value=True, label="Hear the videos' sound tracks"),
        ]


def _wire(page: Page, shown: Sequence[Any], pressed: Sequence[Any], settings: Sequence[Any]) -> None:
    """Which button does what."""
    talk, chat, line, box = shown
    stop, retry, undo, new, camera = pressed
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def answer(current: Talk, *chosen: Any) -> Iterator[Any]:
        import gradio as gr

        for back, messages, said in page.answer(current, *chosen):
            yield gr.skip() if back is None else back, messages, said

    def add(picture: str | None, message: dict[str, Any] | None) -> dict[str, Any]:
        message = message or {"text": "", "files": []}
        return {
            "text": message.get("text") or "",
            "files": [*(message.get("files") or []), *([picture] if picture else [])],
        }

    sent = box.submit(page.send, [box, talk], [box, chat, talk, line], **quiet)
    sent.then(answer, [talk, *settings], [box, chat, line], **quiet)
    retry.click(page.retry, [talk, *settings], [chat, line], **quiet)
    # Not queued: it must be heard while an answer holds the queue.
    stop.click(page.stop, [talk], None, queue=False, **quiet)
    undo.click(page.undo, [talk], [box, chat, line], **quiet)
    for cleared in (new.click, chat.clear):
        cleared(page.clear, [talk], [chat, talk, line], **quiet)
    camera.input(add, [camera, box], [box], **quiet)


def _release(talk: Talk | None) -> None:
    if talk is not None:
        talk.session.cancel()
        talk.session.release()


def build_app(page: Page, *, max_bytes: int, password: Sequence[tuple[str, str]] = (), **look: Any) -> Any:
    """The page as a web application.

    Args:
        page: What its buttons do.
        max_bytes: The most bytes of an uploaded file.
        password: Names and passwords, one of which a visitor must give; none: nobody is asked.
        **look: For `build_blocks`.
    """
    import fastapi
    import gradio as gr

    own = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    blocks = build_blocks(page, **look).queue(default_concurrency_limit=4, max_size=64)
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # Gradio's greys are too light to be read by everybody.
    dark = {"body_text_color_subdued": "*neutral_600", "input_placeholder_color": "*neutral_600"}
    light = {f"{name}_dark": "*neutral_300" for name in dark}
    app = gr.mount_gradio_app(
        own,
        blocks,
        "/",
        server_name="127.0.0.1",
        auth=list(password) or None,
        footer_links=[],
        show_error=False,
        max_file_size=max_bytes,
        ssr_mode=False,
        theme=gr.themes.Default(**fonts).set(**dark, **light),  # type: ignore[arg-type]
        css=STYLE,
        allowed_paths=[str(EXAMPLES)],
    )
    app.add_middleware(_Headers)
    return app


class _Headers:
    """Writes the security policy into every answer, and refuses names that are not this machine's."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        await self._app(scope, receive, with_policy if scope["type"] == "http" else send)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge web``."""
    options.add_model_arguments(parser)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=7860, help="0 takes a free one (default: %(default)s)")
    add("--password-file", metavar="FILE", help="NAME:PASSWORD, one a line; needed where others can reach the page")
    add("--max-medium", type=float, default=64.0, metavar="MIB", help="of an uploaded file (default: %(default)s)")
    add("--max-seconds", type=float, default=600.0, help="of a sound or video (default: %(default)s)")
    add("--max-pixels", type=int, default=40_000_000, help="of a picture or frame (default: %(default)s)")
    add_decoding_arguments(parser)
    add("--no-examples", action="store_true", help="leave out the examples, which only the tiny model knows")


def run(args: argparse.Namespace) -> int:
    """Show the page until interrupted."""
    password = passwords(args.password_file)
    if not password and not is_loopback(args.host):
        raise ConfigError(f"host {args.host} can be reached by others: give --password-file, or listen on 127.0.0.1")
    given = {name: getattr(args, name) for name in ("max_seconds", "max_pixels", "decode_workers", "decode_seconds")}
    costs = checked(ServerSettings(**given, decode_memory=round(args.decode_memory * MEBIBYTE)))
    # Python's own reaction to SIGTERM would leave the temporary folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    with tempfile.TemporaryDirectory(prefix="chatbridge-web-", ignore_cleanup_errors=True) as uploads:
        quiet_gradio(uploads)
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ImportError as error:
            raise MissingExtraError(str(error.name), "web", "chatbridge web") from error
        from lavis_chatbridge.chat.loading import load_model
        from lavis_chatbridge.chat.media import MediaReader

        line = listen(args.host, args.port)
        model, processors = load_model(args.model, args.options, args.device)
        narrow(processors, costs.max_seconds, costs.max_pixels)
        page = Page(model, MediaReader(model, processors), args.template)
        examples = not args.no_examples and args.model == "tiny"
        app = build_app(page, max_bytes=round(args.max_medium * MEBIBYTE), password=password, examples=examples)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        with decoding(processors, costs.decode_workers, costs.decode_memory, costs.decode_seconds):
            line.listen()  # whoever reads the next line may come at once
            print(f"open {address_of(line)} in a browser", flush=True)
            uvicorn.Server(config).run(sockets=[line])
    return 0


def quiet_gradio(uploads: str) -> None:
    """Where gradio keeps uploads, and that it asks nobody outside; it reads this once, when it is imported."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def passwords(file: str | None) -> list[tuple[str, str]]:
    """Names and passwords of a file.

    Raises:
        ConfigError: If it cannot be read, or holds none.
    """
    if file is None:
        return []
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the passwords in {file}: {error}") from error
    found = [line.partition(":") for line in lines if line.strip() and not line.startswith("#")]
    if not found or not all(name and password for name, _, password in found):
        raise ConfigError(f"{file}: expected NAME:PASSWORD in every line")
    return [(name, password) for name, _, password in found]
