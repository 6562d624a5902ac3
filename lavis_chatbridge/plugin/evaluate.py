"""``python -m lavis.evaluate`` and ``chatbridge evaluate``: evaluate a model on configuration files.

The model is scored on every configuration (one file, or a set of benchmarks) in every condition (all media, then those
of ``--ablate``), with one table at the end. Benchmarks that fail or whose data are missing have a line in it, too.
``--rescore`` scores a file of predictions again, without a model.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from lavis_chatbridge.config import PROJECTS, read_yaml
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.plugin import report
from lavis_chatbridge.plugin.launch import Session, is_own_runner, run_command, with_options
from lavis_chatbridge.plugin.report import Line
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

_log = logging.getLogger(__name__)

FOLDER = Path("projects/chatbridge/eval")
ALL = "all"
MODES = ("withheld", "shuffled")
WORDS = ("removed", "told")
"""Alternatives to keeping the words before a medium that ``withheld`` removes."""


def command(
    cfg_path: Annotated[str | None, typer.Option("--cfg-path", help="Score on this configuration file.")] = None,
    suite: Annotated[
        str | None,
        typer.Option(help="Benchmarks: paper, modern, zero-shot, image, video, audio, av, all, or their names."),
    ] = None,
    rescore: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score this file of predictions again, without a model.")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Score again without media (withheld) or with other samples' (shuffled), for some modalities only "
            "(withheld:image,video), with words that state what is missing (withheld:told). Without CONDITION, each "
            "modality of the data is withheld, and shuffled.",
        ),
    ] = None,
    suite_folder: Annotated[
        str | None, typer.Option(help="Folder of the suites' YAML files (default: projects/chatbridge/eval).")
    ] = None,
    output: Annotated[str, typer.Option(help="Folder of the table of --suite.")] = "output/eval",
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Settings that override the file's; repeatable.")
    ] = None,
) -> int:
    """Score a model on a configuration file or benchmarks."""
    chosen = [value is not None for value in (cfg_path, suite, rescore)]
    if sum(chosen) != 1:
        raise ConfigError("give one of --cfg-path YAML, --suite NAMES and --rescore FILE")
    conditions = None if ablate is None else parse_conditions(ablate)
    if rescore is not None:
        if conditions is not None:
            raise ConfigError("--ablate needs a model: use it with --cfg-path or --suite, not with --rescore")
        return report.rescore(rescore, options or [])
    if suite is not None:
        return _suites(suite, suite_folder, Path(output), options or [], conditions)
    return _one(str(cfg_path), options or [], conditions)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.evaluate``: returns the exit status."""
    return run_command("lavis.evaluate", command, argv)


