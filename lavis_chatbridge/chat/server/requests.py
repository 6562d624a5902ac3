"""From the JSON of a chat completion to a checked request; it opens nothing and knows no model.

Names and meanings are those of OpenAI's API reference (chat completions), with ``video_url`` and ``audio_url`` parts
beside ``image_url`` and ``input_audio``, and one setting more: ``hear_videos``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lavis_chatbridge.chat.server.errors import RequestError
from lavis_chatbridge.models.decoding import Sampling
from lavis_chatbridge.prompting.pieces import Modality

_URL_PARTS: dict[str, Modality] = {"image_url": "image", "video_url": "video", "audio_url": "audio"}
_SILENT_FIELDS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
)
"""Known to OpenAI's clients, and without meaning here."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are accepted with the value that changes nothing."""
_MOST_STOPS, _LONGEST_STOP = 4, 100


@dataclass(frozen=True)
class Attachment:
    """A medium of a request: a URL, or (``input_audio``) bare base64 in ``data``."""

    kind: Modality
    url: str = ""
    data: str = ""
    where: str = ""


@dataclass
class Message:
    """What one side said."""

    role: str
    text: str
    media: list[Attachment] = field(default_factory=list)


@dataclass(frozen=True)
class ChatRequest:
    """A checked request.

    Attributes:
        model: The model's name.
        system: Words in front of the conversation.
        messages: They alternate, user first and last.
        sampling: How the reply is chosen.
        stream: Whether the reply is sent as it comes.
        usage: Whether a stream ends with the numbers of tokens.
        hear_videos: Whether videos are heard too.
    """

    model: str
    system: str
    messages: tuple[Message, ...]
    sampling: Sampling
    stream: bool = False
    usage: bool = False
    hear_videos: bool = True

    @property
    def media(self) -> list[Attachment]:
        """All media, in order."""
        return [medium for message in self.messages for medium in message.media]


def read_request(body: Any, max_new_tokens: int, max_media: int) -> ChatRequest:
    """Check the JSON of a chat completion.

    Args:
        body: The decoded JSON.
        max_new_tokens: The most tokens of a reply; more are cut down to it.
        max_media: Media of one request.

    Raises:
        RequestError: If something is wrong with it.
    """
    if not isinstance(body, dict):
        raise RequestError(400, "the request's body is a JSON object")
    _check_fields(body)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise _wrong("model", "a model's name", model)
    system, messages = _messages(body.get("messages"))
    stream = _flag(body, "stream", False)
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise _wrong("stream_options", "an object", options)
    request = ChatRequest(
        model,
        system,
        tuple(messages),
        _sampling(body, max_new_tokens),
        stream,
        _flag(options or {}, "include_usage", False),
        _flag(body, "hear_videos", True),
    )
    if len(request.media) > max_media:
        raise RequestError(
            400,
            f"the request brings {len(request.media)} media, the limit is {max_media}",
            "too_many_media",
            "messages",
        )
    return request


_FIELDS = frozenset(
    {"model", "messages", "stream", "stream_options", "temperature", "top_p", "stop", "seed", "hear_videos"}
    | {"max_tokens", "max_completion_tokens"}
)


def _check_fields(body: Mapping[str, Any]) -> None:
    for name, value in body.items():
        if name in _FIELDS or name in _SILENT_FIELDS or value is None:
            continue
        if name not in _NEUTRAL:
            raise RequestError(400, f"unknown field {_short(name)}", "unknown_parameter", str(name)[:80])
        if value not in _NEUTRAL[name]:
            raise RequestError(
                400, f"{name} = {_short(value)} is not supported by this server", "unsupported_parameter", name
            )


def _messages(given: Any) -> tuple[str, list[Message]]:
    """The words in front, and the messages, neighbours of one role made one."""
    if not isinstance(given, list) or not given:
        raise _wrong("messages", "a list of messages, not empty", given)
    system: list[str] = []
    messages: list[Message] = []
    for i, entry in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(entry, dict):
            raise _wrong(where, "an object", entry)
        message = _message(entry, where)
        if message.role in ("system", "developer"):
            if messages:
                raise RequestError(400, f"{where}: a system message stands in front of all others", param=where)
            system.append(message.text)
        elif messages and messages[-1].role == message.role:
            messages[-1].text = "\n".join(filter(None, (messages[-1].text, message.text)))
            messages[-1].media += message.media
        else:
            messages.append(message)
    if not messages or messages[0].role != "user":
        raise RequestError(400, "messages: the conversation begins with a message of the user", param="messages")
    if messages[-1].role != "user":
        raise RequestError(400, "messages: the last message is the user's, which is answered", param="messages")
    return "\n".join(system), messages


