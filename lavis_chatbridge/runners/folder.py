"""The folder of a run: which one it is, what an earlier run has left there, and that one training at a time has it.

The lock is the kernel's (``fcntl.lockf``): it ends with its process, however that ends and on whichever machine, and
data workers do not inherit it. What the locked file holds only tells who has it.
"""

from __future__ import annotations

import datetime
import errno
import json
import logging
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import read_json
from lavis_chatbridge.runners import checkpoints, distributed
from lavis_chatbridge.runners.progress import LOG
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
CHECKPOINTS, RESULTS, EARLIER, LOCK = "checkpoints", "result", "earlier", ".training.lock"
PATIENCE = 150.0
"""Seconds to wait for a lock of another machine: a file server notices after 90 that its holder has vanished."""
_NOT_LEARNT = (
    *("job_id", "output_dir", "resume", "resume_ckpt_path", "anew", "log_every", "log_freq", "num_workers"),
    *("tensorboard", "wandb", "wandb_mode", "wandb_project", "save_every_steps", "save_every_minutes", "keep_last"),
    *("keep_every", "device", "distributed", "dist_url", "world_size", "timeout_minutes", "parallel", "compile"),
    *("gradient_checkpointing", "feature_cache", "test_splits"),
)
"""Keys of the ``run`` section that may differ between two starts of one script."""
_OF_A_RUN = (CHECKPOINTS, WEIGHTS, LOG, RESULTS, "tensorboard", "wandb")


def new_job_id() -> str:
    """A name for a run's folder: the time to the second, and six hexadecimal digits for runs of one second."""
    return f"{datetime.datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"