@dataclass(frozen=True)
class Condition:
    """An ablation: mode, modalities and words; and the splits that have such media (empty: not yet looked up)."""

    mode: str = "normal"
    modalities: tuple[Modality, ...] = ()
    words: str = "kept"
    splits: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name in the table: ``""``, ``"image and audio withheld"``, ``"audio withheld, told"``."""
        if self.mode == "normal":
            return ""
        return f"{' and '.join(self.modalities)} {self.mode}{'' if self.words == 'kept' else f', {self.words}'}"

    @property
    def options(self) -> dict[str, str]:
        """The options that set this condition."""
        if self.mode == "normal":
            return {}
        found = {"run.media": self.mode, "run.media_modalities": f"[{','.join(self.modalities)}]"}
        found |= {"run.withheld_words": self.words} if self.words != "kept" else {}
        return found | ({"run.test_splits": f"[{','.join(self.splits)}]"} if self.splits else {})


def parse_conditions(words: Sequence[str]) -> list[Condition]:
    """Parse ``--ablate``: ``MODE`` or ``MODE:WORD,WORD``, with words of modalities, ``removed``, ``told``.

    Raises:
        ConfigError: If a word is none of these.
    """
    return [_condition(word) for word in dict.fromkeys(words) if word != ALL]


def _condition(word: str) -> Condition:
    mode, colon, rest = word.partition(":")
    named = rest.split(",") if colon else []
    manner = [name for name in named if name in WORDS]
    asked = [name for name in named if name not in WORDS]
    if mode not in MODES or not set(asked) <= set(MODALITIES) or len(manner) > (mode == "withheld"):
        raise ConfigError(
            f"--ablate {word}: write withheld or shuffled, and after a colon any of {', '.join(MODALITIES)}; withheld "
            f"takes removed or told, too"
        )
    return Condition(mode, tuple(m for m in MODALITIES if m in (asked or MODALITIES)), (manner or ["kept"])[0])


@dataclass
class _Scorer:
    """Scores configurations in one session; equal models are built only once."""

    session: Session
    options: Sequence[str]
    conditions: Sequence[Condition] | None
    written: list[str] = field(default_factory=list)
    model: str = ""

    def score_all(self, path: str | Path, name: str) -> list[Line]:
        """The lines of a configuration with all media, then for each condition; a failure is a line, too."""
        whole = lines = self._score(path, Condition())
        for condition in [] if self.conditions is None else suitable(self.conditions, _registry().get("configuration")):
            try:
                own = self._score(path, condition)
            except ChatBridgeError as error:
                own = [report.failed(name, condition.label, error)]
            before = {line.suite: line.score for line in whole if line.score is not None}
            for line in own:
                if line.score is not None and line.suite in before:
                    line.drop = before[line.suite] - line.score
            lines = lines + own
        return lines

    def _score(self, path: str | Path, condition: Condition) -> list[Line]:
        _log.info("%s%s", path, f" ({condition.label})" if condition.label else "")
        found = self.session.run(str(path), with_options(self.options, condition.options), evaluate=True) or {}
        cfg = _registry().get("configuration")
        self.model = str(cfg.model_cfg.get("model_type") or "")
        files = [path for split in found.values() for path in (split or {}).get("written", ())]
        self.written += files or [str(_registry().get_path("result_dir"))]
        own = Condition(cfg.run.media, tuple(cfg.run.media_modalities), cfg.run.withheld_words)
        return report.lines_of(found, cfg.run, own.label)


def _one(path: str, options: Sequence[str], conditions: Sequence[Condition] | None) -> int:
    """Score one configuration and print the table on the main process; 1 if a part could not be scored."""
    if conditions is not None:
        _check_ablation(path, options)
    with Session() as session:
        scorer = _Scorer(session, options, conditions)
        lines = scorer.score_all(path, Path(path).stem)
        text, complete = report.summary(lines, scorer.written)
        _on_main(lambda: print(text, flush=True))
    return 0 if complete else 1


def _suites(
    names: str, folder: str | None, output: Path, options: Sequence[str], conditions: Sequence[Condition] | None
) -> int:
    """Score suites, print and write the table; 1 if a suite failed, 2 if the data of all suites are missing."""
    lines: list[Line] = []
    with Session() as session:
        scorer = _Scorer(session, options, conditions)
        for name, path in choose(names, find(folder)).items():
            try:
                missing = _missing_data(path, options)
                if conditions is not None and not missing:
                    _check_ablation(path, options)
                own = [Line(name, status="missing", remarks=[missing])] if missing else scorer.score_all(path, name)
            except ChatBridgeError as error:
                own = [report.failed(name, "", error)]
            alone = len({line.suite for line in own}) == 1
            for line in own:
                line.suite = name if alone or line.suite == name else f"{name} {line.suite}"
            lines += own
        _on_main(lambda: _print_table(lines, output / (scorer.model or "."), scorer.model))
    states = {line.status for line in lines}
    return 1 if "failed" in states else 0 if "scored" in states else 2


def find(folder: str | Path | None = None) -> dict[str, tuple[Path, Any]]:
    """Name -> path and ``run`` section of the suites: the configuration files of a folder that name metrics.

    Raises:
        ConfigError: If there is no suite, or a file is not a configuration.
    """
    places = [Path(folder)] if folder else [FOLDER, PROJECTS / "eval"]
    chosen = next((place for place in places if place.is_dir()), None)
    if chosen is None:
        raise ConfigError(f"no folder of suites at {places[0]}: run the command in the checkout, or set --suite-folder")
    suites = {}
    for path in sorted(chosen.glob("*.yaml")):
        run = read_yaml(path).get("run") or {}
        if not hasattr(run, "get"):
            raise ConfigError(f"{path}: expected a configuration file, with a mapping under run")
        if run.get("metrics"):
            suites[path.stem] = (path, run)
    if not suites:
        raise ConfigError(f"{chosen} has no suite: a suite is a YAML file with run.metrics")
    return suites


def choose(names: str, suites: Mapping[str, tuple[Path, Any]]) -> dict[str, Path]:
    """Name -> path of the suites that ``--suite`` names: ``all``, groups (``run.groups``) and suites."""
    groups: dict[str, list[str]] = {ALL: list(suites)}
    for suite, (_, run) in suites.items():
        for group in run.get("groups") or ():
            groups.setdefault(str(group), []).append(suite)
    known = [*groups, *suites]
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise ConfigError(f"--suite is empty; known are {', '.join(known)}")
    if unknown := [name for name in wanted if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown suite {unknown[0]!r}{hint}; known are {', '.join(known)}")
    return {suite: suites[suite][0] for name in wanted for suite in groups.get(name, [name])}


def suitable(conditions: Sequence[Condition], cfg: Any) -> list[Condition]:
    """The conditions that apply to the media of the data; by default, each modality withheld and shuffled."""
    registry = _registry()
    present: dict[str, set[Modality]] = {split: set() for split in cfg.run.test_splits}
    for name, section in cfg.datasets_cfg.items():
        for split, modalities in registry.get_builder_class(name)(section).media_of(cfg.run.test_splits).items():
            present[split] |= modalities
    every = [modality for modality in MODALITIES if any(modality in own for own in present.values())]
    if not every:
        _log.warning("--ablate: splits %s have no media", ", ".join(present))
    found = []
    for each in conditions or [Condition(mode, (modality,)) for modality in every for mode in MODES]:
        modalities = tuple(modality for modality in each.modalities if modality in every)
        if not modalities:
            _log.warning("%s: no such media in splits %s", each.label, ", ".join(present))
            continue
        splits = tuple(split for split, own in present.items() if own.intersection(modalities))
        found.append(Condition(each.mode, modalities, each.words, splits))
    return list(dict.fromkeys(found))


def _missing_data(path: Path, options: Sequence[str]) -> str:
    """The fault if data files of a suite are missing, else an empty text."""
    from lavis_chatbridge.runners.config import dataset_sections  # before builders: it imports LAVIS

    sections = dataset_sections(path, options)

    from lavis_chatbridge.datasets.builders import require_files

    try:
        require_files(sections)
    except DataError as error:
        return str(error)
    return ""


def _check_ablation(path: str | Path, options: Sequence[str]) -> None:
    """Check, before scoring, that ``--ablate`` can replace media.

    Raises:
        ConfigError: If media are withheld already, or a data set, the task or the runner is LAVIS's own.
    """
    from lavis_chatbridge.runners.config import dataset_sections, run_section

    run, datasets = run_section(path, options), dataset_sections(path, options)
    if run.get("media", "normal") != "normal":
        raise ConfigError(
            f"--ablate scores with all media first, but run.media is {run['media']!r}: remove one of the two"
        )
    from lavis_chatbridge.tasks.base import ChatBridgeTask

    registry = _registry()
    task, runner = registry.get_task_class(str(run.get("task"))), str(run.get("runner") or "")
    if (task is not None and not issubclass(task, ChatBridgeTask)) or not is_own_runner(runner):
        raise ConfigError(f"LAVIS's own tasks and runners (run.task {run.get('task')!r}) do not support --ablate")
    for name in datasets:
        builder = registry.get_builder_class(name)
        if builder is not None and not hasattr(builder, "media_of"):  # an unknown name is reported with all faults
            raise ConfigError(f"--ablate: the data set {name!r} is LAVIS's own, whose media cannot be replaced")


def _registry() -> Any:
    from lavis.common.registry import registry

    return registry


def _on_main(action: Callable[[], None]) -> None:
    from lavis_chatbridge.runners import distributed

    if distributed.is_main():
        action()


def _print_table(lines: Sequence[Line], folder: Path, model: str) -> None:
    from lavis_chatbridge.tasks.scoring.records import versions

    print(report.text_table(lines), flush=True)
    files = report.write(folder, lines, {"model": model, "versions": versions()})
    print(f"\nwritten to {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
