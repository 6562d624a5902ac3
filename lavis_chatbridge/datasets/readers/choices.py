"""Readers of multiple-choice and yes-or-no benchmarks: AVQA, WorldSense, OmniBench, Daily-Omni, AV-Odyssey, MMAU,
Video-MME, AVHBench, CMU-MOSI and CMU-MOSEI; and Charades-Ego's descriptions.

A question is followed by its options with letters; a task can reorder these by ``meta.options`` and ``meta.correct``.
The files are read in their published layouts (docs/evaluation.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from lavis_chatbridge.config import shown
from lavis_chatbridge.datasets.readers.common import Origin, Row, question_sample, read_object
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.templates import LETTERS, listed, without_letters
from lavis_chatbridge.schema import Medium, Sample

_MARK = re.compile(r"\[(img|image|audio|video)(\d+)\]")


def avqa(origin: Origin) -> Iterator[Sample]:
    """AVQA's ``{train,val}_qa.json``: ``answer`` is a position in ``multi_choice``. Media field: ``video_name``."""
    for row in origin.objects():
        types = _types(row, "question_relation", "question_type")
        media = origin.locate(row.where, video_name=row.text("video_name"))
        yield _choice(row, row.text("id"), media, types, "question_text", "multi_choice")


def worldsense(origin: Origin) -> Iterator[Sample]:
    """WorldSense's ``worldsense_qa.json``: video -> ``task0``, ``task1``, ... Media field: ``video_id``."""
    for path in origin.every_file:
        for video, entry in read_object(path).entries():
            media = origin.locate(entry.where, video_id=video)
            for key in filter(re.compile(r"task\d+").fullmatch, entry.values):
                row = Row(entry.values[key], f"{entry.where}.{key}")
                types = _types(row, "task_domain", "task_type") | _types(entry, "domain")
                yield _choice(row, f"{video}_{key}", media, types, options="candidates")


def omnibench(origin: Origin) -> Iterator[Sample]:
    """OmniBench's JSONL: ``answer`` is one of ``options``. Media fields: ``image_path``, ``audio_path``."""
    for row in origin.objects():
        media = origin.locate(row.where, image_path=row.text("image_path"), audio_path=row.text("audio_path"))
        yield _choice(row, row.text("index"), media, _types(row, "task type", "audio type"))


def daily_omni(origin: Origin) -> Iterator[Sample]:
    """Daily-Omni's ``qa.json``. Media field: ``video_id``."""
    for number, row in enumerate(origin.objects()):
        video = row.text("video_id")
        media = origin.locate(row.where, video_id=video)
        types = _types(row, "Type", "video_category", "video_duration")
        yield _choice(row, f"{video}_{number}", media, types, "Question", "Choice", "Answer")


def av_odyssey(origin: Origin) -> Iterator[Sample]:
    """AV-Odyssey's table, as JSON or JSONL: several media per question, named ``[img1]`` or ``[audio2]`` in its text.

    All media precede the question, images and videos first. Media field: ``path``, an entry of ``image_path``,
    ``video_path`` or ``audio_path``.
    """
    for row in origin.objects():
        media: list[Medium] = []
        for modality, pattern in origin.media.items():
            own = replace(origin, media={modality: pattern})
            paths = row.texts(f"{modality}_path") if row.values.get(f"{modality}_path") else ()
            media += [medium for path in paths for medium in own.locate(row.where, path=path)]
        spelt = {"question": _spelt(row.text("question")), "options": [_spelt(text) for text in row.texts("options")]}
        asked = Row({**row.values, **spelt}, row.where)
        yield _choice(asked, row.text("question_id"), tuple(media), _types(row, "subfield"))


def mmau(origin: Origin) -> Iterator[Sample]:
    """MMAU's ``mmau-test-mini.json``: ``answer`` is one of ``choices``. Media field: ``audio_id``, without ``./``."""
    for row in origin.objects():
        media = origin.locate(row.where, audio_id=row.text("audio_id").removeprefix("./"))
        types = _types(row, "task", "category", "difficulty")
        yield _choice(row, row.text("id"), media, types, options="choices")


def video_mme(origin: Origin) -> Iterator[Sample]:
    """Video-MME: its ``output_test_template.json``, or its table as a JSON list of questions.

    Media fields: ``video_id`` (``001``) and ``youtube_id``, by which the publisher names the files.
    """
    for video in origin.objects():
        youtube = video.text("videoID") if "videoID" in video else video.text("url").rpartition("=")[2]
        media = origin.locate(video.where, video_id=video.text("video_id"), youtube_id=youtube)
        for row in video.rows("questions") if "questions" in video else [video]:
            types = _types(video, "duration", "domain") | _types(row, "task_type")
            yield _choice(row, row.text("question_id"), media, types)