def identity(run: RunSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two configurations the same run: ``auto`` must not go on from somebody else's checkpoint."""
    model = {key: config["model"].get(key) for key in ("arch", "model_type")}
    return {"task": run.task, "model": model, "datasets": sorted(config["datasets"]), "seed": run.seed}


@dataclass
class RunFolder:
    """Where a run writes, the same on all processes.

    Attributes:
        path: The folder.
        continued: The checkpoint that the run goes on from, in this folder or elsewhere.
        anew: Move an earlier run's files away instead of refusing to mix with them.
        auto: Whether a checkpoint was looked for, which a refusal then says.
    """

    path: Path
    continued: Path | None = None
    anew: bool = False
    auto: bool = False
    _held: bool = field(default=False, repr=False)

    @classmethod
    def choose(cls, run: RunSettings, config: Mapping[str, Any], job_id: str) -> RunFolder:
        """A new run's folder, or, with ``run.resume: auto``, that of the run that goes on.

        Args:
            run: The ``run`` section.
            config: All sections, plain.
            job_id: The name under ``run.output_dir`` where ``run.job_id`` gives none.
        """
        base = Path(run.output_dir).expanduser().absolute()
        continued = _find_checkpoint(run, config, base)
        if continued is not None and run.resume == "auto":
            return cls(continued.parent.parent, continued)
        name = distributed.from_main(str((run.job_id if run.job_id is not None else job_id) or ""))
        return cls(base / name, continued, run.anew, run.resume == "auto")

    @property
    def checkpoints(self) -> Path:
        """Where the run's checkpoints lie."""
        return self.path / CHECKPOINTS

    def make(self) -> None:
        """Make the folder and that of results.

        Raises:
            ConfigError: On every process, if that, or writing into it, is impossible.
        """
        fault = distributed.from_main(_not_writable(self.path / RESULTS) if distributed.is_main() else "")
        if fault:
            raise ConfigError(fault)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep the folder for one training; within it, a further claim changes nothing.

        Raises:
            ConfigError: On every process, if another training has it, or if an earlier one has left there what this
                one would mix with its own.
        """
        if self._held:
            yield
            return
        self.make()
        lock, fault = _lock(self.path / LOCK) if distributed.is_main() else (None, "")
        try:
            fault = distributed.from_main(fault or (self.refusal() if distributed.is_main() else ""))
            if fault:
                raise ConfigError(fault)
            self._held = True
            yield
        finally:
            self._held = False
            _unlock(self.path / LOCK, lock)

    def refusal(self) -> str:
        """Why this run must not write here, or an empty text."""
        try:
            if unfit := self._not_to_go_on_from():
                return unfit
            left = "" if self.anew or self._own_checkpoint() else self._left()
        except OSError as error:
            return f"run.output_dir: cannot read {self.path}: {error.strerror or error}"
        if not left:
            return ""
        if self.auto:
            own = "no sound checkpoint of this task, model type, data sets and seed, but "
            remedy = "set another run.output_dir, or run.anew=true in the place of run.resume"
        else:
            own, remedy = "", "go on with it (run.resume=auto), set another run.output_dir, or run.anew=true"
        return f"{self.path} holds {own}{left} of an earlier training: {remedy} (moves it to {self.path / EARLIER})"

    def set_aside(self) -> None:
        """Move to ``earlier/N`` what is not this run's: with ``anew`` all of the earlier run, else later checkpoints.

        Raises:
            ConfigError: On every process, if files cannot be moved.
        """
        fault = ""
        if distributed.is_main():
            try:
                self._move(self._not_of_this_run())
            except OSError as error:
                fault = f"cannot move an earlier run's files within {self.path}: {error.strerror or error}"
        if fault := distributed.from_main(fault):
            raise ConfigError(fault)
        self.make()

    def _not_of_this_run(self) -> list[Path]:
        if (own := self._own_checkpoint()) is not None:
            return checkpoints.later_than(own)
        return [self.path / name for name in _OF_A_RUN] if self.anew and self._left() else []

    def _move(self, paths: list[Path]) -> None:
        there = [path for path in paths if path.exists()]
        if not there:
            return
        number = 1
        while (target := self.path / EARLIER / str(number)).exists():
            number += 1
        for path in there:
            place = target / path.relative_to(self.path)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, place)
        names = ", ".join(str(path.relative_to(self.path)) for path in there)
        _log.warning("an earlier run's %s of %s are now in %s", names, self.path, target)

    def _own_checkpoint(self) -> Path | None:
        """The checkpoint that the run goes on from if it is one of this folder, also where links lead to it."""
        for path in (self.continued, self.continued.resolve()) if self.continued is not None else ():
            if checkpoints.is_step(path.name) and path.parent.resolve() == self.checkpoints.resolve():
                return self.checkpoints / path.name
        return None

    def _not_to_go_on_from(self) -> str:
        """Why a folder that ``run.resume`` names is no checkpoint of a training; an empty text if it may be one."""
        path = self.continued
        if path is None or not path.is_dir():
            return ""
        if not (path / checkpoints.MANIFEST).exists():
            newest = checkpoints.newest_in(path) or checkpoints.newest_in(path / CHECKPOINTS)
            return f"run.resume: {path} is no checkpoint; the newest one in it is {newest}" if newest else ""
        if path.resolve().name.startswith(checkpoints.BEST):
            return (
                f"run.resume: {path} holds weights alone, without optimiser and position: go on from one of its "
                f"neighbours step_NNNNNNNN, or start another run with model.checkpoint={path / checkpoints.MODEL}"
            )
        return ""

    def _left(self) -> str:
        """What lies here of an earlier training, in words; empty where nothing does."""
        step = checkpoints.newest_step(self.checkpoints)
        if step is not None:
            return f"checkpoints up to step {step}"
        return f"trained weights, {WEIGHTS}" if (self.path / WEIGHTS).exists() else ""


def _find_checkpoint(run: RunSettings, config: Mapping[str, Any], base: Path) -> Path | None:
    """The checkpoint that ``run.resume`` names, the same on all processes."""
    if run.resume is None:
        return None
    if run.resume != "auto":
        return Path(run.resume).expanduser().absolute()
    found = distributed.from_main(_newest(run, config, base) if distributed.is_main() else None)
    if found is None:
        _log.info("run.resume is auto, and %s has no checkpoint of this configuration: starting anew", base)
    return found


def _newest(run: RunSettings, config: Mapping[str, Any], base: Path) -> Path | None:
    """The checkpoint that ``auto`` takes: of a run with a name its own, else one of a run that was configured alike."""
    wanted = identity(run, config)

    def same(state: Mapping[str, Any]) -> bool:
        return state.get("identity") == wanted

    if not run.job_id:
        return checkpoints.newest_run(base, same)
    own = base / run.job_id
    if checkpoints.newest_step(own / CHECKPOINTS) is not None:
        return checkpoints.newest_run(own, same)
    learns = _what_it_learns(config)
    return checkpoints.newest_run(base, lambda state: same(state) and _what_it_learns(state.get("config")) == learns)


def _what_it_learns(config: Any) -> str:
    """What of a configuration decides the weights that come out, to be compared."""
    if not isinstance(config, Mapping) or not isinstance(config.get("run"), Mapping):
        return ""
    run = {key: value for key, value in config["run"].items() if key not in _NOT_LEARNT}
    return json.dumps([config.get("model"), config.get("datasets"), run], sort_keys=True, default=str)


def _lock(path: Path) -> tuple[int | None, str]:
    """The locked file, where this system has such locks; or why this training must not go on."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None, ""
    until = monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            return None, f"run.output_dir: cannot write to {path.parent}: {error.strerror or error}"
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _log.warning("%s cannot be locked (%s): start no second training there", path.parent, error.strerror)
                return None, ""
            holder = _holder(path)
            if holder.get("host") == socket.gethostname() or monotonic() >= until:
                return None, _taken(path, holder)
            _log.info("waiting for the lock of %s, which %s has", path.parent, holder.get("host"))
            sleep(10.0)
            continue
        if _is(handle, path):
            break
        os.close(handle)  # the training that had it has just ended, and removed it
    holder = {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": f"{datetime.datetime.now():%Y-%m-%d %H:%M}",
    }
    os.ftruncate(handle, 0)
    os.write(handle, json.dumps(holder).encode())
    return handle, ""


def _is(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, Any]:
    """What a locked file says of the training that has it; empty while that is being written."""
    found = read_json(path)
    return found if isinstance(found, dict) else {}


def _taken(path: Path, holder: Mapping[str, Any]) -> str:
    who = (
        f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}" if holder else "unknown"
    )
    return f"another training ({who}) writes into {path.parent}: wait for it, stop it, or set another run.output_dir"


def _unlock(path: Path, handle: int | None) -> None:
    if handle is not None:
        with suppress(OSError):
            path.unlink()  # while it is locked: who opens it now finds another file, or none
        os.close(handle)


def _not_writable(folder: Path) -> str:
    """Make a folder; why that, or writing into it, is impossible, or an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        return f"run.output_dir: cannot write to {folder}: {error.strerror or error}"
    return ""
