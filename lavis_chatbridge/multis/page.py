"""Writes an HTML page of checked samples with their media, for inspection before training."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lavis_chatbridge.datasets.readers.common import object_rows
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.multis.annotation import describe, read_annotations
from lavis_chatbridge.multis.check import read_statistics, table
from lavis_chatbridge.pages import render
from lavis_chatbridge.schema import check_inside, media_path


def write_page(
    checked: str | Path,
    media_root: str | Path,
    out: str | Path,
    accepted: int = 40,
    rejected: int = 20,
    annotations: str | Path | None = None,
) -> int:
    """Write the page ``out``, which links to the media, and return its number of samples.

    Shows at most ``accepted`` accepted and ``rejected`` rejected samples, chosen at random with a fixed seed. With
    ``annotations``, also shows the descriptions that the language model read.

    Raises:
        DataError: If ``checked`` is not an output of ``multis check``.
    """
    checked, rng = Path(checked), random.Random(0)
    notes = {a.id: describe(a) for a in read_annotations(annotations)} if annotations else {}
    counts = table(read_statistics(checked))
    cards = []
    for state, count in (("accepted", accepted), ("rejected", rejected)):
        records = [row.values for row in object_rows(str(checked / f"{state}.jsonl"))]
        for index in sorted(rng.sample(range(len(records)), min(count, len(records)))):
            cards.append(_card(state, records[index], str(media_root), Path(out).parent, notes))
    write_text(Path(out), render("multis.html", table=counts, cards=cards), errors="replace")
    return len(cards)


def _card(state: str, record: Mapping[str, Any], root: str, page: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "state": state,
        "id": record["id"],
        "media": list(_media(record["media"], root, page)),
        "reasons": "; ".join(f"{reason['rule']}: {reason['detail']}" for reason in record.get("reasons", ())),
        "turns": record.get("turns") or [{"role": "assistant", "text": record["text"]}],
        "notes": notes.get(record["meta"]["item"] if "meta" in record else record["item"]),
    }


def _media(entries: Any, root: str, page: Path) -> Iterator[dict[str, str]]:
    """The media of a sample as ``{"type", "url"}``, or as ``{"type": "fault", "url": reason}``."""
    for entry in entries:
        try:
            path = media_path(entry["path"], root, "the sample")
            check_inside(path, root)
            if not os.path.isfile(path):
                raise DataError(f"{path} does not exist")
            yield {"type": entry["type"], "url": quote(os.path.relpath(path, page))}
        except DataError as error:
            yield {"type": "fault", "url": str(error)}
