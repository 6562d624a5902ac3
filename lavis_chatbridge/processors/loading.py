"""All processors of a model, from the ``preprocess`` section of its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.config import unknown_key
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.processors.base import ChatBridgeProcessor

Processors: TypeAlias = "dict[str, dict[str, ChatBridgeProcessor]]"
"""Modality (or "text") -> split -> processor."""

SECTIONS = {"image": "vis_processor", "video": "video_processor", "audio": "audio_processor", "text": "text_processor"}
"""Modality (or "text") -> its key in the YAML; those of images and text are LAVIS's."""

SPLITS = ("train", "eval")


def load_processors(preprocess_cfg: Mapping[str, Any] | DictConfig | None = None) -> Processors:
    """The processors of all modalities and of text.

    Args:
        preprocess_cfg: ``vis_processor``, ``video_processor``, ``audio_processor``, ``text_processor``, each with
            ``train`` and ``eval``, each with ``name`` and that processor's settings. Missing ones are
            ChatBridge's own processors with default settings.

    Returns:
        ``{"image": {"train": ..., "eval": ...}, "video": ..., "audio": ..., "text": ...}``.

    Raises:
        ConfigError: With all faults at once.
    """
    sections = _as_dict(preprocess_cfg)
    faults = [unknown_key(key, SECTIONS.values(), "preprocess") for key in sections if key not in SECTIONS.values()]
    processors: Processors = {}
    for modality, section in SECTIONS.items():
        splits = _as_dict(sections.get(section))
        where = f"preprocess.{section}"
        faults += [unknown_key(key, SPLITS, where) for key in splits if key not in SPLITS]
        processors[modality] = {}
        for split in SPLITS:
            try:
                processors[modality][split] = _load(modality, split, _as_dict(splits.get(split)), f"{where}.{split}")
            except ConfigError as error:
                faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
    return processors


def _load(modality: str, split: str, values: dict[str, Any], where: str) -> ChatBridgeProcessor:
    name = values.get("name") or ("chatbridge_text" if modality == "text" else f"chatbridge_{modality}_{split}")
    processor = registry.get_processor_class(name)
    if processor is None:
        own = sorted(known for known in registry.list_processors() if known.startswith("chatbridge"))
        raise ConfigError(f"{where}.name: LAVIS knows no processor {name!r}; ChatBridge's are {', '.join(own)}")
    return processor.from_config(OmegaConf.create(values))


def _as_dict(values: Any) -> dict[str, Any]:
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise ConfigError(f"preprocess: expected a mapping, found {values!r}")
    return {str(key): value for key, value in values.items()}
