"""Builds the processors that a ``preprocess`` section names; also their base class, and the text processor.

A processor with ``encoder: ${model.vision}`` takes that encoder's settings (picture size, mean, std) from the encoder's
own configuration file. No weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from lavis.common.registry import registry
from lavis.processors.base_processor import BaseProcessor
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge import hub
from lavis_chatbridge.config import Settings, parse, unknown_key
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import hash_of
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, directly
from lavis_chatbridge.prompting.conversation import clean_caption

SECTIONS = {"image": "vis_processor", "video": "video_processor", "audio": "audio_processor", "text": "text_processor"}
"""Modality (or "text") -> its key in the YAML; LAVIS's own for images and text."""

PREPROCESSOR = "preprocessor_config.json"
_SPLITS = ("train", "eval")
_SECONDS = 10.0
"""Length of a clip in seconds for encoders without a fixed window (wav2vec2, HuBERT)."""


class Processor(BaseProcessor):
    """A LAVIS processor with typed settings.

    Attributes:
        name: Its name in LAVIS's registry.
        settings_class: The class of its settings.
        revision: Increase it whenever the output for the same settings changes.
        random: Whether its output is random, as in training.
        encoder: The encoder that reads its output, ``"vision"`` or ``"audio"``.
        limits: Limits on opening a medium; a server sets lower ones.
        opener: Calls the ``media`` package's functions: in this process, or a `media.pool.DecodingPool`.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    revision: ClassVar[int] = 1
    random: ClassVar[bool] = False
    encoder: ClassVar[str] = "vision"
    opener: Callable[..., Any] = staticmethod(directly)
    limits: Limits = DEFAULT_LIMITS
    settings: Settings

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = self.settings_class() if settings is None else settings

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig | None = None) -> Processor:
        """Build a processor from its YAML section (without LAVIS's key ``name``); a wrong key is a `ConfigError`.

        ``encoder: ${model.vision}`` inserts the settings for this encoder; other keys override them.
        """
        given = _as_dict(cfg)
        given.pop("name", None)
        if (encoder := given.pop("encoder", None)) is not None:
            given = {**settings_for(encoder, cls.encoder), **given}
        return cls(parse(cls.settings_class, given, cls.name))

    @property
    def version(self) -> str:
        """A string that changes whenever the output may change."""
        return f"{self.name}-{self.revision}-{hash_of(self.settings.model_dump())[:12]}"

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Any:
        """Prepare one medium.

        Args:
            source: A path, bytes, or an array; see the ``media`` package.
            rng: Random generator of training processors, by default a new one. Evaluation processors ignore it.

        Raises:
            MediaError: If the medium cannot be opened.
        """
        raise NotImplementedError


class TextSettings(Settings):
    """How a caption is prepared for the prompt."""

    clean: Literal["original", "spaces"] = "original"
    """``original``: lower case without hyphens, as in the original; ``spaces``: only normalise white space."""


@registry.register_processor("chatbridge_text")
class TextProcessor(Processor):
    """Text to text."""

    name = "chatbridge_text"
    settings_class = TextSettings
    settings: TextSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> str:
        if self.settings.clean == "original":
            return clean_caption(source)
        return " ".join(source.split())


def load_processors(preprocess_cfg: Mapping[str, Any] | DictConfig | None = None) -> dict[str, dict[str, Processor]]:
    """Modality (or "text") -> split -> processor, or a `ConfigError` with all faults at once.

    Args:
        preprocess_cfg: ``vis_processor``, ``video_processor``, ``audio_processor``, ``text_processor``, each with
            ``train`` and ``eval``, each with ``name`` and that processor's settings. Missing ones are
            ChatBridge's own processors with default settings.
    """
    sections = _as_dict(preprocess_cfg)
    faults = [unknown_key(key, SECTIONS.values(), "preprocess") for key in sections if key not in SECTIONS.values()]
    processors: dict[str, dict[str, Processor]] = {modality: {} for modality in SECTIONS}
    for modality, section in SECTIONS.items():
        splits, where = _as_dict(sections.get(section)), f"preprocess.{section}"
        faults += [unknown_key(key, _SPLITS, where) for key in splits if key not in _SPLITS]
        for split in _SPLITS:
            try:
                processors[modality][split] = _load(modality, split, _as_dict(splits.get(split)), f"{where}.{split}")
            except ConfigError as error:
                faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))
    return processors


def _load(modality: str, split: str, values: dict[str, Any], where: str) -> Processor:
    name = values.get("name") or ("chatbridge_text" if modality == "text" else f"chatbridge_{modality}_{split}")
    processor = registry.get_processor_class(name)
    if processor is None:
        own = sorted(known for known in registry.list_processors() if known.startswith("chatbridge"))
        raise ConfigError(f"{where}.name: LAVIS has no processor {name!r}; ChatBridge's are {', '.join(own)}")
    return processor.from_config(OmegaConf.create(values))


def _as_dict(values: Any) -> dict[str, Any]:
    if isinstance(values, DictConfig):
        values = OmegaConf.to_container(values, resolve=True)
    if not isinstance(values, (Mapping, type(None))):
        raise ConfigError(f"preprocess: expected a mapping, found {values!r}")
    return {str(key): value for key, value in (values or {}).items()}


def settings_for(encoder: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The settings for the section ``model.vision`` or ``model.audio`` (``modality``).

    Empty for BEATs and for encoders registered by users.
    """
    name = encoder.get("encoder", "eva" if modality == "vision" else "beats")
    if name == "eva":
        return {"image_size": encoder["image_size"]} if "image_size" in encoder else {}
    if name == "timm":
        import timm

        described = _read(encoder, "vision", "config.json").get("pretrained_cfg")
        if not described and encoder.get("name"):
            known = timm.get_pretrained_cfg(encoder["name"], allow_unregistered=True)
            described = None if known is None else known.to_dict()
        if not described:
            return {}
        data = timm.data.resolve_data_config({}, pretrained_cfg=dict(described))
        return {"image_size": data["input_size"][1], "mean": list(data["mean"]), "std": list(data["std"])}
    if name != "transformers" or not (read := _read(encoder, modality, PREPROCESSOR)):
        return {}
    if modality == "vision":
        found = {"image_size": hub.image_size(read), "mean": read.get("image_mean"), "std": read.get("image_std")}
        return {key: value for key, value in found.items() if value is not None}
    seconds = read.get("chunk_length") or read.get("max_length_s")  # Whisper, CLAP
    if read.get("feature_extractor_type") == "ASTFeatureExtractor" and read.get("max_length"):
        seconds = read["max_length"] / 100  # frames of 10 ms
    return {"extractor": read, "clip_seconds": float(seconds or _SECONDS)}


def _read(encoder: Mapping[str, Any], modality: str, name: str) -> dict[str, Any]:
    """A configuration file of the encoder's weights, or an empty mapping if there is none."""
    if encoder.get("weights") is None:
        return {}
    folder = hub.find(encoder["weights"], f"model.{modality}.weights", "processor")
    return hub.read_config(folder, name) if (folder / name).is_file() else {}