def avhbench(origin: Origin) -> Iterator[Sample]:
    """AVHBench's JSON lists, one file or one per video: yes-or-no questions, by type of hallucination.

    The task ``AV Captioning`` is left out. Media field: ``video_id``.
    """
    for number, row in enumerate(origin.objects()):
        if row.text("task") == "AV Captioning":
            continue
        video, label = row.text("video_id"), row.text("label")
        media, meta = origin.locate(row.where, video_id=video), {"video_id": video, "types": _types(row, "task")}
        if label.lower() not in ("yes", "no"):
            raise DataError(f"{row.where}: label is {shown(label)}, expected Yes or No")
        question = f"{row.text('text')} Answer yes or no."
        yield question_sample(f"{video}_{number}", media, question, label, answers=(label,), meta=meta)


def mosi(origin: Origin) -> Iterator[Sample]:
    """CMU-MOSI and CMU-MOSEI, from the MMSA project's ``label.csv``: multiple choice of a clip's sentiment.

    Options: ``split`` (``mode`` in the file), ``classes`` (``annotation`` in the file; other clips are left out) and
    ``transcript`` (the question quotes what is said). Media fields: ``video_id``, ``clip_id``.
    """
    classes = list(origin.options.get("classes") or ("Negative", "Neutral", "Positive"))
    for row in origin.table():
        annotation = row.text("annotation").capitalize()
        if row.text("mode") != origin.options.get("split", "test") or annotation not in classes:
            continue
        video, clip = row.text("video_id"), row.text("clip_id")
        said = f'The speaker says: "{row.text("text")}". ' if origin.options.get("transcript") else ""
        media = origin.locate(row.where, video_id=video, clip_id=clip)
        question = f"{said}What is the sentiment of the speaker?"
        asked = Row({"question": question, "options": classes, "answer": annotation}, row.where)
        yield _choice(asked, f"{video}_{clip}", media, {"sentiment": annotation})


def charades_ego(origin: Origin) -> Iterator[Sample]:
    """Charades-Ego's CSV: the ``descriptions`` of a video, separated by semicolons, else its ``script``.

    Option ``egocentric`` (``Yes``, ``No``): only videos of this view. Media field: ``id``.
    """
    for row in origin.table():
        view = row.text("egocentric")
        if origin.options.get("egocentric") in (None, view):
            described = row.text("descriptions", blank=True).split(";")
            captions = tuple(text.strip() for text in described if text.strip()) or (row.text("script"),)
            name, types = row.text("id"), {"view": "first person" if view == "Yes" else "third person"}
            yield Sample(name, origin.locate(row.where, id=name), captions, meta={"types": types})


def _choice(
    row: Row,
    name: str,
    media: tuple[Medium, ...],
    types: Mapping[str, str],
    question: str = "question",
    options: str = "options",
    answer: str = "answer",
) -> Sample:
    """A question with its options, from these fields; the answer is a position, a letter or an option's text."""
    given, value = row.texts(options), row.values.get(answer)
    texts = without_letters(given)
    if isinstance(value, int):
        correct = value
    elif (found := row.text(answer)) in (*given, *texts):
        correct = (*given, *texts).index(found) % len(texts)
    else:
        letter = re.match(r"[(\[]?([A-Z])(?:[)\].:]|$)", found)
        correct = LETTERS.index(letter.group(1)) if letter else -1
    if not 0 <= correct < len(texts):
        raise DataError(f"{row.where}: answer {shown(value)} is none of the options {shown(list(given))}")
    meta = {"options": texts, "correct": correct, "types": dict(types)}
    asked = f"{row.text(question)}\n{listed(texts)}"
    return question_sample(name, media, asked, LETTERS[correct], answers=(texts[correct],), meta=meta)


def _types(row: Row, *keys: str) -> dict[str, str]:
    """The fields that classify a benchmark's question; ``["a", "b"]`` becomes ``a / b``."""
    return {key.replace("_", " "): " / ".join(row.texts(key)) for key in keys if row.values.get(key)}


def _spelt(text: str) -> str:
    """Replace a text's media markers by words: ``[img2]`` becomes ``(image 2)``."""
    return _MARK.sub(lambda mark: f"({'image' if mark.group(1) == 'img' else mark.group(1)} {mark.group(2)})", text)
