"""Requests of OpenAI's API, and its answers. It knows no HTTP server and no model.

Fields that mean nothing here are accepted and logged once each; a field that asks for something that this server cannot
do is refused by name.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
from lavis_chatbridge.chat.engine import Answer, Event
from lavis_chatbridge.chat.sources import Access
from lavis_chatbridge.errors import ConfigError, DataError, EngineError, MediaError, PromptError
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import Codec

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
_logged: set[str] = set()
_MOST_REPLIES, _MOST_LOGPROBS = 16, 20
_UNSUPPORTED = (
    *("tools", "functions", "logit_bias", "guided_json", "structured_outputs", "use_beam_search", "prompt_logprobs"),
    *("prompt_embeds", "echo", "suffix"),
)
"""Fields that are accepted with values that ask for nothing only."""
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What is wrong and how to mend it; the client reads it.
        code: A short name for programs.
        param: The part of the request that is at fault.
        headers: Further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _no_limit(value: Any) -> Any:
    return None if value in (-1, 0) and not isinstance(value, bool) else value


def _texts(value: Any) -> Any:
    return [] if value in (None, "") else [value] if isinstance(value, str) else value


Tokens = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_limit)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = False


class _Request(BaseModel):
    """Fields that chat completions and completions share. Names and meanings are OpenAI's and vLLM's."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str | None = None
    stream: bool | None = False
    stream_options: _StreamOptions | None = None
    n: int | None = Field(1, ge=1, le=_MOST_REPLIES)
    max_tokens: Tokens = None
    max_completion_tokens: Tokens = None
    min_tokens: int | None = Field(0, ge=0)
    temperature: float | None = Field(0.0, ge=0, le=2)
    top_p: float | None = Field(0.9, ge=0, le=1)
    top_k: int | None = Field(0, ge=-1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    seed: int | None = None
    stop: Annotated[list[Annotated[str, Field(max_length=200)]], Field(max_length=16), BeforeValidator(_texts)] = []
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = False

    def check(self) -> None:
        """Refuse what cannot be done, and log fields that have no meaning here, once each.

        Raises:
            RequestError: With the field's name.
        """
        extra = self.model_extra or {}
        form = extra.get("response_format") or {"type": "text"}
        kind = form.get("type", "text") if isinstance(form, dict) else form
        asked = [name for name in _UNSUPPORTED if extra.get(name)]
        asked += [f"response_format {kind!s:.40}"] if kind != "text" else []
        asked += ["best_of"] if extra.get("best_of") not in (None, self.n or 1) else []
        asked += ["modalities"] if extra.get("modalities") not in (None, [], ["text"]) else []
        if asked:
            field = asked[0].partition(" ")[0]
            raise RequestError(400, f"{asked[0]} is not supported by this server", "unsupported_parameter", field)
        for name in sorted(extra.keys() - _logged - {*_UNSUPPORTED, "response_format", "best_of", "modalities"}):
            _logged.add(name)
            log.info("the field %s of a request has no meaning here", name[:80])

    def sampling(self, most: int, logprobs: int | None) -> list[Sampling]:
        """How each of the ``n`` replies is chosen; ``most`` is the upper limit of tokens."""
        tokens = self.max_completion_tokens or self.max_tokens or min(most, Sampling().max_new_tokens)
        values: dict[str, Any] = {
            "max_new_tokens": min(most, tokens),
            "min_new_tokens": min(self.min_tokens or 0, most, tokens),
            "top_p": max(self.top_p or 0.0, 1e-6) if self.top_p is not None else None,  # 0 leaves the likeliest
            "seed": self.seed,
            "stop": tuple(self.stop),
            "stop_token_ids": tuple(self.stop_token_ids or ()),
            "logprobs": logprobs,
            "ignore_eos": self.ignore_eos,
        }
        same = ("temperature", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        values |= {name: getattr(self, name) for name in same}
        given = {name: value for name, value in values.items() if value is not None}
        seeds = [None] * (self.n or 1) if self.seed is None else [self.seed + i for i in range(self.n or 1)]
        return [Sampling(**{**given, "seed": seed}) for seed in seeds]


class ChatRequest(_Request):
    """A request of chat completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    hear_videos: bool | None = True
    logprobs: bool | None = False
    top_logprobs: int | None = Field(0, ge=0, le=_MOST_LOGPROBS)

    def conversation(self, access: Access, most_media: int) -> Conversation:
        """The conversation, its URLs opened.

        Raises:
            RequestError: If a message has another form, or a medium cannot be had.
        """
        try:
            read = Conversation.from_openai(
                self.messages, access=access, hear_videos=self.hear_videos is not False, most_media=most_media
            )
        except DataError as error:
            where = str(error).partition(" ")[0]
            raise RequestError(
                400, str(error), "invalid_value", where if where.startswith("messages") else "messages"
            ) from error
        except MediaError as error:
            raise refusal_of(error) from error  # type: ignore[misc]
        if not read.messages or read.messages[-1].role == "assistant":
            read.messages.append(ChatMessage("user", ""))
        return read

    @property
    def reported(self) -> int | None:
        """How many likeliest tokens are reported with each token; None: none is, nor the token's log-probability."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TextRequest(_Request):
    """A request of completions."""

    prompt: str | list[str] | list[int] | None = None
    logprobs: int | None = Field(None, ge=0, le=_MOST_LOGPROBS)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts: texts, or one of token ids.

        Raises:
            RequestError: If there is none, or too many.
        """
        if isinstance(self.prompt, list) and all(isinstance(part, str) for part in self.prompt):
            found: list[Any] = list(self.prompt)
        else:
            found = [] if self.prompt is None else [self.prompt]
        if not 1 <= len(found) <= _MOST_REPLIES or not all(found):
            raise RequestError(
                400, f"prompt: expected 1 to {_MOST_REPLIES} texts, not empty", "invalid_value", "prompt"
            )
        return found

    @property
    def reported(self) -> int | None:
        """See `ChatRequest`."""
        return self.logprobs


def read_request(cls: type[Any], body: bytes) -> Any:
    """A request of one of the two classes.

    Raises:
        RequestError: If the body is no JSON object, or a field has another type or range.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"the request's body is not JSON: {error}", "invalid_json") from error
    if not isinstance(content, dict):
        raise RequestError(400, "the request's body is not a JSON object", "invalid_json")
    try:
        request = cls.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        names = [part for part in first["loc"] if isinstance(part, int) or part.isidentifier()]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)[1:] or "body"
        found = json.dumps(first.get("input"), default=str)[:80]
        raise RequestError(400, f"{where}: {first['msg']}, found {found}", "invalid_value", where) from error
    request.check()
    return request


