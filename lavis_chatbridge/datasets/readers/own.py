"""Readers of a user's own data in two general formats: tables of Hugging Face ``datasets``, and chat messages."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lavis_chatbridge.config import shown, unknown_key
from lavis_chatbridge.datasets.readers.common import ENDINGS, Origin, Row, object_rows, question_sample
from lavis_chatbridge.errors import ConfigError, DataError, one_line
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality
from lavis_chatbridge.schema import Medium, Sample, media_path, modalities_of

_BATCH = 32  # rows of a table in memory
_UNREADABLE = (OSError, RuntimeError, TypeError, ValueError)  # of datasets, pyarrow and pandas
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_log = logging.getLogger(__name__)
_BUILDERS = {"parquet": "parquet", "arrow": "arrow", "csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json"}
_COLUMNS = ("id", *MODALITIES, "captions", "question", "answer", "answers", "messages")
_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MARKER = re.compile(r"\s*<(image|video|audio)>\s*")


def is_hub_id(name: str) -> bool:
    """Whether this is an id of the Hugging Face hub: ``org/name`` without a file's ending, and no folder ``org``."""
    like_an_id = _HUB_ID.fullmatch(name) and name.rpartition(".")[2].lower() not in _BUILDERS
    return bool(like_an_id) and not os.path.isdir(os.path.dirname(name))


def huggingface(origin: Origin) -> Iterator[Sample]:
    """A table that ``datasets`` reads: Parquet, Arrow, CSV or JSON files, an imagefolder or audiofolder, a hub id.

    Media stored as bytes in the table are copied to a file once, because training needs random access.

    Options: ``columns`` (a name of `_COLUMNS` -> the table's column), ``split``, ``name`` (a hub data set's
    configuration), ``revision``.
    """
    columns: Mapping[str, str] = origin.options.get("columns") or {}
    for key in columns:
        if key not in _COLUMNS:
            raise ConfigError(unknown_key(key, _COLUMNS, "options.columns"))
    for path in origin.every_file:
        table = _table(path, origin)
        if absent := [column for column in columns.values() if column not in table.column_names]:
            raise ConfigError(f"{path}: has no column {absent[0]!r}; it has {', '.join(table.column_names)}")
        named = {ours: columns.get(ours, ours) for ours in _COLUMNS}
        if named["captions"] not in table.column_names:
            named["captions"] = "caption" if "caption" in table.column_names else "text"
        if path == origin.every_file[0] and not {named[modality] for modality in MODALITIES} & set(table.column_names):
            found = ", ".join(table.column_names)
            _log.warning("%s: no column of media; set it, as in options.columns.image=NAME; found %s", path, found)
        for number, values in enumerate(_rows(table, path)):
            row = Row({ours: values.get(column) for ours, column in named.items()}, f"{path}: row {number + 1}")
            yield _table_sample(row, str(number), origin, os.path.dirname(path))


def _table(path: str, origin: Origin) -> Any:
    """A streamed table in Arrow's format."""
    try:
        import datasets
    except ImportError as error:
        raise ConfigError("reader: huggingface needs: pip install 'lavis-chatbridge[data]'") from error
    builder = _BUILDERS.get(path.rpartition(".")[2].lower())
    names = [name.lower() for _, _, found in os.walk(path) for name in found]  # none if it is a file
    endings = {name.rpartition(".")[2] for name in names}
    tables = endings & {"parquet", "arrow"} or {name for name in names if Path(name).stem == "metadata"}
    if endings & set(ENDINGS) and not tables:  # `datasets` would guess what the media are
        raise ConfigError(f"{path}: a folder of media needs a metadata.csv or metadata.jsonl; or name its annotations")
    try:
        if builder and os.path.isfile(path):
            more = {"delimiter": "\t"} if path.lower().endswith(".tsv") else {}
            table = datasets.load_dataset(builder, data_files=path, split="train", streaming=True, **more)
        else:
            options = {key: origin.options[key] for key in ("name", "revision") if key in origin.options}
            table = datasets.load_dataset(path, split=origin.options.get("split", "train"), streaming=True, **options)
        # in Arrow's format, `datasets` does not decode media and needs no packages for it
        return (table if table.features else table._resolve_features()).with_format("arrow")
    except StopIteration as error:
        raise DataError(f"{path}: has no rows") from error
    except _UNREADABLE as error:
        raise DataError(f"{path}: datasets cannot read it: {one_line(error)}") from error


def _rows(table: Any, path: str) -> Iterator[dict[str, Any]]:
    """The rows of a table; a `DataError` for a damaged one, or a cell that does not have its column's type."""
    try:
        for batch in table.iter(batch_size=_BATCH):
            yield from batch.to_pylist()
    except _UNREADABLE as error:
        raise DataError(f"{path}: datasets cannot read it: {one_line(error)}") from error


def _table_sample(row: Row, number: str, origin: Origin, folder: str) -> Sample:
    media: list[Medium] = []
    for modality in MODALITIES:
        cell = row.values[modality]
        cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
        media += [_table_medium(modality, value, row.where, origin, folder) for value in cells]
    name = row.name("id") if "id" in row else number
    if "messages" in row:
        return _conversation(name, row.rows("messages"), media, row.where)
    if "question" not in row:
        return Sample(name, tuple(media), row.texts("captions"))
    answers = row.texts("answers") if "answers" in row else ()
    answer = row.text("answer") if "answer" in row else next(iter(answers), None)
    return question_sample(name, tuple(media), row.text("question"), answer, answers=answers)


