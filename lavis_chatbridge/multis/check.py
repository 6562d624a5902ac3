"""Which answers become samples: rules with reasons, statistics, and an account of everything that was turned down.

The whole journal is checked anew each time: it is quick, costs nothing, and gives the same result for the same files.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import atomic_text, write_text
from lavis_chatbridge.multis.annotation import MEDIA_KINDS, Annotation, AnnotationIndex, spoken_words
from lavis_chatbridge.multis.duplicates import NearDuplicates
from lavis_chatbridge.multis.ledger import answers
from lavis_chatbridge.multis.parse import read_description, read_pairs
from lavis_chatbridge.multis.prompts import DATA_KINDS, Pair, PromptBook
from lavis_chatbridge.multis.statistics import Statistics
from lavis_chatbridge.multis.things import Things
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, to_record

_WORDS = re.compile(r"\b[\w'\u2019-]+\b")
_CLAUSE_END = re.compile(r"[.;:!?,]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_LANGUAGE_RULES = ("text_source", "refusal", "markup", "foreign_media", "unsafe", "negation", "hedge")


@dataclass(frozen=True)
class Range:
    """A smallest and a largest number, both allowed."""

    least: int
    most: int

    def fault(self, value: int, what: str) -> str | None:
        """The sentence for a value outside, None inside."""
        if self.least <= value <= self.most:
            return None
        return f"{what}: {value}, expected {self.least} to {self.most}"


@dataclass(frozen=True)
class KindLimits:
    """How long samples of one kind are.

    Args:
        pairs: Questions per sample.
        question_words: Words of each question.
        answer_words: Words of each answer.
    """

    pairs: Range
    question_words: Range
    answer_words: Range


def _default_limits() -> dict[str, KindLimits]:
    return {
        "conversation": KindLimits(Range(2, 8), Range(1, 60), Range(2, 120)),
        "detail": KindLimits(Range(1, 1), Range(2, 60), Range(25, 400)),
        "reasoning": KindLimits(Range(1, 3), Range(4, 80), Range(20, 300)),
    }


@dataclass(frozen=True)
class CheckSettings:
    """What is accepted.

    Args:
        limits: Per kind.
        duplicate_from: Estimated Jaccard similarity of word triples from which a sample counts as a near duplicate.
        unsafe: ``module:function``, a function from a text to a reason or None, in place of the built-in patterns.
        language: A file in the form of ``rules/language.yaml``.
        things: A file in the form of ``rules/things.yaml``.
    """

    limits: dict[str, KindLimits] = field(default_factory=_default_limits)
    duplicate_from: float = 0.8
    unsafe: str | None = None
    language: str | None = None
    things: str | None = None

    def check(self) -> Iterator[str]:
        """Values out of range."""
        if not 0 < self.duplicate_from <= 1:
            yield f"duplicate_from is {self.duplicate_from}, expected more than 0 and at most 1"
        for kind in DATA_KINDS:
            if kind not in self.limits:
                yield f"limits.{kind} is missing"


@dataclass(frozen=True)
class Reason:
    """Why a sample is turned down: the rule, and what it found."""

    rule: str
    detail: str


@dataclass(frozen=True)
class Candidate:
    """An answer that could be read: what the rules look at.

    Args:
        kind: The kind of chat data.
        pairs: Questions and answers.
        annotation: What was known when it was written.
        supported: The vocabulary's names that the annotation supports.
    """

    kind: str
    pairs: list[Pair]
    annotation: Annotation
    supported: set[str]


class Rule(Protocol):
    """A check of one candidate; yields a reason per fault."""

    def __call__(self, candidate: Candidate) -> Iterable[Reason]: ...


class Language:
    """Compiled phrase lists.

    Args:
        path: In the form of ``rules/language.yaml``, which is the default.

    Raises:
        ConfigError: If a list is missing, or a pattern is not a regular expression.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        file = Path(path) if path else Path(__file__).parent / "rules" / "language.yaml"
        try:
            lists = yaml.safe_load(file.read_text(encoding="utf-8"))
            missing = [name for name in _LANGUAGE_RULES if name not in lists]
            if missing:
                raise ConfigError(f"{file}: {', '.join(missing)} is missing")
            self.foreign_media = {name: _one_of(patterns) for name, patterns in lists["foreign_media"].items()}
            self.phrases = {name: _one_of(lists[name]) for name in _LANGUAGE_RULES if name != "foreign_media"}
        except (OSError, yaml.YAMLError, re.error, TypeError, AttributeError) as error:
            raise ConfigError(f"cannot read the phrases of {file}: {error}") from error


