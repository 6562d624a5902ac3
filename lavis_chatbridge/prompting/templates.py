"""Instruction templates: several wordings of the same request per task, read from YAML that users can extend.

A YAML file has ``styles`` (style -> words) and ``tasks`` (task -> its default style and its templates); see
``prompting/templates/*.yaml``. Questions are inserted last, so braces in them stay unchanged. This module knows no data
set and no tokenizer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError, PromptError

FOLDER = Path(__file__).with_name("templates")
QUESTION, STYLE = "{question}", "{style}"


class TaskTemplates(Settings):
    """The wordings of one task."""

    templates: list[str]
    """Each may contain ``{question}`` and ``{style}``; either all or none contain ``{question}``."""
    style: str = ""
    """The default style of samples."""

    def check(self) -> Iterable[str]:
        """Contradictions between the wordings."""
        if not self.templates:
            yield "templates is empty"
        if len({QUESTION in template for template in self.templates}) > 1:
            yield "some templates contain {question} and some do not"
        if any(template.count(QUESTION) > 1 for template in self.templates):
            yield "a template contains {question} twice"
        if not self.style and any(STYLE in template for template in self.templates):
            yield "templates contain {style}, so the task needs a style"

    @property
    def asks(self) -> bool:
        """Whether the sample's question is part of the request."""
        return QUESTION in self.templates[0]


class _TemplateFile(Settings):
    styles: dict[str, list[str]] = {}
    tasks: dict[str, TaskTemplates] = {}


class Templates:
    """All tasks with their wordings, and the words of each style.

    Args:
        tasks: Task -> its templates.
        styles: Style -> words for it, such as "a word or two".

    Raises:
        ConfigError: If a task's style has no words.
    """

    def __init__(self, tasks: Mapping[str, TaskTemplates], styles: Mapping[str, Sequence[str]]) -> None:
        self._tasks = dict(tasks)
        self._styles = {name: list(words) for name, words in styles.items()}
        for name, task in self._tasks.items():
            if task.style and not self._styles.get(task.style):
                raise ConfigError(f"templates.{name}: {self._unknown_style(task.style)}")

    @classmethod
    def load(cls, *paths: str | Path) -> Templates:
        """The package's templates with those of further YAML files; a later file replaces tasks and styles.

        Raises:
            ConfigError: If a file cannot be read or is malformed.
        """
        tasks: dict[str, TaskTemplates] = {}
        styles: dict[str, list[str]] = {}
        for path in [*sorted(FOLDER.glob("*.yaml")), *map(Path, paths)]:
            read = _read(path)
            tasks |= read.tasks
            styles |= read.styles
        return cls(tasks, styles)

    @classmethod
    @functools.cache
    def default(cls) -> Templates:
        """The package's own templates."""
        return cls.load()

    @property
    def tasks(self) -> list[str]:
        return sorted(self._tasks)

    def __contains__(self, task: object) -> bool:
        return task in self._tasks

    def __getitem__(self, task: str) -> TaskTemplates:
        return self._tasks[task]

    def apply(self, task: str, question: str = "", style: str = "", rng: np.random.Generator | None = None) -> str:
        """The request for one sample.

        Args:
            task: A task of these templates.
            question: The sample's question; it is the whole request if the task's templates have no ``{question}``.
            style: The sample's style; by default the task's.
            rng: Chooses template and style words; None takes the first of each.

        Raises:
            PromptError: If the sample lacks a question that the task needs, or the style has no words.
        """
        entry = self._tasks[task]
        template = _choice(entry.templates, rng)
        words = self._styles.get(style or entry.style) or []
        if (style or entry.style) and not words:
            raise PromptError(self._unknown_style(style))
        phrase = _choice(words, rng) if words else ""
        if question and not entry.asks:
            return question
        if not question and entry.asks:
            raise PromptError(f"a sample of task {task!r} has no question")
        return template.replace(STYLE, phrase).replace(QUESTION, question)

    def _unknown_style(self, style: str) -> str:
        return f"no words for style {style!r}; known are {', '.join(sorted(self._styles))}"


def _choice(items: Sequence[str], rng: np.random.Generator | None) -> str:
    return items[0] if rng is None else items[int(rng.integers(len(items)))]


def _read(path: Path) -> _TemplateFile:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"templates {path}: {' '.join(str(error).split())}") from error
    return parse(_TemplateFile, content, f"templates {path.name}")
