"""The base class of processors: settings from LAVIS's config, limits, a version for cache keys, a random generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
from lavis.processors.base_processor import BaseProcessor
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.files import hash_of
from lavis_chatbridge.media.source import DEFAULT_LIMITS, Limits, directly
from lavis_chatbridge.processors import inputs


class ChatBridgeProcessor(BaseProcessor):
    """A LAVIS processor with typed settings.

    Attributes:
        name: Its name in LAVIS's registry.
        settings_class: The class of its settings.
        revision: A number to raise whenever the output for the same settings changes.
        random: Whether its output is random, as in training.
        encoder: The encoder that takes its output, ``"vision"`` or ``"audio"``.
        limits: Bounds on opening a medium; a server sets lower ones.
        opener: Calls the ``media`` package's functions: here, or a `media.pool.DecodingPool` in limited processes.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[Settings]]
    revision: ClassVar[int] = 1
    random: ClassVar[bool] = False
    encoder: ClassVar[str] = "vision"
    opener: Callable[..., Any] = staticmethod(directly)
    settings: Any

    def __init__(self, settings: Any = None, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__()
        self.settings = self.settings_class() if settings is None else settings
        self.limits = limits

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig | None = None) -> ChatBridgeProcessor:
        """The processor of a YAML section, without its key ``name``, which LAVIS reads.

        ``encoder: ${model.vision}`` inserts the settings that this encoder needs; other keys override them.

        Raises:
            ConfigError: If a key is unknown or a value does not fit.
        """
        values = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg or {})
        assert isinstance(values, dict)
        given = {str(key): value for key, value in values.items() if key != "name"}
        if (encoder := given.pop("encoder", None)) is not None:
            given = {**inputs.settings_for(encoder, cls.encoder), **given}
        return cls(parse(cls.settings_class, given, cls.name))

    @property
    def version(self) -> str:
        """A short string that changes whenever the output for a medium may change."""
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

    def _generator(self, rng: np.random.Generator | None) -> np.random.Generator | None:
        """The random generator to use; None if the output is not random."""
        return (rng or np.random.default_rng()) if self.random else None
