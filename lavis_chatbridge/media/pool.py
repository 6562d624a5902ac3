"""Opens media files in worker processes, so that a decoder that crashes, hangs or eats memory takes nobody with it.

`DecodingPool` has the functions of this folder as methods, with the same arguments, results and errors. A worker
(``worker.py``) is a fresh interpreter without this process's environment; it is trusted no further than its pipe: what
it sends is checked, and is never run. It can do whatever else the user may do whom the server runs as. Linux only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from lavis_chatbridge.errors import ChatBridgeError, MediaError
from lavis_chatbridge.media import audio, image, video
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits
from lavis_chatbridge.media.source import Sound, Source, is_file, media_errors

_LONGEST_LINE = 1 << 16
_SECONDS_TO_START = 120.0
_SECONDS_MORE = 1.0  # decoders that look at the clock say themselves that the time is up
_KEPT = ("LANG", "LC_ALL", "LD_LIBRARY_PATH")  # of the environment, which may hold tokens
_LONGEST_CAUSE = 500
_FORMS = {"open_image": ("uint8", 3), "open_video": ("uint8", 4), "decode_audio": ("float32", 1)}  # type, dimensions
_BROKEN = (OSError, EOFError, ValueError, TypeError, KeyError, ArithmeticError, MemoryError, RecursionError)
"""What reading from a worker raises that has ended, or sends anything."""
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from lavis_chatbridge.media.worker import main; "
    "main(int(sys.argv[1]), float(sys.argv[2]))"
)


class DecodingPool:
    """Processes that open media files; several threads may use one.

    Arrays and Pillow images are opened in this process: they are decoded already.

    Args:
        workers: How many media are opened at the same time; further ones wait.
        memory: Bytes that decoding one may take.
        seconds: How long opening one may take, by the clock; then the process is killed.

    Raises:
        ChatBridgeError: If the workers do not start.
    """

    def __init__(self, workers: int = 2, memory: int = 1 << 31, seconds: float = 60.0) -> None:
        self._memory, self._seconds = memory, seconds
        self._closed, self._lock = False, threading.Lock()
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        self._workers = [_Worker(memory, seconds) for _ in range(workers)]
        try:
            for worker in self._workers:
                worker.wait_until_ready()
                self._idle.put(worker)
        except ChatBridgeError:
            self.close()
            raise

    def __enter__(self) -> DecodingPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what is being opened fails."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()

    @property
    def processes(self) -> list[int]:
        """The numbers of the processes that run."""
        with self._lock:
            return [worker.number for worker in self._workers if not worker.ended]

    def open_image(
        self,
        source: Source,
        *,
        at_least: int | None = None,
        background: tuple[int, int, int] = image.WHITE,
        limits: Limits = DEFAULT_LIMITS,
    ) -> np.ndarray:
        """As `media.open_image`."""
        if not is_file(source):
            return image.open_image(source, at_least=at_least, background=background, limits=limits)
        return self._array("open_image", source, limits, at_least=at_least, background=background)[1]

    def open_video(
        self,
        source: Source,
        choose: Callable[[int], Sequence[int]],
        *,
        background: tuple[int, int, int] = image.WHITE,
        limits: Limits = DEFAULT_LIMITS,
    ) -> np.ndarray:
        """As `media.open_video`; ``choose`` is called in this process."""
        if not is_file(source):
            return video.open_video(source, choose, background=background, limits=limits)
        return self._array("open_video", source, limits, choose, background=background)[1]

    def open_audio(
        self,
        source: Sound,
        rate: int = 16_000,
        channel: audio.Channel = "mean",
        *,
        source_rate: int | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> np.ndarray:
        """As `media.open_audio`; it is resampled in this process, since that takes torch."""
        if not is_file(source):
            return audio.open_audio(source, rate, channel, source_rate=source_rate, limits=limits)
        own_rate, samples = self._array("decode_audio", source, limits, channel=channel)
        with media_errors(source):
            return audio.finish_audio(source, int(own_rate), samples, rate, limits)

    def has_audio_track(self, source: Source, *, limits: Limits = DEFAULT_LIMITS) -> bool:
        """As `media.has_audio_track`."""
        return is_file(source) and self._run("has_audio_track", source, limits)[0] is True

    def _array(
        self,
        function: str,
        source: Any,
        limits: Limits,
        choose: Callable[[int], Sequence[int]] | None = None,
        **options: Any,
    ) -> tuple[Any, np.ndarray]:
        value, array = self._run(function, source, limits, choose, **options)
        if array is None:
            raise MediaError(source, "the decoder sent nothing")
        return value, array

    def _run(
        self,
        function: str,
        source: Any,
        limits: Limits,
        choose: Callable[[int], Sequence[int]] | None = None,
        **options: Any,
    ) -> tuple[Any, np.ndarray | None]:
        """What a worker's ``function`` returns."""
        content = source if isinstance(source, (bytes, bytearray, memoryview)) else None
        limits = dataclasses.replace(limits, timeout=min(limits.timeout, self._seconds))
        request = {
            "function": function,
            "path": os.path.abspath(os.fspath(source)) if content is None else None,
            "size": 0 if content is None else memoryview(content).nbytes,
            "limits": dataclasses.asdict(limits),
            "options": options,
        }
        worker, usable = self._idle.get(), False
        try:
            if worker is None or worker.ended:
                worker = self._new()
            answer, array = worker.ask(source, request, content, choose, max(limits.max_bytes, 3 * limits.max_pixels))
            usable = answer.get("last") is False
        finally:
            if worker is not None and not usable:
                worker.kill()
            self._idle.put(worker if usable else None)
        if "fault" in answer:
            raise MediaError(source, str(answer["fault"])[:_LONGEST_CAUSE])
        return answer.get("value"), array

    def _new(self) -> _Worker:
        """A worker in place of one that has ended."""
        with self._lock:
            if self._closed:
                raise ChatBridgeError("the processes that open media have been ended")
            worker = _Worker(self._memory, self._seconds)
            self._workers = [other for other in self._workers if not other.ended] + [worker]
        worker.wait_until_ready()
        return worker


