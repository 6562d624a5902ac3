"""Which answers become samples: rules with reasons, statistics, and a record of every rejection.

All answers are checked again each time: that is quick, costs nothing, and gives the same result for the same files.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lavis_chatbridge import config
from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import atomic_text, write_json
from lavis_chatbridge.multis.annotation import MODALITIES, Annotation, all_words, read_annotations
from lavis_chatbridge.multis.generate import answers
from lavis_chatbridge.multis.parse import read_description, read_pairs
from lavis_chatbridge.multis.prompts import DATA_KINDS, Pair, PromptBook
from lavis_chatbridge.multis.statistics import WORD, Statistics
from lavis_chatbridge.multis.vocabulary import NearDuplicates, Things
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, to_record

_CLAUSE_END = re.compile(r"[.;:!?,]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_DENIAL = re.compile(r"\s*(?:no\b|there\s+(?:is|are)\s+no)", re.IGNORECASE)


class Range(Settings):
    """A smallest and a largest number, both allowed."""

    least: int
    most: int

    def fault(self, value: int, what: str) -> str | None:
        """The sentence for a value outside; None inside."""
        return None if self.least <= value <= self.most else f"{what}: {value}, expected {self.least} to {self.most}"


class KindLimits(Settings):
    """How long samples of one kind are."""

    pairs: Range
    """Questions per sample."""
    question_words: Range
    answer_words: Range


def _limits(*bounds: tuple[int, int]) -> KindLimits:
    pairs, question, answer = (Range(least=least, most=most) for least, most in bounds)
    return KindLimits(pairs=pairs, question_words=question, answer_words=answer)


class Phrases(Settings):
    """The layout of ``rules/language.yaml``: regular expressions of whole words."""

    text_source: list[str]
    refusal: list[str]
    markup: list[str]
    unsafe: list[str]
    negation: list[str]
    hedge: list[str]
    foreign_media: dict[str, list[str]]

    @classmethod
    def load(cls, path: str | None) -> dict[str, re.Pattern[str]]:
        """The patterns by rule; those of ``foreign_media`` by modality."""
        file = Path(path) if path else Path(__file__).parent / "rules" / "language.yaml"
        phrases = config.parse(cls, dict(config.read_yaml(file)), file.name)
        lists = {name: getattr(phrases, name) for name in cls.model_fields if name != "foreign_media"}
        try:
            return {name: _one_of(patterns) for name, patterns in (lists | phrases.foreign_media).items()}
        except re.error as error:
            raise ConfigError(f"{file}: {error.pattern!r} is no regular expression: {error}") from error


class CheckSettings(Settings):
    """What is accepted."""

    limits: dict[str, KindLimits] = {
        "conversation": _limits((2, 8), (1, 60), (2, 120)),
        "detail": _limits((1, 1), (2, 60), (25, 400)),
        "reasoning": _limits((1, 3), (4, 80), (20, 300)),
    }
    duplicate_from: float = 0.8
    """Estimated Jaccard similarity of word triples from which a sample is a near duplicate."""
    unsafe: str | None = None
    """``module:function``, a function from a text to a reason or None; replaces the built-in patterns."""
    language: str | None = None
    """A file in the form of ``rules/language.yaml``."""
    things: str | None = None
    """A file in the form of ``rules/things.yaml``."""

    def check(self) -> Iterator[str]:
        if not 0 < self.duplicate_from <= 1:
            yield f"duplicate_from is {self.duplicate_from}, expected more than 0 and at most 1"
        for kind in DATA_KINDS:
            if kind not in self.limits:
                yield f"limits.{kind} is missing"


class Reason(NamedTuple):
    """Why a sample is rejected: the rule, and what it found."""

    rule: str
    detail: str


@dataclass(frozen=True)
class Candidate:
    """A readable answer, as the rules see it; ``supported`` are the things that the annotation supports."""

    kind: str
    pairs: list[Pair]
    annotation: Annotation
    supported: set[str]

    @property
    def texts(self) -> list[str]:
        """Questions and answers in order."""
        return [text for pair in self.pairs for text in pair]


class Checker:
    """All rules, in order.

    Args:
        options: What is accepted.
        book: Has the questions of descriptions; its examples must not be copied.

    Raises:
        ConfigError: If a rule file or the unsafe hook cannot be loaded.
    """

    def __init__(self, options: CheckSettings | None = None, book: PromptBook | None = None) -> None:
        self._options, self._book = options or CheckSettings(), book or PromptBook()
        self._phrases, self._things = Phrases.load(self._options.language), Things(self._options.things)
        self._unsafe = _load_hook(self._options.unsafe) if self._options.unsafe else self._unsafe_phrase
        self._known = NearDuplicates(self._options.duplicate_from)
        for kind in DATA_KINDS:
            for modality in MODALITIES:
                for number, (_, answer) in enumerate(self._book.examples(kind, modality)):
                    self._known.add(f"seed example {number + 1} of {kind}/{modality}", _words_only(answer))
        self._rules: list[Callable[[Candidate], Iterator[Reason]]] = [
            self._lengths, self._wording, self._repeats, self._absent,
        ]  # fmt: skip

    def check(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[Sample | None, list[Reason]]:
        """The sample of an answer, or every reason against it."""
        pairs, reasons = self._read(record, annotation)
        if pairs:
            supported = self._things.support(all_words(annotation))
            candidate = Candidate(str(record["kind"]), pairs, annotation, supported)
            reasons += [reason for rule in self._rules for reason in rule(candidate)]
        if reasons:
            return None, reasons
        name = f"{annotation.id}:{record['kind']}"
        text = _words_only("\n".join(f"{pair.question}\n{pair.answer}" for pair in pairs))
        for words in {text, _words_only(pairs[0].answer) if record["kind"] == "detail" else text}:
            if near := self._known.find(words):
                return None, [Reason("near_duplicate", f"{round(100 * near[1])} % like {near[0]}")]
        self._known.add(name, text)
        return _sample(name, record, pairs, annotation), []

    def _read(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[list[Pair], list[Reason]]:
        """An answer's questions and answers, and why it cannot be read."""
        reasons, kind = [], str(record["kind"])
        if record.get("finish") in ("length", "max_tokens"):
            reasons.append(Reason("truncated", "the answer was cut off at its longest length"))
        elif record.get("finish") == "content_filter":
            reasons.append(Reason("refusal", "the server's content filter intervened"))
        try:
            if kind == "detail":
                question = self._book.question("detail", annotation.modality, annotation.id)
                return [Pair(question, read_description(str(record["text"])))], reasons
            return read_pairs(str(record["text"])), reasons
        except DataError as error:
            return [], [*reasons, Reason("form", str(error))]

    def _lengths(self, candidate: Candidate) -> Iterator[Reason]:
        limits = self._options.limits[candidate.kind]
        faults = [limits.pairs.fault(len(candidate.pairs), "questions")]
        for question, answer in candidate.pairs:
            faults.append(limits.question_words.fault(_count_words(question), "words of a question"))
            faults.append(limits.answer_words.fault(_count_words(answer), "words of an answer"))
        yield from (Reason("length", fault) for fault in faults if fault)

    def _wording(self, candidate: Candidate) -> Iterator[Reason]:
        """Phrases that betray a writer who read a text, refuse, break a prompt, name an absent sense, or are unsafe."""
        modality = candidate.annotation.modality
        for rule in ("text_source", "refusal", "markup", modality):
            for text in candidate.texts:
                if rule in self._phrases and (found := self._phrases[rule].search(text)):
                    foreign = rule == modality
                    detail = f"{found.group()} ({modality})" if foreign else found.group()
                    yield Reason("foreign_media" if foreign else rule, detail)
        yield from (Reason("unsafe", reason) for text in candidate.texts if (reason := self._unsafe(text)))

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
                if count >= 5 and count > 0.15 * _count_words(pair.answer):  # small models repeat one word
                    yield Reason("repetition", f"{count} times in {_count_words(pair.answer)} words: {name}")

    def _absent(self, candidate: Candidate) -> Iterator[Reason]:
        """Things, sounds and colours that the answer claims and the annotation does not support."""
        absent: dict[str, None] = {}
        hedged = candidate.kind == "reasoning"
        for question, answer in candidate.pairs:
            for text in (answer,) if _DENIAL.match(answer) else (question, answer):
                for name, at in self._things.mentions(text):
                    if name not in candidate.supported and not self._excused(text, at, hedged):
                        absent[name] = None
        if absent:
            yield Reason("absent", ", ".join(absent))

    def _excused(self, text: str, at: int, hedged: bool) -> bool:
        """Whether the mention at ``at`` is denied in its clause or, with ``hedged``, guessed in its sentence."""
        before = text[:at]
        clause = before[max((found.end() for found in _CLAUSE_END.finditer(before)), default=0) :]
        if self._phrases["negation"].search(clause):
            return True
        begin = max((found.end() for found in _SENTENCE_END.finditer(before)), default=0)
        end = _SENTENCE_END.search(text, at)
        return hedged and bool(self._phrases["hedge"].search(text[begin : end.start() if end else len(text)]))

    def _unsafe_phrase(self, text: str) -> str | None:
        found = self._phrases["unsafe"].search(text)
        return found.group() if found else None