def refusal_of(error: Exception) -> RequestError | None:
    """The refusal that an exception means; None if the server is at fault."""
    if isinstance(error, MediaError):  # its source is the position in the request
        where = error.source.removesuffix("'s sound track")
        if "larger than the limit" in error.cause:
            return RequestError(413, f"{where}: {error.cause}", "too_large", where)
        return RequestError(400, f"{where} cannot be read: {error.cause}", "invalid_media", where)
    if isinstance(error, PromptError):
        return RequestError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, EngineError):
        return RequestError(502, str(error), "engine_failed")
    return RequestError(400, str(error), "invalid_value") if isinstance(error, ConfigError) else None


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
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


def report(answer: Answer) -> dict[str, Any]:
    """What OpenAI's format has no field for: what became of the media, and what the user should know."""
    media = [
        {"type": n.modality, "part": n.name, "reached": n.reached, "tokens": n.tokens, "warnings": list(n.warnings)}
        for n in answer.media
    ]
    return {"media": media, "warnings": list(answer.warnings), "dropped_messages": answer.dropped}


class Response:
    """The JSON of a reply, whole or in chunks.

    Args:
        model: The model's name.
        chat: Chat completions, else completions.
        codec: Gives the text of tokens for log-probabilities.
    """

    def __init__(self, model: str, chat: bool, codec: Codec) -> None:
        self._chat, self._codec = chat, codec
        name = "chat.completion" if chat else "text_completion"
        number = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._head = {"id": number, "object": name, "created": int(time.time()), "model": model}
        self._chunk = {**self._head, "object": "chat.completion.chunk" if chat else name}

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """All replies, complete."""
        choices = []
        for index, answer in enumerate(answers):
            said = {"role": "assistant", "content": answer.text, "refusal": None}
            choices.append(
                {
                    "index": index,
                    **({"message": said} if self._chat else {"text": answer.text}),
                    "logprobs": self._logprobs(answer),
                    "finish_reason": _reason(answer),
                }
            )
        return {**self._head, "choices": choices, "usage": usage(answers), "chatbridge": report(answers[0])}

    def opening(self, index: int) -> bytes:
        """The first chunk of a reply."""
        return self._chunked(index, {"role": "assistant", "content": ""}, None)

    def chunk(self, index: int, said: Event) -> bytes:
        """A chunk of text; or, of the answer, the last chunk, which has log-probabilities and the report."""
        if not isinstance(said, Answer):
            return self._chunked(index, {"content": str(said)}, None)
        return self._chunked(index, {}, _reason(said), self._logprobs(said), chatbridge=report(said))

    def numbers(self, answers: Sequence[Answer]) -> bytes:
        """The chunk with the numbers of tokens."""
        return event({**self._chunk, "choices": [], "usage": usage(answers)})

    def _chunked(
        self, index: int, delta: dict[str, str], finish: str | None, logprobs: Any = None, **more: Any
    ) -> bytes:
        held = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": index, **held, "logprobs": logprobs, "finish_reason": finish}
        return event({**self._chunk, "choices": [choice], **more})

    def _logprobs(self, answer: Answer) -> dict[str, Any] | None:
        if not answer.logprobs:
            return None
        rows = [
            [{"token": text, "logprob": value, "bytes": list(text.encode())} for text, value in named]
            for named in (self._named(token) for token in answer.logprobs)
        ]
        if self._chat:
            return {"content": [{**own, "top_logprobs": top} for own, *top in rows], "refusal": None}
        return {
            "tokens": [own["token"] for own, *_ in rows],
            "token_logprobs": [own["logprob"] for own, *_ in rows],
            "top_logprobs": [{entry["token"]: entry["logprob"] for entry in top} for _, *top in rows],
        }

    def _named(self, token: Any) -> list[tuple[str, float]]:
        number, own, likeliest = token
        return [(self._codec.decode([i]), float(value)) for i, value in ((number, own), *likeliest)]


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def _reason(answer: Answer) -> str:
    return "length" if answer.finish == "length" else "stop"
