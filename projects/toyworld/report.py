"""Writes the demo's results as ``report.json`` and ``report.html``, from the files of its runs.

The demo's folder holds the runs ``stage1``, ``stage1_scores``, ``stage2``, ``stage2_scores`` and ``joint``. Stage 1 is
also scored with shuffled media, the joint test with withheld media. This module reads a run's files (``log.txt``,
``result/``); it knows neither training nor evaluation.
"""

from __future__ import annotations

import base64
import json
import mimetypes
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import read_lines, write_json, write_text
from lavis_chatbridge.pages import render
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality

TEMPLATE = Path(__file__).with_name("report.html")
STARTED = ".started"
"""A file that ``make demo`` touches at its start."""

SHUFFLED = "_shuffled_image_video_audio"
JOINT = {
    "both": "",
    "no_vision": "_withheld_image_video",
    "no_audio": "_withheld_audio",
    "neither": "_withheld_image_video_audio",
}
"""Condition of the media -> suffix of the result's file name."""

COMPOSING = ("name", "compose", "match")
"""The kinds of joint questions whose mean is ``joint.both``; the other kinds are listed separately."""

_EXAMPLES_PER_MODALITY = 4
_CURVE_WIDTH, _CURVE_HEIGHT = 552, 132


def write_report(folder: Path, world: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` into the demo's folder, and return the content of ``report.json``.

    Args:
        folder: The demo's folder with the runs.
        world: The folder of the embedded world that the runs used.

    Raises:
        DataError: If a run's results are missing.
    """
    report: dict[str, Any] = {"seconds": _seconds(folder), "stage1": _stage1(folder)}
    if (folder / "stage2_scores").is_dir():
        report["stage2"] = _stage2(folder)
        report["joint"] = _joint(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", render(TEMPLATE, **_page(folder, world, report)))
    return report


def summary(report: Mapping[str, Any]) -> str:
    """The report's scores as a few lines of text."""
    lines = [_row("", *_columns(report["stage1"]))]
    for stage in ("stage1", "stage2"):
        for modality, scores in report.get(stage, {}).items():
            lines.append(_row(f"{stage} {modality}", *(f"{value:.3f}" for value in scores.values())))
    if joint := report.get("joint"):
        lines += [_row(f"joint {name}", f"{joint[name]:.3f}") for name in JOINT]
        for kind, score in joint["by_kind"].items():
            lines.append(_row(f"joint {kind}", f"{score:.3f}", f"in words {joint['text_only'][kind]:.3f}"))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return " ".join(f"{cell:<18}" if number == 0 else f"{cell:>11}" for number, cell in enumerate(cells)).rstrip()


def _columns(stage: Mapping[str, Mapping[str, float]]) -> list[str]:
    return list(next(iter(stage.values())))


def _seconds(folder: Path) -> float | None:
    """Seconds since the demo began, or None if it was not started by make."""
    started = folder / STARTED
    return round(time.time() - started.stat().st_mtime, 1) if started.is_file() else None


# --- Scores ---


def _stage1(folder: Path) -> dict[str, dict[str, float]]:
    seen = _by_modality(folder / "stage1_scores", "test")
    held_out = _by_modality(folder / "stage1_scores", "heldout")
    shuffled = _by_modality(folder / "stage1_scores", "test", SHUFFLED)
    return {
        modality: {
            "accuracy": seen[modality]["attribute_accuracy"],
            "heldout": held_out[modality]["attribute_accuracy"],
            "shuffled": shuffled[modality]["attribute_accuracy"],
            "text_prior": seen[modality]["text_prior"],
        }
        for modality in MODALITIES
    }


def _stage2(folder: Path) -> dict[str, dict[str, float]]:
    splits = {"accuracy": "test", "heldout": "heldout"}
    scores = {name: _by_modality(folder / "stage2_scores", split) for name, split in splits.items()}
    return {modality: {name: scores[name][modality]["exact_match"] for name in splits} for modality in MODALITIES}


def _joint(folder: Path) -> dict[str, Any]:
    """Exact match: per condition over the `COMPOSING` kinds, and per kind with both media and with descriptions."""
    joint: dict[str, Any] = {}
    for name, media in JOINT.items():
        by_kind = _exact_by_kind(folder / "joint", "test", media)
        joint[name] = sum(by_kind[kind] for kind in COMPOSING) / len(COMPOSING)
        joint.setdefault("by_kind", by_kind)
    joint["text_only"] = _exact_by_kind(folder / "joint", "words")
    return joint


def _exact_by_kind(run: Path, split: str, media: str = "") -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for record in _records(run, split, media):
        right.setdefault(record["meta"]["asked"], []).append(_is_right(record))
    return {kind: sum(values) / len(values) for kind, values in sorted(right.items())}


def _is_right(record: Mapping[str, Any]) -> bool:
    """Whether an answer matches exactly, or a caption contains the words of all facts."""
    said = record["prediction"].lower()
    if record.get("answers"):
        return said.strip(" .") in [answer.lower() for answer in record["answers"]]
    words = said.replace(",", " ").replace(".", " ").split()
    return all(value in words for value in record["facts"].values())


def _by_modality(run: Path, split: str, media: str = "") -> dict[Modality, dict[str, Any]]:
    """Each score of a split as a share, and ``text_prior``, by modality (the prefix of sample ids)."""
    by_source = json.loads(_result(run, f"{split}{media}", "_metrics.json").read_text())["by_source"]
    modalities = {record["source"]: record["sample_id"].split("_")[0] for record in _records(run, split, media)}
    shares = {
        source: {name: value / 100 for name, value in {**own["scores"], "text_prior": own.get("chance", 0.0)}.items()}
        for source, own in by_source.items()
        if source in modalities
    }
    return {modalities[source]: own for source, own in shares.items()}


def _records(run: Path, split: str, media: str = "") -> list[dict[str, Any]]:
    return [json.loads(line) for _, line in read_lines(_result(run, f"{split}{media}", ".jsonl"))]


def _result(run: Path, name: str, suffix: str) -> Path:
    """The newest ``{name}_step{N}{suffix}`` among a run's results."""
    pattern = re.compile(rf"{re.escape(name)}_step\d+{re.escape(suffix)}")
    found = [path for path in (run / "result").glob("*") if pattern.fullmatch(path.name)]
    if not found:
        raise DataError(f"{run}/result has no {name}_step*{suffix}: run the evaluation first")
    return max(found, key=lambda path: path.stat().st_mtime)


# --- The page ---


def _page(folder: Path, world: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the template."""
    tables, curves = [], []
    for stage, title in (("stage1", "Stage 1: captions"), ("stage2", "Stage 2: answers")):
        if stage in report:
            rows = [[name, *(f"{value:.3f}" for value in scores.values())] for name, scores in report[stage].items()]
            tables.append({"title": title, "columns": ["", *_columns(report[stage])], "rows": rows})
            curves += _curve(f"{title}, training loss", folder / stage / "log.txt")
    galleries: dict[str, list[dict[str, Any]]] = {}
    if "joint" in report:
        tables += _joint_tables(report["joint"])
        galleries["Seen and heard together"] = _joint_examples(folder, world)
    for modality in MODALITIES:
        galleries[f"Captions after stage 1: {modality}"] = _examples(folder, world, modality)
    shown = {"tables": tables, "curves": curves, "galleries": galleries, "seconds": report["seconds"]}
    return {"title": "ChatBridge on the embedded world", **shown}


def _joint_tables(joint: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = [[name.replace("_", " "), f"{joint[name]:.3f}"] for name in JOINT]
    kinds = [[kind, f"{score:.3f}", f"{joint['text_only'][kind]:.3f}"] for kind, score in joint["by_kind"].items()]
    title = "Picture or clip and sound together, never shown together in training: name, compose, match"
    return [
        {"title": title, "columns": ["", "exact"], "rows": given},
        {"title": "The same by kind of question", "columns": ["", "with media", "in words only"], "rows": kinds},
    ]


def _curve(title: str, log: Path) -> list[dict[str, Any]]:
    """A loss curve as points of an SVG polyline; nothing if the log has fewer than two losses."""
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    points = [(r["train_step"], r["train_loss"]) for r in records if "train_loss" in r and "train_step" in r]
    if len(points) < 2:
        return []
    steps, losses = zip(*points, strict=True)
    low, high = min(losses), max(losses)
    across, up = _CURVE_WIDTH / ((steps[-1] - steps[0]) or 1), _CURVE_HEIGHT / ((high - low) or 1)
    line = " ".join(f"{(step - steps[0]) * across:.1f},{(high - loss) * up:.1f}" for step, loss in points)
    return [{"title": title, "line": line, "low": low, "high": high, "steps": steps, "losses": losses}]


def _examples(folder: Path, world: Path, modality: Modality) -> list[dict[str, Any]]:
    """The first captions of new renderings and of held-out combinations."""
    examples = []
    for split in ("test", "heldout"):
        media = _media(world, f"{modality}_{split}")
        records = [r for r in _records(folder / "stage1_scores", split) if r["sample_id"] in media]
        for record in records[: _EXAMPLES_PER_MODALITY // 2]:
            examples.append(_example(record, media[record["sample_id"]], asked=f"({split})"))
    return examples


def _joint_examples(folder: Path, world: Path) -> list[dict[str, Any]]:
    media = _media(world, "joint_test")
    chosen: dict[str, dict[str, Any]] = {}
    for record in _records(folder / "joint", "test"):
        chosen.setdefault(record["meta"]["asked"], record)
    return [
        _example(r, media[r["sample_id"]], r["prompt"].rsplit("Human:", 1)[-1].replace("###Assistant:", "").strip())
        for r in chosen.values()
    ]


def _example(record: Mapping[str, Any], media: Iterable[tuple[Modality, Path]], asked: str) -> dict[str, Any]:
    answers = record.get("answers")
    return {
        "media": [(modality, _data_url(path)) for modality, path in media],
        "asked": asked,
        "said": record["prediction"],
        "truth": answers[0] if answers else ", ".join(record["facts"].values()),
        "verdict": "right" if _is_right(record) else "wrong",
    }


def _data_url(path: Path) -> str:
    guessed = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{guessed};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _media(world: Path, name: str) -> dict[str, tuple[tuple[Modality, Path], ...]]:
    """Sample id -> its media, from an annotation file of the world."""
    rows = (json.loads(line) for line in (world / "annotations" / f"{name}.jsonl").read_text().splitlines())
    return {row["id"]: tuple((medium["type"], world / medium["path"]) for medium in row["media"]) for row in rows}
