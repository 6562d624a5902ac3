"""What ``--ablate`` asks for: the same evaluation again with some media withheld, or with those of other samples.

It knows the words of the command line and the settings that they stand for, not how media are taken away.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.plugin.suite_table import Line, failed
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

_log = logging.getLogger(__name__)

MODES = ("withheld", "shuffled")


@dataclass(frozen=True)
class Condition:
    """What becomes of which media, and in which splits there are such media (empty: not yet looked up)."""

    mode: str
    kinds: tuple[Modality, ...]
    splits: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As the table of scores names it: ``"image and audio withheld"``."""
        return f"{' and '.join(self.kinds)} {self.mode}"

    @property
    def options(self) -> dict[str, str]:
        """The overrides of a configuration that it stands for."""
        splits = {"run.test_splits": f"[{','.join(self.splits)}]"} if self.splits else {}
        return {"run.media": self.mode, "run.media_kinds": f"[{','.join(self.kinds)}]", **splits}


def parse(words: Sequence[str]) -> list[Condition]:
    """The conditions that words name, each ``MODE`` or ``MODE:KIND,KIND``.

    Raises:
        ConfigError: If one is none.
    """
    return [_parsed(word) for word in dict.fromkeys(words)]


def check(words: Sequence[str], datasets: Iterable[str], run: Mapping[str, Any]) -> None:
    """Refuse, before anything is scored, what cannot be done.

    Args:
        words: Those behind ``--ablate``.
        datasets: The names of the data sets.
        run: The ``run`` section, as file and options have it.

    Raises:
        ConfigError: If a word is no condition, media are taken away already, or a data set, the task or the runner is
            LAVIS's own.
    """
    parse(words)
    if run.get("media", "normal") != "normal":
        raise ConfigError(
            f"--ablate scores with all media first, but run.media is {run['media']!r}: leave one of the two out"
        )
    import lavis.runners  # noqa: F401  (fills the registry with runners)
    from lavis.common.registry import registry

    from lavis_chatbridge.runners import ChatBridgeRunner
    from lavis_chatbridge.tasks.base import ChatBridgeTask

    task, runner = registry.get_task_class(str(run.get("task"))), registry.get_runner_class(str(run.get("runner")))
    for key, found, own in (("task", task, ChatBridgeTask), ("runner", runner, ChatBridgeRunner)):
        if found is not None and not issubclass(found, own):
            raise ConfigError(f"--ablate: run.{key} {run[key]!r} is LAVIS's own, which knows no run.media")
    for name in datasets:
        builder = registry.get_builder_class(name)
        if builder is not None and not hasattr(builder, "media_of"):  # an unknown name is told with all other faults
            raise ConfigError(f"--ablate: the data set {name!r} is LAVIS's own, whose media cannot be exchanged")


def conditions(words: Sequence[str], cfg: Any) -> list[Condition]:
    """The conditions that words name, as far as the data have such media; without words all that suit the data.

    Args:
        words: Those behind ``--ablate``.
        cfg: The configuration that has been scored with all media.
    """
    from lavis.common.registry import registry

    present: dict[str, set[Modality]] = {split: set() for split in cfg.run.test_splits}
    for name, section in cfg.datasets_cfg.items():
        for split, kinds in registry.get_builder_class(name)(section).media_of(cfg.run.test_splits).items():
            present[split] |= kinds
    every = [kind for kind in MODALITIES if any(kind in kinds for kinds in present.values())]
    wanted = parse(words) or [Condition(mode, (kind,)) for kind in every for mode in MODES]
    if not every:
        _log.warning("--ablate: there are no media in splits %s", ", ".join(present))
    found = []
    for each in wanted:
        kinds = tuple(kind for kind in each.kinds if kind in every)
        splits = tuple(split for split, own in present.items() if own.intersection(kinds))
        found.append(Condition(each.mode, kinds, splits))
        if not kinds:
            _log.warning("%s: there are no such media in splits %s", each.label, ", ".join(present))
    return [condition for condition in dict.fromkeys(found) if condition.kinds]


def scored(
    found: Iterable[Condition], score: Callable[[Condition], list[Line]], name: str, whole: Sequence[Line]
) -> list[Line]:
    """The lines of some conditions; one that fails is a line too, since the others' scores are worth as much.

    Args:
        found: See `conditions`.
        score: Gives the lines of one of them.
        name: What a line of one that fails is called.
        whole: The lines with all media.
    """
    lines = []
    for condition in found:
        try:
            own = score(condition)
        except ChatBridgeError as error:
            own = [failed(name, condition.label, error)]
        mark(own, whole, condition)
        lines += own
    return lines


def mark(lines: Sequence[Line], whole: Sequence[Line], condition: Condition) -> None:
    """Note in lines of a condition which one it is, and how much less each score is than with all media."""
    before = {line.suite: line.score for line in whole}
    for line in lines:
        line.media = condition.label
        full = before.get(line.suite)
        if line.score is not None and full is not None:
            line.drop = full - line.score


def _parsed(word: str) -> Condition:
    mode, colon, named = word.partition(":")
    asked = named.split(",") if colon else list(MODALITIES)
    unknown = [kind for kind in asked if kind not in MODALITIES]
    if mode not in MODES or unknown:
        what = f"unknown kind {unknown[0]!r}" if mode in MODES else f"{mode!r} is neither {' nor '.join(MODES)}"
        raise ConfigError(
            f"--ablate {word}: {what}; write MODE or MODE:KIND,KIND with the kinds {', '.join(MODALITIES)}"
        )
    return Condition(mode, tuple(kind for kind in MODALITIES if kind in asked))
