"""Readers of conversations: LLaVA-Instruct-150K, AVSD, the released MULTIS annotations."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, question_sample, stem_of
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, modalities_of

UNDISCLOSED = "__UNDISCLOSED__"
_MARKER = re.compile(r"\n?<(?:image|video|audio)>\n?")
_SPEAKERS = (("human", "user"), ("gpt", "assistant"))


def llava(origin: Origin) -> Iterator[Sample]:
    """LLaVA-Instruct-150K (conversation, detail or complex reasoning). Media fields: ``image``, ``stem``.

    ``<image>`` markers are removed. Option ``messages``: cut conversations after this number of messages.
    """
    for number, row in enumerate(origin.objects()):
        image, name = row.name("image"), row.name("id")
        media = origin.locate(row.where, image=image, stem=stem_of(image))
        turns = _turns(row, media, origin.options.get("messages"))
        yield Sample(f"{name}#{number}", media, turns=turns, meta={"image_id": name})


def avsd(origin: Origin) -> Iterator[Sample]:
    """AVSD's ``dialogs`` (DSTC7, 8 and 10): each becomes one conversation. Media field: ``image_id`` (Charades' name).

    Option ``each_turn``: one sample per question, with the turns before it. Option ``undisclosed``: accept the answer
    ``__UNDISCLOSED__``; such a sample ends with the question and cannot be scored.
    """
    for row in origin.objects("dialogs"):
        name = row.name("image_id")
        media = origin.locate(row.where, image_id=name)
        turns: list[Message] = []
        conversations = []
        for number, pair in enumerate(row.rows("dialog")):
            turns.append(Message("user", pair.text("question"), () if turns else modalities_of(media)))
            answer = pair.text("answer") if "answer" in pair else UNDISCLOSED
            if answer != UNDISCLOSED:
                turns.append(Message("assistant", answer))
            elif not origin.options.get("undisclosed"):
                raise DataError(
                    f"{pair.where}: the answer is {UNDISCLOSED}: this file has no labels to score against; use "
                    "lbl_test_set4DSTC7-AVSD.json, or set options: {undisclosed: true} to predict without scores"
                )
            conversations.append((number, tuple(turns)))
            if turns[-1].role == "user":
                break
        each = bool(origin.options.get("each_turn"))
        for number, so_far in conversations if each else conversations[-1:]:
            meta = {"video_id": name, "turn": number}
            yield Sample(f"{name}_{number}" if each else name, media, turns=so_far, meta=meta)


def multis(origin: Origin) -> Iterator[Sample]:
    """The annotation files released with MULTIS: ``video_id`` or ``image_id``, and texts about it.

    ``conversations`` become turns; ``question`` and ``answer`` (one, or lists of equal length) become one sample each;
    ``desc``, ``caption`` or ``text`` become captions. Media fields: ``id``, ``stem``. Option ``messages``: cut
    conversations after this number (the original uses 8 for conversations, 2 for details and reasoning).
    """
    for number, row in enumerate(origin.objects()):
        name = row.name("video_id", "image_id")
        media = origin.locate(row.where, id=name, stem=stem_of(name))
        sample_id, meta = f"{name}#{number}", {"media_id": name}
        if "conversations" in row:
            yield Sample(sample_id, media, turns=_turns(row, media, origin.options.get("messages")), meta=meta)
        elif "question" in row:
            questions, answers = row.texts("question"), row.texts("answer")
            if len(questions) != len(answers):
                raise DataError(f"{row.where}: {len(questions)} questions, but {len(answers)} answers")
            for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                yield question_sample(f"{sample_id}.{turn}", media, question, answer, meta=meta)
        elif "desc" in row or "caption" in row:
            yield Sample(sample_id, media, row.texts("desc", "caption"), meta=meta)
        else:
            yield Sample(sample_id, media, (", ".join(row.texts("text")),), meta=meta)


def _turns(row: Row, media: tuple[Medium, ...], most: int | None) -> tuple[Message, ...]:
    items = row.rows("conversations")[:most]
    turns: list[Message] = []
    for item in items[: len(items) // 2 * 2]:  # training needs a reply to every question
        speaker, role = _SPEAKERS[len(turns) % 2]
        if (found := item.text("from")) != speaker:
            raise DataError(f"{item.where}: from is {shown(found)}, expected {speaker!r}: they alternate, human first")
        turns.append(Message(role, _MARKER.sub("", item.name("value")), () if turns else modalities_of(media)))
    if not turns:
        raise DataError(f"{row.where}: conversations contain no question with its answer")
    return tuple(turns)
