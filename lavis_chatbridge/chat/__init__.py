"""Conversations with ChatBridge: a session in Python, a terminal, a page and a server on one engine.

Exported names are imported on first use: torch and LAVIS take seconds that ``chatbridge --help`` need not spend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.chat.attachments import media_of
    from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply
    from lavis_chatbridge.chat.loading import load_model
    from lavis_chatbridge.chat.reader import MediaReader
    from lavis_chatbridge.chat.session import Session
    from lavis_chatbridge.models.sampling import Sampling

__all__ = ["Answer", "ChatMessage", "Conversation", "Engine", "MediaReader", "Reply", "Sampling", "Session"]
__all__ += ["load_model", "media_of"]

_MODULES = {
    "Answer": "chat.engine",
    "ChatMessage": "chat.conversation",
    "Conversation": "chat.conversation",
    "Engine": "chat.engine",
    "MediaReader": "chat.reader",
    "Reply": "chat.engine",
    "Sampling": "models.sampling",
    "Session": "chat.session",
    "load_model": "chat.loading",
    "media_of": "chat.attachments",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"lavis_chatbridge.{_MODULES[name]}"), name)
