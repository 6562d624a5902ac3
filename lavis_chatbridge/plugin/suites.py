"""``chatbridge evaluate --suite``: several benchmarks in one process with one model, and one table at the end.

A suite is a configuration file with ``run.metrics``. One whose data are not there is listed with what is missing, and
the rest runs; so does the rest after one that fails.
"""

from __future__ import annotations

import difflib
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.plugin.launch import Session, with_options
from lavis_chatbridge.plugin.scores import lines_of
from lavis_chatbridge.plugin.suite_table import Line, text_table, write

_log = logging.getLogger(__name__)

FOLDER = Path("projects/chatbridge/eval")
ALL, ZERO_SHOT = "all", "zero-shot"


@dataclass(frozen=True)
class Suite:
    """One benchmark's configuration file, and what of it is needed before it runs."""

    name: str
    path: Path
    run: Mapping[str, Any]
    datasets: tuple[str, ...]

    @property
    def zero_shot(self) -> bool:
        """Whether nothing of it was trained on."""
        return bool(self.run.get("zero_shot"))


def find(folder: str | Path | None = None) -> dict[str, Suite]:
    """Name -> suite, of all configuration files of a folder that name metrics.

    Raises:
        ConfigError: If there is none.
    """
    places = [Path(folder)] if folder else [FOLDER, Path(__file__).resolve().parents[2] / FOLDER]
    chosen = next((place for place in places if place.is_dir()), None)
    if chosen is None:
        raise ConfigError(f"no folder of suites at {places[0]}: run in the checkout, or name it with --suite-folder")
    suites = {}
    for path in sorted(chosen.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        run = content.get("run") or {}
        if run.get("metrics"):
            suites[path.stem] = Suite(path.stem, path, run, tuple(content.get("datasets") or ()))
    if not suites:
        raise ConfigError(f"{chosen} holds no suite: a suite is a YAML file with run.metrics")
    return suites


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


def run(names: str, options: Sequence[str], folder: str | None, output: str, ablate: bool = False) -> int:
    """Score the named suites, print and write the table.

    Returns:
        0; 1 if a suite failed; 2 if the data of all are missing.
    """
    chosen = choose(names, find(folder))
    with Session() as session:
        runs = _Runs(session, options)
        for suite in chosen:
            runs.score(suite, ablate)
        return _finish(runs, Path(output))


class _Runs:
    """Scores suites one after the other and keeps a line of each."""

    def __init__(self, session: Session, options: Sequence[str]) -> None:
        self.session = session
        # a set that was interrupted takes the predictions of the suites that it had finished
        self.options = with_options(options, {"run.keep_journal": "true"})
        self.lines: list[Line] = []
        self.journals: list[Path] = []
        self.model = ""

    def score(self, suite: Suite, ablate: bool) -> None:
        """The lines of one suite: with its media, and with ``ablate`` without and with others of each kind."""
        try:
            kinds = self._kinds(suite)
        except _DataMissing as missing:
            self.lines.append(Line(suite.name, status="missing", remarks=[str(missing)]))
            return
        except ChatBridgeError as error:
            self.lines.append(_failed(suite, "", error))
            return
        whole = self._run(suite, "normal", [])
        for kind in kinds if ablate else []:
            for mode in ("withheld", "shuffled"):
                for line, before in zip(self._run(suite, mode, [kind]), whole, strict=False):
                    if line.score is not None and before.score is not None:
                        line.drop = before.score - line.score

    def _run(self, suite: Suite, mode: str, kinds: Sequence[str]) -> list[Line]:
        media = "" if mode == "normal" else f"{' and '.join(kinds)} {mode}"
        more = {} if mode == "normal" else {"run.media": mode, "run.media_kinds": f"[{','.join(kinds)}]"}
        _log.info("suite %s%s", suite.name, f", {media}" if media else "")
        try:
            found = self.session.run(str(suite.path), with_options(self.options, more), evaluate=True) or {}
        except ChatBridgeError as error:
            lines = [_failed(suite, media, error)]
        else:
            lines = list(self._scored(suite, media, found))
        self.lines += lines
        return lines

    def _scored(self, suite: Suite, media: str, found: Mapping[str, Any]) -> list[Line]:
        from lavis.common.registry import registry

        cfg = registry.get("configuration")
        self.model = cfg.model_cfg.model_type
        self.journals.append(Path(registry.get_path("result_dir")) / "journal")
        lines = lines_of(found, cfg.run)
        for line in lines:
            line.suite, line.media = suite.name if len(lines) == 1 else f"{suite.name} {line.suite}", media
        return lines

    def _kinds(self, suite: Suite) -> list[str]:
        """The kinds of media that a suite's data sets have.

        Raises:
            _DataMissing: If files are not there.
            ConfigError: If the configuration is at fault.
        """
        from lavis_chatbridge.runners.config import dataset_sections  # before builders: it imports LAVIS

        sections = dataset_sections(suite.path, self.options)

        from lavis.common.registry import registry

        from lavis_chatbridge.datasets.builders import require_files
        from lavis_chatbridge.errors import DataError

        try:
            require_files(sections)
        except DataError as error:
            raise _DataMissing(error) from error
        parts = [registry.get_builder_class(name)(section).settings.media for name, section in sections.items()]
        return [kind for kind in ("image", "video", "audio") if any(kind in media for media in parts)]


class _DataMissing(ChatBridgeError):
    """Files of a suite are not there."""


def _finish(runs: _Runs, output: Path) -> int:
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.tasks.scoring.records import versions

    states = {line.status for line in runs.lines}
    if distributed.is_main():
        for journal in runs.journals:
            shutil.rmtree(journal, ignore_errors=True)
        files = write(output / (runs.model or "."), runs.lines, {"model": runs.model, "versions": versions()})
        print(text_table(runs.lines))
        print(f"\nwritten to {', '.join(map(str, files))}")
    return 1 if "failed" in states else 0 if "scored" in states else 2


def _failed(suite: Suite, media: str, error: ChatBridgeError) -> Line:
    _log.error("suite %s failed: %s", suite.name, error)
    return Line(suite.name, media, "failed", remarks=[" ".join(str(error).split())])
