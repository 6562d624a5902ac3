"""A server process for tests, and requests to it."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from lavis_chatbridge.chat.messages import data_url
from tests.chat.building import picture, sound, video
from tests.media.making import encoded

TOKEN = "a-token-for-tests"
MODEL = "chatbridge-tiny"
MAX_BODY = 2 << 20


class Served(NamedTuple):
    """A running server: its URL and process, the folder of files that it offers, its temporary folder, its log."""

    url: str
    process: subprocess.Popen
    files: Path
    temporary: Path
    errors: IO[str]


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[Served]:
    """``chatbridge serve`` with the tiny model, its bridge untrained, on a free port."""
    files, temporary = folder / "offered", folder / "temporary"
    for made in (files, temporary):
        made.mkdir()
    (files / "a.png").write_bytes(png())
    (folder / "secret.png").write_bytes(png())
    (files / "link.png").symlink_to(folder / "secret.png")
    command = [sys.executable, "-m", "lavis_chatbridge.cli", "serve", "--port", "0", "--device", "cpu"]
    command += ["--options", "model.checkpoint=null", "--files", str(files), "--max-body", str(MAX_BODY / (1 << 20))]
    environment = {**os.environ, "CHATBRIDGE_TOKENS": TOKEN, "TMPDIR": str(temporary)}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            [*command, *more], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.search(r"http://\S+/v1", line)
            if not found:
                process.wait(60)
                errors.seek(0)
                raise AssertionError(f"the server said {line!r}: {errors.read()[-3000:]}")
            yield Served(found.group(), process, files, temporary, errors)
        finally:
            process.terminate()
            process.wait(30)


def png(darker: int = 0) -> bytes:
    """A picture's file; another one for each ``darker``."""
    return encoded(Image.fromarray(picture() - np.minimum(picture(), darker)), "PNG")


def text(words: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": words}


def image(url: str = "") -> dict[str, Any]:
    """A picture's part."""
    return {"type": "image_url", "image_url": {"url": url or data_url(png(), "image/png")}}


def audio() -> dict[str, Any]:
    """A sound's part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def clip(heard: str = "tone") -> dict[str, Any]:
    """A video's part."""
    return {"type": "video_url", "video_url": {"url": data_url(video(heard), "video/mp4")}}


def asked(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """One message of the user."""
    return [{"role": "user", "content": list(parts)}]
