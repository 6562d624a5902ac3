"""Readers of questions and answers: VQAv2, OKVQA, GQA, Visual Genome, MSRVTT-QA, MSVD-QA, MUSIC-AVQA."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, object_rows, question_sample, read_object, table_rows
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Sample

_PLACEHOLDER = re.compile(r"<[^<>]*>")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def vqav2(origin: Origin) -> Iterator[Sample]:
    """VQAv2 and OKVQA: ``questions`` and, except for test splits, ``annotations`` with ten answers per question.

    Training uses ``multiple_choice_answer``; scores use all ten. ``meta.type`` is the type of answer, as in VQAv2's
    official evaluator (OKVQA: the name of the question type); ``meta.question_type`` is the type of question. Media
    fields: ``image_id``, ``data_subtype`` (``train2014``).
    """
    labels: dict[int, dict[str, Any]] = {}
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
            label = labels.get(number, {"answer": None, "answers": (), "types": {}})
            meta = {"question_id": number, "image_id": image} | label["types"]
            media = origin.locate(row.where, image_id=image, data_subtype=subtype)
            yield question_sample(
                str(number), media, row.text("question"), label["answer"], answers=label["answers"], meta=meta
            )


def _label(row: Row, names: Mapping[str, str]) -> dict[str, Any]:
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
    return {"answer": best, "answers": every or (best,), "types": types}


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
