"""The wording of requests: instruction templates of each task, and the lines of a multiple-choice question's options.

Templates are read from YAML files, which users can add to. A file has ``styles`` (style -> phrases) and ``tasks``
(task -> its default style and its templates); see ``prompting/templates/*.yaml``. This module uses no data set and no
tokenizer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from lavis_chatbridge.config import Settings, merged, parse, read_yaml
from lavis_chatbridge.errors import PromptError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTERED = re.compile(r"^\s*[(\[]?[A-Z][)\].:]\s*")
_FOLDER = Path(__file__).with_name("templates")
QUESTION, STYLE = "{question}", "{style}"


class TaskTemplates(Settings):
    """The templates of one task."""

    templates: list[str] = Field(min_length=1)
    """Each may contain ``{question}`` and ``{style}``; either all or none contain ``{question}``."""
    style: str = ""
    """The default style of samples."""

    def check(self) -> Iterator[str]:
        if len({QUESTION in template for template in self.templates}) > 1:
            yield "some templates contain {question} and some do not"
        if not self.style and any(STYLE in template for template in self.templates):
            yield "templates contain {style}, so the task needs a style"

    @property
    def asks(self) -> bool:
        """Whether the sample's question is part of the request."""
        return QUESTION in self.templates[0]


class Templates(Settings):
    """The templates of all tasks, and the phrases of each style."""

    tasks: dict[str, TaskTemplates] = {}
    styles: dict[str, list[str]] = {}
    """Style -> phrases for it, such as "a word or two"."""

    def check(self) -> Iterator[str]:
        for name, task in self.tasks.items():
            if task.style and not self.styles.get(task.style):
                yield f"tasks.{name}: {self._unknown_style(task.style)}"

    @classmethod
    @functools.cache
    def load(cls, *paths: str | Path) -> Templates:
        """Load the package's templates and further YAML files; tasks and styles of later files replace earlier ones."""
        files = [read_yaml(path) for path in [*sorted(_FOLDER.glob("*.yaml")), *paths]]
        return parse(cls, merged(*files), " ".join(["templates", *(Path(path).name for path in paths)]))

    def apply(self, task: str, question: str = "", style: str = "", rng: np.random.Generator | None = None) -> str:
        """The request for a sample of ``task``, with its question and style.

        A question is the whole request if the task's templates have no ``{question}``. ``rng`` chooses the template and
        the style's phrase; without it, the first ones are used.
        """
        entry = self.tasks[task]
        template = _choice(entry.templates, rng)
        words = self.styles.get(style or entry.style, [])
        if (style or entry.style) and not words:
            raise PromptError(self._unknown_style(style))
        phrase = _choice(words, rng) if words else ""
        if question and not entry.asks:
            return question
        if not question and entry.asks:
            raise PromptError(f"a sample of task {task!r} has no question")
        return template.replace(STYLE, phrase).replace(QUESTION, question)  # braces in the question stay unchanged

    def _unknown_style(self, style: str) -> str:
        return f"no words for style {style!r}; known are {', '.join(sorted(self.styles))}"


def listed(options: Sequence[str]) -> str:
    """One line with a letter per option (texts without letters), and the request to answer with a letter."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([*lines, "Answer with the letter of the right option."])


def without_letters(options: Sequence[str]) -> list[str]:
    """Options without their letters, if all have one (``"A. a drum"``)."""
    if all(_LETTERED.match(option) for option in options):
        return [_LETTERED.sub("", option).strip() for option in options]
    return [option.strip() for option in options]


def _choice(items: Sequence[str], rng: np.random.Generator | None) -> str:
    return items[0] if rng is None else items[int(rng.integers(len(items)))]
