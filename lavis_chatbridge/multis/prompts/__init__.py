"""The prompts that ask a language model for chat data: instructions, and worked examples written for this package.

`kinds.yaml` holds what is asked for, `seeds/` the examples. A folder of one's own in the same layout replaces both.
This module knows how a request is worded, not how it is sent.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.multis.annotation import MEDIA_KINDS, Annotation, MediaKind, describe, from_json

DataKind = Literal["conversation", "detail", "reasoning"]
DATA_KINDS: tuple[DataKind, ...] = get_args(DataKind)
MIN_SEEDS = 3
Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """A question and its answer."""

    question: str
    answer: str


@dataclass(frozen=True)
class Seed:
    """A worked example: notes about something, and what may be written from them, per kind."""

    annotation: dict[str, Any]
    conversation: list[Pair] | None = None
    detail: str | None = None
    reasoning: Pair | None = None

    def answer(self, kind: DataKind) -> str | None:
        """The example's answer in the form that the instruction asks for; None where it has none for ``kind``."""
        if kind == "detail":
            return self.detail
        pairs = (self.conversation or []) if kind == "conversation" else [self.reasoning] if self.reasoning else []
        return "\n".join(f"Question: {pair.question}\nAnswer: {pair.answer}" for pair in pairs) or None


@dataclass(frozen=True)
class KindSettings:
    """What is asked for in one kind of chat data."""

    instruction: str
    max_tokens: int
    questions: dict[str, list[str]] | None = None


@dataclass(frozen=True)
class Kinds:
    """The layout of ``kinds.yaml``."""

    modalities: dict[str, dict[str, str]]
    common: str
    kinds: dict[str, KindSettings]

    def check(self) -> list[str]:
        """What is missing."""
        faults = [f"modalities.{name} is missing" for name in MEDIA_KINDS if name not in self.modalities]
        return faults + [f"kinds.{name} is missing" for name in DATA_KINDS if name not in self.kinds]


class PromptBook:
    """The instructions and examples of one folder.

    Args:
        folder: Holds ``kinds.yaml`` and ``seeds/*.yaml``; the package's own by default.

    Raises:
        ConfigError: With every fault of the files, also where a kind and modality has fewer than three examples.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder) if folder else Path(__file__).parent
        self._kinds = settings.parse(Kinds, _load(self.folder / "kinds.yaml"), "kinds")
        self._seeds: dict[tuple[DataKind, MediaKind], list[tuple[str, str]]] = {}
        for file in sorted((self.folder / "seeds").glob("*.yaml")):
            self._add_seeds(file)
        short = [
            f"{kind} of {modality} has {len(self._seeds.get((kind, modality), []))}"
            for kind in DATA_KINDS
            for modality in MEDIA_KINDS
            if len(self._seeds.get((kind, modality), [])) < MIN_SEEDS
        ]
        if short:
            raise ConfigError(f"{self.folder}: at least {MIN_SEEDS} seed examples are needed; {'; '.join(short)}")

    @cached_property
    def version(self) -> str:
        """A short hash of all files, recorded with what was generated."""
        digest = hashlib.sha256()
        for file in [self.folder / "kinds.yaml", *sorted((self.folder / "seeds").glob("*.yaml"))]:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:12]

    def max_tokens(self, kind: DataKind) -> int:
        """How long an answer of this kind may become."""
        return self._kinds.kinds[kind].max_tokens

    def examples(self, kind: DataKind, modality: MediaKind) -> list[tuple[str, str]]:
        """All examples: textual description and answer."""
        return self._seeds[kind, modality]

    def messages(self, kind: DataKind, annotation: Annotation, shots: int = MIN_SEEDS, seed: int = 0) -> list[Message]:
        """The chat messages that ask for data of ``kind`` about one item.

        Args:
            kind: What is asked for.
            annotation: The item.
            shots: How many examples precede it; fewer than there are are drawn by the item's id and ``seed``.
            seed: See ``shots``.
        """
        modality = annotation.modality
        examples = self.examples(kind, modality)
        if shots < len(examples):
            examples = random.Random(f"{seed}/{kind}/{annotation.id}").sample(examples, shots)
        words = {"senses": self._kinds.modalities[modality].get("sense", ""), **self._kinds.modalities[modality]}
        system = (self._kinds.common + "\n" + self._kinds.kinds[kind].instruction).format(**words).strip()
        messages = [{"role": "system", "content": system}]
        for description, answer in examples:
            messages += [{"role": "user", "content": description}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": describe(annotation)}]

    def question(self, kind: DataKind, modality: MediaKind, item: str) -> str:
        """The question that stands before an answer which comes without one (detailed descriptions), fixed per item."""
        questions = (self._kinds.kinds[kind].questions or {}).get(modality)
        if not questions:
            raise ConfigError(f"{self.folder / 'kinds.yaml'}: kinds.{kind}.questions.{modality} is missing")
        return random.Random(f"{kind}/{item}").choice(questions)

    def _add_seeds(self, file: Path) -> None:
        entries = _load(file)
        if not isinstance(entries, list):
            raise ConfigError(f"{file}: expected a list of examples, found {type(entries).__name__}")
        for number, entry in enumerate(entries):
            where = f"{file.name}[{number}]"
            seed = settings.parse(Seed, entry, where)
            modality = _MODALITY_OF_FILE.get(file.stem)
            if modality is None:
                raise ConfigError(f"{file}: expected one of the names {', '.join(sorted(_MODALITY_OF_FILE))}")
            annotation = _seed_annotation(seed.annotation, modality, where)
            for kind in DATA_KINDS:
                answer = seed.answer(kind)
                if answer:
                    self._seeds.setdefault((kind, modality), []).append((describe(annotation), answer.strip()))


_MODALITY_OF_FILE: dict[str, MediaKind] = {
    "image": "image",
    "video": "video",
    "audio": "audio",
    "video_audio": "video+audio",
}


def _seed_annotation(values: Mapping[str, Any], modality: MediaKind, where: str) -> Annotation:
    media = [{"type": kind, "path": "seed"} for kind in modality.split("+")]
    try:
        return from_json({"id": where, "media": media, **values}, where)
    except DataError as error:
        raise ConfigError(str(error)) from error


def _load(file: Path) -> Any:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: {error}") from error
