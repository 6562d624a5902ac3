"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then finds everything there, and never runs the frozen encoders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.plugin.launch import Session, load

_MIB = 1 << 20


def command(
    cfg_path: Annotated[str, typer.Option("--cfg-path", metavar="YAML", help="The configuration file.")],
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Settings that override the file's; repeatable.")
    ] = None,
) -> None:
    """Encode the media that the cache lacks, and report its content; every process of a launcher encodes its share."""
    with Session():
        cfg = _read(cfg_path, options or [])
        from lavis.common.registry import registry

        from lavis_chatbridge.plugin import world
        from lavis_chatbridge.runners import distributed, features

        device = distributed.init(cfg.run)
        world.prepare(cfg.datasets_cfg)
        task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg).to(device).eval()
        store = features.fill(model, datasets, cfg.run, cfg.get_config().get("preprocess"))
        if distributed.is_main():
            print(_report(store, features.samples(datasets, cfg.run)))


def _read(cfg_path: str, options: Sequence[str]) -> Any:
    cfg = load(cfg_path, options)
    if cfg.run.feature_cache is None:
        raise ConfigError(
            "run.feature_cache names no folder: set it, for example --options run.feature_cache=output/features"
        )
    return cfg


def _report(store: Any, samples: Iterable[Any]) -> str:
    """How many of the samples' media have features, where these lie, and how large they are."""
    held: Counter[str] = Counter()
    without: Counter[str] = Counter()
    for medium in dict.fromkeys(medium for sample in samples for medium in sample.files):
        try:
            (held if store.key(medium) in store else without)[medium.kind] += 1
        except MediaError:
            without[medium.kind] += 1
    size = sum(shard.stat().st_size for shard in store.folder.glob("*.tar")) / _MIB
    lines = [f"{store.folder}: features of {_counts(held)} for this configuration; {size:.1f} MiB in all"]
    if without:
        lines.append(f"no features of {_counts(without)}, which cannot be read: training skips their samples")
    return "\n".join(lines)


def _counts(media: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind} files" for kind, count in sorted(media.items())) or "no files"
