"""The output folder of a run: its path, the checkpoint to resume from, and the check that it belongs to one run."""

from __future__ import annotations

import datetime
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import locked
from lavis_chatbridge.runners import checkpoints, distributed
from lavis_chatbridge.runners.logs import LOG
from lavis_chatbridge.runners.settings import RunSettings

WEIGHTS, CHECKPOINTS, RESULTS, CONFIG = "model.safetensors", "checkpoints", "result", "config.yaml"
LOCK_WAIT = 20.0
"""Seconds to wait for the lock: data workers of a killed run hold it until they notice, after some 5 s."""
_OF_A_RUN = (CHECKPOINTS, WEIGHTS, LOG, RESULTS, "tensorboard", "wandb")


def new_job_id() -> str:
    """A name for a run's folder: the time to the second, and six hexadecimal digits for runs of one second."""
    return f"{datetime.datetime.now():%Y%m%d_%H%M%S}_{secrets.token_hex(3)}"


class RunFolder:
    """The output folder of a run, the same on all processes; ``job_id`` is its name if ``run.job_id`` is None.

    Attributes:
        path: The folder.
        resumed: The checkpoint to resume from, in this folder or elsewhere; None starts a new run.
    """

    def __init__(self, run: RunSettings, job_id: str = "") -> None:
        name = distributed.from_main(run.job_id if run.job_id is not None else job_id)
        self.path = Path(run.output_dir).expanduser().absolute() / name
        self.checkpoints = checkpoints.CheckpointFolder(self.path / CHECKPOINTS, run.keep_last, run.keep_every)
        self.overwrite = run.overwrite
        self.resumed: Path | None = None
        self._claimed = False
        if run.resume == "auto":
            self.resumed = distributed.from_main(self.checkpoints.newest() if distributed.is_main() else None)
        elif run.resume is not None:
            self.resumed = Path(run.resume).expanduser().resolve()

    def make(self) -> None:
        """Create the folder; a `ConfigError` on every process if it cannot be created or written to."""
        with distributed.together():
            if distributed.is_main():
                try:
                    (self.path / RESULTS).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ConfigError(f"run.output_dir: cannot write to {self.path}: {error.strerror}") from error
                if not os.access(self.path, os.W_OK):
                    raise ConfigError(f"run.output_dir: cannot write to {self.path}: it is not writable")

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Lock the folder for one training; a further claim inside the block changes nothing.

        Raises:
            ConfigError: On every process, if another training holds the lock, or the folder has files of an earlier
                run that this one neither resumes nor overwrites.
        """
        if self._claimed:
            yield
            return
        self.make()
        with ExitStack() as stack:
            with distributed.together():
                if distributed.is_main():
                    try:
                        stack.enter_context(locked(self.path / "training", LOCK_WAIT))
                    except DataError as error:
                        raise ConfigError(
                            f"another training writes into {self.path}: wait for it, stop it, or set another "
                            f"run.output_dir ({error})"
                        ) from error
                    self.check()
            self._claimed = True
            try:
                yield
            finally:
                self._claimed = False

    def clear(self) -> None:
        """With ``run.overwrite``, delete an earlier run's files; the checkpoint to resume from and older ones stay."""
        if not self.overwrite or not distributed.is_main():
            return
        if (step := self._own_step()) is not None:
            for later, path in self.checkpoints.steps().items():
                if later > step:
                    shutil.rmtree(path)
            return
        for path in (self.path / name for name in _OF_A_RUN):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.path / RESULTS).mkdir(exist_ok=True)

    def _own_step(self) -> int | None:
        """The step of the checkpoint to resume from, if it is one of this folder."""
        if self.resumed is None or self.resumed.parent != self.checkpoints.path.resolve():
            return None
        return checkpoints.step_of(self.resumed)

    def check(self) -> None:
        """Refuse a folder with files of an earlier run that this one neither resumes nor overwrites.

        Raises:
            ConfigError: If there are such files, or there is no checkpoint to resume from.
        """
        if self.resumed is not None and not (self.resumed / checkpoints.STATE).is_file():
            folders = (self.resumed, self.resumed / CHECKPOINTS)
            inside = [path for folder in folders if (path := checkpoints.CheckpointFolder(folder).newest())]
            newest = f"; the newest one in it is {inside[0]}" if inside else ""
            raise ConfigError(f"run.resume: {self.resumed} is not a checkpoint{newest}")
        own, found = self._own_step(), max(self.checkpoints.steps(), default=None)
        if self.overwrite or (own is not None and own == found):
            return
        if own is not None:
            raise ConfigError(
                f"{self.path} has checkpoints up to step {found}, after the one to resume from (step {own}): set "
                "run.overwrite=true to delete the later ones, or another run.output_dir"
            )
        if found is not None or (self.path / WEIGHTS).exists():
            held = f"checkpoints up to step {found}" if found is not None else f"trained weights, {WEIGHTS}"
            raise ConfigError(
                f"{self.path} has {held} of an earlier training: resume it (run.resume=auto), set another "
                "run.output_dir, or delete them with run.overwrite=true"
            )