def _message(entry: Mapping[str, Any], where: str) -> Message:
    role, content = entry.get("role"), entry.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise RequestError(
            400, f"{where}.role is {_short(role)}, expected system, user or assistant", "invalid_value", f"{where}.role"
        )
    message = Message(role, "")
    if isinstance(content, str):
        message.text = content
    elif isinstance(content, list):
        texts = []
        for j, part in enumerate(content):
            found = _part(part, f"{where}.content[{j}]")
            if isinstance(found, str):
                texts.append(found)
            else:
                message.media.append(found)
        message.text = "\n".join(texts)
    else:
        raise _wrong(f"{where}.content", "a text or a list of parts", content)
    if message.media and role != "user":
        raise RequestError(400, f"{where}: only the user's messages bring media", param=where)
    if not message.text.strip() and not message.media and role == "user":
        raise RequestError(400, f"{where} is empty", param=where)
    return message


def _part(part: Any, where: str) -> str | Attachment:
    if not isinstance(part, dict):
        raise _wrong(where, "an object with a type", part)
    kind = part.get("type")
    held = part.get(kind) if isinstance(kind, str) else None
    if kind == "text":
        if not isinstance(held, str):
            raise _wrong(f"{where}.text", "a text", held)
        return held
    if isinstance(kind, str) and kind in _URL_PARTS:
        url = held.get("url") if isinstance(held, dict) else held
        if not isinstance(url, str) or not url:
            raise _wrong(f"{where}.{kind}.url", "a URL", url)
        return Attachment(_URL_PARTS[kind], url=url, where=where)
    if kind == "input_audio":
        data = held.get("data") if isinstance(held, dict) else None
        if not isinstance(data, str) or not data:
            raise _wrong(f"{where}.input_audio.data", "base64", data)
        return Attachment("audio", data=data, where=where)
    known = ", ".join(["text", "input_audio", *_URL_PARTS])
    raise RequestError(
        400, f"{where}.type is {_short(kind)}, expected one of {known}", "invalid_value", f"{where}.type"
    )


def _sampling(body: Mapping[str, Any], most: int) -> Sampling:
    asked = body.get("max_completion_tokens")
    name = "max_tokens" if asked is None else "max_completion_tokens"
    tokens = _number(body, name, 1, 1 << 31, whole=True)
    seed = _number(body, "seed", -(1 << 63), (1 << 63) - 1, whole=True)
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > _MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise _wrong("stop", f"a text or a list of at most {_MOST_STOPS} texts", stop)
    if any(len(s) > _LONGEST_STOP for s in stops):
        raise RequestError(400, f"stop: a text is longer than {_LONGEST_STOP} characters", param="stop")
    usual = Sampling()
    temperature = _number(body, "temperature", 0.0, 2.0)
    # A nucleus of nothing still holds the likeliest token.
    top_p = max(_number(body, "top_p", 0.0, 1.0) or 0.0, 1e-6) if body.get("top_p") is not None else usual.top_p
    return Sampling(
        max_new_tokens=min(most, usual.max_new_tokens if tokens is None else int(tokens)),
        temperature=usual.temperature if temperature is None else temperature,
        top_p=top_p,
        seed=None if seed is None else int(seed),
        stop=tuple(stops),
    )


def _number(body: Mapping[str, Any], name: str, least: float, most: float, whole: bool = False) -> Any:
    value = body.get(name)
    if value is None:
        return None
    right = isinstance(value, int) if whole else isinstance(value, (int, float))
    if not right or isinstance(value, bool) or not least <= value <= most:
        kind = "a whole number" if whole else "a number"
        raise _wrong(name, f"{kind} from {least} to {most}", value)
    return value


def _flag(body: Mapping[str, Any], name: str, usual: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise _wrong(name, "true or false", value)
    return usual if value is None else value


def _wrong(where: str, expected: str, found: Any) -> RequestError:
    return RequestError(400, f"{where} is {_short(found)}, expected {expected}", "invalid_value", where)


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return "missing" if value is None else text[:60]
