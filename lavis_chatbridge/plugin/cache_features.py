"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then never runs the frozen encoders. ``--soft`` also exports the soft tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.plugin.launch import Session, load

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.features import FeatureStore
    from lavis_chatbridge.schema import Sample


def command(
    cfg_path: Annotated[str, typer.Option("--cfg-path", help="the configuration file")],
    options: Annotated[list[str], typer.Option(help="KEY=VALUE: settings that override the file's")] = [],  # noqa: B006
    soft: Annotated[Path | None, typer.Option(help="also write soft tokens to this .npz or .safetensors")] = None,
) -> None:
    """Encode the media that the cache lacks, and say what it contains; each process of a launcher does its share."""
    with Session():
        cfg = load(cfg_path, options)
        if cfg.run.feature_cache is None:
            raise ConfigError(
                "run.feature_cache names no folder: set it, for example --options run.feature_cache=output/features"
            )
        from lavis.common.registry import registry

        from lavis_chatbridge.datasets.features import SOFT_FORMATS, write_soft_tokens
        from lavis_chatbridge.plugin import world
        from lavis_chatbridge.runners import distributed, features

        if soft is not None and soft.suffix not in SOFT_FORMATS:
            raise ConfigError(f"--soft {soft}: expected a file {' or '.join(SOFT_FORMATS)}")
        device = distributed.init(cfg.run)
        world.prepare(cfg.datasets_cfg)
        task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg).to(device).eval()
        store = features.fill(model, datasets, cfg.run, cfg.get_config().get("preprocess"))
        if not distributed.is_main():
            return
        print(_report(store, features.samples(datasets, cfg.run)))
        if soft is not None:
            count = write_soft_tokens(model, store, features.samples(datasets, cfg.run), soft)
            print(f"{soft}: soft tokens of {count} media")


def _report(store: FeatureStore, samples: Iterable[Sample]) -> str:
    """How many of the samples' media have features, and their size."""
    from lavis_chatbridge.datasets.features import distinct_media

    held: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for medium in distinct_media(samples):
        try:
            (held if store.key(medium) in store else without)[medium.modality] += 1
        except MediaError:
            without[medium.modality] += 1
    size = sum(shard.stat().st_size for shard in store.folder.glob("*.tar")) / (1 << 20)
    lines = [f"{store.folder}: features of {_counts(held)} for this configuration; {size:.1f} MiB in all"]
    if without:
        lines.append(f"no features of {_counts(without)}, which cannot be read: training skips their samples")
    return "\n".join(lines)


def _counts(media: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {modality} files" for modality, count in sorted(media.items())) or "no files"
