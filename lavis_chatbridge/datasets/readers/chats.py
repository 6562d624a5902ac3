"""Readers of conversations: LLaVA-Instruct-150K, AVSD, the released MULTIS annotations."""

from __future__ import annotations

import os
from collections.abc import Iterator

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, json_rows, question_sample
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample

_MARKERS = ("<image>", "<video>", "<audio>")
_ROLES = {"human": "user", "gpt": "assistant"}


def llava(origin: Origin) -> Iterator[Sample]:
    """LLaVA-Instruct-150K (conversation, detail or complex reasoning). Media field: ``image`` (a file's name).

    The format's own ``<image>`` line at the start or end of the first question says where the picture goes; it is taken
    off there and nowhere else.
    """
    for number, row in enumerate(json_rows(origin.file("file"))):
        image = row.text("image")
        media = origin.locate(row.where, image=image, stem=os.path.splitext(image)[0])
        yield Sample(f"{row.text('id')}#{number}", media, turns=_turns(row, media), meta={"image_id": row.text("id")})


def avsd(origin: Origin) -> Iterator[Sample]:
    """AVSD's ``dialogs`` (DSTC7, 8 and 10): each becomes one conversation. Media field: ``image_id`` (Charades' name).

    Option ``each_turn``: one sample per question, with the turns before it, as its evaluation wants. In the test files
    an answer to be given is ``__UNDISCLOSED__``; such a sample ends with the question.
    """
    for row in json_rows(origin.file("file"), "dialogs"):
        name = row.text("image_id")
        media = origin.locate(row.where, image_id=name)
        turns: list[Message] = []
        for number, pair in enumerate(row.rows("dialog")):
            kinds = tuple(medium.kind for medium in media) if number == 0 else ()
            turns.append(Message("user", pair.text("question"), kinds))
            answer = pair.text("answer") if "answer" in pair else "__UNDISCLOSED__"
            if answer != "__UNDISCLOSED__":
                turns.append(Message("assistant", answer))
            if origin.options.get("each_turn"):
                yield Sample(f"{name}_{number}", media, turns=tuple(turns), meta={"video_id": name})
            if turns[-1].role == "user":
                break
        if turns and not origin.options.get("each_turn"):
            yield Sample(name, media, turns=tuple(turns), meta={"video_id": name})


def multis(origin: Origin) -> Iterator[Sample]:
    """The annotation files released with MULTIS: ``video_id`` or ``image_id``, and what is said about it.

    ``conversations`` become turns; ``question`` and ``answer`` (one, or lists of equal length) become one sample each;
    ``desc``, ``caption`` or ``text`` become captions. Media field: ``id``.
    """
    for number, row in enumerate(json_rows(origin.file("file"))):
        name = row.text("video_id", "image_id")
        media = origin.locate(row.where, id=name, stem=os.path.splitext(name)[0])
        sample_id, meta = f"{name}#{number}", {"media_id": name}
        if "conversations" in row:
            yield Sample(sample_id, media, turns=_turns(row, media), meta=meta)
        elif "question" in row:
            questions, answers = row.texts("question"), row.texts("answer")
            if len(questions) != len(answers):
                raise DataError(f"{row.where}: {len(questions)} questions, but {len(answers)} answers")
            for turn, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                yield question_sample(row, f"{sample_id}.{turn}", media, question, answer, meta=meta)
        elif "text" in row and "desc" not in row and "caption" not in row:
            yield Sample(sample_id, media, (", ".join(row.texts("text")),), meta=meta)
        else:
            yield Sample(sample_id, media, row.texts("desc", "caption"), meta=meta)


def _turns(row: Row, media: tuple[Medium, ...]) -> tuple[Message, ...]:
    turns: list[Message] = []
    for number, item in enumerate(row.rows("conversations")):
        speaker, expected = item.text("from"), "gpt" if number % 2 else "human"
        if speaker != expected:
            raise DataError(
                f"{item.where}: from is {shown(speaker)}, expected {expected!r}: they take turns, human first"
            )
        text = item.text("value")
        if number == 0:
            text = _without_marker(text)
        kinds = tuple(medium.kind for medium in media) if number == 0 else ()
        turns.append(Message(_ROLES[speaker], text, kinds))
    if len(turns) % 2:
        turns.pop()  # a question that nobody answers teaches nothing
    if not turns:
        raise DataError(f"{row.where}: conversations hold no question with its answer")
    return tuple(turns)


def _without_marker(text: str) -> str:
    for marker in _MARKERS:
        text = text.removeprefix(f"{marker}\n").removesuffix(f"\n{marker}")
    return text.strip()