def check(
    generated: str | Path, annotations: str | Path, folder: str | Path, checker: Checker | None = None
) -> dict[str, Any]:
    """Check all answers of a generation.

    Args:
        generated: The generation's folder or file.
        annotations: The annotations from which it was made.
        folder: Gets ``accepted.jsonl`` (samples), ``rejected.jsonl`` (reasons, raw text), ``statistics.json``.
        checker: The rules.

    Returns:
        The statistics, ready for JSON.

    Raises:
        DataError: If there are no annotations.
    """
    checker, folder = checker or Checker(), Path(folder)
    known = {annotation.id: annotation for annotation in read_annotations(annotations)}
    statistics = Statistics()
    with (
        atomic_text(folder / "accepted.jsonl", errors="replace") as accepted,
        atomic_text(folder / "rejected.jsonl", errors="replace") as rejected,
    ):
        for record in answers(generated):
            annotation, sample = known.get(record["item"]), None
            reasons = [Reason("no_annotation", f"item {record['item']!r} is not among the annotations")]
            if annotation is not None:
                sample, reasons = checker.check(record, annotation)
            statistics.add(record, sample, [reason.rule for reason in reasons])
            line = _rejection(record, reasons, annotation) if sample is None else to_record(sample)
            (rejected if sample is None else accepted).write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(folder / "statistics.json", statistics.to_json())
    return statistics.to_json()


