"""What the demo found, as ``report.json`` and ``report.html``: reads what the runs wrote, computes nothing anew.

The demo's folder holds the runs ``stage1`` and ``stage1_scores``, and where instruction tuning has run ``stage2``,
``stage2_scores`` and ``joint``; media are shuffled in the first of the scores, withheld in the last, too. This module
knows the files of a run (``log.txt``, ``result/``), not how a run works.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.toyworld.page import Curve, Example, Page, render

STARTED = ".started"
SHUFFLED = "_shuffled_image_video_audio"
JOINT = {
    "both": "",
    "no_vision": "_withheld_image_video",
    "no_audio": "_withheld_audio",
    "neither": "_withheld_image_video_audio",
}
"""What the model was given -> what the names of its results say of media."""
COMPOSING = ("name", "compose", "match")
"""The kinds of joint questions that ``joint.both`` counts; the others are listed by kind."""

_EXAMPLES_PER_KIND = 4
_LEAD = (
    "A model of a few million parameters on a small closed world, trained on this machine a moment ago. The encoders "
    "and the language model are frozen; only the bridge between them has learnt."
)


def write_report(folder: Path, world: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into the demo's folder.

    Args:
        folder: The demo's folder with the runs.
        world: The folder of the embedded world that they used.

    Returns:
        What ``report.json`` holds.

    Raises:
        DataError: If a run's results are missing.
    """
    report: dict[str, Any] = {"seconds": _seconds(folder), "stage1": _stage1(folder)}
    if (folder / "stage2_scores").is_dir():
        report["stage2"] = _stage2(folder)
        report["joint"] = _joint(folder)
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "report.html", render(_page(folder, world, report)))
    return report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge world report``."""
    parser.add_argument("folder", type=Path, help="the demo's folder, with the runs in it")
    parser.add_argument("--world", type=Path, default=Path("output/world"), help="the world that they used")


def run(args: argparse.Namespace) -> int:
    """``chatbridge world report``: prints the scores and where the page is."""
    report = write_report(args.folder, args.world)
    print(summary(report))
    if report["seconds"] is not None:
        print(f"\n{report['seconds']:.0f} seconds in all")
    print(f"report: {args.folder / 'report.html'}")
    return 0


def summary(report: Mapping[str, Any]) -> str:
    """The report's scores as a few lines of text."""
    lines = [_row("", *_columns(report["stage1"]))]
    for stage in ("stage1", "stage2"):
        for kind, scores in report.get(stage, {}).items():
            lines.append(_row(f"{stage} {kind}", *(f"{value:.3f}" for value in scores.values())))
    joint = report.get("joint")
    if joint:
        lines += [_row(f"joint {name}", f"{joint[name]:.3f}") for name in JOINT]
        for kind, score in joint["by_kind"].items():
            lines.append(_row(f"joint {kind}", f"{score:.3f}", f"in words {joint['text_only'][kind]:.3f}"))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return " ".join(f"{cell:<18}" if number == 0 else f"{cell:>11}" for number, cell in enumerate(cells)).rstrip()


