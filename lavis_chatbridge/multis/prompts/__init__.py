"""Prompts for generating chat data: instructions, and worked examples written for this package.

``kinds.yaml`` has the instructions, ``seeds/`` the examples. A folder with the same layout replaces both. This module
makes prompts; it sends no requests.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, Annotation, ItemModality, describe, from_json

DataKind = Literal["conversation", "detail", "reasoning"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
SHOTS = 3
"""Number of examples in a prompt."""


class Pair(Settings):
    """A question and its answer."""

    question: str
    answer: str


class Seed(Settings):
    """A seed example: a description of an item, and an answer per kind."""

    annotation: dict[str, Any]
    conversation: list[Pair] = []
    detail: str = ""
    reasoning: Pair | None = None

    def answer(self, kind: DataKind) -> str:
        """The example's answer of ``kind`` in the requested format, or ""."""
        if kind == "detail":
            return self.detail.strip()
        pairs = self.conversation if kind == "conversation" else [self.reasoning] if self.reasoning else []
        return "\n".join(f"Question: {pair.question}\nAnswer: {pair.answer}" for pair in pairs)


class KindSettings(Settings):
    """The instruction of one kind of chat data."""

    instruction: str
    max_tokens: int
    questions: dict[ItemModality, list[str]] = {}
    """Questions for samples that are requested without a question (detailed descriptions)."""


class Kinds(Settings):
    """The content of ``kinds.yaml``."""

    modalities: dict[ItemModality, dict[str, str]]
    common: str
    kinds: dict[DataKind, KindSettings]

    def check(self) -> Iterator[str]:
        yield from (f"modalities.{name} is missing" for name in ITEM_MODALITIES if name not in self.modalities)
        yield from (f"kinds.{name} is missing" for name in DATA_KINDS if name not in self.kinds)
        questions = self.kinds["detail"].questions if "detail" in self.kinds else {}
        yield from (f"kinds.detail.questions.{name} is missing" for name in ITEM_MODALITIES if not questions.get(name))


class PromptBook:
    """The instructions and examples of one folder; a `ConfigError` has every fault of its files.

    Args:
        folder: Folder with ``kinds.yaml`` and ``seeds/*.yaml``; None: the package's own.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else Path(__file__).parent
        self._words = parse(Kinds, _load(self.folder / "kinds.yaml"), "kinds")
        self.kinds: dict[DataKind, KindSettings] = self._words.kinds
        self.examples: dict[tuple[DataKind, ItemModality], list[tuple[str, str]]] = {}
        """Kind and modality -> pairs of description and answer."""
        for modality in ITEM_MODALITIES:
            self.examples |= {(kind, modality): [] for kind in DATA_KINDS}
            file = self.folder / "seeds" / f"{modality.replace('+', '_')}.yaml"
            media = [{"type": medium, "path": "seed"} for medium in modality.split("+")]
            for number, entry in enumerate(_load(file)):
                where = f"{file.name}[{number}]"
                seed = parse(Seed, entry, where)
                description = describe(from_json({"id": where, "media": media, **seed.annotation}, where))
                for kind in DATA_KINDS:
                    if answer := seed.answer(kind):
                        self.examples[kind, modality].append((description, answer))

    def messages(self, kind: DataKind, annotation: Annotation) -> list[dict[str, str]]:
        """The chat messages that request data of ``kind`` about one item, with examples sampled by its id."""
        examples = self.examples[kind, annotation.modality]
        if len(examples) > SHOTS:
            examples = random.Random(f"{kind}/{annotation.id}").sample(examples, SHOTS)
        words = self._words.modalities[annotation.modality]
        system = (self._words.common + "\n" + self.kinds[kind].instruction).format(**words).strip()
        messages = [{"role": "system", "content": system}]
        for description, answer in examples:
            messages += [{"role": "user", "content": description}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": describe(annotation)}]

    def question(self, modality: ItemModality, item: str) -> str:
        """The question for a detailed description, which is requested without one; depends only on the item."""
        return random.Random(f"detail/{item}").choice(self.kinds["detail"].questions[modality])


def _load(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from error
