"""Parse a language model's answer into questions and answers.

Models follow the requested form (``Question: ...`` / ``Answer: ...``) loosely: numbered, bold, with other labels, or as
JSON. An ambiguous answer is rejected with a reason; nothing is guessed.
"""

from __future__ import annotations

import json
import re
from typing import Any

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
    """Parse a conversation.

    Raises:
        DataError: If there are none, or they do not alternate.
    """
    text = _unfenced(text)
    pairs = _from_json(text)
    if pairs is not None:
        return pairs
    marks = list(_LABEL.finditer(text))
    if not marks:
        raise DataError("no line begins with 'Question:' or 'Answer:'")
    parts = []
    for mark, following in zip(marks, [*marks[1:], None], strict=True):
        end = following.start() if following else len(text)
        parts.append((mark["label"].lower() in _ASK, text[mark.end() : end].strip().strip("*_").strip()))
    for position, (asks, words) in enumerate(parts):
        if asks != (position % 2 == 0):
            raise DataError(
                f"part {position + 1} is {'a question' if asks else 'an answer'}, expected the other: no turns"
            )
        if not words:
            raise DataError(f"part {position + 1} is empty")
    if len(parts) % 2:
        raise DataError("the last question has no answer")
    return [Pair(question=q, answer=a) for (_, q), (_, a) in zip(parts[::2], parts[1::2], strict=True)]


def read_description(text: str) -> str:
    """Parse a description that was requested without a question.

    Raises:
        DataError: If it is empty, or is a list of questions and answers.
    """
    text = _TITLE.sub("", _unfenced(text)).strip()
    if not text:
        raise DataError("the answer is empty")
    labels = {mark["label"].lower() for mark in _LABEL.finditer(text)}
    if labels & set(_ASK):
        raise DataError("questions and answers, expected a description")
    return text


def _unfenced(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fence = _FENCE.match(text)
    return (fence[1] if fence else text).strip()


def _from_json(text: str) -> list[Pair] | None:
    """The pairs of a JSON answer, or None if it is not JSON."""
    if text[:1] not in ("{", "["):
        return None
    try:
        values: Any = json.loads(text)
    except ValueError as error:
        raise DataError(f"begins like JSON, but is not ({error})") from error
    if isinstance(values, dict):
        inner = next((value for key, value in values.items() if isinstance(value, list)), None)
        values = [values] if inner is None else inner
    pairs = []
    for entry in values:
        question = entry.get("question") if isinstance(entry, dict) else None
        answer = entry.get("answer") if isinstance(entry, dict) else None
        if not (isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()):
            raise DataError("JSON without the keys 'question' and 'answer'")
        pairs.append(Pair(question=question.strip(), answer=answer.strip()))
    if not pairs:
        raise DataError("JSON without questions")
    return pairs
