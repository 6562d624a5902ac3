"""Batches for training and evaluation: data workers, unreadable samples, exact sharding over ranks.

A *source* of a mixture is a `SampleDataset`: the samples of one modality in an annotation file. `Sample.source`, the
data set's name in that file, is not used here.

The plan determines the samples of each step, so the loader's only state is the step number. torch's DataLoader runs the
workers. If the decoder of a sample hangs, the worker is replaced and the sample is skipped like an unreadable one.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader

from lavis_chatbridge.config import Settings
from lavis_chatbridge.datasets.dataset import SampleDataset, SplitDataset, collate
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.datasets.settings import Share
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MediaError, TrainingError

_log = logging.getLogger(__name__)

_TRIES_BEFORE_JUDGING = 20
_NAMED_PER_SOURCE = 20
_LENGTHS_LOOKED_AT = 20_000
_IDLE_TIMEOUTS = 10  # at least this number of timeouts without a busy worker, before loading ends with an error
_FATAL = "fatal"  # a batch's key for an error; raised in a worker it would print a traceback

Request: TypeAlias = tuple[str, Sequence[tuple[int, int]]]
"""A batch to load: the name of a source, and ``(index, epoch)`` of each sample."""


class LoaderSettings(Settings):
    """How batches are made: keys of the ``run`` section."""

    batch_size_train: PositiveInt = 32
    """Samples per micro-batch and process."""
    batch_tokens: PositiveInt | None = None
    """Approximate tokens of a micro-batch, instead of ``batch_size_train``; each data set's batch size is fixed."""
    accum_grad_iters: PositiveInt = 1
    """Micro-batches per optimiser step; all of them, on all processes, are from one data set."""
    train_dataset_ratios: dict[str, Share] | None = None
    """Each data set's share of the steps; null: proportional to the number of samples."""
    group_by_length: bool = False
    """Make batches of samples of similar length."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of weights, order, augmentation and dropout."""
    num_workers: NonNegativeInt = 2
    """Data workers per training process; 0 loads in the training process itself."""
    hang_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 300.0
    """Seconds for loading one sample, which is then skipped; without data workers there is no limit."""


_IN_THIS_PROCESS = LoaderSettings(num_workers=0)


def too_many_unreadable(source: str, bad: int, tried: int, share: float, last: str = "") -> str:
    """Error text if more than ``share`` of at least 20 samples is unreadable, else ""; ``last`` is one cause."""
    if tried < _TRIES_BEFORE_JUDGING or bad <= share * tried:
        return ""
    cause = f"; the last one: {last}" if last else ""
    return (
        f"{source}: {bad} of {tried} samples could not be read, more than the {share:.0%} that max_bad_share "
        f"accepts{cause}. Repair or remove them (chatbridge check-data --decode lists them)"
    )


