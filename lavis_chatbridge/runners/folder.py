"""The output folder of a run: its path, the checkpoint to resume from, and the check that it belongs to one run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import locked
from lavis_chatbridge.runners import checkpoints, distributed
from lavis_chatbridge.runners.logs import LOG
from lavis_chatbridge.runners.settings import RunSettings

WEIGHTS, CHECKPOINTS, RESULTS, CONFIG = "model.safetensors", "checkpoints", "result", "config.yaml"
LOCK_WAIT = 20.0
"""Seconds to wait for the lock: data workers of a killed run hold it until they exit, after about 5 s."""
_OF_A_RUN = (WEIGHTS, LOG, RESULTS, "tensorboard", "wandb")


class RunFolder:
    """The output folder of a run, the same on all processes; ``job_id`` is its name if ``run.job_id`` is None.

    Attributes:
        path: The folder.
        checkpoints: The folder of its checkpoints.
        resumed: The checkpoint to resume from, in this folder or elsewhere; None starts a new run.
    """

    def __init__(self, run: RunSettings, job_id: str = "") -> None:
        name = distributed.from_main(run.job_id if run.job_id is not None else job_id)
        self.path = Path(run.output_dir).expanduser().absolute() / name
        self.checkpoints = self.path / CHECKPOINTS
        self.overwrite = run.overwrite
        self.resumed: Path | None = None
        if run.resume == "auto":
            self.resumed = distributed.from_main(checkpoints.newest(self.checkpoints))
        elif run.resume is not None:
            self.resumed = Path(run.resume).expanduser().resolve()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """`check` the folder, and lock it for one training; the lock is a `DataError` for a second one."""
        with ExitStack() as stack:
            with distributed.together():
                if distributed.is_main():
                    stack.enter_context(locked(self.path / "training", LOCK_WAIT))
            self.check()
            yield

    def check(self) -> None:
        """Raise on every process if the folder has files of a run that this one neither resumes nor overwrites."""
        with distributed.together():
            if not distributed.is_main():
                return
            if self.resumed is not None and not (self.resumed / checkpoints.STATE).is_file():
                raise ConfigError(
                    f"run.resume: {self.resumed} is not a checkpoint, a folder such as step_00001000; to load a weight "
                    "file, set model.checkpoint"
                )
            if not self.overwrite and (found := self._earlier()):
                raise ConfigError(
                    f"{self.path} has {found} of an earlier training: resume it (run.resume=auto), set another "
                    "run.output_dir, or delete its files with run.overwrite=true"
                )

    def clear(self) -> None:
        """With ``run.overwrite``, delete an earlier run's files, except the checkpoint that this run resumes."""
        if not self.overwrite or not self._earlier():
            return
        old = [path for path in checkpoints.saved(self.checkpoints) if path.resolve() != self.resumed]
        for path in [*old, *(self.path / name for name in _OF_A_RUN)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        (self.path / RESULTS).mkdir()

    def _earlier(self) -> str | None:
        """The name of an earlier run's newest checkpoint or weights, unless this run resumes that checkpoint."""
        newest = checkpoints.newest(self.checkpoints)
        if newest is None:
            return WEIGHTS if (self.path / WEIGHTS).exists() else None
        return None if self.resumed is not None and newest.samefile(self.resumed) else newest.name
