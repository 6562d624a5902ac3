"""Requests of lmms-eval in ChatBridge's terms: messages with their media, and how answers are decoded.

lmms-eval passes media in the form of its data sets: paths, bytes, Pillow images, arrays, dictionaries of the
``datasets`` library. This module finds each one's modality; it does not import lmms-eval.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, Medium
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media.container import modality_of
from lavis_chatbridge.media.source import is_file
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting.conversation import MODALITIES

_CUTS = ("video_start", "video_end", "start_time", "end_time")
_FIELDS = ("bytes", "path", "url", "video", "image", "audio")


def question(text: str, visuals: Any, hear_videos: bool = False) -> list[ChatMessage]:
    """A question of lmms-eval's plain tasks: media first, as ChatBridge was trained, without markers ``<image>``."""
    media = [medium_of(visual) for visual in _flat(visuals)]
    return [ChatMessage("user", text.replace("<image>", "").strip(), _heard(media, hear_videos))]


def conversation(messages: Iterable[Mapping[str, Any]], hear_videos: bool = False) -> list[ChatMessage]:
    """The messages of lmms-eval's chat tasks; a system prompt opens the first, neighbours of one role are joined."""
    talk = Conversation()
    for message in messages:
        role, content = message["role"], message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        text = "\n".join(str(part["text"]) for part in parts if part["type"] == "text").strip()
        media = [medium_of(part["url"], part["type"], part) for part in parts if part["type"] != "text"]
        if role == "system":
            talk.system = f"{talk.system}\n{text}".strip()
        else:
            talk.add(ChatMessage(role, text, _heard(media, hear_videos)))
    roles = [said.role for said in talk.messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"] or talk.messages[0] == ChatMessage("user", ""):
        raise DataError(f"messages of the roles {roles}: expected user ... user, with assistant between them")
    first, *rest = talk.messages
    return [ChatMessage("user", f"{talk.system}\n{first.text}".strip(), first.media), *rest]


def medium_of(given: Any, modality: str = "", more: Mapping[str, Any] | None = None) -> Medium:
    """One medium, from any form: see the module's docstring; or a torchcodec decoder of sound.

    ``modality`` is the type in a chat message (lmms-eval calls any dictionary a video), ``more`` its other fields.
    """
    fields = {**(more or {}), **(given if isinstance(given, Mapping) else {})}
    if cuts := [key for key in _CUTS if fields.get(key) is not None]:
        raise MediaError(_name(given), f"a part of a video ({cuts[0]}) is not supported; cut the file beforehand")
    if hasattr(given, "get_all_samples"):
        samples = given.get_all_samples()
        return Medium("audio", wav(samples.data.numpy(), int(samples.sample_rate)))
    if not isinstance(given, Mapping):
        if modality in MODALITIES:
            return Medium(modality, given)  # type: ignore[arg-type]
        if is_file(given):
            return Medium(modality_of(given), given)
        if isinstance(given, (np.ndarray, Image)):
            return Medium("video" if getattr(given, "ndim", 3) == 4 else "image", given)
        raise MediaError(_name(given), f"a {type(given).__name__} is not a medium that ChatBridge knows")
    if given.get("array") is not None:
        return Medium("audio", wav(np.asarray(given["array"]), int(given["sampling_rate"])))
    inner = next((given[key] for key in _FIELDS if given.get(key)), None)
    if inner is None:
        raise MediaError(_name(given), f"a medium with the fields {sorted(given)}, none of which is known")
    named = str(given.get("type") or modality)
    return medium_of(inner, named if named in MODALITIES else "")


def decoding(kwargs: Mapping[str, Any]) -> Sampling:
    """A task's ``generation_kwargs``; other keys are left out."""
    temperature = float(kwargs.get("temperature") or 0.0) if kwargs.get("do_sample", True) else 0.0
    until = kwargs.get("until") or ()
    return Sampling(
        max_new_tokens=int(kwargs.get("max_new_tokens") or kwargs.get("max_gen_toks") or 128),  # lmms-eval's default
        min_new_tokens=int(kwargs.get("min_new_tokens") or 1),
        temperature=temperature,
        top_p=float(kwargs.get("top_p") or 1.0),
        num_beams=1 if temperature else int(kwargs.get("num_beams") or 1),
        repetition_penalty=float(kwargs.get("repetition_penalty") or 1.0),
        length_penalty=float(kwargs.get("length_penalty") or 1.0),
        stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
    )


def batches(keys: Sequence[str], lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Numbers of requests in batches: only those of one key together, the longest first."""
    for key in dict.fromkeys(keys):
        numbers = sorted((i for i, other in enumerate(keys) if other == key), key=lambda i: -lengths[i])
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def wav(samples: np.ndarray, rate: int) -> bytes:
    """Samples ``[S]`` or ``[C,S]`` as a file that states its rate."""
    import soundfile

    file = io.BytesIO()
    soundfile.write(file, samples.T.astype(np.float32), rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def _heard(media: Sequence[Medium], hear_videos: bool) -> tuple[Medium, ...]:
    """The media; with ``hear_videos`` each video is followed by its own sound, unless there are sounds already."""
    tracks = hear_videos and not any(medium.modality == "audio" for medium in media)
    return tuple(heard for medium in media for heard in medium.with_track(tracks))


def _flat(visuals: Any) -> Iterator[Any]:
    if isinstance(visuals, (list, tuple)):
        for visual in visuals:
            yield from _flat(visual)
    elif visuals is not None:
        yield visuals


def _name(given: Any) -> str:
    path = given.get("path") or given.get("url") if isinstance(given, Mapping) else given
    return str(path) if is_file(path) and not isinstance(path, bytes) else f"a {type(given).__name__}"