def _table_medium(modality: Modality, value: Any, where: str, origin: Origin, folder: str) -> Medium:
    """A medium from a cell: bytes, a path, or the object of both that `datasets` stores."""
    content, path = (value.get("bytes"), value.get("path")) if isinstance(value, Mapping) else (value, value)
    if isinstance(content, (bytes, bytearray)):
        if origin.keep is None:
            raise DataError(f"{where}: {modality} is stored as bytes; chatbridge convert-data writes it to a tar file")
        ending = Path(path).suffix[1:].lower() if isinstance(path, str) else ""
        return origin.keep(modality, bytes(content), ending if ending in ENDINGS else modality)
    if isinstance(path, str) and os.path.isabs(path) and path.startswith(os.path.abspath(folder or ".") + os.sep):
        return Medium(modality, path)  # `datasets` returns absolute paths for a folder's media
    return Medium(modality, media_path(path, folder or origin.root, where, origin.allow_outside))


def messages(origin: Origin) -> Iterator[Sample]:
    """Chat data of fine-tuning tools, JSONL or a JSON list: ms-swift, LLaMA-Factory (sharegpt, alpaca), TRL.

    A row has ``messages``, ``conversations`` or ``instruction``/``input``/``output``, and lists ``images``, ``videos``,
    ``audios`` of paths. ``<image>`` in a text, or an item ``{"type": "image"}`` of a typed content, stands for the next
    medium; media without a marker belong to the first question. A system message precedes the first question. Paths
    are relative to the file; ``media: {image: "pictures/{path}"}`` changes that.
    """
    for path in origin.every_file:
        for number, row in enumerate(object_rows(path)):
            name = row.name("id") if "id" in row else str(number)
            yield _conversation(name, _said(row), _listed(row, origin, os.path.dirname(path)), row.where)


def _said(row: Row) -> list[Row]:
    """The messages of a row, as ``role`` and ``content``."""
    if "messages" in row or "conversations" in row:
        said = row.rows("messages", "conversations")
    elif "prompt" in row and "completion" in row:
        said = [*row.rows("prompt"), *row.rows("completion")]
    else:
        asked = "\n".join(row.text(key) for key in ("instruction", "input") if row.values.get(key))
        pair = {"user": asked, "assistant": row.text("output")}
        said = [Row({"role": role, "content": text}, row.where) for role, text in pair.items()]
    if row.values.get("system"):
        said = [Row({"role": "system", "content": row.text("system")}, row.where), *said]
    return said


def _listed(row: Row, origin: Origin, folder: str) -> list[Medium]:
    """The media that a row lists, in the order images, videos, audios."""
    found: list[Medium] = []
    for modality in MODALITIES:
        value = row.values.get(f"{modality}s") or row.values.get(modality) or []
        for item in value if isinstance(value, list) else [value]:
            path = item.get("path") if isinstance(item, Mapping) else item
            if modality in origin.media:
                found += replace(origin, media={modality: origin.media[modality]}).locate(row.where, path=path)
            else:
                found.append(Medium(modality, media_path(path, folder or ".", row.where, origin.allow_outside)))
    return found


def _conversation(name: str, said: Sequence[Row], media: Sequence[Medium], where: str) -> Sample:
    """A sample, with the media in the order of their markers in the turns."""
    left = {modality: [medium for medium in media if medium.modality == modality] for modality in MODALITIES}
    system, turns, placed = "", [], []
    for message in said:
        role = _ROLES.get(message.name("role", "from"))
        text, modalities = _content(message)
        if role is None:
            found = shown(message.name("role", "from"))
            raise DataError(f"{message.where}: role is {found}, expected system, user or assistant")
        if role == "system":
            system = f"{text}\n"
            continue
        for modality in modalities:
            if not left[modality]:
                raise DataError(f"{message.where}: the list {modality}s has no medium for <{modality}>")
            placed.append(left[modality].pop(0))
        turns.append(Message(role, text, tuple(modalities)))
    if len(turns) % 2 and len(turns) > 1:  # a question without a reply
        placed = placed[: len(placed) - len(turns.pop().media)]
    if not turns or any(turn.role != ("user", "assistant")[i % 2] for i, turn in enumerate(turns)):
        raise DataError(f"{where}: messages must alternate between user and assistant, user first")
    rest = [medium for modality in MODALITIES for medium in left[modality]]
    turns[0] = Message("user", system + turns[0].text, (*modalities_of(rest), *turns[0].media))
    return Sample(name, (*rest, *placed), turns=tuple(turns))


def _content(message: Row) -> tuple[str, list[Modality]]:
    """A message's text without markers, and the modalities of its markers, in order."""
    content = message.values.get("content", message.values.get("value"))
    if isinstance(content, str):
        marked: list[Modality] = list(_MARKER.findall(content))  # type: ignore[arg-type]
        return _MARKER.sub(" ", content).strip() if marked else content, marked
    texts, modalities = [], []
    for item in message.rows("content"):
        if (part_type := item.name("type")) == "text":
            texts.append(item.name("text", blank=True))
        elif part_type in MODALITIES:
            modalities.append(part_type)  # type: ignore[arg-type]
        else:
            raise DataError(f"{item.where}: type is {shown(part_type)}, expected text, {', '.join(MODALITIES)}")
    return " ".join(filter(None, texts)), modalities
