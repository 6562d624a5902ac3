"""``chatbridge serve``: load a model and answer over HTTP until interrupted."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from lavis_chatbridge.chat.options import ModelOptions, with_options
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from lavis_chatbridge.chat.engine import Engine

MEBIBYTE = 1 << 20
TOKENS = "CHATBRIDGE_TOKENS"
"""The environment variable with bearer tokens, separated by spaces."""
_OWN_NAMES = ("localhost", "127.0.0.1", "::1")
_FRAMES_PER_SECOND = 60
_MAX_BYTES = 512 * MEBIBYTE  # of a decoded medium


class ServerOptions(Settings):
    """How a server behaves, and the cost of a request."""

    name: str = ""
    """The model's name for clients (default: chatbridge-MODEL)."""
    host: str = "127.0.0.1"
    """The address to listen on; default: this machine only."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    """0 takes a free one."""
    token_file: str = ""
    """Bearer tokens, one a line (or in CHATBRIDGE_TOKENS)."""
    files: tuple[Path, ...] = ()
    """Folder for file: URLs; repeatable."""
    allowed_hosts: tuple[str, ...] = ()
    """Host for http(s): URLs; repeatable."""
    allowed_origins: tuple[str, ...] = ()
    """Origin of web pages (CORS); repeatable."""
    max_body: PositiveFloat = 64.0
    """MiB of a request."""
    max_medium: PositiveFloat = 48.0
    """MiB of one medium."""
    max_media: NonNegativeInt = 16
    """Media of a request."""
    max_tokens: PositiveInt = 1024
    """Tokens of a reply."""
    queue: PositiveInt = 64
    """Replies that may wait."""
    batch: PositiveInt = 16
    """Replies that are generated at once."""
    keep: NonNegativeInt = 8
    """Conversations whose keys and values are kept."""
    timeout: PositiveFloat = 120.0
    """Seconds of a request."""

    def check(self) -> Iterator[str]:
        for folder in self.files:
            if not folder.is_dir():
                yield f"there is no folder {folder}"
        if not self.tokens and not is_loopback(self.host):
            yield f"others can reach host {self.host}: give tokens (--token-file), or listen on 127.0.0.1"

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Bearer tokens, one of which a request must have; none asks for no token."""
        return (*os.environ.get(TOKENS, "").split(), *(lines_of(self.token_file) if self.token_file else ()))


class DecodingOptions(Settings):
    """Limits on opening the media of strangers."""

    max_seconds: PositiveFloat = 600.0
    """Seconds of a sound or video."""
    max_pixels: PositiveInt = 40_000_000
    """Pixels of a picture or frame."""
    decode_workers: NonNegativeInt = 2 if sys.platform == "linux" else 0
    """Processes that open media; 0: none."""
    decode_memory: Annotated[int, Field(ge=16)] = 2048
    """MiB that opening one medium may take."""
    decode_seconds: PositiveFloat = 60.0
    """Seconds that opening one medium may take."""


@with_options
def command(model: ModelOptions, server: ServerOptions, decode: DecodingOptions) -> None:
    """Serve until interrupted."""
    model.announce()
    try:
        import uvicorn

        from lavis_chatbridge.chat.server.app import build_app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette", "prometheus_client"):
            raise
        raise MissingExtraError(str(error.name), "serve", "chatbridge serve") from error
    log_to_stderr()
    name = server.name or f"chatbridge-{Path(model.model).stem}"
    server = server.model_copy(update={"name": name})
    line = listen(server.host, server.port)
    engine = model.open(batch=server.batch, waiting=server.queue, keep=server.keep)
    with decoding(engine, decode), closing(engine):
        config = uvicorn.Config(
            build_app(engine, server),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=5,
            timeout_keep_alive=75,  # openai uses a connection again within 5 seconds, uvicorn's own default
        )
        print(f"listening on {address_of(line)}/v1 (model {name})", flush=True)
        uvicorn.Server(config).run(sockets=[line])


def log_to_stderr() -> None:
    """Log lines with time on stderr; SIGTERM ends the process as Ctrl-C does, so that it tidies up."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    for name in ("httpx", "uvicorn", "pebble"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextmanager
def decoding(engine: Engine, options: DecodingOptions) -> Iterator[None]:
    """Open an engine's media within the limits for those of strangers, in processes of their own."""
    from lavis_chatbridge.media import DEFAULT_LIMITS
    from lavis_chatbridge.media.pool import DecodingPool
    from lavis_chatbridge.media.source import directly

    limits = dataclasses.replace(
        DEFAULT_LIMITS,
        max_pixels=min(options.max_pixels, DEFAULT_LIMITS.max_pixels),
        max_seconds=options.max_seconds,
        max_frames=round(options.max_seconds * _FRAMES_PER_SECOND),
        max_bytes=_MAX_BYTES,
    )
    workers, memory = options.decode_workers, options.decode_memory * MEBIBYTE
    with DecodingPool(workers, memory, options.decode_seconds) if workers else nullcontext(directly) as opener:
        for processor in engine.reader.processors.values():
            processor.limits, processor.opener = limits, opener
        yield


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return host.strip("[]").lower() in _OWN_NAMES


def own_names(host: str) -> re.Pattern[str]:
    """Matches the Host header of a request to the address ``host``, not by a name that leads there (DNS rebinding)."""
    names = map(re.escape, (*_OWN_NAMES, host.strip("[]")))
    return re.compile(rf"\[?({'|'.join(names)})\]?(:\d*)?", re.IGNORECASE)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is reported (ConfigError) before the model is loaded."""
    address = host.strip("[]")
    try:
        return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def address_of(line: socket.socket) -> str:
    """The URL of a listening socket."""
    host, port = line.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def lines_of(file: str) -> list[str]:
    """The lines of a file of secrets, without empty ones and comments; ConfigError if it has none."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error
    found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{file} is empty")
    return found
