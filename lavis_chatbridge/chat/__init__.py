"""Conversations with ChatBridge: a session in Python, a terminal, a page and a server on one engine.

Exported names are imported on first use: torch and LAVIS take seconds that ``chatbridge --help`` need not spend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, Medium
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply
    from lavis_chatbridge.chat.loading import load_model
    from lavis_chatbridge.chat.media import MediaNote, MediaReader, media_of
    from lavis_chatbridge.chat.session import Session
    from lavis_chatbridge.models.sampling import Sampling

_HOMES = {
    "chat.conversation": ("ChatMessage", "Conversation", "Medium"),
    "chat.engine": ("Answer", "Engine", "Reply"),
    "chat.loading": ("load_model",),
    "chat.media": ("MediaNote", "MediaReader", "media_of"),
    "chat.session": ("Session",),
    "models.sampling": ("Sampling",),
}

__all__ = [
    "Answer",
    "ChatMessage",
    "Conversation",
    "Engine",
    "MediaNote",
    "MediaReader",
    "Medium",
    "Reply",
    "Sampling",
    "Session",
    "load_model",
    "media_of",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"lavis_chatbridge.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
