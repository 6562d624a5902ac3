"""Converts OpenAI's requests to conversations and `Sampling`, and replies to OpenAI's JSON. It does no HTTP."""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, ValidationError

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
from lavis_chatbridge.chat.engine import Answer, Event, QueueFullError
from lavis_chatbridge.chat.messages import Access, read_messages
from lavis_chatbridge.errors import ConfigError, DataError, EngineError, MediaError, PromptError
from lavis_chatbridge.models.decoding import TokenLogprob
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_logged: set[str] = set()
_MOST_REPLIES, _MOST_LOGPROBS, _MOST_LOGGED = 16, 20, 100
_USUAL = Sampling()
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("tools", "functions", "logit_bias", "guided_json", "structured_outputs", "use_beam_search")),
    **dict.fromkeys(("prompt_logprobs", "prompt_embeds", "echo", "suffix")),
    "modalities": ["text"],
    "response_format": {"type": "text"},
}
"""Fields that are accepted only if they are empty or have this value."""
_SAME = ("temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "ignore_eos")
"""Fields that `Sampling` has under the same name."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


@dataclass(eq=False)
class RequestError(Exception):
    """A refused request: HTTP status, what is wrong and how to mend it, a name for programs, the part at fault."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    headers: dict[str, str] | None = None

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        error_type = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": error_type, "param": self.param, "code": self.code}}


def _no_limit(value: Any) -> Any:
    return None if value == -1 else value


def _texts(value: Any) -> Any:
    return [] if value in (None, "") else [value] if isinstance(value, str) else value


Tokens = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_limit)]


class Body(BaseModel):
    """Fields that chat completions and completions share. Names and meanings are OpenAI's and vLLM's."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = False
    stream_options: dict[str, Any] | None = None
    n: int | None = Field(1, ge=1, le=_MOST_REPLIES)
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    min_tokens: int | None = Field(0, ge=0)
    temperature: float | None = Field(0.0, ge=0, le=2)
    top_p: float | None = Field(0.9, ge=0, le=1)
    top_k: int | None = Field(0, ge=-1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, ge=0.01, le=100)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(1 << 63), le=(1 << 63) - 1)
    stop: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=16), BeforeValidator(_texts)] = []
    stop_token_ids: list[NonNegativeInt] | None = None
    ignore_eos: bool | None = False

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens are reported with each token; None reports no log-probability."""
        raise NotImplementedError

    def prompts(self, access: Access, most_media: int) -> Sequence[Conversation | str | list[int]]:
        """The conversation, its URLs opened, or the texts to be continued."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse unsupported fields by name, and log fields that have no meaning here, once each."""
        neutral = {**_UNSUPPORTED, "best_of": self.n or 1}
        for name, value in (self.model_extra or {}).items():
            if name not in neutral:
                if name[:80] not in _logged and len(_logged) < _MOST_LOGGED:
                    _logged.add(name[:80])
                    log.info("the field %s of a request has no meaning here", name[:80])
            elif value and value != neutral[name]:
                asked = f"{name} {json.dumps(value)[:60]}"
                raise RequestError(400, f"{asked} is not supported by this server", "unsupported_parameter", name)

    def samplings(self, most: int) -> list[Sampling]:
        """How each of the ``n`` replies is chosen; ``most`` is the upper limit of tokens."""
        tokens = min(most, self.max_completion_tokens or self.max_tokens or _USUAL.max_new_tokens)
        values: dict[str, Any] = {
            **{name: getattr(self, name) for name in _SAME},
            "max_new_tokens": tokens,
            "min_new_tokens": min(self.min_tokens or 0, tokens),
            "top_p": None if self.top_p is None else max(self.top_p, 1e-6),  # 0 leaves the likeliest
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logprobs": self.reported,
        }
        given = {name: value for name, value in values.items() if value is not None}
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n or 1)]
        return [_USUAL.model_copy(update={**given, "seed": seed}) for seed in seeds]


