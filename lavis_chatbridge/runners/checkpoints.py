"""Checkpoints that survive anything: written beside, synced, renamed, verified on load, refused where they do not fit.

A checkpoint is a folder ``step_NNNNNNNN`` of

- ``model.safetensors``: the trained weights, under the model's own names;
- ``optimizer.safetensors``: the optimiser's tensors, as ``PARAMETER|STATE``;
- ``state.json``: everything else: progress, data position, scaler, schedule, random generators, configuration,
  versions, and the fingerprints of what is frozen;
- ``manifest.json``: size and digest of the other files. It is written last; a folder without it, or that does not
  agree with it, is no checkpoint;
- ``validation.json``: added once the step has been validated: what that changed of the progress.

No pickle is read or written. This module knows no runner: it takes and returns `Checkpoint`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lavis_chatbridge.errors import CheckpointError, TrainingError
from lavis_chatbridge.files import read_json, share, sync, write_json

_log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
VALIDATION = "validation.json"
FORMAT = 1
BEST = "best_"
_STEP = re.compile(r"step_(\d{8,})")
_BEST = re.compile(BEST + r"(\d{8,})")
_PARTIAL = ".partial"


@dataclass
class Checkpoint:
    """A run at one moment.

    Attributes:
        model: Trained weights by name.
        optimizer: Optimiser tensors by ``PARAMETER|STATE``; empty where only weights were kept.
        state: Everything else, as JSON's types.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: Where they lie; made on the first save.
        keep_last: How many of the newest stay.
        keep_every: Those at multiples of this step stay for good.
    """

    def __init__(self, folder: Path, keep_last: int = 2, keep_every: int | None = None) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.keep_every = keep_every

    def save(self, checkpoint: Checkpoint, step: int) -> Path:
        """Write the checkpoint of a step, then remove those that need not stay.

        Raises:
            TrainingError: If it cannot be written; older checkpoints are as they were.
        """
        target = self.folder / f"step_{step:08d}"
        self._write(checkpoint, target)
        self._remove_old()
        return target

    def save_best(self, checkpoint: Checkpoint, step: int) -> Path:
        """Write the best weights so far. The former best stay until `add_validation`.

        Raises:
            TrainingError: If they cannot be written.
        """
        target = self.folder / f"{BEST}{step:08d}"
        self._write(checkpoint, target)
        return target

    def add_validation(self, step: int, progress: Mapping[str, Any]) -> None:
        """Add what a validation found to the checkpoint of its step, then remove best weights that are no longer so.

        Args:
            step: The step, whose checkpoint has been saved before the validation.
            progress: `TrainState`'s fields that the validation changed, ``best_step`` among them.

        Raises:
            TrainingError: If it cannot be written; resuming then repeats the validation.
        """
        target = self.folder / f"step_{step:08d}"
        try:
            if target.is_dir():  # not where a run goes on from another run's checkpoint
                write_json(target / VALIDATION, dict(progress))
        except OSError as error:
            raise TrainingError(f"cannot write {target / VALIDATION}: {cause(error)}") from error
        for number, path in _numbered(self.folder, _BEST).items():
            if number != progress["best_step"]:
                shutil.rmtree(path, ignore_errors=True)

    def best(self, step: int) -> Path | None:
        """The weights of the best step, as such or in that step's checkpoint; None where neither is there any more."""
        places = [self.folder / f"{BEST}{step:08d}", self.folder / f"step_{step:08d}"]
        return next((place for place in places if (place / MANIFEST).is_file()), None)

    def _write(self, checkpoint: Checkpoint, target: Path) -> None:
        partial = target.with_name(f".{target.name}{_PARTIAL}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            write(checkpoint, partial)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(partial, target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise TrainingError(f"cannot write the checkpoint {target}: {cause(error)}; {self._last_good()}") from error

    def _last_good(self) -> str:
        newest = newest_in(self.folder)
        return f"the last good one is {newest}" if newest else "there is no earlier one"

    def _remove_old(self) -> None:
        found = _numbered(self.folder, _STEP)
        newest = sorted(found)[-self.keep_last :]
        for step, path in found.items():
            kept_for_good = self.keep_every is not None and step % self.keep_every == 0
            if step not in newest and not kept_for_good:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob(f".*{_PARTIAL}"):
            shutil.rmtree(path, ignore_errors=True)


def write(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint's files into a new folder and sync them to disk.

    Raises:
        OSError: If the disk is full, not writable ...
        SafetensorError: The same, from the tensor files.
    """
    folder.mkdir(parents=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in checkpoint.model.items()}
    save_file(
        weights, folder / MODEL, metadata=adapters_metadata(checkpoint.state.get("adapters"))
    )
    save_file({name: tensor.detach().contiguous() for name, tensor in checkpoint.optimizer.items()}, folder / OPTIMIZER)
    for name in (MODEL, OPTIMIZER):
        share(folder / name)
    (folder / STATE).write_text(json.dumps({"format": FORMAT, **checkpoint.state}, indent=1), encoding="utf-8")
    manifest = {
        name: {"bytes": (folder / name).stat().st_size, "blake2b": _digest(folder / name)} for name in _files(folder)
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for name in (*_files(folder), MANIFEST):
        sync(folder / name)
    sync(folder)


def adapters_metadata(adapters: Mapping[str, Any] | None) -> dict[str, str]:
    """What a weight file says of its LoRA adapters: the alpha is in no tensor, and another one gives other answers."""
    return {"cfg": json.dumps({"lora": dict(adapters)})} if adapters else {}


def read(folder: Path) -> Checkpoint:
    """Verify and read a checkpoint.

    Raises:
        CheckpointError: If it is incomplete, damaged, or of a format that this version does not know.
    """
    faults = verify(folder)
    if faults:
        raise CheckpointError(f"the checkpoint {folder} is damaged: {'; '.join(faults)}")
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        model, optimizer = load_file(folder / MODEL), load_file(folder / OPTIMIZER)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the checkpoint {folder} cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"the checkpoint {folder} has format {found!r}, this version reads {FORMAT}: update lavis-chatbridge"
        )
    return Checkpoint(model, optimizer, state)


def verify(folder: Path) -> list[str]:
    """What is wrong with a checkpoint's files; empty if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {str(name): (entry["bytes"], entry["blake2b"]) for name, entry in manifest.items()}
        if any(Path(name).name != name for name in files):
            raise ValueError("it names files of other folders")
        if not all(isinstance(size, int) and isinstance(digest, str) for size, digest in files.values()):
            raise ValueError("a size or a digest is of another type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} is missing or unreadable ({' '.join(str(error).split())[:200]})"]
    faults = [f"{name} is not in {MANIFEST}" for name in (MODEL, OPTIMIZER, STATE) if name not in files]
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{' '.join(name.split())[:100]} is missing")
        elif path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes, expected {size}")
        elif _digest(path) != digest:
            faults.append(f"{name} has other contents than were written")
    return faults


def newest_in(folder: Path) -> Path | None:
    """The newest checkpoint of a run that is sound; damaged ones are named in the log and passed over."""
    found = _numbered(folder, _STEP)
    for step in sorted(found, reverse=True):
        faults = verify(found[step])
        if not faults:
            return found[step]
        _log.warning("passing over the checkpoint %s: %s", found[step], "; ".join(faults))
    return None


def newest_step(folder: Path) -> int | None:
    """The highest step of which a folder has a checkpoint or best weights, sound or not."""
    return max([*_numbered(folder, _STEP), *_numbered(folder, _BEST)], default=None)


def is_step(name: str) -> bool:
    """Whether a folder of this name is a checkpoint, and not best weights or something of the user's."""
    return _STEP.fullmatch(name) is not None


def later_than(checkpoint: Path) -> list[Path]:
    """The checkpoints and best weights beside a checkpoint whose step is a later one."""
    match, folder = _STEP.fullmatch(checkpoint.name), checkpoint.parent
    found = [*_numbered(folder, _STEP).items(), *_numbered(folder, _BEST).items()]
    return [path for step, path in found if match is not None and step > int(match.group(1))]


def validation_of(folder: Path) -> dict[str, Any]:
    """What `CheckpointFolder.add_validation` added to a checkpoint; empty where that step was not validated."""
    found = read_json(folder / VALIDATION)
    numbers = (int, float, type(None))
    sound = isinstance(found, dict) and all(isinstance(value, numbers) for value in found.values())
    return found if sound else {}


def newest_run(output_dir: Path, fits: Callable[[Mapping[str, Any]], bool]) -> Path | None:
    """The newest sound checkpoint of the runs in ``output_dir`` or one folder below, the run that wrote last first.

    Args:
        output_dir: Where runs lie.
        fits: Whether a checkpoint is of the run that is looked for, by its state.
    """
    folders = [*output_dir.glob("checkpoints"), *output_dir.glob("*/checkpoints")]
    runs = [folder for folder in folders if _numbered(folder, _STEP)]
    for run in sorted(runs, key=lambda folder: folder.stat().st_mtime, reverse=True):
        newest = newest_in(run)
        if newest is None:
            continue
        state = read_json(newest / STATE)
        if isinstance(state, dict) and fits(state):
            return newest
        _log.warning("passing over %s: it belongs to another configuration", newest)
    return None


def differences(found: Mapping[str, Any], expected: Mapping[str, Any], limit: int = 5) -> list[str]:
    """What of ``found`` (in a checkpoint) is not as ``expected`` (in the model), as sentences."""
    lines = [f"{key} is missing" for key in expected if key not in found]
    lines += [f"{str(key)[:200]} is not expected" for key in found if key not in expected]
    both = [key for key in expected if key in found and found[key] != expected[key]]
    lines += [f"{key} is {str(found[key])[:200]}, expected {expected[key]}" for key in both]
    return lines if len(lines) <= limit else [*lines[:limit], f"and {len(lines) - limit} more"]


def _numbered(folder: Path, pattern: re.Pattern) -> dict[int, Path]:
    """The folders whose names match, by their step."""
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir())
    return {int(match.group(1)): path for match, path in matches if match}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def cause(error: Exception) -> str:
    """Cause and remedy in a few words."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error) or "quota" in str(error).lower():
        return "the disk is full (free some space, then run again with run.resume=auto)"
    if number == errno.EFBIG or "File too large" in str(error):
        return "the file is larger than this system allows (ulimit -f)"
    if number in (errno.EACCES, errno.EROFS, errno.EPERM):
        return "the folder is not writable (set run.output_dir to one that is)"
    return " ".join(str(error).split())
