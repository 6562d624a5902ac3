"""From the ``preprocess`` section of a model's YAML to its processors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.config import unknown_key
from lavis_chatbridge.errors import ConfigError

SECTIONS = {
    "image": "vis_processor",
    "video": "video_processor",
    "audio": "audio_processor",
    "text": "text_processor",
}
"""Modality of processor to its key in the YAML; those of pictures and words are LAVIS's."""
FORMER_KEYS = {"txt_processor": "text_processor"}
"""Keys of version 0.1.0, and what they are called now."""

SPLITS = ("train", "eval")


def load_processors(preprocess_cfg: Mapping[str, Any] | DictConfig | None = None) -> dict[str, dict[str, Any]]:
    """The processors of all kinds of media and of text.

    Args:
        preprocess_cfg: ``vis_processor``, ``video_processor``, ``audio_processor``, ``text_processor``, each with
            ``train`` and ``eval``, each with ``name`` and that processor's settings. What is left out is ChatBridge's
            own.

    Returns:
        ``{"image": {"train": ..., "eval": ...}, "video": ..., "audio": ..., "text": ...}``.

    Raises:
        ConfigError: With all faults at once.
    """
    sections = with_known_keys(_as_dict(preprocess_cfg))
    faults = [unknown_key(key, SECTIONS.values(), "preprocess") for key in sections if key not in SECTIONS.values()]
    processors: dict[str, dict[str, Any]] = {}
    for kind, section in SECTIONS.items():
        splits = _as_dict(sections.get(section))
        where = f"preprocess.{section}"
        faults += [unknown_key(key, SPLITS, where) for key in splits if key not in SPLITS]
        processors[kind] = {}
        for split in SPLITS:
            try:
                processors[kind][split] = _load(kind, split, _as_dict(splits.get(split)), f"{where}.{split}")
            except ConfigError as error:
                faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
    return processors


def with_known_keys(preprocess_cfg: Any) -> Any:
    """A ``preprocess`` section in which what had another name before has its present one.

    Do this before sections are merged: one under its former name would stand beside what it overrides.

    Raises:
        ConfigError: If a section is there under both names.
    """
    both = [former for former, name in FORMER_KEYS.items() if former in preprocess_cfg and name in preprocess_cfg]
    if both:
        raise ConfigError(f"preprocess: {both[0]} is the former name of {FORMER_KEYS[both[0]]}; leave only the latter")
    if not any(former in preprocess_cfg for former in FORMER_KEYS):
        return preprocess_cfg
    known = {FORMER_KEYS.get(key, key): value for key, value in preprocess_cfg.items()}
    return OmegaConf.create(known) if isinstance(preprocess_cfg, DictConfig) else known


def _load(kind: str, split: str, values: dict[str, Any], where: str) -> Any:
    name = values.get("name") or ("chatbridge_text" if kind == "text" else f"chatbridge_{kind}_{split}")
    processor = registry.get_processor_class(name)
    if processor is None:
        known = [known for known in registry.list_processors() if known.startswith("chatbridge")]
        raise ConfigError(
            f"{where}.name: LAVIS knows no processor {name!r}; ChatBridge's are {', '.join(sorted(known))}"
        )
    return processor.from_config(OmegaConf.create(values))


def _as_dict(values: Any) -> dict[str, Any]:
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"preprocess: expected a mapping, found {values!r}")
    return {str(key): value for key, value in values.items()}
