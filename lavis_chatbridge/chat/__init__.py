"""Conversations with ChatBridge: a session in Python, a terminal, a page and a server on one engine.

Exported names are imported on first use: torch and LAVIS take seconds that ``chatbridge --help`` need not spend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lavis_chatbridge.chat.attachments import media_of
    from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, MediaReader
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply
    from lavis_chatbridge.chat.session import Session, load_model
    from lavis_chatbridge.models.sampling import Sampling

_MODULES = {
    "chat.attachments": ["media_of"],
    "chat.conversation": ["ChatMessage", "Conversation", "MediaReader"],
    "chat.engine": ["Answer", "Engine", "Reply"],
    "chat.session": ["Session", "load_model"],
    "models.sampling": ["Sampling"],
}
__all__ = ["Answer", "ChatMessage", "Conversation", "Engine", "MediaReader", "Reply", "Sampling", "Session"]
__all__ += ["load_model", "media_of"]


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"lavis_chatbridge.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
