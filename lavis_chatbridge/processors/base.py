"""What all processors share: settings from LAVIS's config, a version for cache keys, a source of chance."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from lavis.processors.base_processor import BaseProcessor
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge import media
from lavis_chatbridge.config import parse
from lavis_chatbridge.media.limits import DEFAULT_LIMITS, Limits


class ChatBridgeProcessor(BaseProcessor):
    """A LAVIS processor with typed settings.

    Attributes:
        name: Its name in LAVIS's registry.
        settings_class: The dataclass of its settings.
        revision: Raised whenever its output for the same settings changes.
        draws: Whether something of it is drawn, as in training.
        settings: How it works.
        limits: What a medium may cost; a server sets narrower ones.
        opener: What opens media: the ``media`` module, or a `media.pool.DecodingPool` where media are not trusted.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type]
    revision: ClassVar[int] = 1
    settings: Any
    limits: Limits
    opener: Any = media
    draws: ClassVar[bool] = False

    def __init__(self, settings: Any = None, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__()
        self.settings = self.settings_class() if settings is None else settings
        self.limits = limits

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | DictConfig | None = None) -> ChatBridgeProcessor:
        """The processor that a section of a YAML describes; its ``name`` key is LAVIS's.

        Raises:
            ConfigError: If a key is unknown or a value does not fit.
        """
        values = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg or {})
        assert isinstance(values, dict)
        given = {str(key): value for key, value in values.items() if key != "name"}
        return cls(parse(cls.settings_class, given, cls.name))

    @property
    def version(self) -> str:
        """A short string that changes whenever the output for a medium may change."""
        settings = json.dumps(dataclasses.asdict(self.settings), sort_keys=True)
        return f"{self.name}-{self.revision}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> Any:
        """Prepare one medium.

        Args:
            source: What the ``media`` module's functions take.
            rng: What training processors draw from; a fresh one if not given. Others draw nothing.

        Raises:
            MediaError: If the medium cannot be opened.
        """
        raise NotImplementedError

    def _chance(self, rng: np.random.Generator | None) -> np.random.Generator | None:
        """What it draws from; none if it draws nothing."""
        return (rng or np.random.default_rng()) if self.draws else None
