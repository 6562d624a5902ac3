"""Answers in the JSON of chat completions, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from lavis_chatbridge.chat.session import Answer

_REASONS = {"stop": "stop", "length": "length", "cancelled": "stop"}


@dataclass(frozen=True)
class Completion:
    """What all messages about one reply share.

    Args:
        model: The model's name.
        number: What the reply is called.
        created: When it was asked for, in seconds since 1970.
    """

    model: str
    number: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """A reply that is complete."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": _REASONS[answer.finish],
        }
        head = self._head("chat.completion")
        return {**head, "choices": [choice], "usage": usage(answer), "chatbridge": report(answer)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        """A piece of a reply."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **more}

    def opening(self) -> dict[str, Any]:
        """The first chunk."""
        return self.chunk({"role": "assistant", "content": ""})

    def closing(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of the reply."""
        return self.chunk({}, _REASONS[answer.finish], chatbridge=report(answer))

    def numbers(self, answer: Answer) -> dict[str, Any]:
        """The chunk with the numbers of tokens, which has no part of the reply."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(answer)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}


def usage(answer: Answer) -> dict[str, Any]:
    """The numbers of tokens."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": answer.prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": answer.reused_tokens},
    }


def report(answer: Answer) -> dict[str, Any]:
    """What OpenAI's format has no place for: what became of the media, and what the user should know."""
    media = [
        {"type": n.kind, "part": n.name, "reached": n.reached, "tokens": n.tokens, "warnings": list(n.warnings)}
        for n in answer.media
    ]
    return {"media": media, "warnings": list(answer.warnings), "dropped_turns": answer.dropped}


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


END = b"data: [DONE]\n\n"
