"""``chatbridge serve``: load a model and answer over HTTP until interrupted."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lavis_chatbridge.chat import options
from lavis_chatbridge.chat.server.settings import MEBIBYTE, ServerSettings
from lavis_chatbridge.config import checked
from lavis_chatbridge.errors import ConfigError, MissingExtraError

TOKENS = "CHATBRIDGE_TOKENS"
"""The environment variable that holds bearer tokens, separated by spaces."""
_FRAMES_PER_SECOND = 60
_KEEP_ALIVE = 75
"""Seconds after which an idle line is closed. Clients (httpx, and so openai) use one again for 5 seconds: were it
closed about then, a request that is just being sent would be lost."""
_MAX_BYTES = 512 * MEBIBYTE  # of a decoded medium


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge serve``."""
    usual = ServerSettings()
    options.add_model_arguments(parser)
    add = parser.add_argument
    add("--name", help="what clients call the model (default: chatbridge-MODEL)")
    add("--host", default=usual.host, help="the address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=usual.port, help="0 takes a free one (default: %(default)s)")
    add("--token-file", metavar="FILE", help=f"bearer tokens, one a line (or in the environment: {TOKENS})")
    add("--files", action="append", default=[], metavar="DIR", help="let file: URLs name files below DIR; repeatable")
    add("--allow-urls", action="store_true", help="fetch http(s) URLs, from public addresses only")
    add("--max-body", type=float, default=usual.max_body / MEBIBYTE, metavar="MIB", help="(default: %(default)s)")
    add("--max-medium", type=float, default=usual.max_medium / MEBIBYTE, metavar="MIB", help="(default: %(default)s)")
    add("--max-media", type=int, default=usual.max_media, metavar="N", help="of a request (default: %(default)s)")
    add("--max-seconds", type=float, default=usual.max_seconds, help="of a sound or video (default: %(default)s)")
    add("--max-pixels", type=int, default=usual.max_pixels, help="of a picture or frame (default: %(default)s)")
    add("--max-tokens", type=int, default=usual.max_new_tokens, help="of a reply (default: %(default)s)")
    add("--queue", type=int, default=usual.queue, metavar="N", help="requests that may wait (default: %(default)s)")
    add("--batch", type=int, default=usual.batch, metavar="N", help="replies made together (default: %(default)s)")
    add("--preparers", type=int, default=usual.preparers, metavar="N", help="requests whose media are opened at once")
    add_decoding_arguments(parser)
    add("--timeout", type=float, default=usual.timeout, metavar="S", help="of a request (default: %(default)s)")
    add(
        "--keep",
        type=int,
        default=usual.keep,
        metavar="N",
        help="conversations whose keys and values stay in memory for their next turn (default: %(default)s)",
    )


def add_decoding_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes open media, and what one medium may take."""
    usual = ServerSettings()
    add = parser.add_argument
    add("--decode-workers", type=int, default=usual.decode_workers, metavar="N", help="processes that open media")
    add("--decode-memory", type=float, default=usual.decode_memory / MEBIBYTE, metavar="MIB", help="of one medium")
    add("--decode-seconds", type=float, default=usual.decode_seconds, metavar="S", help="of one medium")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    settings = settings_of(args)
    try:
        import uvicorn

        from lavis_chatbridge.chat.server.app import build_app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "uvicorn", "starlette"):
            raise
        raise MissingExtraError(str(error.name), "serve", "chatbridge serve") from error
    from lavis_chatbridge.chat.loading import load_model
    from lavis_chatbridge.chat.server.engine import Engine

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    # Python's own reaction to SIGTERM would leave the temporary folder behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    line = listen(settings.host, settings.port)
    model, processors = load_model(args.model, args.options, args.device)
    narrow(processors, settings.max_seconds, settings.max_pixels)
    scratch_folder = tempfile.TemporaryDirectory(prefix="chatbridge-", ignore_cleanup_errors=True)
    opening = decoding(processors, settings.decode_workers, settings.decode_memory, settings.decode_seconds)
    with opening, scratch_folder as scratch:
        engine = Engine(
            model,
            processors,
            args.template,
            batch=settings.batch,
            waiting=settings.queue,
            preparers=settings.preparers,
            keep=settings.keep,
        )
        try:
            config = uvicorn.Config(
                build_app(engine, settings, Path(scratch)),
                log_level="warning",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
                timeout_keep_alive=_KEEP_ALIVE,
            )
            line.listen()  # whoever reads the next line may come at once
            print(f"listening on {address_of(line)}/v1 (model {settings.name})", flush=True)
            uvicorn.Server(config).run(sockets=[line])
        finally:
            engine.close()
    return 0


def settings_of(args: argparse.Namespace) -> ServerSettings:
    """The command's arguments as settings.

    Raises:
        ConfigError: With all faults.
    """
    model = Path(args.model).stem if args.model.endswith((".yaml", ".yml")) else args.model
    same = {field.name for field in dataclasses.fields(ServerSettings)} - {"tokens", "folders"}
    values: dict[str, Any] = {name: value for name, value in vars(args).items() if name in same}
    values |= {
        "name": args.name or f"chatbridge-{model}",
        "tokens": _tokens(args.token_file),
        "folders": tuple(map(Path, args.files)),
        "max_body": round(args.max_body * MEBIBYTE),
        "max_medium": round(args.max_medium * MEBIBYTE),
        "max_new_tokens": args.max_tokens,
        "decode_memory": round(args.decode_memory * MEBIBYTE),
    }
    return checked(ServerSettings(**values))


def narrow(processors: Any, max_seconds: float, max_pixels: int) -> None:
    """Let media cost no more than strangers' may."""
    from lavis_chatbridge.media import DEFAULT_LIMITS

    limits = dataclasses.replace(
        DEFAULT_LIMITS,
        max_pixels=min(max_pixels, DEFAULT_LIMITS.max_pixels),
        max_seconds=max_seconds,
        max_frames=round(max_seconds * _FRAMES_PER_SECOND),
        max_bytes=_MAX_BYTES,
    )
    for kind in ("image", "video", "audio"):
        processors[kind]["eval"].limits = limits


@contextmanager
def decoding(processors: Any, workers: int, memory: int, seconds: float) -> Iterator[None]:
    """Let worker processes open the media, as long as it lasts; without workers this process opens them.

    Args:
        processors: Those of a model, whose evaluation ones open media.
        workers: How many there are.
        memory: Bytes that opening one medium may take.
        seconds: Seconds that opening one may take.
    """
    if workers == 0:
        yield
        return
    from lavis_chatbridge.media.pool import DecodingPool

    evaluating = [processors[kind]["eval"] for kind in ("image", "video", "audio")]
    with DecodingPool(workers, memory, seconds) as pool:
        for processor in evaluating:
            processor.opener = pool
        try:
            yield
        finally:
            for processor in evaluating:
                del processor.opener  # its class's holds again


def listen(host: str, port: int) -> socket.socket:
    """A bound socket: a port that is taken is told before the model is loaded.

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


def _tokens(file: str | None) -> tuple[str, ...]:
    found = os.environ.get(TOKENS, "").split()
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the tokens in {file}: {error}") from error
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"{file} holds no token")
    return tuple(dict.fromkeys(found))
