"""``chatbridge cache-features``: fill ``run.feature_cache`` for a configuration without training.

Training with the same configuration then never runs the frozen encoders. ``--soft`` also exports the soft tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.files import atomic_file
from lavis_chatbridge.plugin.launch import CfgPath, Options, Session, load, prepare_world

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.features import FeatureStore
    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.schema import Medium

_SOFT_FORMATS = (".npz", ".safetensors")


def command(
    cfg_path: CfgPath,
    options: Options = None,
    soft: Annotated[Path | None, typer.Option(help="Also write soft tokens to this .npz or .safetensors.")] = None,
) -> None:
    """Encode the media that are not in the cache yet; each process of a launcher encodes its share."""
    if soft is not None and soft.suffix not in _SOFT_FORMATS:
        raise ConfigError(f"--soft {soft}: expected a file {' or '.join(_SOFT_FORMATS)}")
    with Session():
        cfg = load(cfg_path, options or [])
        if cfg.run.feature_cache is None:
            raise ConfigError("run.feature_cache is null: name a folder, as in run.feature_cache=output/features")
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
        every = distinct_media(data.samples(datasets, cfg.run))
        media = [medium for medium in every if _is_stored(medium, store)]
        counts = Counter(medium.modality for medium in media)
        found = ", ".join(f"{count} {modality} files" for modality, count in sorted(counts.items())) or "no files"
        print(f"{store.folder}: features of {found} for this configuration")
        if lost := len(every) - len(media):
            print(f"{lost} files cannot be read: training skips their samples")
        if soft is not None:
            _write_soft_tokens(model, store, media, soft)
            print(f"{soft}: soft tokens of {len(media)} files")


def _write_soft_tokens(model: ChatBridge, store: FeatureStore, media: Sequence[Medium], target: Path) -> None:
    """Write the soft tokens of stored media: ``MODALITY:PATH`` -> float32 ``[Q, D]``."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    found = {}
    with torch.no_grad():
        for medium in media:
            tokens = model.perceive_media(medium.modality, [store.get(store.key(medium))])[0]
            part = "" if medium.offset is None else f"@{medium.offset}+{medium.size}"
            found[f"{medium.modality}:{medium.path}{part}"] = tokens.float().cpu().contiguous().numpy()
    with atomic_file(target) as temporary:
        if target.suffix == ".npz":
            with open(temporary, "wb") as file:
                np.savez(file, **found)  # type: ignore[arg-type]
        else:
            save_file(found, temporary)


def _is_stored(medium: Medium, store: FeatureStore) -> bool:
    try:
        return store.key(medium) in store
    except MediaError:
        return False
