"""A worker process that opens media files for `pool.DecodingPool`, within limits that the kernel keeps.

It reads requests from its standard input and writes answers to its standard output: a line of JSON each, followed by
the bytes that the line announces. Nothing that either side reads is run as code. It imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import resource
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from lavis_chatbridge.errors import MediaError
from lavis_chatbridge.media.audio import decode_audio
from lavis_chatbridge.media.container import has_audio_track
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.media.limits import Limits
from lavis_chatbridge.media.video import open_video

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "open_image": open_image,
    "open_video": open_video,
    "decode_audio": decode_audio,
    "has_audio_track": has_audio_track,
}


def main(memory: int, seconds: float) -> None:
    """Answer requests until there are no more.

    Args:
        memory: Bytes of address space that decoding may take beyond what the libraries have.
        seconds: Processor time of one medium, after which the kernel ends the process.
    """
    import av  # noqa: F401  (loaded before the memory is bounded, as soundfile)
    import soundfile  # noqa: F401

    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):  # what a library prints must not look like an answer
        os.dup2(nothing, standard)
    usual = _address_space()
    _lower(resource.RLIMIT_AS, usual + memory)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    _write(answers, {"ready": True})
    while line := requests.readline():
        _bound_processor_time(seconds)
        head, array, exhausted = _answer(json.loads(line), requests, answers, memory)
        _write(answers, {**head, "last": exhausted or _address_space() > usual + memory // 2}, array)
        del array


def _answer(
    request: dict[str, Any], requests: BinaryIO, answers: BinaryIO, memory: int
) -> tuple[dict[str, Any], np.ndarray | None, bool]:
    """The line of the answer, the array after it, and whether the memory was not enough."""
    source = requests.read(request["size"]) if request["path"] is None else request["path"]
    options = dict(request["options"], limits=Limits(**request["limits"]))
    if "background" in options:
        options["background"] = tuple(options["background"])
    if request["function"] == "open_video":
        options["choose"] = lambda count: _choose(count, requests, answers)
    try:
        found = FUNCTIONS[request["function"]](source, **options)
    except MediaError as error:
        if isinstance(error.__cause__, MemoryError):
            return {"fault": f"decoding takes more than {memory >> 20} MiB of memory"}, None, True
        return {"fault": error.cause}, None, False
    value, array = found if isinstance(found, tuple) else (None, found)
    if not isinstance(array, np.ndarray):
        return {"value": array}, None, False
    array = np.ascontiguousarray(array)
    return {"value": value, "dtype": str(array.dtype), "shape": array.shape}, array, False


def _choose(count: int, requests: BinaryIO, answers: BinaryIO) -> list[int]:
    """Ask which of ``count`` frames are wanted."""
    _write(answers, {"frames": count})
    return json.loads(requests.readline())


def _write(answers: BinaryIO, head: dict[str, Any], array: np.ndarray | None = None) -> None:
    answers.write(json.dumps(head).encode() + b"\n")
    if array is not None and array.size:
        answers.write(array.data.cast("B"))
    answers.flush()


def _address_space() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _lower(what: int, value: int) -> None:
    """Lower a limit for good; one that is lower already stays."""
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _bound_processor_time(seconds: float) -> None:
    """Grant ``seconds`` from now on; the limit is one of all that a process has used."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    used = resource.getrusage(resource.RUSAGE_SELF)
    value = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
