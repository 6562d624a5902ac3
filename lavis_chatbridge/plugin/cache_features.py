"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then finds everything there, and never runs the frozen encoders.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.plugin.launch import Session, add_arguments, load

__all__ = ["add_arguments", "run"]

_MIB = 1 << 20


def run(args: argparse.Namespace) -> int:
    """Encode what the cache lacks, and say what it holds; every process that a launcher starts does its share."""
    with Session() as session:
        with session.together(args.cfg_path, args.options):
            cfg = _read(args.cfg_path, args.options)
        from lavis.common.registry import registry

        from lavis_chatbridge.plugin import world
        from lavis_chatbridge.runners import distributed, features

        device = session.join(cfg.run)
        world.prepare(cfg.datasets_cfg)
        task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
        datasets = task.build_datasets(cfg)
        model = task.build_model(cfg).to(device).eval()
        store = features.fill(model, datasets, cfg.run, cfg.get_config().get("preprocess"))
        if distributed.is_main():
            print(_report(store, features.samples(datasets, cfg.run)))
    return 0


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
