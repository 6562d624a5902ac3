"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then never runs the frozen encoders.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.plugin.launch import Session, load, prepare_world

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.features import FeatureStore
    from lavis_chatbridge.schema import Medium


def command(
    cfg_path: Annotated[str, typer.Option("--cfg-path", help="the configuration file")],
    options: Annotated[list[str], typer.Option(help="KEY=VALUE: settings that override the file's")] = [],  # noqa: B006
) -> None:
    """Encode the media that the cache lacks, and say what it contains; each process of a launcher does its share."""
    with Session():
        cfg = load(cfg_path, options)
        if cfg.run.feature_cache is None:
            raise ConfigError("run.feature_cache names no folder: set it, as in run.feature_cache=output/features")
        from lavis.common.registry import registry

        from lavis_chatbridge.datasets.features import distinct_media
        from lavis_chatbridge.runners import data, distributed

        device = distributed.init(cfg.run)
        prepare_world(cfg.datasets_cfg)
        task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg).to(device).eval()
        store = data.fill_features(model, datasets, cfg.run, cfg.get_config().get("preprocess"))
        if not distributed.is_main():
            return
        media = distinct_media(data.samples(datasets, cfg.run))
        stored = Counter(medium.modality for medium in media if _is_stored(medium, store))
        counts = ", ".join(f"{count} {modality} files" for modality, count in sorted(stored.items())) or "no files"
        print(f"{store.folder}: features of {counts} for this configuration")
        if lost := len(media) - stored.total():
            print(f"{lost} files cannot be read: training skips their samples")


def _is_stored(medium: Medium, store: FeatureStore) -> bool:
    try:
        return store.key(medium) in store
    except MediaError:
        return False
