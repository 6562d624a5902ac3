"""Third stage: checks all answers; writes samples, rejected answers with their reasons, statistics, and an HTML page.

Every call checks all answers again: this is fast and deterministic.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import atomic_text, read_json, read_objects, write_json, write_text
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, describe, read_annotations
from lavis_chatbridge.multis.generate import ANSWERS, read_answers
from lavis_chatbridge.multis.prompts import DATA_KINDS
from lavis_chatbridge.multis.rules import Checker
from lavis_chatbridge.pages import render
from lavis_chatbridge.schema import Sample, to_record

PAPER_COUNTS = {"conversation": 24_000, "detail": 18_000, "reasoning": 9_000}
"""Numbers of samples of the paper's chat data, as rounded there (arXiv 2305.16103, section 4.2)."""


def check(generated: str | Path, annotations: str | Path, folder: str | Path, checker: Checker) -> dict[str, Any]:
    """Check all generated answers, and return the statistics.

    Writes ``accepted.jsonl`` (samples), ``rejected.jsonl`` (reasons and text) and ``statistics.json`` to ``folder``.
    """
    folder = Path(folder)
    if not (Path(generated) / ANSWERS).is_file():
        raise DataError(f"{generated} has no {ANSWERS}: expected the output folder of `chatbridge multis generate`")
    known = {annotation.id: annotation for annotation in read_annotations(annotations)}
    accepted: list[Sample] = []
    rejected: list[dict[str, Any]] = []
    for record in read_answers(generated).values():
        annotation = known.get(record["item"])
        if annotation is None:
            sample, reasons = None, [("no_annotation", f"item {record['item']!r} has no annotation")]
        else:
            sample, reasons = checker.check(record, annotation)
        if sample is not None:
            accepted.append(sample)
            continue
        rejected.append(
            {
                "id": f"{record['item']}:{record['kind']}",
                **{key: record[key] for key in ("item", "kind", "modality", "text")},
                "request": record["id"],
                "reasons": [{"rule": rule, "detail": detail} for rule, detail in reasons],
                "media": [medium.model_dump() for medium in annotation.media] if annotation else [],
            }
        )
    for name, records in (("accepted", map(to_record, accepted)), ("rejected", rejected)):
        with atomic_text(folder / f"{name}.jsonl", errors="replace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    counted = statistics(accepted, rejected)
    write_json(folder / "statistics.json", counted)
    return counted


def statistics(accepted: Sequence[Sample], rejected: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of accepted and rejected samples by kind and by modality, and of rejected ones by rule."""
    kinds = [Counter(sample.task for sample in accepted), Counter(record["kind"] for record in rejected)]
    modalities = [Counter(s.modality for s in accepted), Counter(record["modality"] for record in rejected)]
    reasons = Counter(rule for record in rejected for rule in {reason["rule"] for reason in record["reasons"]})
    return {
        "accepted": len(accepted),
        "rejected": len(rejected),
        "kinds": {
            kind: {"accepted": kinds[0][kind], "rejected": kinds[1][kind], "paper": PAPER_COUNTS[kind]}
            for kind in DATA_KINDS
        },
        "modalities": {m: {"accepted": modalities[0][m], "rejected": modalities[1][m]} for m in ITEM_MODALITIES},
        "reasons": dict(reasons.most_common()),
    }


def table(counted: Mapping[str, Any]) -> str:
    """Statistics as text for a terminal."""
    rows = {**counted["kinds"], "all": {**counted, "paper": sum(PAPER_COUNTS.values())}}
    lines = [f"{'kind':14}{'accepted':>10}{'rejected':>10}{'paper':>9}"]
    lines += [f"{kind:14}{row['accepted']:10}{row['rejected']:10}{row['paper']:9}" for kind, row in rows.items()]
    if counted["reasons"]:
        lines.append("rejected for: " + ", ".join(f"{rule} {n}" for rule, n in counted["reasons"].items()))
    return "\n".join(lines)


def write_page(
    checked: str | Path, media_root: str | Path, out: str | Path, annotations: str | Path | None = None
) -> int:
    """Write the HTML page ``out``, which links to the media, and return its number of samples.

    Shows at most 40 accepted and 20 rejected samples, chosen at random with a fixed seed. With ``annotations``, also
    shows the descriptions that the language model read.
    """
    counted = read_json(Path(checked) / "statistics.json")
    if counted is None:
        raise DataError(f"{checked} was not made by `chatbridge multis check`: expected {checked}/statistics.json")
    rng = random.Random(0)
    notes = {a.id: describe(a) for a in read_annotations(annotations)} if annotations else {}
    cards = []
    for state, count in (("accepted", 40), ("rejected", 20)):
        records = [record for _, record in read_objects(Path(checked) / f"{state}.jsonl")]
        for index in sorted(rng.sample(range(len(records)), min(count, len(records)))):
            cards.append(_card(state, records[index], Path(media_root), Path(out).parent, notes))
    write_text(Path(out), render("multis.html", table=table(counted), cards=cards), errors="replace")
    return len(cards)


def _card(state: str, record: Mapping[str, Any], root: Path, page: Path, notes: Mapping[str, str]) -> dict[str, Any]:
    media = [(medium["type"], root / medium["path"]) for medium in record["media"]]
    present = [(modality, path) for modality, path in media if path.is_file()]
    return {
        "state": state,
        "id": record["id"],
        "media": [{"type": modality, "url": quote(os.path.relpath(path, page))} for modality, path in present],
        "missing": [str(path) for _, path in media if not path.is_file()],
        "reasons": "; ".join(f"{reason['rule']}: {reason['detail']}" for reason in record.get("reasons", ())),
        "turns": record.get("turns") or [{"role": "assistant", "text": record["text"]}],
        "notes": notes.get(record["meta"]["item"] if "meta" in record else record["item"]),
    }