class MixtureLoader:
    """The training batches of one rank, from data set name -> training split.

    Attributes:
        plan: Determines the samples of each step.
        skipped: Name of a source -> number of unreadable samples so far.
    """

    def __init__(
        self, splits: Mapping[str, SplitDataset], settings: LoaderSettings, rank: int = 0, world_size: int = 1
    ) -> None:
        self.sources = {source.name: source for split in splits.values() for source in split.sources}
        if len(self.sources) < sum(len(split.sources) for split in splits.values()):
            raise ConfigError("two sources of the mixture have the same name")
        for source in self.sources.values():
            source.seed = settings.seed
        self.settings, self.rank = settings, rank
        self.skipped: Counter[str] = Counter()
        self.plan = MixturePlan(
            {name: len(source) for name, source in self.sources.items()},
            source_ratios(splits, settings.train_dataset_ratios),
            {name: self._batch_size(source) * settings.accum_grad_iters for name, source in self.sources.items()},
            world_size,
            settings.seed,
            {n: source.lengths for n, source in self.sources.items()} if settings.group_by_length else None,
        )

    def _batch_size(self, source: SampleDataset) -> int:
        """Samples per micro-batch. With ``batch_tokens``, as many as fit if all have the 95th percentile of lengths."""
        budget = self.settings.batch_tokens
        if budget is None:
            return self.settings.batch_size_train
        lengths = source.lengths[:_LENGTHS_LOOKED_AT] + source.added_tokens()
        return max(1, int(budget // np.quantile(lengths, 0.95)))

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps ``start`` to ``stop - 1``, ``accumulate`` for each step, in order.

        A batch has the keys of `collate`, and ``skipped``: pairs of sample id and cause. If all its samples are
        unreadable, an empty batch is returned, because every rank needs a batch per step. A malformed sample raises a
        `DataError`, a dead worker a `TrainingError`.
        """

        parts = self.settings.accum_grad_iters

        def remaining(done: int) -> Iterator[Request]:
            for number in range(done, (stop - start) * parts):
                step, part = divmod(number, parts)
                source, pairs = self.plan.batch(start + step, self.rank)
                size = len(pairs) // parts
                yield source, pairs[part * size : (part + 1) * size]

        return _load(self.sources, remaining, self.settings, self.skipped)


class EvaluationLoader:
    """A rank's shard of a split: every sample is on exactly one rank.

    A batch has samples of one source and of similar length, the longest first: an out-of-memory error occurs at once.

    Attributes:
        shares: Name of a source, and the indices of this rank's samples.
        skipped: Name of a source -> number of unreadable samples.
    """

    def __init__(
        self,
        dataset: SplitDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        settings: LoaderSettings = _IN_THIS_PROCESS,
    ) -> None:
        self.dataset, self.batch_size, self.settings = dataset, batch_size, settings
        self.skipped: Counter[str] = Counter()
        self.shares: list[tuple[str, list[int]]] = []
        before = 0
        for source in dataset.sources:
            # start at the rank after the previous source's last one, so that small sources are not all on rank 0
            first = (rank - before) % world_size
            longest_first = np.argsort(-np.asarray(source.lengths, dtype=np.int64), kind="stable").tolist()
            self.shares.append((source.name, longest_first[first::world_size]))
            before += len(source)
        self.leave_out(frozenset())

    def leave_out(self, known: Set[tuple[str, int]]) -> None:
        """Skip these samples (source, index), without changing the sharding over ranks."""
        self._requests: list[Request] = []
        for source, share in self.shares:
            left = [(index, 0) for index in share if (source, index) not in known]
            starts = range(0, len(left), self.batch_size)
            self._requests += [(source, left[start : start + self.batch_size]) for start in starts]

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.skipped = Counter()
        sources = {source.name: source for source in self.dataset.sources}
        return _load(sources, lambda done: self._requests[done:], self.settings, self.skipped)


def source_ratios(splits: Mapping[str, SplitDataset], ratios: Mapping[str, float] | None = None) -> dict[str, float]:
    """Source name -> share of the steps.

    A data set's share is the first of these that is set:

    1. its entry in ``ratios`` (``run.train_dataset_ratios``);
    2. the ``ratio`` of its own section;
    3. its number of samples.

    It is divided among the sources by their own ratios if all have one, else by their numbers of samples.
    """
    if unknown := sorted(set(ratios or {}) - set(splits)):
        raise ConfigError(f"ratios name {', '.join(unknown)}; the data sets are {', '.join(sorted(splits))}")
    own = {name: (ratios or {}).get(name, split.ratio) for name, split in splits.items()}
    without = sorted(name for name, ratio in own.items() if ratio is None)
    if without and len(without) < len(own):
        raise ConfigError(f"{', '.join(without)} has no ratio, but other data sets of the mixture have one")
    shares: dict[str, float] = {}
    for name, split in splits.items():
        parts: list[float] = [source.ratio for source in split.sources if source.ratio is not None]
        if len(parts) < len(split.sources):
            parts = [len(source) for source in split.sources]
        total = float(own[name] or len(split))
        shares |= {source.name: total * part / sum(parts) for source, part in zip(split.sources, parts, strict=True)}
    return shares


class _Mixture(torch.utils.data.Dataset):
    """Loads a request as a batch; unreadable samples are listed under ``skipped``.

    Attributes:
        hung: ``(source, index)`` of samples that hung while decoding.
        busy: ``[workers, 4]``, shared with the workers: process id, number of the source, sample index, and start time
            in ns (0 while idle).
    """

    def __init__(self, sources: Mapping[str, SampleDataset], workers: int) -> None:
        self._sources, self._names = sources, list(sources)
        self.hung: set[tuple[str, int]] = set()
        self.busy = torch.zeros(max(1, workers), 4, dtype=torch.int64).share_memory_()

    def __getitem__(self, request: Request) -> dict[str, Any]:
        name, pairs = request
        source = self._sources[name]
        worker = torch.utils.data.get_worker_info()
        busy = self.busy[worker.id if worker else 0]
        items, skipped = [], []
        for index, epoch in pairs:
            if (name, index) in self.hung:
                skipped.append((source.sample(index).id, "its decoder did not return in time"))
                continue
            busy[:] = torch.tensor([os.getpid(), self._names.index(name), index, time.monotonic_ns()])
            try:
                items.append(source.item(index, epoch))
            except MediaError as error:
                skipped.append((source.sample(index).id, str(error)))
            except ChatBridgeError as error:
                return {_FATAL: error}
            finally:
                busy[3] = 0
        return collate(items, name) | {"skipped": skipped}

    def stuck(self, seconds: float) -> dict[int, tuple[str, int]]:
        """Process id -> the sample that a worker has been loading for longer than ``seconds``."""
        since = time.monotonic_ns() - int(seconds * 1e9)
        return {pid: (self._names[n], index) for pid, n, index, start in self.busy.tolist() if 0 < start < since}

    @property
    def idle(self) -> bool:
        """Whether no worker is loading a sample."""
        return not self.busy[:, 3].any()


def _load(
    sources: Mapping[str, SampleDataset],
    remaining: Callable[[int], Iterable[Request]],
    settings: LoaderSettings,
    skipped: Counter[str],
) -> Iterator[dict[str, Any]]:
    """The batches of ``remaining(0)``; if a worker is stuck after ``n`` batches, new workers load ``remaining(n)``."""
    dataset, done = _Mixture(sources, settings.num_workers), 0
    with worker_deaths():
        while True:
            for batch in _until_stuck(dataset, remaining(done), settings):
                done += 1
                _count_skipped(batch, skipped)
                yield batch
            if not (stuck := dataset.stuck(settings.hang_seconds)):
                return
            dataset.hung |= set(stuck.values())
            dataset.busy.zero_()
            for pid in stuck:  # SIGKILL: workers ignore SIGTERM, and torch does not stop this one
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _count_skipped(batch: Mapping[str, Any], counts: Counter[str]) -> None:
    source = batch["source"]
    for sample_id, cause in batch["skipped"]:
        counts[source] += 1
        if counts[source] <= _NAMED_PER_SOURCE:
            _log.warning("%s: skipped sample %s: %s", source, sample_id, cause)
        if counts[source] == _NAMED_PER_SOURCE:
            _log.warning("%s: further skipped samples are counted without a message", source)


def _until_stuck(dataset: _Mixture, requests: Iterable[Request], settings: LoaderSettings) -> Iterator[dict[str, Any]]:
    """The batches of the requests in order; ends early if a worker is stuck.

    A `TrainingError` if for ``hang_seconds`` no batch comes and no worker is busy: a worker that cannot put its batch
    into shared memory only prints a traceback, and goes on.
    """
    timeout = min(5.0, settings.hang_seconds) if settings.num_workers else 0
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,  # a request is a batch, so nothing is collated
        sampler=requests,  # type: ignore[arg-type]
        num_workers=settings.num_workers,
        pin_memory=torch.cuda.is_available(),
        collate_fn=dict,
        worker_init_fn=_ignore_signals,
        timeout=timeout,
    )
    batches, idle = iter(loader), 0
    while True:
        try:
            batch, idle = next(batches), 0
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            if dataset.stuck(settings.hang_seconds):
                return
            idle = idle + 1 if dataset.idle else 0
            if idle >= _IDLE_TIMEOUTS and idle * timeout >= settings.hang_seconds:
                break
            continue
        if _FATAL in batch:
            raise batch.pop(_FATAL)  # pop: a reference cycle with the batch would keep the workers alive
        yield batch
    del batches  # ends the workers, which ignore SIGTERM, also if the error below cannot be printed
    raise TrainingError(
        f"the data workers sent no batch for {idle * timeout:.0f} s, although none of them is loading a sample: "
        "shared memory is probably full (df -h /dev/shm). Free some, or set run.num_workers=0"
    )


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Raise a `TrainingError` if a data worker dies; torch raises its own error at any statement of the block."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TrainingError(
            f"a data worker died: {str(error).splitlines()[0]} Often it lacked memory: use fewer workers "
            "(run.num_workers), or give the container more shared memory; run.resume=auto resumes training"
        ) from error


def _ignore_signals(_worker: int) -> None:
    """Clusters and terminals signal all processes, but the main process must stop the workers, after its checkpoint."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
