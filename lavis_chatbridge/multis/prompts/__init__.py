"""The prompts that ask a language model for chat data: instructions, and worked examples written for this package.

`kinds.yaml` contains the instructions, `seeds/` the examples; a folder of your own in the same layout replaces both.
This module knows how a request is worded, not how it is sent.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import yaml

from lavis_chatbridge import config
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.annotation import MODALITIES, Modalities, describe, from_json

DataKind = Literal["conversation", "detail", "reasoning"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
MIN_SEEDS = 3
Chat = list[dict[str, str]]
_MODALITY_OF_FILE: dict[str, Modalities] = {
    "image": "image", "video": "video", "audio": "audio", "video_audio": "video+audio",
}  # fmt: skip


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


class SeedPair(Settings):
    """A question and its answer in a seed file."""

    question: str
    answer: str


class Seed(Settings):
    """A worked example: notes about an item, and what may be written from them, per kind."""

    annotation: dict[str, Any]
    conversation: list[SeedPair] = []
    detail: str | None = None
    reasoning: SeedPair | None = None

    def answer(self, kind: DataKind) -> str | None:
        """The example's answer in the requested form; None if it has none for ``kind``."""
        if kind == "detail":
            return self.detail
        pairs = self.conversation if kind == "conversation" else [self.reasoning] if self.reasoning else []
        return "\n".join(f"Question: {pair.question}\nAnswer: {pair.answer}" for pair in pairs) or None


class KindSettings(Settings):
    """What is requested in one kind of chat data."""

    instruction: str
    max_tokens: int
    questions: dict[str, list[str]] = {}


class Kinds(Settings):
    """The layout of ``kinds.yaml``."""

    modalities: dict[str, dict[str, str]]
    common: str
    kinds: dict[str, KindSettings]

    def check(self) -> list[str]:
        faults = [f"modalities.{name} is missing" for name in MODALITIES if name not in self.modalities]
        return faults + [f"kinds.{name} is missing" for name in DATA_KINDS if name not in self.kinds]


class PromptBook:
    """The instructions and examples of one folder.

    Args:
        folder: Has ``kinds.yaml`` and ``seeds/*.yaml``; by default the package's own.

    Raises:
        ConfigError: With every fault of the files, or if a kind and modality has fewer than three examples.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else Path(__file__).parent
        self._kinds = config.parse(Kinds, _load(self.folder / "kinds.yaml"), "kinds")
        self._examples: dict[tuple[DataKind, Modalities], list[tuple[str, str]]] = {
            (kind, modality): [] for kind in DATA_KINDS for modality in MODALITIES
        }
        for file in sorted((self.folder / "seeds").glob("*.yaml")):
            self._add_seeds(file)
        few = [f"{k} of {m} has {len(seeds)}" for (k, m), seeds in self._examples.items() if len(seeds) < MIN_SEEDS]
        if few:
            raise ConfigError(f"{self.folder}: at least {MIN_SEEDS} seed examples are needed; {'; '.join(few)}")

    def max_tokens(self, kind: DataKind) -> int:
        """The longest answer of this kind."""
        return self._kinds.kinds[kind].max_tokens

    def examples(self, kind: DataKind, modality: Modalities) -> list[tuple[str, str]]:
        """All examples: textual description and answer."""
        return self._examples[kind, modality]

    def messages(
        self, kind: DataKind, modality: Modalities, item: str, notes: str, shots: int = MIN_SEEDS, seed: int = 0
    ) -> Chat:
        """The chat that asks for data of ``kind`` about one item.

        Args:
            kind: The requested kind.
            modality: Of the item.
            item: The item's id, which selects the examples together with ``seed``.
            notes: The item's textual description.
            shots: Number of examples before it.
            seed: See ``item``.
        """
        examples = self.examples(kind, modality)
        if shots < len(examples):
            examples = random.Random(f"{seed}/{kind}/{item}").sample(examples, shots)
        instruction = f"{self._kinds.common}\n{self._kinds.kinds[kind].instruction}"
        chat = [{"role": "system", "content": instruction.format(**self._kinds.modalities[modality]).strip()}]
        for description, answer in examples:
            chat += [{"role": "user", "content": description}, {"role": "assistant", "content": answer}]
        return [*chat, {"role": "user", "content": notes}]

    def question(self, kind: DataKind, modality: Modalities, item: str) -> str:
        """The question for an answer that comes without one (detailed descriptions), fixed per item."""
        questions = self._kinds.kinds[kind].questions.get(modality)
        if not questions:
            raise ConfigError(f"{self.folder / 'kinds.yaml'}: kinds.{kind}.questions.{modality} is missing")
        return random.Random(f"{kind}/{item}").choice(questions)

    def _add_seeds(self, file: Path) -> None:
        entries, modality = _load(file), _MODALITY_OF_FILE.get(file.stem)
        if modality is None:
            raise ConfigError(f"{file}: expected one of the names {', '.join(sorted(_MODALITY_OF_FILE))}")
        if not isinstance(entries, list):
            raise ConfigError(f"{file}: expected a list of examples, found {type(entries).__name__}")
        for number, entry in enumerate(entries):
            where = f"{file.name}[{number}]"
            seed = config.parse(Seed, entry, where)
            notes = _notes(seed.annotation, modality, where)
            for kind in DATA_KINDS:
                if answer := seed.answer(kind):
                    self._examples[kind, modality].append((notes, answer.strip()))


def _notes(values: Mapping[str, Any], modality: Modalities, where: str) -> str:
    media = [{"type": name, "path": "seed"} for name in modality.split("+")]
    try:
        return describe(from_json({"id": where, "media": media, **values}, where))
    except DataError as error:
        raise ConfigError(str(error)) from error


def _load(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {error}") from error
