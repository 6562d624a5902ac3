"""Predictions written down as they are made, so that an interrupted evaluation goes on where it stopped.

A prediction belongs to a key, a hash of all that it depends on: the sample and its media, the exact prompt, the
decoding settings, the processing of media, the model's weights, the library versions. What has changed is predicted
anew. This module knows no metric and no data set.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import append_lines

_log = logging.getLogger(__name__)
_VALUES_PER_TENSOR = 64

JOURNAL = "journal"
"""The folder of journals within that of results."""


class Journal:
    """The journals of all processes in one folder; this process appends to its own.

    Args:
        folder: Where they lie; made when the first prediction is written.
        rank: This process.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder = folder
        self.path = folder / f"rank{rank}.jsonl"

    def read(self) -> dict[str, dict[str, Any]]:
        """Key -> record, of all processes; a line that an interruption cut off is passed over."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            # not splitlines, which also parts at characters that a text may hold
            for line in filter(None, path.read_text(encoding="utf-8", errors="replace").split("\n")):
                try:
                    entry = json.loads(line)
                    found[entry["key"]] = entry["record"]
                except (ValueError, KeyError, TypeError):
                    _log.warning("%s: passed over a line that is not whole", path)
        return found

    def add(self, entries: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Append records with their keys; they are in the file when this returns.

        Raises:
            ConfigError: If they cannot be written.
        """
        lines = [json.dumps({"key": key, "record": record}, ensure_ascii=False) for key, record in entries]
        with writable(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            append_lines(self.path, lines)

    def remove(self) -> None:
        """Remove the journals of all processes."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Name the folder of results when it takes nothing (any more).

    Raises:
        ConfigError: In place of the operating system's error.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"run.output_dir: cannot write to {folder}: {error.strerror or error}") from error


def key_of(*parts: Any) -> str:
    """A hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def model_mark(model: nn.Module) -> str:
    """A short hash that changes when a model's weights or settings do.

    A few evenly spaced values of every tensor are looked at: a step of training changes all of them, and 13e9 values
    need not be read.
    """
    digest = hashlib.sha256(repr(getattr(model, "settings", "")).encode())
    # not the state dict: asking for it would take weights apart again that FSDP has gathered for the evaluation
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().flatten()
        step = max(1, flat.numel() // _VALUES_PER_TENSOR)
        values = flat[::step].to("cpu", torch.float64).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