class Checker:
    """All rules, in order.

    Args:
        options: What is accepted.
        book: Where the questions of descriptions come from; its examples count as known texts that must not be copied.

    Raises:
        ConfigError: If a rule file or the unsafe hook cannot be loaded.
    """

    def __init__(self, options: CheckSettings | None = None, book: PromptBook | None = None) -> None:
        self._options = options or CheckSettings()
        self._book = book or PromptBook()
        self._language = Language(self._options.language)
        self._things = Things(self._options.things)
        self._unsafe = _load_hook(self._options.unsafe) if self._options.unsafe else self._unsafe_phrase
        self._known = NearDuplicates(self._options.duplicate_from)
        for modality in MEDIA_KINDS:
            for kind in DATA_KINDS:
                for number, (_, answer) in enumerate(self._book.examples(kind, modality)):
                    self._known.add(f"seed example {number + 1} of {kind}/{modality}", _words_only(answer))
        self.rules: list[Rule] = [
            self._lengths, self._phrases, self._foreign, self._repeats, self._absent, self._safety,
        ]  # fmt: skip

    def read(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[list[Pair], list[Reason]]:
        """An answer's questions and answers, and why it cannot be read."""
        reasons = []
        finish = str(record.get("finish") or "")
        if finish in ("length", "max_tokens"):
            reasons.append(Reason("truncated", "the answer was cut off at its longest length"))
        elif finish == "content_filter":
            reasons.append(Reason("refusal", "the server's content filter stepped in"))
        kind = str(record["kind"])
        try:
            if kind == "detail":
                question = self._book.question("detail", annotation.modality, annotation.id)
                return [Pair(question, read_description(str(record["text"])))], reasons
            return read_pairs(str(record["text"])), reasons
        except DataError as error:
            return [], [*reasons, Reason("form", str(error))]

    def check(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[Sample | None, list[Reason]]:
        """One answer of the journal: the sample, or every reason against it."""
        pairs, reasons = self.read(record, annotation)
        if pairs:
            supported = self._things.support(spoken_words(annotation))
            candidate = Candidate(str(record["kind"]), pairs, annotation, supported)
            reasons += [reason for rule in self.rules for reason in rule(candidate)]
        if reasons:
            return None, reasons
        name = f"{annotation.id}:{record['kind']}"
        text = _words_only("\n".join(f"{pair.question}\n{pair.answer}" for pair in pairs))
        bare = _words_only(pairs[0].answer) if record["kind"] == "detail" else text
        for words in {text, bare}:
            near = self._known.find(words)
            if near:
                return None, [Reason("near_duplicate", f"{round(100 * near[1])} % like {near[0]}")]
        self._known.add(name, text)
        return _sample(name, record, pairs, annotation), []

    def _lengths(self, candidate: Candidate) -> Iterator[Reason]:
        limits = self._options.limits[candidate.kind]
        faults = [limits.pairs.fault(len(candidate.pairs), "questions")]
        for pair in candidate.pairs:
            faults.append(limits.question_words.fault(_count_words(pair.question), "words of a question"))
            faults.append(limits.answer_words.fault(_count_words(pair.answer), "words of an answer"))
        yield from (Reason("length", fault) for fault in faults if fault)

    def _phrases(self, candidate: Candidate) -> Iterator[Reason]:
        for rule in ("text_source", "refusal", "markup"):
            for pair in candidate.pairs:
                for text in (pair.question, pair.answer):
                    found = self._language.phrases[rule].search(text)
                    if found:
                        yield Reason(rule, found.group())

    def _foreign(self, candidate: Candidate) -> Iterator[Reason]:
        pattern = self._language.foreign_media.get(candidate.annotation.modality)
        for pair in candidate.pairs:
            for text in (pair.question, pair.answer):
                found = pattern.search(text) if pattern else None
                if found:
                    yield Reason("foreign_media", f"{found.group()} ({candidate.annotation.modality})")

    def _repeats(self, candidate: Candidate) -> Iterator[Reason]:
        questions = Counter(_words_only(pair.question) for pair in candidate.pairs)
        yield from (Reason("repetition", f"asked {n} times: {q}") for q, n in questions.items() if n > 1)
        words = [word for pair in candidate.pairs for word in _words_only(pair.answer).split()]
        runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        for run, count in runs.most_common(1):
            if count >= 3 and 4 * count > 0.2 * len(words):
                yield Reason("repetition", f"{count} times: {' '.join(run)}")
        for pair in candidate.pairs:
            names = Counter(name for name, _ in self._things.mentions(pair.answer))
            for name, count in names.most_common(1):
                if count >= 5 and count > 0.15 * _count_words(pair.answer):  # small models turn round one word
                    yield Reason("repetition", f"{count} times in {_count_words(pair.answer)} words: {name}")

    def _absent(self, candidate: Candidate) -> Iterator[Reason]:
        """Things, sounds and colours that are claimed, and that the annotation does not support."""
        absent: dict[str, None] = {}
        hedged = candidate.kind == "reasoning"
        for pair in candidate.pairs:
            denies = re.match(r"\s*(?:no\b|there\s+(?:is|are)\s+no)", pair.answer, re.IGNORECASE)
            for text in (pair.answer,) if denies else (pair.question, pair.answer):
                for name, at in self._things.mentions(text):
                    if name not in candidate.supported and not self._excused(text, at, hedged):
                        absent[name] = None
        if absent:
            yield Reason("absent", ", ".join(absent))

    def _excused(self, text: str, at: int, hedged: bool) -> bool:
        """Whether the mention at ``at`` is denied in its clause or, where that is allowed, guessed in its sentence."""
        before = text[:at]
        clause = before[max((found.end() for found in _CLAUSE_END.finditer(before)), default=0) :]
        if self._language.phrases["negation"].search(clause):
            return True
        if not hedged:
            return False
        begin = max((found.end() for found in _SENTENCE_END.finditer(before)), default=0)
        end = _SENTENCE_END.search(text, at)
        return bool(self._language.phrases["hedge"].search(text[begin : end.start() if end else len(text)]))

    def _safety(self, candidate: Candidate) -> Iterator[Reason]:
        for pair in candidate.pairs:
            for text in (pair.question, pair.answer):
                reason = self._unsafe(text)
                if reason:
                    yield Reason("unsafe", reason)

    def _unsafe_phrase(self, text: str) -> str | None:
        found = self._language.phrases["unsafe"].search(text)
        return found.group() if found else None


def check(
    generated: str | Path, annotations: str | Path, folder: str | Path, checker: Checker | None = None
) -> Statistics:
    """Check all answers of a generation.

    Args:
        generated: The generation's folder or journal.
        annotations: The annotations from which it was made.
        folder: Gets ``accepted.jsonl`` (samples), ``rejected.jsonl`` (reasons, raw text), ``statistics.json``.
        checker: The rules.

    Returns:
        The statistics.

    Raises:
        DataError: If there are no annotations.
    """
    checker = checker or Checker()
    folder = Path(folder)
    index = AnnotationIndex(annotations)
    statistics = Statistics()
    with (
        atomic_text(folder / "accepted.jsonl", errors="replace") as accepted,
        atomic_text(folder / "rejected.jsonl", errors="replace") as rejected,
    ):
        for record in answers(generated):
            annotation = index.get(record["item"])
            if annotation is None:
                sample = None
                reasons = [Reason("no_annotation", f"item {record['item']!r} is not among the annotations")]
            else:
                sample, reasons = checker.check(record, annotation)
            statistics.take(record, sample, [reason.rule for reason in reasons])
            if sample is not None:
                accepted.write(json.dumps(to_record(sample), ensure_ascii=False) + "\n")
            else:
                rejected.write(json.dumps(_rejection(record, reasons, annotation), ensure_ascii=False) + "\n")
    write_text(folder / "statistics.json", json.dumps(statistics.to_json(), indent=2) + "\n")
    return statistics


def _sample(name: str, record: Mapping[str, Any], pairs: list[Pair], annotation: Annotation) -> Sample:
    media = tuple(Medium(medium.type, medium.path) for medium in annotation.media)
    turns: list[Message] = []
    for position, pair in enumerate(pairs):
        turns.append(Message("user", pair.question, tuple(medium.kind for medium in media) if position == 0 else ()))
        turns.append(Message("assistant", pair.answer))
    meta = {"request": record["id"], "model": record.get("model", ""), "item": annotation.id}
    return Sample(
        id=name,
        media=media,
        turns=tuple(turns),
        source=annotation.source,
        task=str(record["kind"]),
        facts=annotation.facts,
        meta={**meta, **({"licence": annotation.licence} if annotation.licence else {})},
    )


def _rejection(record: Mapping[str, Any], reasons: list[Reason], annotation: Annotation | None) -> dict[str, Any]:
    return {
        "id": f"{record['item']}:{record['kind']}",
        "request": record["id"],
        "item": record["item"],
        "kind": record["kind"],
        "modality": record.get("modality", ""),
        "reasons": [{"rule": reason.rule, "detail": reason.detail} for reason in reasons],
        "text": record["text"],
        "media": [{"type": medium.type, "path": medium.path} for medium in annotation.media] if annotation else [],
    }


def _one_of(patterns: list[str]) -> re.Pattern[str]:
    """Any of the patterns, no part of a longer word at an end that is a letter or digit itself."""
    whole = (rf"(?:(?<!\w)|(?=\W))(?:{pattern})(?:(?!\w)|(?<=\W))" for pattern in patterns)
    return re.compile("|".join(whole), re.IGNORECASE)


def _words_only(text: str) -> str:
    return " ".join(_WORDS.findall(text.lower()))


def _count_words(text: str) -> int:
    return len(_WORDS.findall(text))


def _load_hook(name: str) -> Callable[[str], str | None]:
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load the hook {name!r}, expected MODULE:FUNCTION ({error})") from error
    if not callable(hook):
        raise ConfigError(f"the hook {name!r} is not a function")
    return hook