def _columns(stage: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(next(iter(stage.values())))


def _seconds(folder: Path) -> float | None:
    """Seconds since the demo began, by the mark that it left."""
    mark = folder / STARTED
    return round(time.time() - mark.stat().st_mtime, 1) if mark.is_file() else None


def _stage1(folder: Path) -> dict[str, dict[str, float]]:
    seen = _by_kind(folder / "stage1_scores", "test")
    held_out = _by_kind(folder / "stage1_scores", "heldout")
    shuffled = _by_kind(folder / "stage1_scores", "test", SHUFFLED)
    return {
        kind: {
            "accuracy": seen[kind]["attribute_accuracy"],
            "heldout": held_out[kind]["attribute_accuracy"],
            "shuffled": shuffled[kind]["attribute_accuracy"],
            "text_prior": seen[kind]["text_prior"],
        }
        for kind in MODALITIES
    }


def _stage2(folder: Path) -> dict[str, dict[str, float]]:
    seen = _by_kind(folder / "stage2_scores", "test")
    held_out = _by_kind(folder / "stage2_scores", "heldout")
    return {
        kind: {"accuracy": seen[kind]["exact_match"], "heldout": held_out[kind]["exact_match"]} for kind in MODALITIES
    }


def _joint(folder: Path) -> dict[str, Any]:
    """Exact match per condition over the composing kinds; per kind with both media, and with both in words only."""
    joint: dict[str, Any] = {}
    for name, media in JOINT.items():
        by_kind = _exact_by_asked(folder / "joint", "test", media)
        joint[name] = _mean(by_kind, COMPOSING)
        joint.setdefault("by_kind", by_kind)
    joint["text_only"] = _exact_by_asked(folder / "joint", "words")
    return joint


def _mean(scores: Mapping[str, float], kinds: Iterable[str]) -> float:
    values = [scores[kind] for kind in kinds]
    return sum(values) / len(values)


def _exact_by_asked(run: Path, split: str, media: str = "") -> dict[str, float]:
    """Share of exact answers per kind of question."""
    right: dict[str, list[bool]] = {}
    for record in _records(run, split, media):
        right.setdefault(record["meta"]["asked"], []).append(_is_right(record))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def _is_right(record: Mapping[str, Any]) -> bool:
    """Exact match, or for captions all facts named by their words."""
    said = record["prediction"].lower()
    if record.get("answers"):
        return said.strip(" .") in [answer.lower() for answer in record["answers"]]
    words = said.replace(",", " ").replace(".", " ").split()
    return all(value in words for value in record["facts"].values())


def _by_kind(run: Path, split: str, media: str = "") -> dict[Modality, dict[str, Any]]:
    """The metrics of a split by the kind of medium, which the samples' ids begin with."""
    by_source = json.loads(_result(run, f"{split}{media}", "_metrics.json").read_text())["by_source"]
    kinds = {record["source"]: record["sample_id"].split("_")[0] for record in _records(run, split, media)}
    return {kinds[source]: scores for source, scores in by_source.items() if source in kinds}


def _records(run: Path, split: str, media: str = "") -> list[dict[str, Any]]:
    return json.loads(_result(run, f"{split}{media}", ".json").read_text())


def _result(run: Path, name: str, suffix: str) -> Path:
    """The newest result of a split and what became of its media in a run's folder: ``{name}_step{N}{suffix}``."""
    pattern = re.compile(rf"{re.escape(name)}_step\d+{re.escape(suffix)}")
    found = [path for path in (run / "result").glob("*") if pattern.fullmatch(path.name)]
    if not found:
        raise DataError(f"{run}/result has no {name}_step*{suffix}: run the evaluation first")
    return max(found, key=lambda path: path.stat().st_mtime)


def _page(folder: Path, world: Path, report: Mapping[str, Any]) -> Page:
    page = Page("ChatBridge on the embedded world", _LEAD)
    for stage, title in (("stage1", "Stage 1: captions"), ("stage2", "Stage 2: answers")):
        if stage in report:
            rows = [[kind, *(f"{value:.3f}" for value in scores.values())] for kind, scores in report[stage].items()]
            page.tables.append((title, ["", *_columns(report[stage])], rows))
            page.curves.append(Curve(f"{title}, training loss", _losses(folder / stage / "log.txt")))
    if "joint" in report:
        _add_joint(page, report["joint"])
        page.galleries.append(("Seen and heard together", _joint_examples(folder, world)))
    for kind in MODALITIES:
        page.galleries.append((f"Captions after stage 1: {kind}", _examples(folder, world, kind)))
    if report["seconds"] is not None:
        page.notes.append(f"Everything on this page took {report['seconds']:.0f} seconds to build, train and score.")
    return page


def _add_joint(page: Page, joint: Mapping[str, Any]) -> None:
    rows = [[name.replace("_", " "), f"{joint[name]:.3f}"] for name in JOINT]
    page.tables.append(
        ("Picture or clip and sound together, never trained on: name, compose, match", ["", "exact"], rows)
    )
    rows = [[kind, f"{score:.3f}", f"{joint['text_only'][kind]:.3f}"] for kind, score in joint["by_kind"].items()]
    page.tables.append(("The same by kind of question", ["", "with media", "in words only"], rows))


def _losses(log: Path) -> tuple[tuple[float, float], ...]:
    points = []
    for line in log.read_text().splitlines() if log.is_file() else []:
        record = json.loads(line)
        if "train_loss" in record and "train_step" in record:
            points.append((float(record["train_step"]), float(record["train_loss"])))
    return tuple(points)


def _examples(folder: Path, world: Path, kind: Modality) -> list[Example]:
    """The first few captions of new renderings and of held-out combinations."""
    examples = []
    for split in ("test", "heldout"):
        media = _media(world, f"{kind}_{split}")
        records = [r for r in _records(folder / "stage1_scores", split) if r["sample_id"] in media]
        for record in records[: _EXAMPLES_PER_KIND // 2]:
            examples.append(_example(record, media[record["sample_id"]], asked=f"({split})"))
    return examples


def _joint_examples(folder: Path, world: Path) -> list[Example]:
    media = _media(world, "joint_test")
    chosen: dict[str, dict[str, Any]] = {}
    for record in _records(folder / "joint", "test"):
        chosen.setdefault(record["meta"]["asked"], record)
    return [_example(r, media[r["sample_id"]], asked=_question(r["prompt"])) for r in chosen.values()]


def _question(prompt: str) -> str:
    return prompt.rsplit("Human:", 1)[-1].replace("###Assistant:", "").strip()


def _example(record: Mapping[str, Any], media: tuple[tuple[Modality, Path], ...], asked: str) -> Example:
    answers = record.get("answers")
    truth = answers[0] if answers else ", ".join(record["facts"].values())
    return Example(media, record["prediction"], truth, _is_right(record), asked)


def _media(world: Path, name: str) -> dict[str, tuple[tuple[Modality, Path], ...]]:
    """Sample id to its media, read from an annotation file of the world."""
    rows = (json.loads(line) for line in (world / "annotations" / f"{name}.jsonl").read_text().splitlines())
    return {row["id"]: tuple((medium["type"], world / medium["path"]) for medium in row["media"]) for row in rows}
