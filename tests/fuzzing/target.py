"""A target: how its inputs are made, and which part of the package is given them."""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lavis_chatbridge.chat.server.errors import RequestError
from lavis_chatbridge.errors import ChatBridgeError

REFUSALS = (ChatBridgeError, RequestError)
"""What a user may get to see; any other exception is a fault of the package."""


@dataclass(frozen=True)
class Target:
    """A part of the package that reads what others wrote.

    Args:
        name: What it is called in the table.
        make: From a random generator to one input.
        feed: Gives an input to the package, in an empty folder; asserts what must hold afterwards.
        cases: Special cases: what a file is like -> its maker.
        megabytes: How much one input may add to the memory of the process.
    """

    name: str
    make: Callable[[random.Random], bytes]
    feed: Callable[[bytes, Path], None]
    cases: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    megabytes: float = 300.0

    def input(self, seed: int, case: int | str) -> bytes:
        """The input of a number, or the special case of a name."""
        if isinstance(case, str):
            return self.cases[case]()
        return self.make(random.Random(f"{seed} {self.name} {case}"))

    def outcome(self, data: bytes, folder: Path) -> str:
        """``"result"``, or the name of the exception with which the input was refused.

        Raises:
            Exception: Whatever else the package raised: a fault.
        """
        try:
            self.feed(data, folder)
        except REFUSALS as error:
            text = str(error)
            assert "\n" not in text, f"a message of several lines: {text[:200]!r}"
            assert len(text) < 8_000, f"a message of {len(text)} characters: {text[:200]!r}"
            return type(error).__name__
        return "result"


def packed(files: Mapping[str, bytes]) -> bytes:
    """Several files as one input."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    """The files of an input."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def dumped(value: object) -> bytes:
    """JSON as Python writes it, with ``NaN`` and escaped lone surrogates."""
    return json.dumps(value).encode()
