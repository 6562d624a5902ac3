"""Parses a language model's answer into questions and answers.

Models vary the requested format (``Question: ...`` / ``Answer: ...``): numbers, bold labels, other labels. An
ambiguous answer raises a `DataError` with the reason.
"""

from __future__ import annotations

import re

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.multis.prompts import Pair

_ASK = ("question", "q", "user", "human", "person")
_REPLY = ("answer", "a", "assistant", "reply", "response")
_LABEL = re.compile(
    r"^[ \t]*(?:[-*#>]+[ \t]*)?(?:\d+[.)][ \t]*)?(?:\*\*|__)?"
    r"(?P<label>" + "|".join(_ASK + _REPLY) + r")(?:[ \t]*#?\d+)?(?:\*\*|__)?[ \t]*[:\uFF1A][ \t]*(?:\*\*|__)?",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TITLE = re.compile(r"\A(?:\*\*)?(?:detailed )?description(?:\*\*)?[ \t]*[:\uFF1A](?:\*\*)?\s*", re.IGNORECASE)


def read_pairs(text: str) -> list[Pair]:
    """Parse a conversation: questions and answers that alternate."""
    text = _unfenced(text)
    marks = list(_LABEL.finditer(text))
    if not marks:
        raise DataError("no line begins with 'Question:' or 'Answer:'")
    parts = []
    for position, mark in enumerate(marks):
        asks = mark["label"].lower() in _ASK
        end = marks[position + 1].start() if position + 1 < len(marks) else len(text)
        words = text[mark.end() : end].strip().strip("*_").strip()
        if asks != (position % 2 == 0):
            raise DataError(f"part {position + 1} is {'a question' if asks else 'an answer'}, expected the other")
        if not words:
            raise DataError(f"part {position + 1} is empty")
        parts.append(words)
    if len(parts) % 2:
        raise DataError("the last question has no answer")
    return [Pair(question=q, answer=a) for q, a in zip(parts[::2], parts[1::2], strict=True)]


def read_description(text: str) -> str:
    """Parse a description that was requested without a question."""
    text = _TITLE.sub("", _unfenced(text)).strip()
    if not text:
        raise DataError("the answer is empty")
    if any(mark["label"].lower() in _ASK for mark in _LABEL.finditer(text)):
        raise DataError("questions and answers, expected a description")
    return text


def _unfenced(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fence = _FENCE.match(text)
    return (fence[1] if fence else text).strip()
