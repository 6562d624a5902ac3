"""``python -m lavis.evaluate`` and ``chatbridge evaluate``: evaluate a model on configuration files.

The model is scored on every configuration (one file, or a set of benchmarks) in every condition (all media, then those
of ``--ablate``), with one table at the end. ``--rescore`` scores a file of predictions again, without a model.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.config import PROJECTS, read_yaml
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.plugin import report
from lavis_chatbridge.plugin.launch import Session, is_own_runner, run_command, with_options
from lavis_chatbridge.plugin.report import Line
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.tasks.settings import MediaSettings

if TYPE_CHECKING:
    from lavis_chatbridge.runners.config import Config

_log = logging.getLogger(__name__)

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
        Path, typer.Option(help="Folder of the suites' YAML files; default: the shipped ones.")
    ] = PROJECTS / "eval",
    output: Annotated[Path, typer.Option(help="Folder of the table of --suite.")] = Path("output/eval"),
    engine: Annotated[str, typer.Option(help="A vLLM server that runs the language model: http://HOST:PORT/v1.")] = "",
    options: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Settings that override the file's; repeatable.")
    ] = None,
) -> int:
    """Score a model on a configuration file or benchmarks."""
    if [cfg_path, suite, rescore].count(None) != 2:
        raise ConfigError("give one of --cfg-path YAML, --suite NAMES and --rescore FILE")
    conditions = None if ablate is None else parse_conditions(ablate)
    options = with_options(options or [], {"model.language_model.engine": engine} if engine else {})
    if rescore is not None:
        if conditions is not None:
            raise ConfigError("--ablate needs a model: use it with --cfg-path or --suite, not with --rescore")
        return report.rescore(rescore, options)
    if suite is not None:
        return _suites(choose(suite, find(suite_folder)), output, options, conditions)
    with Session() as session:
        lines = _conditions(session, str(cfg_path), options, conditions)
        _print_on_main(report.summary(lines))
    return int(any(line.status == "failed" for line in lines))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.evaluate``: returns the exit status."""
    return run_command("lavis.evaluate", command, argv)


def parse_conditions(words: Sequence[str]) -> list[MediaSettings]:
    """Parse ``--ablate``: ``MODE`` or ``MODE:WORD,WORD``, with words of modalities, ``removed``, ``told``."""
    return [_condition(word) for word in dict.fromkeys(words) if word != ALL]


def _condition(word: str) -> MediaSettings:
    mode, colon, rest = word.partition(":")
    named = rest.split(",") if colon else []
    manner = [name for name in named if name in WORDS]
    asked = [name for name in named if name not in WORDS]
    if mode not in MODES or not set(asked) <= set(MODALITIES) or len(manner) > (mode == "withheld"):
        raise ConfigError(
            f"--ablate {word}: write withheld or shuffled, and after a colon any of {', '.join(MODALITIES)}; withheld "
            f"takes removed or told, too"
        )
    modalities = [modality for modality in MODALITIES if modality in (asked or MODALITIES)]
    return _replacing(mode, modalities, *manner)


def _replacing(mode: str, modalities: Sequence[Modality], words: str = "kept") -> MediaSettings:
    values = {"media": mode, "media_modalities": modalities, "withheld_words": words}
    return MediaSettings.model_validate(values)


def _suites(
    paths: Mapping[str, Path], output: Path, options: Sequence[str], conditions: Sequence[MediaSettings] | None
) -> int:
    """Score suites, print and write the table; 1 if a suite failed, 2 if the data of all suites are missing."""
    lines: list[Line] = []
    with Session() as session:
        for name, path in paths.items():
            try:
                missing = _missing_data(path, options)
                own = [missing] if missing else _conditions(session, path, options, conditions)
            except ChatBridgeError as error:
                own = [report.failed(name, "", error)]
            alone = len({line.suite for line in own}) == 1
            for line in own:
                line.suite = name if alone else f"{name} {line.suite}"
            lines += own
        model = str(session.cfg.model_cfg.get("model_type") or "") if hasattr(session, "cfg") else ""
        _print_on_main(report.text_table(lines), lines, output / model, model)
    states = {line.status for line in lines}
    return 1 if "failed" in states else 0 if "scored" in states else 2


def _conditions(
    session: Session, path: str | Path, options: Sequence[str], conditions: Sequence[MediaSettings] | None
) -> list[Line]:
    """The lines of a configuration with all media, then for each condition; equal models are built only once."""
    if conditions is not None:
        _check_ablation(path, options)
    lines = whole = _score(session, path, options)
    for condition, splits in [] if conditions is None else suitable(conditions, session.cfg):
        try:
            changes = condition.options | {"run.test_splits": f"[{','.join(splits)}]"}
            own = _score(session, path, with_options(options, changes))
        except ChatBridgeError as error:
            own = [report.failed(Path(path).stem, condition.label, error)]
        before = {line.suite: line.score for line in whole if line.score is not None}
        for line in own:
            if line.score is not None and line.suite in before:
                line.drop = before[line.suite] - line.score
        lines = lines + own
    return lines


