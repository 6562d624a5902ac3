"""Batches for training and evaluation: data workers, the share of unreadable media, an exact division over ranks.

The plan says what belongs to a step, so the loader's whole state is a step number and its counts of unreadable samples;
torch's DataLoader supplies workers, prefetching and pinned memory.
"""

from __future__ import annotations

import logging
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lavis_chatbridge.datasets.collate import collate
from lavis_chatbridge.datasets.dataset import SourceDataset, SourceGroup
from lavis_chatbridge.datasets.plan import MixturePlan, batch_size_for_tokens, capped_sizes
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, MediaError, TrainingError

_log = logging.getLogger(__name__)

_TRIES_BEFORE_JUDGING = 20
_NAMED_PER_SOURCE = 20
_LENGTHS_LOOKED_AT = 20_000
_MOST_DRAWN = 1024
"""Samples of a step on all processes: drawing the templates of more takes longer than the padding that it saves."""

_FATAL = "fatal"  # raised in a worker, an error would reach the user as a traceback


@dataclass(frozen=True)
class LoaderSettings:
    """How batches are made.

    Args:
        batch_size: Samples per micro-batch and rank.
        batch_tokens: About how many tokens a micro-batch may have instead; the count is then fixed per source.
        accumulate: Micro-batches per step; a step's micro-batches have one source.
        ratios: Data set -> share of the steps, in any unit; without them by number of samples.
        cap: No data set counts as more than this many samples when there are no ratios.
        group_by_length: Put samples of similar length into a batch.
        seed: Of the order, and of what each sample draws (caption, template, augmentation).
        workers: Processes that load data; 0 loads in this one.
        prefetch: Batches that each worker has ready.
        pin_memory: Put tensors into page-locked memory, for a faster copy to the GPU.
        max_bad_share: Stop when more than this share of a source's samples cannot be read.
    """

    batch_size: int = 1
    batch_tokens: int | None = None
    accumulate: int = 1
    ratios: Mapping[str, float] | None = None
    cap: int | None = None
    group_by_length: bool = False
    seed: int = 0
    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False
    max_bad_share: float = 0.05


def too_many_unreadable(source: str, bad: int, tried: int, share: float, last: str = "") -> str:
    """What to tell when more than ``share`` of a source's samples cannot be read, from 20 samples on; else nothing.

    Args:
        source: The name of the source.
        bad: Samples that could not be read.
        tried: Samples in all.
        share: The share of them that may be unreadable.
        last: Why the last one could not be read.
    """
    if tried < _TRIES_BEFORE_JUDGING or bad <= share * tried:
        return ""
    cause = f"; the last one: {last}" if last else ""
    return (
        f"{source}: {bad} of {tried} samples could not be read, more than the {share:.0%} that max_bad_share "
        f"allows{cause}. Mend or remove them (chatbridge check-data --decode lists them)"
    )


class BadSamples:
    """Counts what could not be read, per source, and stops when it is too much.

    Args:
        max_share: The share of a source's samples that may be unreadable.
        sizes: Source -> how many samples there are in all, where that is known: the share is then of these, whichever
            are tried first and however many are not tried again.
    """

    def __init__(self, max_share: float, sizes: Mapping[str, int] | None = None) -> None:
        self.max_share = max_share
        self.sizes = sizes or {}
        self.tried: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()

    def take(self, batch: dict[str, Any]) -> None:
        """Count a batch, name in the log what it lacks.

        Raises:
            DataError: If a source's share of unreadable samples exceeds the limit, from 20 samples on.
        """
        source, skipped = batch["source"], batch["skipped"]
        self.tried[source] += len(batch["sample_id"]) + len(skipped)
        for sample_id, cause in skipped:
            self.skipped[source] += 1
            if self.skipped[source] <= _NAMED_PER_SOURCE:
                _log.warning("%s: skipped sample %s: %s", source, sample_id, cause)
            if self.skipped[source] == _NAMED_PER_SOURCE:
                _log.warning("%s: further skipped samples are counted, not named", source)
        bad, tried = self.skipped[source], max(self.tried[source], self.sizes.get(source, 0))
        last = skipped[-1][1] if skipped else ""
        if fault := too_many_unreadable(source, bad, tried, self.max_share, last):
            raise DataError(fault)

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The counts, for a checkpoint."""
        return {"tried": dict(self.tried), "skipped": dict(self.skipped)}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on counting from a checkpoint's counts."""
        self.tried, self.skipped = Counter(state["tried"]), Counter(state["skipped"])


