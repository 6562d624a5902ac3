"""Conversations with ChatBridge: a session in Python, the commands ``chatbridge chat`` and ``chatbridge ask``.

What is exported is imported on first use: torch and LAVIS take seconds that ``chatbridge --help`` need not spend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.chat.history import ChatTurn
    from lavis_chatbridge.chat.loading import load_model
    from lavis_chatbridge.chat.media import MediaNote, MediaReader, Medium, media_of_turn
    from lavis_chatbridge.chat.session import Answer, Session, Stream
    from lavis_chatbridge.models.decoding import Decoder, Generation, Sampling

__all__ = [
    "Answer",
    "ChatTurn",
    "Decoder",
    "Generation",
    "MediaNote",
    "MediaReader",
    "Medium",
    "Sampling",
    "Session",
    "Stream",
    "load_model",
    "media_of_turn",
]

_HOMES = {
    "Answer": "chat.session",
    "ChatTurn": "chat.history",
    "Decoder": "models.decoding",
    "Generation": "models.decoding",
    "MediaNote": "chat.media",
    "MediaReader": "chat.media",
    "Medium": "chat.media",
    "Sampling": "models.sampling",
    "Session": "chat.session",
    "Stream": "chat.session",
    "load_model": "chat.loading",
    "media_of_turn": "chat.media",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lavis_chatbridge.{_HOMES[name]}"), name)