class ChatRequest(Body):
    """A request of chat completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    hear_videos: bool | None = True
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0, le=_MOST_LOGPROBS)

    @property
    def reported(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, access: Access, most_media: int) -> Sequence[Conversation]:
        read = read_messages(self.messages, access, self.hear_videos is not False, most_media)
        if not read.messages or read.messages[-1].role == "assistant":
            read.messages.append(ChatMessage("user", ""))
        return [read]


class TextRequest(Body):
    """A request of completions."""

    prompt: str | list[str] | list[int] | None = None
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)

    @property
    def reported(self) -> int | None:
        return self.logprobs

    def prompts(self, access: Access, most_media: int) -> Sequence[str | list[int]]:
        several = isinstance(self.prompt, list) and all(isinstance(part, str) for part in self.prompt)
        found: list[Any] = self.prompt if several else [self.prompt]  # type: ignore[assignment]
        if not 1 <= len(found) <= _MOST_REPLIES or not all(found):
            message = f"prompt: expected 1 to {_MOST_REPLIES} texts, not empty"
            raise RequestError(400, message, "invalid_value", "prompt")
        return found


B = TypeVar("B", bound=Body)


def read_request(cls: type[B], body: bytes) -> B:
    """A request of one of the two classes; RequestError if the body has another form."""
    try:
        request = cls.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            message = f"the request's body is not a JSON object: {first['msg']}"
            raise RequestError(400, message, "invalid_json") from error
        names = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)[1:]
        found = json.dumps(first.get("input"), default=str)[:80]
        raise RequestError(400, f"{where}: {first['msg']}, found {found}", "invalid_value", where) from error
    request.check()
    return request


def refusal_of(error: Exception, number: str) -> RequestError:
    """The refusal that an exception means to a client; the log gets a fault of the server under the request's id."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(429, str(error), "queue_full", headers={"Retry-After": "1"})
    if isinstance(error, MediaError):  # its source is the position in the request
        where = error.source.removesuffix("'s sound track")
        if "larger than the limit" in error.cause:
            return RequestError(413, f"{where}: {error.cause}", "too_large", where)
        return RequestError(400, f"{where} cannot be read: {error.cause}", "invalid_media", where)
    if isinstance(error, DataError):  # it begins with the position
        where = str(error).partition(" ")[0]
        param = where if where.startswith(("messages", "prompt")) else "messages"
        return RequestError(400, str(error), "invalid_value", param)
    if isinstance(error, PromptError):
        return RequestError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, EngineError):
        return RequestError(502, str(error), "engine_failed")
    if isinstance(error, ConfigError):
        return RequestError(400, str(error), "invalid_value")
    log.error("%s failed", number, exc_info=error)
    return RequestError(500, f"internal error; the server's log has more under {number}", "internal")


class Response:
    """The JSON of the replies to one request of chat completions (else of completions), whole or in chunks."""

    def __init__(self, model: str, chat: bool, tokenizer: Tokenizer) -> None:
        self._chat, self._tokenizer = chat, tokenizer
        name = "chat.completion" if chat else "text_completion"
        number = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": number, "object": name, "created": int(time.time()), "model": model}
        self._chunk = {**self._head, "object": "chat.completion.chunk" if chat else name}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All replies, complete."""
        choices = []
        for index, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choices.append(self._choice(index, {"message": message} if self._chat else {"text": answer.text}, answer))
        return {**self._head, "choices": choices, "usage": _usage(answers), "chatbridge": _report(answers[0])}

    def opening(self, index: int) -> bytes:
        """The first chunk of a reply."""
        return self._sent(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, event: Event) -> bytes:
        """A chunk of text; or, of the answer, the last chunk, which has log-probabilities and the report."""
        answer = event if isinstance(event, Answer) else None
        return self._sent(index, {} if answer else {"content": str(event)}, answer)

    def usage(self, answers: Sequence[Answer]) -> bytes:
        """The chunk with the numbers of tokens."""
        return server_sent({**self._chunk, "choices": [], "usage": _usage(answers)})

    def _sent(self, index: int, delta: dict[str, str], answer: Answer | None = None) -> bytes:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        report = {"chatbridge": _report(answer)} if answer else {}
        return server_sent({**self._chunk, "choices": [self._choice(index, content, answer)], **report})

    def _choice(self, index: int, content: dict[str, Any], answer: Answer | None) -> dict[str, Any]:
        """One choice; only a complete ``answer`` has log-probabilities and a reason for its end."""
        reason = None if answer is None else "length" if answer.finish == "length" else "stop"
        logprobs = None if answer is None else self._logprobs(answer.logprobs)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not tokens:
            return None
        rows = [[self._entry(id, value) for id, value in ((t.id, t.logprob), *t.top)] for t in tokens]
        if self._chat:
            return {"content": [{**own, "top_logprobs": top} for own, *top in rows], "refusal": None}
        return {
            "tokens": [own["token"] for own, *_ in rows],
            "token_logprobs": [own["logprob"] for own, *_ in rows],
            "top_logprobs": [{entry["token"]: entry["logprob"] for entry in top} for _, *top in rows],
        }

    def _entry(self, id: int, value: float) -> dict[str, Any]:
        text = self._tokenizer.decode([id])
        return {"token": text, "logprob": float(value), "bytes": list(text.encode())}


def server_sent(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """The numbers of tokens of the replies to one request, those of media by modality."""
    first, completion = answers[0], sum(answer.tokens for answer in answers)
    media = Counter[str]()
    for note in first.media:
        media[f"{note.modality}_tokens"] += note.tokens
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.reused_tokens, **media},
    }


def _report(answer: Answer) -> dict[str, Any]:
    """The field of a reply beside OpenAI's: notes on media, and warnings."""
    media = [
        {"type": n.modality, "part": n.name, "reached": n.reached, "tokens": n.tokens, "warnings": list(n.warnings)}
        for n in answer.media
    ]
    return {"media": media, "warnings": list(answer.warnings), "dropped_messages": answer.dropped}
