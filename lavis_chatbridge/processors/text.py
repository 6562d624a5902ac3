"""``chatbridge_text``: prepares a caption or question for the prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from lavis.common.registry import registry

from lavis_chatbridge.config import Settings
from lavis_chatbridge.processors.base import ChatBridgeProcessor
from lavis_chatbridge.prompting.conversation import clean_caption


class TextSettings(Settings):
    """How text is prepared."""

    clean: Literal["original", "spaces", "no"] = "original"
    """``original``: lower case without hyphens, as in the original; ``spaces``: only normalise white space."""
    max_words: int | None = None
    """Longer text is cut after this number of words."""
    prompt: str = ""
    """Text to put before it."""

    def check(self) -> Iterator[str]:
        if self.max_words is not None and self.max_words < 1:
            yield f"max_words is {self.max_words}, expected at least 1 or null"


@registry.register_processor("chatbridge_text")
class TextProcessor(ChatBridgeProcessor):
    """Text to text."""

    name = "chatbridge_text"
    settings_class = TextSettings
    settings: TextSettings

    def __call__(self, source: Any, rng: np.random.Generator | None = None) -> str:
        text = str(source)
        if self.settings.clean == "original":
            text = clean_caption(text)
        elif self.settings.clean == "spaces":
            text = " ".join(text.split())
        if self.settings.max_words is not None:
            text = " ".join(text.split(" ")[: self.settings.max_words])
        return self.settings.prompt + text
