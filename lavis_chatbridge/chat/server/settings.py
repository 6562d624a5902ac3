"""What a server allows and how much one request may cost."""

from __future__ import annotations

import ipaddress
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@dataclass(frozen=True)
class ServerSettings:
    """How a server behaves.

    Args:
        name: What clients call the model.
        host: The address that it listens on.
        port: The port; 0 takes a free one.
        tokens: Bearer tokens, one of which a request must bring; none: nobody is asked.
        folders: Folders below which ``file:`` URLs may lie.
        allow_urls: Fetch ``http`` and ``https`` URLs, from public addresses only.
        max_body: Bytes of a request.
        max_medium: Bytes of one medium.
        max_media: Media of one request.
        max_seconds: Length of a sound or video.
        max_pixels: Width times height of a picture or frame.
        max_new_tokens: The most tokens of a reply, whatever a request says.
        queue: Requests that may wait; further ones are refused.
        batch: Replies that move forward together.
        preparers: Requests whose media are opened at the same time.
        decode_workers: Processes that open media, on Linux only; 0 opens them in the server itself.
        decode_memory: Bytes that opening one medium may take.
        decode_seconds: Seconds that opening one medium may take.
        timeout: Seconds from a request's first byte to the last of its reply.
        keep: Conversations whose keys and values are kept for their next turn.
    """

    name: str = "chatbridge"
    host: str = "127.0.0.1"
    port: int = 8000
    tokens: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    allow_urls: bool = False
    max_body: int = 64 * MEBIBYTE
    max_medium: int = 48 * MEBIBYTE
    max_media: int = 16
    max_seconds: float = 600.0
    max_pixels: int = 40_000_000
    max_new_tokens: int = 1024
    queue: int = 64
    batch: int = 16
    preparers: int = 2
    decode_workers: int = 2 if sys.platform == "linux" else 0
    decode_memory: int = 2048 * MEBIBYTE
    decode_seconds: float = 60.0
    timeout: float = 120.0
    keep: int = 8

    def check(self) -> Iterator[str]:
        """Yields what does not fit."""
        least = {"max_body": 1024, "max_medium": 1, "max_media": 0, "max_new_tokens": 1, "queue": 1, "batch": 1}
        least |= {"preparers": 1, "keep": 0, "max_pixels": 1, "port": 0}
        least |= {"decode_workers": 0, "decode_memory": 16 * MEBIBYTE}
        for name, value in least.items():
            if getattr(self, name) < value:
                yield f"{name} is {getattr(self, name)}, expected at least {value}"
        if self.decode_workers and sys.platform != "linux":
            yield f"decode_workers is {self.decode_workers}, but the processes that open media need Linux: use 0"
        for name in ("max_seconds", "decode_seconds", "timeout"):
            if not getattr(self, name) > 0:
                yield f"{name} is {getattr(self, name)}, expected above 0"
        if self.port > 65_535:
            yield f"port is {self.port}, expected at most 65535"
        for folder in self.folders:
            if not folder.is_dir():
                yield f"there is no folder {folder}"
        if any(not token.isascii() or not token.strip() or token != token.strip() for token in self.tokens):
            yield "a token is empty, or holds spaces around it or characters beyond ASCII"
        if not self.tokens and not is_loopback(self.host):
            yield f"host {self.host} can be reached by others: give tokens (--token-file), or listen on 127.0.0.1"

    @property
    def host_names(self) -> frozenset[str]:
        """The names under which a server that asks for no token answers.

        Without this check any page in the user's browser could reach it, by a name of its own that leads to loopback.
        """
        return frozenset() if self.tokens else _LOCAL_NAMES | {self.host.lower()}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
