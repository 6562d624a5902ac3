"""``run.feature_cache``: data sets read the frozen encoders' outputs from a folder, which is filled on first use.

The outputs are those of the evaluation processors: middle frames and uncropped pictures, hence less augmentation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lavis_chatbridge.datasets.features import FeatureStore, build_features
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.processors.loading import load_processors
from lavis_chatbridge.prompting.pieces import MODALITIES
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.data import Datasets
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.schema import Sample

_log = logging.getLogger(__name__)


def attach(model: nn.Module, datasets: Datasets, run: RunSettings, preprocess: Any) -> None:
    """With ``run.feature_cache``, let the splits of a run read features, after encoding those that the cache lacks."""
    if run.feature_cache is not None:
        store = fill(model, datasets, run, preprocess)
        _log.info("reading the frozen encoders' outputs of %d media from %s", len(store), store.folder)
        for group in _used(datasets, run):
            group.set_features(store)


def fill(model: nn.Module, datasets: Datasets, run: RunSettings, preprocess: Any) -> FeatureStore:
    """Encode the media of a run's splits that the cache lacks; every process encodes its share.

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
    """All samples of the splits that a run reads."""
    sources = (source for group in _used(datasets, run) for source in group.sources)
    return (source.sample(index) for source in sources for index in range(len(source)))


def _used(datasets: Datasets, run: RunSettings) -> list[Any]:
    """The data sets of the splits that this run reads."""
    names = {*run.valid_splits, *run.test_splits, *(() if run.evaluate else run.train_splits)}
    return [dataset for splits in datasets.values() for split, dataset in splits.items() if split in names]