def _sample(name: str, record: Mapping[str, Any], pairs: list[Pair], annotation: Annotation) -> Sample:
    media = tuple(Medium(medium.type, medium.path) for medium in annotation.media)
    turns: list[Message] = []
    for position, pair in enumerate(pairs):
        shown = tuple(medium.type for medium in annotation.media) if position == 0 else ()
        turns += [Message("user", pair.question, shown), Message("assistant", pair.answer)]
    meta = {"request": record["id"], "model": record.get("model", ""), "item": annotation.id}
    licence = {"licence": annotation.licence} if annotation.licence else {}
    task = str(record["kind"])
    return Sample(
        name,
        media,
        turns=tuple(turns),
        source=annotation.source,
        task=task,
        facts=annotation.facts,
        meta=meta | licence,
    )


def _rejection(record: Mapping[str, Any], reasons: list[Reason], annotation: Annotation | None) -> dict[str, Any]:
    return {
        "id": f"{record['item']}:{record['kind']}",
        "request": record["id"],
        "item": record["item"],
        "kind": record["kind"],
        "modality": record.get("modality", ""),
        "reasons": [reason._asdict() for reason in reasons],
        "text": record["text"],
        "media": [medium.model_dump() for medium in annotation.media] if annotation else [],
    }


def _one_of(patterns: list[str]) -> re.Pattern[str]:
    """Any of the patterns as whole words: an end that is a letter or digit is not inside a longer word."""
    whole = (rf"(?:(?<!\w)|(?=\W))(?:{pattern})(?:(?!\w)|(?<=\W))" for pattern in patterns)
    return re.compile("|".join(whole), re.IGNORECASE)


def _words_only(text: str) -> str:
    return " ".join(WORD.findall(text.lower()))


def _count_words(text: str) -> int:
    return len(WORD.findall(text))


def _load_hook(name: str) -> Callable[[str], str | None]:
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load the hook {name!r}, expected MODULE:FUNCTION ({error})") from error
    if not callable(hook):
        raise ConfigError(f"the hook {name!r} is not a function")
    return hook
