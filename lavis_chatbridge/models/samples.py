"""Reads a batch of LAVIS's tasks and data sets into prompts and media.

``samples`` is a dict. ``image``, ``video`` and ``audio`` hold a tensor with a batch axis, or a list with a medium or a
list of media for each sample (a medium is a tensor, ``AudioClips`` or ``EncodedMedium``). ``pieces`` are the prompts;
without them a template makes prompts from LAVIS's text keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

from torch import Tensor

from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.media.types import AudioClips, EncodedMedium
from lavis_chatbridge.models.templates import Template
from lavis_chatbridge.prompting import Message, Modality, Piece, Slot, Text, alignment_prompt, context_of
from lavis_chatbridge.prompting.conversation import END_OF_TURN, HUMAN
from lavis_chatbridge.prompting.pieces import MODALITIES

Medium: TypeAlias = Tensor | AudioClips | EncodedMedium
Media: TypeAlias = dict[Modality, list[list[Medium]]]

_BATCH: dict[Modality, str] = {"image": "[B, 3, H, W]", "video": "[B, T, 3, H, W]", "audio": "[B, T, F, M]"}
"""The shape of a modality's tensor: ``F`` frames of ``M`` mel bins in each of a sound's ``T`` clips."""


def media_of(samples: Mapping[str, Any]) -> Media:
    """Each modality's media, by sample.

    Raises:
        PromptError: If modalities have different numbers of samples, or a value is no processed medium.
    """
    media: Media = {
        modality: _by_sample(modality, samples[modality])
        for modality in MODALITIES
        if samples.get(modality) is not None
    }
    sizes = {modality: len(listed) for modality, listed in media.items()}
    if len(set(sizes.values())) > 1:
        raise PromptError(f"the media of a batch are for different numbers of samples: {sizes}")
    return media


def training_prompts(samples: Mapping[str, Any], media: Media, template: Template) -> list[list[Piece]]:
    """Each sample's prompt with its targets.

    It is ``pieces``; or, with an answer (``text_output`` or ``answer``), a conversation that ``text_input`` opens; or,
    with ``text_input`` alone, the media and that caption.

    Raises:
        PromptError: If there is no text, or texts and media are of different numbers.
    """
    if samples.get("pieces") is not None:
        return _checked([_worded(pieces, template) for pieces in samples["pieces"]], media)
    texts = _texts(samples.get("text_input"), _size(media))
    answers = _answers(samples)
    if texts is None:
        raise PromptError("a training batch needs 'pieces' or 'text_input'")
    brought = _modalities(media, len(texts))
    if answers is None:
        return _checked([alignment_prompt(k, text) for k, text in zip(brought, texts, strict=True)], media)
    if len(answers) != len(texts):
        raise PromptError(f"{len(texts)} questions in 'text_input', but {len(answers)} answers")
    conversations = [
        template.prompt([Message("user", text, k), Message("assistant", answer)])
        for k, text, answer in zip(brought, texts, answers, strict=True)
    ]
    return _checked(conversations, media)


def contexts(samples: Mapping[str, Any], media: Media, template: Template, question: Any = None) -> list[list[Piece]]:
    """Each sample's prompt for the model to continue.

    It is ``pieces`` up to the last target; or a conversation that ``question``, ``prompt`` or ``text_input`` opens; or,
    without any of them, the media alone, for a caption.

    Raises:
        PromptError: If the batch is empty, or texts and media are of different numbers.
    """
    if samples.get("pieces") is not None:
        return _checked([context_of(_worded(pieces, template)) for pieces in samples["pieces"]], media)
    given = next((g for g in (question, samples.get("prompt"), samples.get("text_input")) if g), None)
    size = _size(media)
    texts = _texts(given, size)
    if texts is None:
        if not size:
            raise PromptError("there is nothing to answer: the batch holds neither text nor media")
        return [list(alignment_prompt(k, "")[:-1]) for k in _modalities(media, size)]
    brought = _modalities(media, len(texts))
    turns = [[Message("user", text, k)] for k, text in zip(brought, texts, strict=True)]
    return _checked([template.prompt(t, generate=True) for t in turns], media)


def is_alignment(context: Sequence[Piece]) -> bool:
    """Whether a context has media only, so that a caption follows."""
    return all(isinstance(piece, Slot) for piece in context)


def _by_sample(modality: Modality, given: Any) -> list[list[Medium]]:
    if isinstance(given, Tensor):
        if given.dim() < len(_BATCH[modality].split(",")):
            raise PromptError(
                f"'{modality}' is a tensor of shape {list(given.shape)}, expected a batch {_BATCH[modality]}: "
                f"{modality}.unsqueeze(0) makes a batch of a single one"
            )
        return [[medium] for medium in given]
    if isinstance(given, (AudioClips, EncodedMedium)) or not isinstance(given, (list, tuple)):
        raise PromptError(f"'{modality}' of a batch is a {type(given).__name__}, expected a tensor or a list by sample")
    media: list[list[Medium]] = []
    for i, of_sample in enumerate(given):
        listed = [of_sample] if isinstance(of_sample, (Tensor, AudioClips, EncodedMedium)) else list(of_sample or ())
        wrong = [medium for medium in listed if not isinstance(medium, (Tensor, AudioClips, EncodedMedium))]
        if wrong:
            raise PromptError(
                f"'{modality}' of sample {i} holds a {type(wrong[0]).__name__}, expected a processed medium"
            )
        media.append(listed)
    return media


def _size(media: Media) -> int | None:
    return next((len(listed) for listed in media.values()), None)


def _modalities(media: Media, size: int) -> list[tuple[Modality, ...]]:
    """Each sample's media in the order image, video, audio."""
    if _size(media) not in (None, size):
        raise PromptError(f"the batch has {size} texts, but media for {_size(media)} samples")
    return [
        tuple(modality for modality in MODALITIES for _ in (media[modality][i] if modality in media else ()))
        for i in range(size)
    ]