class MixtureLoader:
    """The training batches of one rank.

    Args:
        groups: Data set name -> its training split.
        settings: How batches are made.
        rank: This process.
        world_size: Number of processes.

    Attributes:
        plan: Which samples belong to which step.
        bad: Counts of unreadable samples.
    """

    def __init__(
        self,
        groups: Mapping[str, SourceGroup | SourceDataset],
        settings: LoaderSettings,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.sources = {source.name: source for group in groups.values() for source in group.sources}
        if len(self.sources) < sum(len(group.sources) for group in groups.values()):
            raise ConfigError("two sources of the mixture have the same name")
        for source in self.sources.values():
            source.settings = replace(source.settings, seed=settings.seed)
        self.settings = settings
        self.rank = rank
        self.bad = BadSamples(settings.max_bad_share)
        lengths = {name: source.lengths for name, source in self.sources.items()} if _needs_lengths(settings) else {}
        sizes = self._batch_sizes(lengths)
        few = [name for name, size in sizes.items() if size * world_size <= _MOST_DRAWN]
        self.plan = MixturePlan(
            {name: len(source) for name, source in self.sources.items()},
            source_ratios(groups, settings.ratios, settings.cap),
            sizes,
            world_size,
            settings.seed,
            lengths if settings.group_by_length else None,
            {name: self.sources[name].drawn_tokens for name in few} if settings.group_by_length else None,
        )

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps ``start`` to ``stop - 1``, ``accumulate`` for each step, in order.

        A batch holds what `collate` gives, and ``step``, ``epoch`` (of its first sample) and ``skipped`` (pairs of
        sample id and cause). One whose samples were all unreadable is empty: the ranks must stay in step.

        Raises:
            DataError: If too many samples of a source cannot be read, or one is malformed.
            TrainingError: If a data worker dies.
        """
        requests = _Requests(self.plan, self.rank, self.settings.accumulate, start, stop)
        for batch in _load(_Mixture(self.sources), requests, self.settings):
            self.bad.take(batch)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the step number."""
        return self.bad.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a checkpoint's counts."""
        self.bad.load_state_dict(state)

    def _batch_sizes(self, lengths: Mapping[str, np.ndarray]) -> dict[str, int]:
        settings = self.settings
        if settings.batch_tokens is None:
            return dict.fromkeys(self.sources, settings.batch_size * settings.accumulate)
        sizes = {}
        for name, source in self.sources.items():
            written = lengths[name][:_LENGTHS_LOOKED_AT] + source.added_tokens()
            sizes[name] = batch_size_for_tokens(written, settings.batch_tokens) * settings.accumulate
        return sizes


class EvaluationLoader:
    """A rank's share of a split: every sample on exactly one rank, none twice.

    Samples of one modality and of similar length come together, the longest first (so that too little memory shows at
    once); the last batch of each source may be smaller, and ranks may differ by a batch.

    Args:
        dataset: The split.
        batch_size: Samples per batch.
        rank: This process.
        world_size: Number of processes.
        settings: Workers, pinned memory and the share of unreadable media; its batch sizes are for training.
    """

    def __init__(
        self,
        dataset: SourceGroup | SourceDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        settings: LoaderSettings | None = None,
    ) -> None:
        self.dataset = dataset
        self.settings = settings or LoaderSettings()
        self.bad = BadSamples(self.settings.max_bad_share)
        self.batch_size = batch_size
        self.shares: list[tuple[str, list[int]]] = []
        """Source -> which of its samples are this process's."""
        before = 0
        for source in dataset.sources:
            # the division goes on where the previous source's ended, so that small sources do not all meet on rank 0
            first = (rank - before) % world_size
            self.shares.append((source.name, _longest_first(source)[first::world_size]))
            before += len(source)
        self._requests = self._in_batches()

    def leave_out(self, known: Set[tuple[str, int]]) -> None:
        """Do not load these samples (source, index); the division over ranks stays as it is."""
        self._requests = self._in_batches(known)

    def _in_batches(self, known: Set[tuple[str, int]] = frozenset()) -> list[Request]:
        requests: list[Request] = []
        for source, share in self.shares:
            left = [index for index in share if (source, index) not in known]
            for start in range(0, len(left), self.batch_size):
                pairs = [(index, 0) for index in left[start : start + self.batch_size]]
                requests.append(Request(source, pairs, step=len(requests)))
        return requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.bad = BadSamples(self.settings.max_bad_share, {source: len(share) for source, share in self.shares})
        sources = {source.name: source for source in self.dataset.sources}
        for batch in _load(_Mixture(sources), self._requests, self.settings):
            self.bad.take(batch)
            yield batch


@dataclass(frozen=True)
class Request:
    """What a worker is asked for: ``(index, epoch)`` pairs of one source."""

    source: str
    pairs: Sequence[tuple[int, int]]
    step: int


def source_ratios(
    groups: Mapping[str, SourceGroup | SourceDataset],
    ratios: Mapping[str, float] | None = None,
    cap: int | None = None,
) -> dict[str, float]:
    """Source name -> share of the steps: the data set's ratio, divided among its sources.

    A data set's ratio is the one given here, else the one of its configuration, else its number of samples (no more
    than ``cap``); its sources divide it by their own ratios, else by their numbers of samples.

    Raises:
        ConfigError: If a ratio names no data set, or only some have one.
    """
    unknown = sorted(set(ratios or {}) - set(groups))
    if unknown:
        raise ConfigError(f"ratios name {', '.join(unknown)}; the data sets are {', '.join(sorted(groups))}")
    own = {name: (ratios or {}).get(name, group.ratio) for name, group in groups.items()}
    without = sorted(name for name, ratio in own.items() if ratio is None)
    if without and len(without) < len(own):
        raise ConfigError(f"{', '.join(without)} has no ratio, but other data sets of the mixture have one")
    sizes = capped_sizes({name: sum(len(source) for source in group.sources) for name, group in groups.items()}, cap)
    shares: dict[str, float] = {}
    for name, group in groups.items():
        whole = sizes[name] if without else float(own[name] or 0.0)
        inner = [source.ratio if len(group.sources) > 1 else 1.0 for source in group.sources]
        if any(ratio is None for ratio in inner):
            inner = [capped_sizes({"": len(source)}, cap)[""] for source in group.sources]
        total = sum(float(ratio or 0.0) for ratio in inner)
        shares |= {s.name: whole * float(r or 0.0) / total for s, r in zip(group.sources, inner, strict=True)}
    return shares


class _Requests:
    """The requests of a span of steps, one per micro-batch."""

    def __init__(self, plan: MixturePlan, rank: int, accumulate: int, start: int, stop: int | None) -> None:
        self._plan, self._rank, self._accumulate, self._start, self._stop = plan, rank, accumulate, start, stop

    def __iter__(self) -> Iterator[Request]:
        step = self._start
        while self._stop is None or step < self._stop:
            source, pairs = self._plan.batch(step, self._rank)
            size = len(pairs) // self._accumulate
            for part in range(self._accumulate):
                yield Request(source, pairs[part * size : (part + 1) * size], step)
            step += 1


class _Mixture(torch.utils.data.Dataset):
    """Answers a request with a batch; what cannot be read is left out and named."""

    def __init__(self, sources: Mapping[str, SourceDataset]) -> None:
        self._sources = sources

    def __getitem__(self, request: Request) -> dict[str, Any]:
        source = self._sources[request.source]
        items, skipped = [], []
        for index, epoch in request.pairs:
            try:
                items.append(source.item(index, epoch))
            except MediaError as error:
                skipped.append((source.sample(index).id, str(error)))
            except ChatBridgeError as error:
                return {_FATAL: error}
        batch = collate(items, source.name)
        return batch | {"skipped": skipped, "step": request.step, "epoch": request.pairs[0][1] if request.pairs else 0}


def _load(dataset: _Mixture, requests: Iterable[Request], settings: LoaderSettings) -> Iterator[dict[str, Any]]:
    loader: DataLoader = DataLoader(
        dataset,
        batch_size=None,  # a request is a whole batch already
        sampler=requests,
        num_workers=settings.workers,
        prefetch_factor=settings.prefetch if settings.workers else None,
        pin_memory=settings.pin_memory and torch.cuda.is_available(),
        collate_fn=_as_it_is,
        worker_init_fn=_outlive_signals,
    )
    with worker_deaths():
        for batch in loader:
            if _FATAL in batch:
                raise batch[_FATAL]
            yield batch


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Name cause and remedy when a data worker dies; torch raises its own error at whatever the process is doing then.

    Raises:
        TrainingError: In place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise TrainingError(
            f"a data worker died: {str(error).splitlines()[0]} Often it was killed for memory: use fewer workers "
            "(run.num_workers), or give the container more shared memory; a training goes on with run.resume=auto"
        ) from error


def _outlive_signals(_worker: int) -> None:
    """Clusters and terminals signal all processes at once: the training decides when its workers end, so that it can
    still save a checkpoint."""
    for number in (signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None)):
        if number is not None:
            signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def _longest_first(source: SourceDataset) -> list[int]:
    """All indices of a source by the samples' length; equal ones in their own order."""
    return np.argsort(-np.asarray(source.lengths), kind="stable").tolist()


def _needs_lengths(settings: LoaderSettings) -> bool:
    return settings.group_by_length or settings.batch_tokens is not None
