"""Readers of question-and-answer annotations: VQAv2, OKVQA, GQA, Visual Genome, MSRVTT-QA, MSVD-QA, MUSIC-AVQA."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import (
    Origin,
    Row,
    json_entries,
    json_rows,
    json_value,
    question_sample,
    table_rows,
)
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.schema import Sample

_PLACEHOLDER = re.compile(r"<[^<>]*>")


def vqav2(origin: Origin) -> Iterator[Sample]:
    """VQAv2 and OKVQA: ``questions`` and, except for the test split, ``annotations`` with ten answers to each.

    The answer trained on is ``multiple_choice_answer``; all ten are kept for the score, and the type of answer by which
    the official evaluator tells questions apart. Media fields: ``image_id``,
    ``data_subtype`` (``train2014``).
    """
    questions = origin.file("questions")
    subtype = json_value(questions, "data_subtype")
    if not isinstance(subtype, (str, type(None))):
        raise DataError(f"{questions}: data_subtype is {shown(subtype)}, expected text")
    answers: dict[int, tuple[str, tuple[str, ...], dict[str, str]]] = {}
    if "annotations" in origin.files:
        for row in json_rows(origin.file("annotations"), "annotations"):
            # of ten people one may have said nothing, which the official evaluator takes for an answer like others
            every = (
                tuple(answer.text("answer", blank=True) for answer in row.rows("answers")) if "answers" in row else ()
            )
            best = row.text("multiple_choice_answer") if "multiple_choice_answer" in row else _commonest(every, row)
            kind = {"type": row.text("answer_type")} if "answer_type" in row else {}
            answers[row.whole("question_id")] = (best, every or (best,), kind)
    for row in json_rows(questions, "questions"):
        number, image = row.whole("question_id"), row.whole("image_id")
        media = origin.locate(row.where, image_id=image, data_subtype=subtype or "")
        if "annotations" in origin.files and number not in answers:
            raise DataError(f"{row.where}: question {number} has no annotation in {origin.file('annotations')}")
        best, every, kind = answers.get(number, ("", (), {}))
        meta = {"question_id": number, "image_id": image} | kind
        sample = question_sample(row, str(number), media, row.text("question"), best, answers=every, meta=meta)
        yield sample if every else Sample(sample.id, media, turns=sample.turns[:1], meta=meta)


def visual_genome(origin: Origin) -> Iterator[Sample]:
    """Visual Genome's ``question_answers.json``; ``images`` (``image_data.json``) says in which folder a picture lies.

    Media fields: ``image_id``, ``folder`` (``VG_100K`` or ``VG_100K_2``, from the picture's address).
    """
    folders = {}
    if "images" in origin.files:
        for row in json_rows(origin.file("images")):
            parts = row.text("url").split("/")
            folders[row.whole("image_id", "id")] = parts[-2] if len(parts) > 1 else ""
    for row in json_rows(origin.file("questions")):
        for pair in row.rows("qas"):
            image = pair.whole("image_id") if "image_id" in pair else row.whole("id", "image_id")
            media = origin.locate(pair.where, image_id=image, folder=folders.get(image, "VG_100K"))
            answer = pair.text("answer").rstrip(".")
            meta = {"image_id": image}
            yield question_sample(pair, pair.text("qa_id"), media, pair.text("question"), answer, meta=meta)


def msrvtt_qa(origin: Origin) -> Iterator[Sample]:
    """MSRVTT-QA and MSVD-QA: a list of questions. Media field: ``video_id``, a number (``video7.mp4``).

    MSVD-QA numbers its videos; with ``mapping`` (its ``youtube_mapping.txt``, lines of ``NAME vid7``) the media field
    ``name`` is the one under which MSVD publishes them.
    """
    questions = origin.file("questions" if "questions" in origin.files else "file")
    names = _youtube_names(origin.file("mapping")) if "mapping" in origin.files else None
    for row in json_rows(questions):
        video = row.whole("video_id")
        if names is not None and video not in names:
            raise DataError(f"{row.where}: video {video} is not in {origin.file('mapping')}")
        media = origin.locate(row.where, video_id=video, **({"name": names[video]} if names else {}))
        yield question_sample(
            row, row.text("id"), media, row.text("question"), row.text("answer"), meta={"video_id": video}
        )


def gqa(origin: Origin) -> Iterator[Sample]:
    """GQA: an object of question number -> question, as in ``testdev_balanced_questions.json``. Media field:
    ``image_id``. The kind of question (``types.structural``) is kept.
    """
    path = origin.file("file")
    for number, row in json_entries(path):
        image = row.text("imageId")
        media = origin.locate(row.where, image_id=image)
        types = row.values.get("types")
        kind = types.get("structural") if isinstance(types, dict) else None
        meta = {"image_id": image} | ({"type": kind} if isinstance(kind, str) else {})
        yield question_sample(row, number, media, row.text("question"), row.text("answer"), meta=meta)


def music_avqa(origin: Origin) -> Iterator[Sample]:
    """MUSIC-AVQA: questions with ``<Object>`` places that ``templ_values`` fills. Media field: ``video_id``."""
    for row in json_rows(origin.file("file")):
        if row.values.get("question_deleted"):
            continue
        video = row.text("video_id")
        media = origin.locate(row.where, video_id=video)
        kinds = _list_in_text(row, "type") if "type" in row else []
        yield question_sample(
            row,
            row.text("question_id"),
            media,
            _fill(row.text("question_content"), _list_in_text(row, "templ_values"), row),
            row.text("anser", "answer"),  # the published files spell it so
            meta={"video_id": video, "type": kinds},
        )


def _youtube_names(path: str) -> dict[int, str]:
    names = {}
    for row in table_rows(path, " ", ("name", "number")):
        names[Row({"number": row.text("number").removeprefix("vid")}, row.where).whole("number")] = row.text("name")
    return names


def _commonest(answers: tuple[str, ...], row: Row) -> str:
    if not answers:
        raise DataError(f"{row.where}: has neither multiple_choice_answer nor answers")
    return Counter(answers).most_common(1)[0][0]


def _list_in_text(row: Row, key: str) -> list[str]:
    """A list that the file holds as a string of JSON."""
    value = row.values.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{row.where}: {key} is {shown(value)}, expected a list as JSON") from error
    if not isinstance(value, list):
        raise DataError(f"{row.where}: {key} is {shown(value)}, expected a list")
    return [Row({key: item}, row.where).text(key) for item in value]


def _fill(question: str, values: list[str], row: Row) -> str:
    places = _PLACEHOLDER.findall(question)
    if len(places) != len(values):
        raise DataError(f"{row.where}: {len(places)} places in {shown(question)}, but {len(values)} values")
    rest = iter(values)
    return _PLACEHOLDER.sub(lambda _: next(rest), question)