def _texts(given: Any, size: int | None) -> list[str] | None:
    """One text for each sample; a single string is for all."""
    if given is None:
        return None
    return [given] * (1 if size is None else size) if isinstance(given, str) else [str(text) for text in given]


def _answers(samples: Mapping[str, Any]) -> list[str] | None:
    """One answer for each question; of LAVIS's several weighted ones (``n_answers``), the heaviest."""
    given = next((samples[key] for key in ("text_output", "answer") if samples.get(key) is not None), None)
    if given is None:
        return None
    answers = [given] if isinstance(given, str) else [str(answer) for answer in given]
    counts = samples.get("n_answers")
    if counts is None:
        return answers
    weights = [float(w) for w in cast(Any, samples.get("weight", [1.0] * len(answers)))]
    chosen, start = [], 0
    for count in (int(c) for c in counts):
        chosen.append(answers[max(range(start, start + count), key=lambda i: weights[i])])
        start += count
    return chosen


def _worded(pieces: Sequence[Piece], template: Template) -> list[Piece]:
    """A batch's own prompt, unless it is worded for another template."""
    first = pieces[0] if pieces else None
    if template.name != "human_assistant" and isinstance(first, Text) and first.text.startswith(END_OF_TURN + HUMAN):
        raise PromptError(
            f"model.template is {template.name}, but the batch's prompts are worded as human_assistant: call "
            "set_template(model.template) of the data sets (this package's runner does)"
        )
    return list(pieces)


def _checked(prompts: list[list[Piece]], media: Media) -> list[list[Piece]]:
    if _size(media) not in (None, len(prompts)):
        raise PromptError(f"the batch has {len(prompts)} prompts, but media for {_size(media)} samples")
    if not prompts:
        raise PromptError("the batch is empty")
    return prompts
