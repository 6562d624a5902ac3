"""Conversations with ChatBridge: a session in Python, the commands ``chatbridge chat`` and ``chatbridge ask``.

What is exported is imported on first use: torch and LAVIS take seconds that ``chatbridge --help`` need not spend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.chat.decoding import Decoder, Generation, Sampling
    from lavis_chatbridge.chat.history import ChatTurn
    from lavis_chatbridge.chat.loading import load_model
    from lavis_chatbridge.chat.media import MediaNote, MediaReader, Medium, media_of_turn
    from lavis_chatbridge.chat.session import Answer, Session, Stream

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
    "Answer": "session",
    "ChatTurn": "history",
    "Decoder": "decoding",
    "Generation": "decoding",
    "MediaNote": "media",
    "MediaReader": "media",
    "Medium": "media",
    "Sampling": "decoding",
    "Session": "session",
    "Stream": "session",
    "load_model": "loading",
    "media_of_turn": "media",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
