"""``chatbridge web``: a page on which a person talks with ChatBridge about pictures, videos and sounds.

Its security policy lets the browser load nothing from other hosts. Uploads are in a temporary folder that the server
deletes when it ends.
"""

from __future__ import annotations

import os
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveFloat

from lavis_chatbridge.chat.options import ModelOptions, with_options
from lavis_chatbridge.chat.server import command as server
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

    from lavis_chatbridge.chat.page import Page

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
"""What the browser may load: gradio writes its own scripts into the page and compiles some."""


class WebOptions(Settings):
    """Where the page is, and who may use it."""

    host: str = "127.0.0.1"
    """The address to listen on; default: this machine only."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 7860
    """0 takes a free one."""
    password_file: str = ""
    """NAME:PASSWORD, one a line; needed if others reach the page."""
    max_medium: PositiveFloat = 64.0
    """MiB of one medium."""

    def check(self) -> Iterator[str]:
        if not self.password_file and not server.is_loopback(self.host):
            yield f"others can reach host {self.host}: give --password-file, or listen on 127.0.0.1"


@with_options
def command(model: ModelOptions, page: WebOptions) -> None:
    """Show the page until interrupted."""
    password = passwords(page.password_file)
    model.announce()
    server.log_to_stderr()
    with tempfile.TemporaryDirectory(prefix="chatbridge-gradio-", ignore_cleanup_errors=True) as uploads:
        quiet_gradio(uploads)
        try:
            import gradio  # noqa: F401
            import uvicorn
        except ModuleNotFoundError as error:
            raise MissingExtraError(str(error.name), "web", "chatbridge web") from error
        from lavis_chatbridge.chat.page import TINY_KNOWS, Page

        line = server.listen(page.host, page.port)
        engine = model.open()
        knows = TINY_KNOWS if model.model == "tiny" else ""
        parts = Page(engine, f"ChatBridge {Path(model.model).stem}", knows)
        app = build_app(parts, page, password)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=5)
        with server.decoding(engine, server.DecodingOptions()), closing(engine):
            print(f"open {server.address_of(line)} in a browser", flush=True)
            uvicorn.Server(config).run(sockets=[line])


def quiet_gradio(uploads: str) -> None:
    """Set gradio's folder of uploads, and that it calls nobody outside; gradio reads this when it is imported."""
    os.environ["GRADIO_TEMP_DIR"] = uploads
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def passwords(file: str) -> list[tuple[str, str]]:
    """Names and passwords of a file; none without a file."""
    found = [line.partition(":") for line in (server.lines_of(file) if file else ())]
    if not all(name and password for name, _, password in found):
        raise ConfigError(f"{file}: expected NAME:PASSWORD in every line")
    return [(name, password) for name, _, password in found]


def build_app(page: Page, options: WebOptions, password: Sequence[tuple[str, str]] = ()) -> FastAPI:
    """The page as a web application; ``password`` are names and passwords, one of which a visitor must give."""
    import fastapi
    import gradio as gr
    from starlette.middleware.base import BaseHTTPMiddleware

    from lavis_chatbridge.chat.page import EXAMPLES, asset, build_blocks

    blocks = build_blocks(page).queue(default_concurrency_limit=16, max_size=64)
    fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    # Gradio's greys have too little contrast.
    light = {"body_text_color_subdued": "*neutral_600", "input_placeholder_color": "*neutral_600"}
    dark = {f"{name}_dark": "*neutral_300" for name in light}
    app = gr.mount_gradio_app(
        fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        blocks,
        "/",
        server_name=options.host,
        auth=list(password) or None,
        footer_links=[],
        show_error=False,
        max_file_size=round(options.max_medium * server.MEBIBYTE),
        ssr_mode=False,
        theme=gr.themes.Default(**fonts).set(**light, **dark),  # type: ignore[arg-type]
        css=asset("page.css"),
        js=asset("page.js"),
        allowed_paths=[str(EXAMPLES)],
    )

    own_names = server.own_names(options.host)

    async def guard(request: Request, respond: Callable[[Request], Any]) -> Response:
        """Refuse foreign pages and, where no password protects from DNS rebinding, foreign names."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "")
        foreign = origin and urllib.parse.urlsplit(origin).netloc != host
        if foreign or not (password or own_names.fullmatch(host)):
            return fastapi.responses.PlainTextResponse("This page answers only under its own address.", 403)
        response = await respond(request)
        response.headers["content-security-policy"] = POLICY
        response.headers["referrer-policy"] = "no-referrer"
        return response

    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    return app
