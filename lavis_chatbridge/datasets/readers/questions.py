"""Readers of questions and conversations.

Questions: VQAv2, OKVQA, GQA, Visual Genome, MSRVTT-QA, MSVD-QA, MUSIC-AVQA.
Conversations: LLaVA-Instruct-150K, AVSD, the released MULTIS annotations.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TypeAlias

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import (
    Origin,
    Row,
    object_rows,
    question_sample,
    read_object,
    stem_of,
    table_rows,
)
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, modalities_of

_PLACEHOLDER = re.compile(r"<[^<>]*>")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_UNDISCLOSED = "__UNDISCLOSED__"
_MARKER = re.compile(r"\n?<(?:image|video|audio)>\n?")
_SPEAKERS = (("human", "user"), ("gpt", "assistant"))
_Label: TypeAlias = tuple[str | None, tuple[str, ...], dict[str, str]]  # answer for training, all answers, types


def vqav2(origin: Origin) -> Iterator[Sample]:
    """VQAv2 and OKVQA: ``questions`` and, except for test splits, ``annotations`` with ten answers per question.

    Training uses ``multiple_choice_answer``; scores use all ten. ``meta.type`` is the type of answer, as in VQAv2's
    official evaluator (OKVQA: the name of the question type); ``meta.question_type`` is the type of question. Media
    fields: ``image_id``, ``data_subtype`` (``train2014``).
    """
    labels: dict[int, _Label] = {}
    for path in origin.files.get("annotations", ()):
        content = read_object(path)
        names = content.values.get("question_types") or {}
        labels |= {row.whole("question_id"): _label(row, names) for row in content.rows("annotations")}
    for path in origin.paths("questions"):
        content = read_object(path)
        subtype = content.values.get("data_subtype") or ""
        for row in content.rows("questions"):
            number, image = row.whole("question_id"), row.whole("image_id")
            if "annotations" in origin.files and number not in labels:
                raise DataError(f"{row.where}: question {number} has no annotation")
            answer, answers, types = labels.get(number, (None, (), {}))
            meta = {"question_id": number, "image_id": image} | types
            media = origin.locate(row.where, image_id=image, data_subtype=subtype)
            yield question_sample(str(number), media, row.text("question"), answer, answers=answers, meta=meta)


def _label(row: Row, names: Mapping[str, str]) -> _Label:
    """The answer for training, all answers, and the types of a question."""
    # one of the ten answers may be empty; the official evaluator treats it like any other
    every = tuple(answer.text("answer", blank=True) for answer in row.rows("answers")) if "answers" in row else ()
    if every and "multiple_choice_answer" not in row:
        best = Counter(every).most_common(1)[0][0]
    else:
        best = row.text("multiple_choice_answer")
    types = {"type": row.text("answer_type")} if "answer_type" in row else {}
    if "question_type" in row:
        question_type = row.text("question_type")
        types["question_type"] = str(names.get(question_type, question_type))
        if names:  # OKVQA: all answers have the same type
            types["type"] = types["question_type"]
    return best, every or (best,), types


def visual_genome(origin: Origin) -> Iterator[Sample]:
    """Visual Genome's ``question_answers.json``; ``images`` (``image_data.json``) has the folder of each image.

    Media fields: ``image_id``, ``folder`` (``VG_100K`` or ``VG_100K_2``, from the image's URL).
    """
    folders = {}
    for row in (row for path in origin.files.get("images", ()) for row in object_rows(path)):
        folders[row.whole("image_id", "id")] = os.path.basename(os.path.dirname(row.text("url")))
    for row in (row for path in origin.paths("questions") for row in object_rows(path)):
        for pair in row.rows("qas"):
            image = pair.whole("image_id") if "image_id" in pair else row.whole("id", "image_id")
            media = origin.locate(pair.where, image_id=image, folder=folders.get(image, "VG_100K"))
            answer, meta = pair.text("answer").rstrip("."), {"image_id": image}
            yield question_sample(pair.text("qa_id"), media, pair.text("question"), answer, meta=meta)


def msrvtt_qa(origin: Origin) -> Iterator[Sample]:
    """MSRVTT-QA and MSVD-QA: a list of questions. Media field: ``video_id``, a number (``video7.mp4``).

    MSVD-QA numbers its videos; with ``mapping`` (its ``youtube_mapping.txt``, lines of ``NAME vid7``) the media field
    ``name`` is the published file's name.
    """
    names: dict[str, str] = {}
    for path in origin.files.get("mapping", ()):
        names |= {row.text("number"): row.name("name") for row in table_rows(path, " ", ("name", "number"))}
    purpose = "questions" if "questions" in origin.files else "file"
    for row in (row for path in origin.paths(purpose) for row in object_rows(path)):
        video = row.whole("video_id")
        if names and f"vid{video}" not in names:
            raise DataError(f"{row.where}: video {video} is not in {', '.join(origin.paths('mapping'))}")
        media = origin.locate(row.where, video_id=video, **({"name": names[f"vid{video}"]} if names else {}))
        meta = {"video_id": video}
        yield question_sample(row.text("id"), media, row.text("question"), row.text("answer"), meta=meta)


def gqa(origin: Origin) -> Iterator[Sample]:
    """GQA: an object of question number -> question, as in ``testdev_balanced_questions.json``.

    ``types.structural`` becomes ``meta.type``. Media field: ``image_id``.
    """
    for path in origin.every_file:
        for number, row in read_object(path).entries():
            image = row.name("imageId")
            types = row.values.get("types") or {}
            meta = {"image_id": image} | ({"type": types["structural"]} if "structural" in types else {})
            media = origin.locate(row.where, image_id=image)
            yield question_sample(number, media, row.text("question"), row.text("answer"), meta=meta)


def music_avqa(origin: Origin) -> Iterator[Sample]:
    """MUSIC-AVQA: questions with ``<Object>`` placeholders, filled from ``templ_values``. Media field: ``video_id``.

    Underscores in answers become blanks (``electric_bass``), and a number is correct as a word or as digits.
    """
    for row in origin.objects():
        if row.values.get("question_deleted"):
            continue
        video = row.name("video_id")
        media = origin.locate(row.where, video_id=video)
        content, values = row.text("question_content"), _list_in_text(row, "templ_values")
        first, *rest = _PLACEHOLDER.split(content)
        if len(rest) != len(values):
            raise DataError(f"{row.where}: {len(rest)} placeholders in {shown(content)}, but {len(values)} values")
        question = first + "".join(value + text for value, text in zip(values, rest, strict=True))
        answer = row.text("anser", "answer").replace("_", " ")  # "anser" is the published spelling
        also = (str(_NUMBERS.index(answer)),) if answer in _NUMBERS else ()
        also = (_NUMBERS[int(answer)],) if answer.isdecimal() and int(answer) < len(_NUMBERS) else also
        meta = {"video_id": video, "type": _list_in_text(row, "type") if "type" in row else []}
        yield question_sample(row.text("question_id"), media, question, answer, answers=(answer, *also), meta=meta)


def _list_in_text(row: Row, key: str) -> list[str]:
    """A list that the file stores as JSON inside a string."""
    try:
        value = json.loads(row.text(key))
    except ValueError as error:
        raise DataError(f"{row.where}: {key} is {shown(row.text(key))}, expected a list as JSON") from error
    return list(Row({key: value}, row.where).texts(key)) if value else []


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
            answer = pair.text("answer") if "answer" in pair else _UNDISCLOSED
            if answer != _UNDISCLOSED:
                turns.append(Message("assistant", answer))
            elif not origin.options.get("undisclosed"):
                raise DataError(
                    f"{pair.where}: the answer is {_UNDISCLOSED}: this file has no labels to score against; use "
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
