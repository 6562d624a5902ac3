"""Builds a run's loaders, one for training and one for each evaluated split, and fills its feature cache.

LAVIS's own data sets have no sample ids and bring their own ``collater``; they get a simpler loader, which follows the
same `MixturePlan`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lavis.tasks.base_task import BaseTask
from torch import nn
from torch.utils.data import DataLoader, default_collate

from lavis_chatbridge.datasets.features import build_features
from lavis_chatbridge.datasets.loader import EvaluationLoader, MixtureLoader, too_many_unreadable
from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.processors.base import load_processors
from lavis_chatbridge.prompting.conversation import MODALITIES
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.tasks.base import ChatBridgeTask

_log = logging.getLogger(__name__)

Datasets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Data set name -> split name -> data set, as tasks build them."""


def train_loader(datasets: Datasets, run: RunSettings) -> MixtureLoader | LavisTrainLoader:
    """The training batches of this process."""
    chosen = {
        name if split == "train" else f"{name}/{split}": splits[split]
        for name, splits in datasets.items()
        for split in run.train_splits
        if split in splits
    }
    own = [hasattr(dataset, "sources") for dataset in chosen.values()]
    if all(own):
        return MixtureLoader(chosen, run, distributed.rank(), distributed.world_size())
    if any(own):
        raise ConfigError(f"cannot mix LAVIS's data sets with this package's in one training: {', '.join(chosen)}")
    return LavisTrainLoader(chosen, run)


class LavisTrainLoader(torch.utils.data.Dataset):
    """Training batches of LAVIS's map-style data sets, in the order of a `MixturePlan`."""

    def __init__(self, datasets: Mapping[str, Any], run: RunSettings) -> None:
        self.datasets, self.run, self.rank = datasets, run, distributed.rank()
        sizes = {name: len(dataset) for name, dataset in datasets.items()}
        batch_size = run.batch_size_train * run.accum_grad_iters
        self.plan = MixturePlan(sizes, run.train_dataset_ratios, batch_size, distributed.world_size(), run.seed)

    def batches(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps ``start`` to ``stop - 1``, in order."""
        numbers = range(start * self.run.accum_grad_iters, stop * self.run.accum_grad_iters)
        yield from DataLoader(self, batch_size=None, sampler=numbers, num_workers=self.run.num_workers)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """A micro-batch of the run, by its number from 0."""
        step, part = divmod(number, self.run.accum_grad_iters)
        name, pairs = self.plan.batch(step, self.rank)
        pairs = pairs[part * self.run.batch_size_train :][: self.run.batch_size_train]
        collate = getattr(self.datasets[name], "collater", None) or default_collate
        return {"source": name, "skipped": [], **collate([self.datasets[name][index] for index, _ in pairs])}


def evaluation_loader(
    datasets: Datasets, split: str, task: BaseTask, run: RunSettings, device: torch.device
) -> EvaluationLoader | DataLoader:
    """This process's batches of a split; each sample is on exactly one process."""
    found = {name: splits[split] for name, splits in datasets.items() if split in splits}
    dataset, rank, world_size = next(iter(found.values())), distributed.rank(), distributed.world_size()
    if isinstance(task, ChatBridgeTask) and all(hasattr(each, "sources") for each in found.values()):
        dataset = task.evaluation_split(found)
    elif len(found) > 1:
        raise ConfigError(f"the split {split!r} is in {', '.join(found)}; LAVIS's tasks score one data set at a time")
    if hasattr(dataset, "sources"):
        return EvaluationLoader(dataset, run.batch_size_eval, rank, world_size, run)
    return DataLoader(
        dataset,
        batch_size=run.batch_size_eval,
        sampler=range(rank, len(dataset), world_size),
        num_workers=run.num_workers,
        collate_fn=getattr(dataset, "collater", None),
        pin_memory=device.type == "cuda",
    )


def check_readable(loader: EvaluationLoader | DataLoader, run: RunSettings) -> None:
    """Raise a `DataError` on every process if in total more than ``run.max_bad_share`` of a data set is unreadable."""
    if not isinstance(loader, EvaluationLoader):
        return
    bad = sum(map(Counter, distributed.gather_everywhere(dict(loader.skipped))), Counter[str]())
    sizes = {source.name: len(source) for source in loader.dataset.sources}
    faults = [too_many_unreadable(name, bad[name], size, run.max_bad_share) for name, size in sizes.items()]
    if any(faults):
        raise DataError("; ".join(filter(None, faults)))


# ---- features: cached outputs of the frozen encoders (``run.feature_cache``), used instead of media


def fill_features(model: nn.Module, datasets: Datasets, run: RunSettings, preprocess: Any) -> str:
    """Encode all media of a run's splits that are not in the cache, and make the splits read features from it.

    Every process encodes its share. ``model`` is ChatBridge, on its device. Returns a sentence: how many media
    have features.
    """
    used = [dataset for splits in datasets.values() for name, dataset in splits.items() if name in run.used_splits]
    able = hasattr(model, "encode_media") and all(hasattr(dataset, "set_features") for dataset in used)
    if run.feature_cache is None or not able:
        raise ConfigError("run.feature_cache needs a folder, ChatBridge and this package's data sets: set it to null")
    loaded = load_processors(preprocess)
    sources = [source for dataset in used for source in dataset.sources]
    samples = (source.sample(index) for source in sources for index in range(len(source)))
    media = dict.fromkeys(medium for sample in samples for medium in sample.files)
    with distributed.together(), torch.no_grad():
        store = build_features(
            model,  # type: ignore[arg-type]
            media,
            {modality: loaded[modality]["eval"] for modality in MODALITIES},
            Path(run.feature_cache).expanduser().absolute(),
            workers=run.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    store.refresh()
    for dataset in used:
        dataset.set_features(store)
    unreadable = sum(medium not in store for medium in media)
    found = f"{store.folder} has the features of {len(media) - unreadable} media of this configuration"
    found += f"; {unreadable} cannot be read, and training skips their samples" if unreadable else ""
    _log.info(found)
    return found
