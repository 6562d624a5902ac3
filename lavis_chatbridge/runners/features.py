"""``run.feature_cache``: data sets take the frozen encoders' outputs from a folder, which is filled on first use.

What is stored comes from the evaluation processors, so training then sees the middle frames and uncropped pictures:
less augmentation for much less time per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lavis_chatbridge.datasets.features import FeatureStore, build_features
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.processors.loading import load_processors
from lavis_chatbridge.prompting.pieces import MODALITIES
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.schema import Sample

_log = logging.getLogger(__name__)


def attach(model: Any, datasets: Mapping[str, Mapping[str, Any]], run: RunSettings, preprocess: Any) -> None:
    """Let the used splits read features, after encoding what the cache lacks; every process does its share.

    Args:
        model: A model with ``encode_media`` and ``frozen_fingerprint``, on its device.
        datasets: Data set name -> split -> data set.
        run: Names the folder and the splits; without a folder nothing happens.
        preprocess: The ``preprocess`` section, for the evaluation processors.

    Raises:
        ConfigError: If the model or a data set cannot do this.
    """
    if run.feature_cache is None:
        return
    store = fill(model, datasets, run, preprocess)
    _log.info("taking the frozen encoders' outputs of %d media from %s", len(store), store.folder)
    for group in _used(datasets, run):
        group.set_features(store)


def fill(model: Any, datasets: Mapping[str, Mapping[str, Any]], run: RunSettings, preprocess: Any) -> FeatureStore:
    """Encode what the cache lacks of the used splits; every process does its share.

    Args:
        model: A model with ``encode_media`` and ``frozen_fingerprint``, on its device.
        datasets: Data set name -> split -> data set.
        run: Names the splits and the folder.
        preprocess: The ``preprocess`` section, for the evaluation processors.

    Raises:
        ConfigError: If there is no folder, or the model or a data set cannot do this.
        ChatBridgeError: On every process, if one of them cannot do its share.
    """
    groups = _used(datasets, run)
    able = hasattr(model, "encode_media") and all(hasattr(group, "set_features") for group in groups)
    if run.feature_cache is None or not able:
        raise ConfigError(
            "run.feature_cache needs a folder, ChatBridge and this package's data sets; else leave it null"
        )
    loaded = load_processors(preprocess)
    processors: dict[str, Any] = {kind: loaded[kind]["eval"] for kind in MODALITIES}
    with distributed.together(), torch.no_grad():
        store = build_features(
            model,
            samples(datasets, run),
            processors,
            Path(run.feature_cache).expanduser().absolute(),
            workers=run.num_workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    store.refresh()
    return store


def samples(datasets: Mapping[str, Mapping[str, Any]], run: RunSettings) -> Iterator[Sample]:
    """All samples of the splits that a run reads."""
    return chain.from_iterable(_samples(group) for group in _used(datasets, run))


def _used(datasets: Mapping[str, Mapping[str, Any]], run: RunSettings) -> list[Any]:
    """The data sets of the splits that this run reads."""
    wanted = [*run.valid_splits, *run.test_splits, *([] if run.evaluate else run.train_splits)]
    return [splits[split] for splits in datasets.values() for split in dict.fromkeys(wanted) if split in splits]


def _samples(group: Any) -> Iterator[Sample]:
    for source in group.sources:
        for index in range(len(source)):
            yield source.sample(index)
