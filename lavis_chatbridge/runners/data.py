"""The data of a run: a loader per split, and cached outputs of the frozen encoders.

LAVIS's data sets have no ids and their own ``collater``; they get a simpler loader with the same plan.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lavis_chatbridge.datasets.features import FeatureStore, build_features
from lavis_chatbridge.datasets.loader import EvaluationLoader, LoaderSettings, MixtureLoader, too_many_unreadable
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.processors.base import load_processors
from lavis_chatbridge.prompting.conversation import MODALITIES
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import Samples
from lavis_chatbridge.schema import Sample

_log = logging.getLogger(__name__)

Datasets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Data set name -> split name -> data set, as tasks build them."""


def _settings(run: RunSettings, device: torch.device) -> LoaderSettings:
    return LoaderSettings(
        batch_size=run.batch_size_train,
        batch_tokens=run.batch_tokens,
        accumulate=run.accum_grad_iters,
        ratios=run.train_dataset_ratios,
        group_by_length=run.group_by_length,
        seed=run.seed,
        workers=run.num_workers,
        pin_memory=device.type == "cuda",
    )


def splits_of(datasets: Datasets) -> set[str]:
    """All splits of all data sets."""
    return {split for splits in datasets.values() for split in splits}


def train_loader(datasets: Datasets, run: RunSettings, device: torch.device) -> MixtureLoader | LavisTrainLoader:
    """The training batches of this process."""
    chosen = {
        name if split == "train" else f"{name}/{split}": splits[split]
        for name, splits in datasets.items()
        for split in run.train_splits
        if split in splits
    }
    settings = _settings(run, device)
    own = [hasattr(dataset, "sources") for dataset in chosen.values()]
    if all(own):
        return MixtureLoader(chosen, settings, distributed.rank(), distributed.world_size())
    if any(own):
        raise ConfigError(f"cannot mix LAVIS's data sets with this package's in one training: {', '.join(chosen)}")
    return LavisTrainLoader(chosen, settings)


def evaluation_loader(dataset: Any, run: RunSettings, device: torch.device) -> Any:
    """This process's batches of a split; each sample is on exactly one process."""
    rank, world_size = distributed.rank(), distributed.world_size()
    if hasattr(dataset, "sources"):
        return EvaluationLoader(dataset, run.batch_size_eval, rank, world_size, _settings(run, device))
    return DataLoader(
        dataset,
        batch_size=run.batch_size_eval,
        sampler=range(rank, len(dataset), world_size),
        num_workers=run.num_workers,
        collate_fn=getattr(dataset, "collater", None),
        pin_memory=device.type == "cuda",
    )


def check_readable(loader: Iterable[Samples], run: RunSettings) -> None:
    """Raise a `DataError` on every process if in total more than ``run.max_bad_share`` of a data set is unreadable."""
    if not isinstance(loader, EvaluationLoader):
        return
    bad = sum(map(Counter, distributed.gather_everywhere(dict(loader.skipped))), Counter[str]())
    sizes = {source.name: len(source) for source in loader.dataset.sources}
    faults = [too_many_unreadable(name, bad[name], size, run.max_bad_share) for name, size in sizes.items()]
    if any(faults):
        raise DataError("; ".join(filter(None, faults)))


class LavisTrainLoader(torch.utils.data.Dataset):
    """Training batches of LAVIS's map-style data sets, in the order of a `MixturePlan`."""

    def __init__(self, datasets: Mapping[str, Any], settings: LoaderSettings) -> None:
        self.datasets, self.size, self.workers = datasets, settings.batch_size, settings.workers
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        size = settings.batch_size * settings.accumulate
        self.plan = MixturePlan(sizes, settings.ratios, size, distributed.world_size(), settings.seed)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps ``start`` to ``stop - 1``, in order."""
        sampler = (
            (name, pairs[first : first + self.size])
            for name, pairs in (self.plan.batch(step, distributed.rank()) for step in range(start, stop))
            for first in range(0, len(pairs), self.size)
        )
        yield from DataLoader(self, batch_size=None, sampler=sampler, num_workers=self.workers)  # type: ignore[arg-type]

    def __getitem__(self, request: tuple[str, list[tuple[int, int]]]) -> dict[str, Any]:
        """A micro-batch from a request: a data set's name and ``(index, epoch)`` of each sample."""
        name, pairs = request
        collate = getattr(self.datasets[name], "collater", None) or default_collate
        return {"source": name, "skipped": [], **collate([self.datasets[name][index] for index, _ in pairs])}


# ---- features: cached outputs of the frozen encoders (``run.feature_cache``), used instead of media


def attach_features(model: nn.Module, datasets: Datasets, run: RunSettings, preprocess: Any) -> None:
    """With ``run.feature_cache``: fill the cache, and make the run's splits read features from it."""
    if run.feature_cache is not None:
        store = fill_features(model, datasets, run, preprocess)
        _log.info("reading the frozen encoders' outputs of %d media from %s", len(store), store.folder)
        for group in _used(datasets, run):
            group.set_features(store)


def fill_features(model: nn.Module, datasets: Datasets, run: RunSettings, preprocess: Any) -> FeatureStore:
    """Encode all media of a run's splits that are not in the cache; every process encodes its share.

    ``model`` is ChatBridge, on its device; ``preprocess`` has the evaluation processors.
    """
    able = hasattr(model, "encode_media") and all(hasattr(group, "set_features") for group in _used(datasets, run))
    if run.feature_cache is None or not able:
        raise ConfigError("run.feature_cache needs a folder, ChatBridge and this package's data sets: set it to null")
    loaded = load_processors(preprocess)
    with distributed.together(), torch.no_grad():
        store = build_features(
            model,  # type: ignore[arg-type]
            samples(datasets, run),
            {modality: loaded[modality]["eval"] for modality in MODALITIES},
            Path(run.feature_cache).expanduser().absolute(),
            workers=run.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    store.refresh()
    return store


def samples(datasets: Datasets, run: RunSettings) -> Iterator[Sample]:
    """All samples of the run's splits."""
    sources = (source for group in _used(datasets, run) for source in group.sources)
    return (source.sample(index) for source in sources for index in range(len(source)))


def _used(datasets: Datasets, run: RunSettings) -> list[Any]:
    """The data sets of the run's splits."""
    names = {*run.valid_splits, *run.test_splits, *(() if run.evaluate else run.train_splits)}
    return [dataset for splits in datasets.values() for split, dataset in splits.items() if split in names]
