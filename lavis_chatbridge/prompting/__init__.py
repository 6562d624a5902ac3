"""Conversations, roles, media slots and instruction templates: the parts of prompts."""

from lavis_chatbridge.prompting.conversation import (
    Message,
    alignment_prompt,
    chat_prompt,
    clean_caption,
    escape_markers,
)
from lavis_chatbridge.prompting.pieces import Modality, Piece, Slot, Text, context_of, slots_of, spell_out, target_text

__all__ = [
    "Message",
    "Modality",
    "Piece",
    "Slot",
    "Text",
    "alignment_prompt",
    "chat_prompt",
    "clean_caption",
    "context_of",
    "escape_markers",
    "slots_of",
    "spell_out",
    "target_text",
]