class _Worker:
    """One process."""

    def __init__(self, memory: int, seconds: float) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START, str(memory), str(seconds), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the server, which ends its workers
        )
        self._seconds = seconds + _SECONDS_MORE
        self.number = self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it no longer runs."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
        for line in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # what was not sent cannot be sent now
                if line is not None:
                    line.close()

    def wait_until_ready(self) -> None:
        """Raises ChatBridgeError: If it does not start."""
        with _Alarm(_SECONDS_TO_START, self._process.kill):
            line = self._readline()
        if not line:
            self.kill()
            raise ChatBridgeError("a process that opens media does not start; what it says stands above")

    def ask(
        self,
        source: object,
        request: dict[str, Any],
        content: Any,
        choose: Callable[[int], Sequence[int]] | None,
        max_bytes: int,
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Its answer and the array after it.

        Raises:
            MediaError: If it ends before it has answered, or sends what it should not.
            ChoiceError: If ``choose`` returns what there is not.
        """
        fault: Exception | None = None
        with _Alarm(self._seconds, self._process.kill) as alarm:
            try:
                self._write(request, content)
                answer = self._read_answer()
                if choose is not None and "frames" in answer:
                    self._write(video.chosen(choose, int(answer["frames"])))
                    answer = self._read_answer()
                form = _FORMS.get(request["function"])
                array = self._read_array(answer, *form, max_bytes) if form and "shape" in answer else None
            except video.ChoiceError:
                raise
            except _BROKEN as error:
                fault = error
        if alarm.rung:
            raise MediaError(source, f"decoding took longer than {self._seconds - _SECONDS_MORE:g} s") from fault
        if fault is not None:
            self.kill()
            raise MediaError(source, f"its decoder ended with status {self._process.returncode}") from fault
        return answer, array

    def _write(self, head: Any, content: Any = None) -> None:
        line = self._process.stdin
        assert line is not None
        line.write(json.dumps(head).encode() + b"\n")
        if content is not None:
            line.write(content)
        line.flush()

    def _readline(self) -> bytes:
        line = self._process.stdout
        assert line is not None
        return line.readline(_LONGEST_LINE)

    def _read_answer(self) -> dict[str, Any]:
        line = self._readline()
        if not line:
            raise EOFError("there is no answer")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise ValueError("the answer is no mapping")
        return answer

    def _read_array(self, answer: dict[str, Any], kind: str, dimensions: int, max_bytes: int) -> np.ndarray:
        shape = tuple(map(int, answer["shape"]))
        if answer["dtype"] != kind or len(shape) != dimensions or min(shape) < 0:
            raise ValueError(f"an array of shape {shape} and type {answer['dtype']}")
        size = math.prod(shape) * np.dtype(kind).itemsize
        if size > max_bytes:
            raise ValueError(f"{size} bytes are more than {max_bytes}")
        array = np.empty(shape, kind)
        line = self._process.stdout
        assert line is not None
        if size and line.readinto(array.data.cast("B")) != size:  # type: ignore[attr-defined]
            raise EOFError("the array is not whole")
        return array


class _Alarm:
    """Calls ``ring`` unless it is left within ``seconds``; when it has been left, it rings no more."""

    def __init__(self, seconds: float, ring: Callable[[], None]) -> None:
        self.rung = False
        self._ring = ring
        self._timer = threading.Timer(seconds, self._go)
        self._timer.daemon = True

    def __enter__(self) -> _Alarm:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self._timer.join()

    def _go(self) -> None:
        self.rung = True
        self._ring()
