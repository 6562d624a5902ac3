"""``chatbridge evaluate --suite``: several benchmarks in one process with one model, and one table at the end.

A suite is a configuration file with ``run.metrics``. One whose data are not there is listed with what is missing, and
the rest runs; so does the rest after one that fails.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.plugin import ablation
from lavis_chatbridge.plugin.launch import Session, is_own_runner, with_options
from lavis_chatbridge.plugin.scores import lines_of
from lavis_chatbridge.plugin.suite_table import Line, failed, text_table, write

_log = logging.getLogger(__name__)

FOLDER = Path("projects/chatbridge/eval")
ALL, ZERO_SHOT = "all", "zero-shot"


@dataclass(frozen=True)
class Suite:
    """One benchmark's configuration file, and what of it is needed before it runs."""

    name: str
    path: Path
    run: Mapping[str, Any]

    @property
    def zero_shot(self) -> bool:
        """Whether nothing of it was trained on."""
        return bool(self.run.get("zero_shot"))


def find(folder: str | Path | None = None) -> dict[str, Suite]:
    """Name -> suite, of all configuration files of a folder that name metrics.

    Raises:
        ConfigError: If there is none, or a file is no configuration.
    """
    places = [Path(folder)] if folder else [FOLDER, Path(__file__).resolve().parents[2] / FOLDER]
    chosen = next((place for place in places if place.is_dir()), None)
    if chosen is None:
        raise ConfigError(f"no folder of suites at {places[0]}: run in the checkout, or name it with --suite-folder")
    suites = {}
    for path in sorted(chosen.glob("*.yaml")):
        run = _run_section(path)
        if run.get("metrics"):
            suites[path.stem] = Suite(path.stem, path, run)
    if not suites:
        raise ConfigError(f"{chosen} holds no suite: a suite is a YAML file with run.metrics")
    return suites


def _run_section(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    run = (content.get("run") or {}) if isinstance(content, Mapping) else None
    if not isinstance(run, Mapping):
        raise ConfigError(f"{path}: expected sections of which run is a mapping; is this a configuration file?")
    return run


def choose(names: str, suites: Mapping[str, Suite]) -> list[Suite]:
    """The suites that ``--suite`` names.

    Raises:
        ConfigError: If a name is unknown, or there is none.
    """
    if names == ALL:
        return list(suites.values())
    if names == ZERO_SHOT:
        return [suite for suite in suites.values() if suite.zero_shot]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError(f"--suite names no suite; known are {', '.join([ZERO_SHOT, ALL, *suites])}")
    for name in wanted:
        if name not in suites:
            near = difflib.get_close_matches(name, [*suites, ALL, ZERO_SHOT], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"unknown suite {name!r}{hint}; known are {', '.join([ZERO_SHOT, ALL, *suites])}")
    return [suites[name] for name in dict.fromkeys(wanted)]


def run(
    names: str, options: Sequence[str], folder: str | None, output: str, ablate: Sequence[str] | None = None
) -> int:
    """Score the named suites, print and write the table.

    Args:
        names: Those behind ``--suite``.
        options: Overrides of each suite's configuration.
        folder: Where the suites are, if not in the checkout.
        output: Where the table goes.
        ablate: Also score with fewer media: conditions, an empty sequence for all (see `ablation.conditions`).

    Returns:
        0; 1 if a suite failed; 2 if the data of all are missing.
    """
    chosen = choose(names, find(folder))
    ablation.parse(ablate or [])  # a wrong word is told before the first suite is scored
    with Session(keep_journals=True) as session:
        runs = _Runs(session, options)
        for suite in chosen:
            runs.score(suite, ablate)
        return _finish(runs, Path(output))


class _Runs:
    """Scores suites one after the other and keeps a line of each."""

    def __init__(self, session: Session, options: Sequence[str]) -> None:
        self.session = session
        self.options = options
        self.lines: list[Line] = []
        self.model = ""

    def score(self, suite: Suite, ablate: Sequence[str] | None) -> None:
        """The lines of one suite: with its media, and with ``ablate`` under other conditions."""
        try:
            with self.session.together(suite.path, self.options):
                self._check(suite, ablate)
            whole = self._run(suite, {})
            lines = [*whole, *(self._ablated(suite, ablate, whole) if ablate is not None else [])]
        except _DataMissing as missing:
            self.lines.append(Line(suite.name, status="missing", remarks=[str(missing)]))
            return
        except ChatBridgeError as error:
            self.lines.append(failed(suite.name, "", error))
            return
        for line in lines:
            alone = len(whole) == 1 or line.suite == suite.name
            line.suite = suite.name if alone else f"{suite.name} {line.suite}"
        self.lines += lines

    def _ablated(self, suite: Suite, ablate: Sequence[str], whole: Sequence[Line]) -> list[Line]:
        """The lines of a suite under each condition; one that fails is a line too."""
        from lavis.common.registry import registry

        found = ablation.conditions(ablate, registry.get("configuration"))
        return ablation.scored(found, lambda condition: self._run(suite, condition.options), suite.name, whole)

    def _run(self, suite: Suite, more: Mapping[str, str]) -> list[Line]:
        _log.info("suite %s%s", suite.name, "".join(f" {key}={value}" for key, value in more.items()))
        found = self.session.run(str(suite.path), with_options(self.options, more), evaluate=True) or {}

        from lavis.common.registry import registry

        cfg = registry.get("configuration")
        self.model = cfg.model_cfg.model_type
        return lines_of(found, cfg.run)

    def _check(self, suite: Suite, ablate: Sequence[str] | None) -> None:
        """Look for a suite's files, and whether its media can be exchanged if they are to be.

        Raises:
            _DataMissing: If files are not there.
            ConfigError: If the configuration is at fault.
        """
        from lavis_chatbridge.runners.config import dataset_sections, run_section  # before builders: it imports LAVIS

        sections = dataset_sections(suite.path, self.options)

        from lavis_chatbridge.datasets.builders import require_files
        from lavis_chatbridge.errors import DataError

        try:
            require_files(sections)
        except DataError as error:
            raise _DataMissing(error) from error
        run = run_section(suite.path, self.options)
        if ablate is not None:
            ablation.check(ablate, sections, run)
        if not is_own_runner(runner := str(run.get("runner") or "")):
            raise ConfigError(
                f"run.runner {runner!r} is LAVIS's own, which runs only once in a process: use chatbridge_runner, or "
                f"score {suite.path} alone (--cfg-path)"
            )


class _DataMissing(ChatBridgeError):
    """Files of a suite are not there."""


def _finish(runs: _Runs, output: Path) -> int:
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.tasks.scoring.records import versions

    states = {line.status for line in runs.lines}
    if distributed.is_main():
        print(text_table(runs.lines), flush=True)
        folder = output / (runs.model or ".")
        try:
            files = write(folder, runs.lines, {"model": runs.model, "versions": versions()})
        except OSError as error:
            raise ConfigError(f"--output: cannot write to {folder}: {error.strerror or error}") from error
        runs.session.remove_journals()
        print(f"\nwritten to {', '.join(map(str, files))}")
    return 1 if "failed" in states else 0 if "scored" in states else 2
