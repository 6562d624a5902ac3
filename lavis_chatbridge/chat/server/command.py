"""``chatbridge serve``: load a model and answer over HTTP until interrupted."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge.chat import loading
from lavis_chatbridge.chat.sources import MEBIBYTE
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from lavis_chatbridge.chat.engine import Engine

TOKENS = "CHATBRIDGE_TOKENS"
"""The environment variable with bearer tokens, separated by spaces."""
_FRAMES_PER_SECOND = 60
_KEEP_ALIVE = 75
"""Seconds until an idle connection is closed. Clients (httpx, and so openai) use one again within 5 seconds: a server
that closed it at about that time would lose a request."""
_MAX_BYTES = 512 * MEBIBYTE  # of a decoded medium
_WORKERS, _MEMORY, _SECONDS = 2 if sys.platform == "linux" else 0, 2048, 60.0


def command(
    model: loading.Model = "tiny",
    options: loading.Options = [],  # noqa: B006  (typer copies it)
    device: loading.Device = "auto",
    template: loading.TemplateName = None,
    engine: loading.EngineUrl = "",
    name: Annotated[str, typer.Option(help="The model's name for clients (default: chatbridge-MODEL).")] = "",
    host: Annotated[str, typer.Option(help="The address to listen on; default: this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    token_file: Annotated[str, typer.Option(help=f"Bearer tokens, one a line (or in {TOKENS}).")] = "",
    files: Annotated[list[str], typer.Option(help="Folder for file: URLs; repeatable.")] = [],  # noqa: B006
    allowed_hosts: Annotated[list[str], typer.Option(help="Host for http(s): URLs; repeatable.")] = [],  # noqa: B006
    allowed_origins: Annotated[list[str], typer.Option(help="Origin of web pages (CORS); repeatable.")] = [],  # noqa: B006
    max_body: Annotated[float, typer.Option(help="MiB of a request.")] = 64,
    max_medium: Annotated[float, typer.Option(help="MiB of one medium.")] = 48,
    max_media: Annotated[int, typer.Option(help="Media of a request.")] = 16,
    max_seconds: Annotated[float, typer.Option(help="Seconds of a sound or video.")] = 600,
    max_pixels: Annotated[int, typer.Option(help="Pixels of a picture or frame.")] = 40_000_000,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a reply.")] = 1024,
    queue: Annotated[int, typer.Option(min=1, help="Replies that may wait.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Replies under way at once.")] = 16,
    keep: Annotated[int, typer.Option(min=0, help="Conversations whose keys and values are kept.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds of a request.")] = 120,
    decode_workers: Annotated[int, typer.Option(help="Processes that open media; 0: none.")] = _WORKERS,
    decode_memory: Annotated[int, typer.Option(help="MiB that opening one medium may take.")] = _MEMORY,
    decode_seconds: Annotated[float, typer.Option(help="Seconds that opening one medium may take.")] = _SECONDS,
) -> None:
    """Serve until interrupted."""
    try:
        import uvicorn

        from lavis_chatbridge.chat.server.app import ServerSettings, build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette", "prometheus_client"):
            raise
        raise MissingExtraError(str(error.name), "serve", "chatbridge serve") from error
    values = {
        "name": name or f"chatbridge-{Path(model).stem if model.endswith(('.yaml', '.yml')) else model}",
        "host": host,
        "port": port,
        "tokens": _tokens(token_file),
        "origins": tuple(allowed_origins),
        "access": {"folders": tuple(files), "hosts": tuple(allowed_hosts), "max_bytes": round(max_medium * MEBIBYTE)},
        "max_body": round(max_body * MEBIBYTE),
        "max_media": max_media,
        "max_new_tokens": max_tokens,
        "timeout": timeout,
    }
    settings = parse(ServerSettings, values, "serve")
    log_to_stderr()
    line = listen(settings.host, settings.port)
    own = loading.open_engine(model, options, device, template, engine, batch=batch, waiting=queue, keep=keep)
    with decoding(own, max_seconds, max_pixels, decode_workers, decode_memory, decode_seconds), closing(own):
        config = uvicorn.Config(
            build_app(own, settings),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=_KEEP_ALIVE,
        )
        line.listen()  # clients may connect as soon as they read the next line
        print(f"listening on {address_of(line)}/v1 (model {settings.name})", flush=True)
        uvicorn.Server(config).run(sockets=[line])


def log_to_stderr() -> None:
    """Log lines with time on stderr; SIGTERM ends the process as Ctrl-C does, so that it tidies up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("httpx", "uvicorn", "pebble"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def decoding(
    engine: Engine,
    max_seconds: float = 600,
    max_pixels: int = 40_000_000,
    workers: int = _WORKERS,
    memory: int = _MEMORY,
    seconds: float = _SECONDS,
) -> Iterator[None]:
    """Open media within the limits for those of strangers, in processes of their own.

    Args:
        engine: Its media.
        max_seconds: Length of a sound or a video.
        max_pixels: Pixels of a picture or frame.
        workers: Processes; 0: media are opened in this one.
        memory: MiB that a process may take for a medium.
        seconds: Time that a process may take for a medium.

    Raises:
        ConfigError: If a number is out of range.
    """
    if workers < 0 or memory < 16 or seconds <= 0:
        raise ConfigError(
            f"--decode-workers {workers}, --decode-memory {memory}, --decode-seconds {seconds:g}: expected at least 0, "
            "16 MiB, and more than 0 s"
        )
    from lavis_chatbridge.media import DEFAULT_LIMITS
    from lavis_chatbridge.media.pool import DecodingPool

    processors = list(engine.reader.processors.values())
    for processor in processors:
        processor.limits = dataclasses.replace(
            DEFAULT_LIMITS,
            max_pixels=min(max_pixels, DEFAULT_LIMITS.max_pixels),
            max_seconds=max_seconds,
            max_frames=round(max_seconds * _FRAMES_PER_SECOND),
            max_bytes=_MAX_BYTES,
        )
    if workers == 0:
        yield
        return
    with DecodingPool(workers, memory * MEBIBYTE, seconds) as pool:
        for processor in processors:
            processor.opener = pool
        try:
            yield
        finally:
            for processor in processors:
                del processor.opener  # its class's opener is used again


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that a taken port is reported before the model is loaded.

    Raises:
        ConfigError: If the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        line = socket.socket(family, kind)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        line.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return line


def address_of(line: socket.socket) -> str:
    """Where a socket listens, as a URL."""
    host, port = line.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tokens(file: str) -> tuple[str, ...]:
    found = [*os.environ.get(TOKENS, "").split(), *(lines_of(file) if file else ())]
    return tuple(dict.fromkeys(found))


def lines_of(file: str) -> list[str]:
    """The lines of a file of secrets, without empty ones and comments.

    Raises:
        ConfigError: If it cannot be read, or has none.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{file} is empty")
    return found
