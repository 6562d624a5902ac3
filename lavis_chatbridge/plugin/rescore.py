"""``chatbridge evaluate --rescore FILE``: the scores of a file of predictions, without a model and without its data."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import read_json, write_json
from lavis_chatbridge.plugin import scores

_log = logging.getLogger(__name__)


def run(file: str, options: Sequence[str]) -> int:
    """Score the predictions of each source, write ``..._rescored.json`` beside them and print a table.

    Returns:
        0; 1 if a source could not be scored.

    Args:
        file: What an evaluation wrote, ``result/SPLIT_stepN.json``.
        options: ``run.metrics=[...]`` and ``run.normalisation=...`` where others are wanted than those of that run.

    Raises:
        DataError: If the file holds no predictions, nothing says which metrics are wanted, nothing could be scored, or
            the scores cannot be written.
        ConfigError: If an option is none of this command.
    """
    from lavis_chatbridge.tasks.scoring.records import announce, scores_or_fault, versions

    path = Path(file)
    records = _records(path)
    chosen = _settings(path, options)
    announce(chosen.metrics)
    sources = list(dict.fromkeys(str(record.get("source", "")) for record in records))
    by_source = {
        name: scores_or_fault(
            [record for record in records if str(record.get("source", "")) == name],
            chosen.metrics,
            chosen.normalisation,
        )
        for name in sources
    }
    settings = {"metrics": chosen.metrics, "normalisation": chosen.normalisation}
    target = path.with_name(f"{path.stem}_rescored.json")
    lines = scores.lines_of({"": {"by_source": by_source}}, chosen)
    for line in lines:
        line.suite = line.suite.strip()
    printed, complete = scores.report(lines, [str(target)], "data set")
    try:
        write_json(target, {"by_source": by_source, **settings, "versions": versions()})
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(printed)
    return 0 if complete else 1


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise DataError(
            f"{path}: expected a list of predictions, as an evaluation writes it to result/SPLIT_stepN.json"
        )
    return records


def _settings(path: Path, options: Sequence[str]) -> Any:
    """What the run said about its metrics, with the options over it."""
    from lavis_chatbridge import config as settings
    from lavis_chatbridge.runners.config import read_options
    from lavis_chatbridge.tasks.settings import EvaluationSettings

    beside = path.with_name(f"{path.stem}_metrics.json")
    known = read_json(beside)
    if not isinstance(known, dict):
        if beside.exists():
            _log.warning("%s is damaged: what that run said about its metrics is not known", beside)
        known = {}
    said = {
        key: known[key] for key in ("metrics", "normalisation", "published", "media", "media_kinds") if key in known
    }
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
