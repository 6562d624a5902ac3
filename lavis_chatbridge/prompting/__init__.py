"""Conversations, roles, media slots and instruction templates: what the language model is asked."""

from lavis_chatbridge.prompting.conversation import Turn, alignment_prompt, chat_prompt, clean_caption, escape_markers
from lavis_chatbridge.prompting.pieces import Modality, Piece, Slot, Text, context_of, slots_of, spell_out, target_text

__all__ = [
    "Modality",
    "Piece",
    "Slot",
    "Text",
    "Turn",
    "alignment_prompt",
    "chat_prompt",
    "clean_caption",
    "context_of",
    "escape_markers",
    "slots_of",
    "spell_out",
    "target_text",
]
