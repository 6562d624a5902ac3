"""Reads a batch of LAVIS's tasks and data sets into prompts and media.

``samples`` is a dict. ``image``, ``video`` and ``audio`` are tensors with a batch axis, or lists with one medium or a
list of media per sample. ``pieces`` are the prompts; without them, a template makes prompts from LAVIS's text keys. An
inconsistent batch raises a `PromptError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.media.types import AudioClips, EncodedMedium
from lavis_chatbridge.models.templates import Template
from lavis_chatbridge.prompting.conversation import (
    END_OF_TURN,
    HUMAN,
    MODALITIES,
    Message,
    Modality,
    Piece,
    Text,
    alignment_prompt,
    context_of,
)

Medium: TypeAlias = Tensor | AudioClips | EncodedMedium
Media: TypeAlias = dict[Modality, list[list[Medium]]]

_BATCH: dict[Modality, str] = {"image": "[B, 3, H, W]", "video": "[B, T, 3, H, W]", "audio": "[B, T, F, M]"}
"""The shape of a modality's tensor: ``F`` frames of ``M`` mel bins in each of a sound's ``T`` clips."""


def media_of(samples: Mapping[str, Any]) -> Media:
    """Modality -> for each sample, the list of its media."""
    media = {name: _by_sample(name, samples[name]) for name in MODALITIES if samples.get(name) is not None}
    sizes = {modality: len(listed) for modality, listed in media.items()}
    if len(set(sizes.values())) > 1:
        raise PromptError(f"the modalities of a batch have different numbers of samples: {sizes}")
    return media


def training_prompts(samples: Mapping[str, Any], media: Media, template: Template) -> list[list[Piece]]:
    """Each sample's prompt with its targets.

    The first of these that the batch has: ``pieces``; ``text_input`` and an answer (``text_output`` or ``answer``) as a
    conversation; ``text_input`` alone as the caption of the media.
    """
    if samples.get("pieces") is not None:
        return _given_prompts(samples["pieces"], media, template)
    if samples.get("text_input") is None:
        raise PromptError("a training batch needs 'pieces' or 'text_input'")
    questions = _user_messages(samples["text_input"], media)
    answers = _answers(samples)
    if answers is None:
        return [alignment_prompt(message.media, message.text) for message in questions]
    if len(answers) != len(questions):
        raise PromptError(f"{len(questions)} questions in 'text_input', but {len(answers)} answers")
    replies = [Message("assistant", answer) for answer in answers]
    return [template.prompt(turns) for turns in zip(questions, replies, strict=True)]


def contexts(samples: Mapping[str, Any], media: Media, template: Template, question: Any = None) -> list[list[Piece]]:
    """Each sample's prompt for the model to continue.

    The first of these that is given: ``pieces`` up to the last target; ``question``, ``prompt`` or ``text_input`` as
    the first message of a conversation; only the media, to be captioned.
    """
    if samples.get("pieces") is not None:
        return [context_of(pieces) for pieces in _given_prompts(samples["pieces"], media, template)]
    given = question or samples.get("prompt") or samples.get("text_input")
    if given:
        return [template.prompt([message], generate=True) for message in _user_messages(given, media)]
    if not media:
        raise PromptError("there is nothing to answer: the batch has neither text nor media")
    return [context_of(alignment_prompt(message.media, "")) for message in _user_messages("", media)]


def _by_sample(modality: Modality, given: Any) -> list[list[Medium]]:
    if isinstance(given, Tensor):
        if given.dim() < len(_BATCH[modality].split(",")):
            raise PromptError(
                f"'{modality}' is a tensor of shape {list(given.shape)}, expected a batch {_BATCH[modality]}: "
                f"{modality}.unsqueeze(0) makes a batch of one"
            )
        return [[medium] for medium in given]
    if not isinstance(given, (list, tuple)) or isinstance(given, Medium):
        raise PromptError(f"'{modality}' of a batch is a {type(given).__name__}, expected a tensor or a list by sample")
    media = [[one] if isinstance(one, Medium) else list(one or ()) for one in given]
    for i, listed in enumerate(media):
        if wrong := [type(medium).__name__ for medium in listed if not isinstance(medium, Medium)]:
            raise PromptError(f"'{modality}' of sample {i} contains a {wrong[0]}, expected a processed medium")
    return media


def _user_messages(texts: str | Sequence[Any], media: Media) -> list[Message]:
    """One message per sample, its media in the order image, video, audio; a single string is used for all samples."""
    size = max(map(len, media.values()), default=1)
    listed = [texts] * size if isinstance(texts, str) else [str(text) for text in texts]
    _check_size(len(listed), media, "texts")
    shown = [tuple(modality for modality in media for _ in media[modality][i]) for i in range(len(listed))]
    return [Message("user", text, modalities) for text, modalities in zip(listed, shown, strict=True)]


def _answers(samples: Mapping[str, Any]) -> list[str] | None:
    """One answer per question; with LAVIS's several weighted answers (``n_answers``), the one of largest weight."""
    given = next((samples[key] for key in ("text_output", "answer") if samples.get(key) is not None), None)
    if given is None:
        return None
    answers = [given] if isinstance(given, str) else [str(answer) for answer in given]
    if samples.get("n_answers") is None:
        return answers
    weighted = zip([float(w) for w in samples.get("weight", [1.0] * len(answers))], answers, strict=True)
    groups = [[next(weighted) for _ in range(int(count))] for count in samples["n_answers"]]
    return [max(group, key=lambda pair: pair[0])[1] for group in groups]


def _given_prompts(prompts: Sequence[Sequence[Piece]], media: Media, template: Template) -> list[list[Piece]]:
    """The batch's own prompts; a `PromptError` if they were made for another template."""
    _check_size(len(prompts), media, "prompts")
    first = next((piece for pieces in prompts for piece in pieces[:1] if isinstance(piece, Text)), Text(""))
    if template.name != "human_assistant" and first.text.startswith(END_OF_TURN + HUMAN):
        raise PromptError(
            f"model.template is {template.name}, but the batch's prompts are worded as human_assistant: call "
            "set_template(model.template) of the data sets (this package's runner does)"
        )
    return [list(pieces) for pieces in prompts]


def _check_size(count: int, media: Media, what: str) -> None:
    if not count:
        raise PromptError("the batch is empty")
    if any(len(listed) != count for listed in media.values()):
        size = len(next(iter(media.values())))
        raise PromptError(f"the batch has {count} {what}, but media for {size} samples")