def _score(session: Session, path: str | Path, options: Sequence[str]) -> list[Line]:
    _log.info("evaluating %s %s", path, " ".join(options))
    found = session.run(str(path), options, evaluate=True) or {}
    return report.lines_of(found, session.cfg.run)


def find(folder: Path = PROJECTS / "eval") -> dict[str, tuple[Path, Any]]:
    """Name -> path and ``run`` section of the suites: the configuration files of a folder that name metrics."""
    suites = {}
    for path in sorted(folder.glob("*.yaml")):
        run = read_yaml(path).get("run") or {}
        if not hasattr(run, "get"):
            raise ConfigError(f"{path}: expected a configuration file, with a mapping under run")
        if run.get("metrics"):
            suites[path.stem] = (path, run)
    if not suites:
        raise ConfigError(f"{folder} has no suite: a suite is a YAML file with run.metrics")
    return suites


def choose(names: str, suites: Mapping[str, tuple[Path, Any]]) -> dict[str, Path]:
    """Name -> path of the suites that ``--suite`` names: ``all``, groups (``run.groups``) and suites."""
    groups: dict[str, list[str]] = {ALL: list(suites)} | {name: [name] for name in suites}
    for suite, (_, run) in suites.items():
        for group in run.get("groups") or ():
            groups.setdefault(str(group), []).append(suite)
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in groups]:
        near = difflib.get_close_matches(unknown[0], groups, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"unknown suite {unknown[0]!r}{hint}; known in --suite-folder are {', '.join(groups)}")
    return {suite: suites[suite][0] for name in wanted for suite in groups[name]}


def suitable(conditions: Sequence[MediaSettings], cfg: Config) -> list[tuple[MediaSettings, list[str]]]:
    """The conditions that apply to the data, with the splits that have such media.

    By default, each modality of the data is withheld, and shuffled.
    """
    from lavis.common.registry import registry

    present: dict[str, set[Modality]] = {split: set() for split in cfg.run.test_splits}
    for name, section in cfg.datasets_cfg.items():
        for split, modalities in registry.get_builder_class(name)(section).media_of(cfg.run.test_splits).items():
            present[split] |= modalities
    every = [modality for modality in MODALITIES if any(modality in own for own in present.values())]
    found = []
    for asked in conditions or [_replacing(mode, [modality]) for modality in every for mode in MODES]:
        one = asked.model_copy(update={"media_modalities": [m for m in asked.media_modalities if m in every]})
        splits = [split for split, own in present.items() if own.intersection(one.media_modalities)]
        if not splits:
            _log.warning("%s: no such media in splits %s", asked.label, ", ".join(present))
        elif (one, splits) not in found:
            found.append((one, splits))
    return found


def _missing_data(path: Path, options: Sequence[str]) -> Line | None:
    """The line of a suite whose data files are not there, else None."""
    from lavis_chatbridge.datasets.builders import require_files
    from lavis_chatbridge.runners.config import dataset_sections

    sections = dataset_sections(path, options)
    try:
        require_files(sections)
    except DataError as error:
        return Line(path.stem, status="missing", remarks=[str(error)])
    return None


def _check_ablation(path: str | Path, options: Sequence[str]) -> None:
    """Check, before scoring, that ``--ablate`` can replace media: LAVIS's own parts would score them all the same."""
    from lavis.common.registry import registry

    from lavis_chatbridge.runners.config import dataset_sections, run_section
    from lavis_chatbridge.tasks.base import ChatBridgeTask

    run, names = run_section(path, options), dataset_sections(path, options)
    if run.get("media", "normal") != "normal":
        raise ConfigError(f"--ablate scores with all media first, but run.media is {run['media']!r}: remove one")
    task = registry.get_task_class(str(run.get("task"))) or ChatBridgeTask
    # unknown names are reported with all other faults of the configuration
    builders = filter(None, map(registry.get_builder_class, names))
    ours = issubclass(task, ChatBridgeTask) and all(hasattr(builder, "media_of") for builder in builders)
    if not ours or not is_own_runner(str(run.get("runner"))):
        raise ConfigError(f"{path}: LAVIS's own data sets, tasks and runners do not support --ablate")


def _print_on_main(text: str, lines: Sequence[Line] = (), folder: Path | None = None, model: str = "") -> None:
    """Print a table on the main process, and write it if a folder is given."""
    from lavis_chatbridge.runners import distributed
    from lavis_chatbridge.tasks.scoring.records import versions

    if distributed.is_main():
        print(text, flush=True)
        if folder is not None:
            files = report.write(folder, lines, {"model": model, "versions": versions()})
            print(f"\nwritten to {', '.join(map(str, files))}")


if __name__ == "__main__":
    sys.exit(main())
