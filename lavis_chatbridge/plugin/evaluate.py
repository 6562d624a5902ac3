"""``python -m lavis.evaluate`` and ``chatbridge evaluate``: evaluate a model on configuration files.

Every configuration (one file, or a set of benchmarks) is scored in every condition (all media, then those of
``--ablate``), with one table at the end. ``--rescore`` scores a file of predictions again, without a model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from omegaconf import OmegaConf

from lavis_chatbridge.config import PROJECTS, hint, read_yaml
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.plugin import report
from lavis_chatbridge.plugin.launch import CfgPathOrNone, Options, Runs, load
from lavis_chatbridge.plugin.report import Line
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.tasks.settings import MediaSettings

if TYPE_CHECKING:
    from lavis_chatbridge.runners.config import Config

_log = logging.getLogger(__name__)

ALL = "all"
MODES = ("withheld", "shuffled")
WORDS = ("removed", "told")
"""What may happen to the words before a withheld medium, which are kept otherwise."""


def command(
    cfg_path: CfgPathOrNone = None,
    suite: Annotated[
        str | None, typer.Option(help="Benchmarks: paper, modern, zero-shot, image, video, audio, av, all, or names.")
    ] = None,
    rescore: Annotated[
        str | None, typer.Option(metavar="FILE", help="Score predictions again, without a model.")
    ] = None,
    ablate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Score again without media (withheld) or with other samples' (shuffled): withheld:image,video, "
            "withheld:told, ... Without CONDITION, each modality of the data is withheld, and shuffled.",
        ),
    ] = None,
    suite_folder: Annotated[Path, typer.Option(help="Folder of the suites' YAML files.")] = PROJECTS / "eval",
    output: Annotated[Path, typer.Option(help="Folder of the table of --suite.")] = Path("output/eval"),
    engine: Annotated[str, typer.Option(help="A vLLM server that runs the language model: http://HOST:PORT/v1.")] = "",
    options: Options = None,
) -> int:
    """Score a model on a configuration file or benchmarks."""
    if [cfg_path, suite, rescore].count(None) != 2:
        raise ConfigError("give one of --cfg-path YAML, --suite NAMES and --rescore FILE")
    conditions = None if ablate is None else parse_conditions(ablate)
    options = [*(options or []), *([f"model.language_model.engine={engine}"] if engine else [])]
    if rescore is not None:
        if conditions is not None:
            raise ConfigError("--ablate needs a model: use it with --cfg-path or --suite, not with --rescore")
        return report.rescore(rescore, options)
    paths = {"": Path(str(cfg_path))} if suite is None else choose(suite, suite_folder)
    if suite is not None:
        output.mkdir(parents=True, exist_ok=True)  # before the work
    with Runs() as runs:
        lines = score(runs, paths, options, conditions)
        text = report.text_table(lines) if suite else report.summary(lines)
        from lavis_chatbridge.runners import distributed

        if distributed.is_main():
            print(text, flush=True)
            if suite:
                model = str(runs.cfg.model_cfg.get("model_type") or "") if hasattr(runs, "cfg") else ""
                print(f"\nwritten to {', '.join(map(str, report.write_scores(output / model, lines, model)))}")
    states = {line.status for line in lines}
    return 1 if "failed" in states else 0 if "scored" in states else 2


def score(
    runs: Runs, paths: Mapping[str, Path], options: Sequence[str], asked: Sequence[MediaSettings] | None = None
) -> list[Line]:
    """Score configurations by suite (a single one is the suite ``""``), each with all media, then in each condition.

    ``asked`` are the conditions of ``--ablate``; None: only all media; empty: see `ablations`.
    """
    lines: list[Line] = []
    for suite, path in paths.items():
        found: list[Line] = []
        with _errors_as_lines(found, suite):
            if suite:
                from lavis_chatbridge.datasets.builders import require_files
                from lavis_chatbridge.runners.config import dataset_sections

                sections = dataset_sections(path, options)  # its errors are not about missing data
                try:
                    require_files(sections)
                except DataError as error:
                    found.append(Line("", status="missing", remarks=[str(error)]))
            for label, changes in [] if found else _conditions(runs, path, options, asked):
                with _errors_as_lines(found, suite, label):
                    scores = runs.run(str(path), [*options, *changes], evaluate=True) or {}
                    found += report.lines_of(scores, runs.cfg.run)
                if all(line.status == "failed" for line in found):
                    break  # nothing to compare with
        lines += report.completed(found, suite)
    return lines


@contextmanager
def _errors_as_lines(lines: list[Line], suite: str, label: str = "") -> Iterator[None]:
    """Append an error of the block as a line; the error of a single configuration without scores is raised."""
    try:
        yield
    except ChatBridgeError as error:
        if not suite and not lines:
            raise
        _log.error("%s %s failed: %s", suite, label, error)
        lines.append(Line("", label).fail(" ".join(str(error).split())))


def _conditions(
    runs: Runs, path: Path, options: Sequence[str], asked: Sequence[MediaSettings] | None
) -> Iterator[tuple[str, list[str]]]:
    """Label and options of each condition: first all media; then, if asked, the ablations that suit the last run."""
    if asked is None:
        yield "", []
        return
    from lavis.common.registry import registry

    cfg = load(str(path), options)
    if cfg.run.media != "normal":
        raise ConfigError(f"--ablate scores with all media first, but run.media is {cfg.run.media!r}: remove one")
    for name in cfg.datasets_cfg:
        if not hasattr(registry.get_builder_class(name), "media_of"):
            raise ConfigError(f"datasets.{name} is LAVIS's own, which --ablate does not support")
    yield "", []
    for condition, splits in ablations(asked, runs.cfg):
        yield condition.label, [*condition.options, f"run.test_splits=[{','.join(splits)}]"]


def parse_conditions(conditions: Sequence[str]) -> list[MediaSettings]:
    """Parse ``--ablate``: ``MODE`` or ``MODE:WORD,WORD``, with words of modalities, ``removed``, ``told``."""
    found = []
    for condition in dict.fromkeys(condition for condition in conditions if condition != ALL):
        mode, colon, rest = condition.partition(":")
        named = set(rest.split(",")) if colon else set()
        modalities = [modality for modality in MODALITIES if modality in named]
        words = [word for word in WORDS if word in named]
        if mode not in MODES or len(named) > len(modalities) + len(words) or len(words) > (mode == "withheld"):
            raise ConfigError(
                f"--ablate {condition}: write withheld or shuffled, and after a colon any of {', '.join(MODALITIES)}; "
                f"withheld takes removed or told, too"
            )
        settings = {"media": mode, "media_modalities": modalities or MODALITIES, "withheld_words": (*words, "kept")[0]}
        found.append(MediaSettings.model_validate(settings))
    return found


def ablations(asked: Sequence[MediaSettings], cfg: Config) -> list[tuple[MediaSettings, list[str]]]:
    """The conditions that apply to a configuration's data, with the splits that have such media.

    If none is asked for, each modality of the data is withheld, and shuffled.
    """
    from lavis.common.registry import registry

    present: dict[str, set[Modality]] = {split: set() for split in cfg.run.test_splits}
    for name, section in cfg.datasets_cfg.items():
        for split, modalities in registry.get_builder_class(name)(section).media_of(cfg.run.test_splits).items():
            present[split] |= modalities
    every = [modality for modality in MODALITIES if any(modality in own for own in present.values())]
    found = []
    for condition in asked or parse_conditions([f"{mode}:{modality}" for modality in every for mode in MODES]):
        used = [modality for modality in condition.media_modalities if modality in every]
        one = condition.model_copy(update={"media_modalities": used})
        splits = [split for split, own in present.items() if own.intersection(used)]
        if not splits:
            _log.warning("%s: no such media in splits %s", condition.label, ", ".join(present))
        elif (one, splits) not in found:
            found.append((one, splits))
    return found


def choose(names: str, folder: Path = PROJECTS / "eval") -> dict[str, Path]:
    """Suite -> path of the suites that ``--suite`` names: ``all``, groups (``run.groups``) and suites.

    A suite is a configuration file of the folder with ``run.metrics``.
    """
    members: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*.yaml")):
        config = read_yaml(path)
        if OmegaConf.select(config, "run.metrics"):
            for name in (ALL, path.stem, *(OmegaConf.select(config, "run.groups") or ())):
                members.setdefault(name, []).append(path)
    if not members:
        raise ConfigError(f"{folder} has no suite: a suite is a YAML file with run.metrics")
    wanted = [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in members]:
        raise ConfigError(f"unknown suite {unknown[0]!r} in --suite-folder{hint(unknown[0], members)}")
    return {path.stem: path for name in wanted for path in members[name]}
