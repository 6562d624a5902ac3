"""Multiple choice: parses the option from a reply, and scores it without a bonus for a favourite letter.

Every question is asked with its options in several orders (by default all rotations); its score is the share of orders
in which the right option was chosen. A model that always says A is right in one of N rotations, which is chance.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lavis_chatbridge.prompting.choices import LETTERS
from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring.answers import squad


def chosen(reply: str, options: Sequence[str]) -> int:
    """Position of the option in a reply: by its letter, by its text, or as the only option in a sentence.

    Args:
        reply: ``"B"``, ``"(b) a drum"``, ``"The answer is B."``, ``"a drum"``.
        options: In the order in which they were asked.

    Returns:
        The position; -1 if the reply has none or several.
    """
    said = reply.strip()
    letters = LETTERS[: len(options)]
    texts = [squad(option) for option in options]
    if squad(said) in texts:
        return texts.index(squad(said))
    leading = re.match(rf"[(\[]?([{letters}])(?:[)\].:,]|$|\s*\n)", said, re.IGNORECASE)
    stated = re.search(rf"\b(?:answer|option|choice)\s*(?:is|:)?\s*[(\[]?([{letters}])\b", said, re.IGNORECASE)
    if letter := leading or stated:
        return letters.index(letter.group(1).upper())
    words = f" {squad(said)} "
    held = [number for number, text in enumerate(texts) if text and f" {text} " in words]
    return held[0] if len(held) == 1 else -1


def right(record: Prediction) -> float:
    """Percent of the asked orders in which the right option was chosen."""
    correct = record.meta.get("correct")
    return 100.0 * sum(number == correct for number in record.chosen) / max(1, len(record.chosen))


def chance(record: Prediction) -> float:
    """Score of guessing, in percent."""
    return 100.0 / max(1, len(record.meta.get("options") or ()))
