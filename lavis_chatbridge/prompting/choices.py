"""The options of a multiple-choice question as text: one line per option, and a request to answer with a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
REQUEST = "Answer with the letter of the right option."
_LETTERED = re.compile(r"^\s*[(\[]?[A-Z][)\].:]\s*")


def listed(options: Sequence[str]) -> str:
    """One line with a letter per option, and the request to answer with a letter.

    Args:
        options: Their texts, without letters.
    """
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*lines, REQUEST])


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without their letters, if all have one (``"A. a drum"``)."""
    if all(_LETTERED.match(option) for option in options):
        return [_LETTERED.sub("", option).strip() for option in options]
    return [option.strip() for option in options]
