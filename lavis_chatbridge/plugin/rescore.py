"""``chatbridge evaluate --rescore FILE``: the scores of a file of predictions, without a model and without its data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.plugin.suite_table import Line, text_table
from lavis_chatbridge.writing import write_json


def run(file: str, options: Sequence[str]) -> int:
    """Score the predictions of each source, write ``..._rescored.json`` beside them and print a table.

    Returns:
        0; 1 if a source could not be scored.

    Args:
        file: What an evaluation wrote, ``result/SPLIT_stepN.json``.
        options: ``run.metrics=[...]`` and ``run.normalisation=...`` where others are wanted than those of that run.

    Raises:
        DataError: If the file holds no predictions, or nothing says which metrics are wanted.
        ConfigError: If an option is none of this command.
    """
    from lavis_chatbridge.tasks.scoring.records import announce, score_records, versions

    path = Path(file)
    records = _records(path)
    chosen = _settings(path, options)
    announce(chosen.metrics)
    sources = list(dict.fromkeys(str(record.get("source", "")) for record in records))
    by_source = {
        name: score_records(
            [record for record in records if str(record.get("source", "")) == name],
            chosen.metrics,
            chosen.normalisation,
        )
        for name in sources
    }
    settings = {"metrics": chosen.metrics, "normalisation": chosen.normalisation}
    target = path.with_name(f"{path.stem}_rescored.json")
    write_json(target, {"by_source": by_source, **settings, "versions": versions()})
    lines = [Line.of_scores(name, scores, chosen.metrics, chosen.published) for name, scores in by_source.items()]
    print(text_table(lines, "data set"))
    print(f"written to {target}")
    return int(any(line.status == "failed" for line in lines))


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DataError(
            f"{path}: expected a list of predictions, as an evaluation writes it to result/SPLIT_stepN.json"
        )
    return records


def _settings(path: Path, options: Sequence[str]) -> Any:
    """What the run said about its metrics, with the options over it."""
    from lavis_chatbridge import settings
    from lavis_chatbridge.runners.config import read_options
    from lavis_chatbridge.tasks.settings import EvaluationSettings

    beside = path.with_name(f"{path.stem}_metrics.json")
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    said = {key: known[key] for key in ("metrics", "normalisation", "published") if key in known}
    given = read_options(options)
    others = [key for key in given if key != "run"]
    if others:
        raise ConfigError(f"--rescore takes options of run alone, such as run.metrics; found {', '.join(others)}")
    chosen = settings.parse(EvaluationSettings, {**said, **given.get("run", {})}, "run")
    if not chosen.metrics:
        raise DataError(
            f"{path}: the run named no official metrics; name them, such as --options run.metrics=[exact_match]"
        )
    return chosen
