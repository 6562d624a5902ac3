"""Third stage: accepts or rejects answers by rules; stores rejected answers with the reasons.

Every call checks all answers again: this is fast and deterministic.
"""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, DataError, MissingExtraError
from lavis_chatbridge.files import atomic_text, write_json
from lavis_chatbridge.multis.annotation import ITEM_MODALITIES, Annotation, all_words, read_annotations
from lavis_chatbridge.multis.generate import read_answers
from lavis_chatbridge.multis.parse import read_description, read_pairs
from lavis_chatbridge.multis.prompts import DATA_KINDS, DataKind, Pair, PromptBook
from lavis_chatbridge.multis.things import Things
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample, to_record

PAPER_COUNTS = {"conversation": 24_000, "detail": 18_000, "reasoning": 9_000}
"""Numbers of samples of the paper's video, audio and video+audio chat data (arXiv 2305.16103, section 4.2), as rounded
there."""
_WORDS = re.compile(r"\b[\w'\u2019-]+\b")
_CLAUSE_END = re.compile(r"[.;:!?,]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_DENIAL = re.compile(r"\s*(?:no\b|there\s+(?:is|are)\s+no)", re.IGNORECASE)
_PHRASE_LISTS = ("text_source", "refusal", "markup", "unsafe", "negation", "hedge")
Range = tuple[int, int]
"""Minimum and maximum, inclusive."""
Reason = tuple[str, str]
"""A rule's name and the detail that it found."""


class KindLimits(Settings):
    """Limits of one kind of sample: questions per sample, words per question, words per answer."""

    pairs: Range
    question_words: Range
    answer_words: Range


class CheckSettings(Settings):
    """The settings of the rules."""

    limits: dict[DataKind, KindLimits] = {
        "conversation": KindLimits(pairs=(2, 8), question_words=(1, 60), answer_words=(2, 120)),
        "detail": KindLimits(pairs=(1, 1), question_words=(2, 60), answer_words=(25, 400)),
        "reasoning": KindLimits(pairs=(1, 3), question_words=(4, 80), answer_words=(20, 300)),
    }
    duplicate_from: float = Field(default=0.8, gt=0, le=1)
    """Samples with at least this estimated Jaccard similarity of word triples are near duplicates."""
    unsafe: str | None = None
    """``MODULE:FUNCTION``: text -> reason or None; null uses the patterns in ``language``."""
    language: str | None = None
    """A file in the format of ``rules/language.yaml``."""
    things: str | None = None
    """A file in the format of ``rules/things.yaml``."""

    def check(self) -> Iterator[str]:
        yield from (f"limits.{kind} is missing" for kind in DATA_KINDS if kind not in self.limits)


@dataclass(frozen=True)
class Candidate:
    """A parsed answer: the input of the rules."""

    kind: DataKind
    pairs: list[Pair]
    annotation: Annotation
    supported: set[str]
    """Names of the vocabulary that the annotation supports."""

    @cached_property
    def texts(self) -> list[str]:
        """All questions and answers."""
        return [text for pair in self.pairs for text in (pair.question, pair.answer)]


class NearDuplicates:
    """Finds texts that share most of their word triples with an earlier text (MinHash, by datasketch)."""

    def __init__(self, threshold: float) -> None:
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError as error:
            raise MissingExtraError("datasketch", "multis", "chatbridge multis check") from error
        self._threshold, self._hash = threshold, MinHash
        self._index = MinHashLSH(threshold=min(threshold, 0.9), num_perm=128)  # candidates only
        self._known: dict[str, Any] = {}

    def find(self, text: str) -> tuple[str, float] | None:
        """The most similar earlier text and its estimated similarity, or None below the threshold."""
        signature = self._signature(text)
        near = [(signature.jaccard(self._known[key]), key) for key in self._index.query(signature)]
        similarity, key = max(near, default=(0.0, ""))
        return (key, similarity) if similarity >= self._threshold else None

    def add(self, key: str, text: str) -> None:
        """Add a text under the name ``key``."""
        self._known[key] = self._signature(text)
        self._index.insert(key, self._known[key], check_duplication=False)

    def _signature(self, text: str) -> Any:
        words = _words(text)
        shingles = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        signature = self._hash(num_perm=128, seed=1)
        signature.update_batch([shingle.encode() for shingle in shingles])
        return signature


class Checker:
    """Applies all rules. ``book`` has the questions of descriptions, and the examples that answers must not copy.

    Raises:
        ConfigError: If a rule file or the unsafe hook cannot be loaded.
    """

    def __init__(self, options: CheckSettings | None = None, book: PromptBook | None = None) -> None:
        self._options, self._book = options or CheckSettings(), book or PromptBook()
        self._phrases, self._foreign = _read_phrases(self._options.language)
        self._things = Things(self._options.things)
        self._unsafe = _load_hook(self._options.unsafe) if self._options.unsafe else self._unsafe_phrase
        self._known = NearDuplicates(self._options.duplicate_from)
        for (kind, modality), examples in self._book.examples.items():
            for number, (_, answer) in enumerate(examples, start=1):
                self._known.add(f"seed example {number} of {kind}/{modality}", answer)
        self._rules = (self._lengths, self._wording, self._repeats, self._absent, self._safety)

    def check(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[Sample | None, list[Reason]]:
        """Check one answer; returns the sample, or None and all reasons for rejection."""
        kind = record["kind"]
        pairs, reasons = self._parse(record, annotation)
        if pairs:
            candidate = Candidate(kind, pairs, annotation, self._things.support(all_words(annotation)))
            reasons += [reason for rule in self._rules for reason in rule(candidate)]
        if reasons:
            return None, reasons
        text = "\n".join(f"{pair.question}\n{pair.answer}" for pair in pairs)
        for words in (text, pairs[0].answer) if kind == "detail" else (text,):
            if near := self._known.find(words):
                return None, [("near_duplicate", f"{round(100 * near[1])} % like {near[0]}")]
        self._known.add(f"{annotation.id}:{kind}", text)
        return _sample(record, pairs, annotation), []

    def _parse(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[list[Pair], list[Reason]]:
        reasons: list[Reason] = []
        if record["finish"] in ("length", "max_tokens"):
            reasons.append(("truncated", "the answer reached the token limit"))
        elif record["finish"] == "content_filter":
            reasons.append(("refusal", "the server's content filter stopped the answer"))
        try:
            if record["kind"] == "detail":
                question = self._book.question("detail", annotation.modality, annotation.id)
                return [Pair(question=question, answer=read_description(record["text"]))], reasons
            return read_pairs(record["text"]), reasons
        except DataError as error:
            return [], [*reasons, ("form", str(error))]

    def _lengths(self, candidate: Candidate) -> Iterator[Reason]:
        limits = self._options.limits[candidate.kind]
        counts = [(len(candidate.pairs), limits.pairs, "questions")]
        for pair in candidate.pairs:
            counts.append((len(_words(pair.question)), limits.question_words, "words of a question"))
            counts.append((len(_words(pair.answer)), limits.answer_words, "words of an answer"))
        for count, (least, most), what in counts:
            if not least <= count <= most:
                yield "length", f"{what}: {count}, expected {least} to {most}"

    def _wording(self, candidate: Candidate) -> Iterator[Reason]:
        modality = candidate.annotation.modality
        for text in candidate.texts:
            for rule in ("text_source", "refusal", "markup"):
                if found := self._phrases[rule].search(text):
                    yield rule, found.group()
            if modality in self._foreign and (found := self._foreign[modality].search(text)):
                yield "foreign_media", f"{found.group()} ({modality})"

    def _repeats(self, candidate: Candidate) -> Iterator[Reason]:
        questions = Counter(" ".join(_words(pair.question)) for pair in candidate.pairs)
        yield from (("repetition", f"asked {n} times: {q}") for q, n in questions.items() if n > 1)
        words = [word for pair in candidate.pairs for word in _words(pair.answer)]
        runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        for run, count in runs.most_common(1):
            if count >= 3 and 4 * count > 0.2 * len(words):
                yield "repetition", f"{count} times: {' '.join(run)}"
        for pair in candidate.pairs:  # small models repeat one word
            length = len(_words(pair.answer))
            for name, count in Counter(name for name, _ in self._things.mentions(pair.answer)).most_common(1):
                if count >= 5 and count > 0.15 * length:
                    yield "repetition", f"{count} times in {length} words: {name}"

    def _absent(self, candidate: Candidate) -> Iterator[Reason]:
        """Things, sounds and colours that an answer mentions but the annotation does not support."""
        absent: dict[str, None] = {}
        for pair in candidate.pairs:
            for text in (pair.answer,) if _DENIAL.match(pair.answer) else (pair.question, pair.answer):
                for name, at in self._things.mentions(text):
                    if name not in candidate.supported and not self._excused(text, at, candidate.kind == "reasoning"):
                        absent[name] = None
        if absent:
            yield "absent", ", ".join(absent)

    def _excused(self, text: str, at: int, hedged: bool) -> bool:
        """Whether the mention at ``at`` is negated in its clause or, with ``hedged``, only supposed in its sentence."""
        before = text[:at]
        clause = before[max((found.end() for found in _CLAUSE_END.finditer(before)), default=0) :]
        if self._phrases["negation"].search(clause):
            return True
        begin = max((found.end() for found in _SENTENCE_END.finditer(before)), default=0)
        end = _SENTENCE_END.search(text, at)
        sentence = text[begin : end.start() if end else len(text)]
        return hedged and bool(self._phrases["hedge"].search(sentence))

    def _safety(self, candidate: Candidate) -> Iterator[Reason]:
        yield from (("unsafe", reason) for text in candidate.texts if (reason := self._unsafe(text)))

    def _unsafe_phrase(self, text: str) -> str | None:
        found = self._phrases["unsafe"].search(text)
        return found.group() if found else None


def check(generated: str | Path, annotations: str | Path, folder: str | Path, checker: Checker | None = None) -> dict:
    """Check all generated answers, and return the statistics.

    Writes ``accepted.jsonl`` (samples), ``rejected.jsonl`` (reasons and text) and ``statistics.json`` to ``folder``.

    Raises:
        DataError: If there are no annotations.
    """
    checker, folder = checker or Checker(), Path(folder)
    known = {annotation.id: annotation for annotation in read_annotations(annotations)}
    accepted: list[Sample] = []
    rejected: list[dict[str, Any]] = []
    for record in read_answers(generated):
        annotation = known.get(record["item"])
        if annotation is None:
            sample, reasons = None, [("no_annotation", f"item {record['item']!r} has no annotation")]
        else:
            sample, reasons = checker.check(record, annotation)
        if sample is not None:
            accepted.append(sample)
        else:
            rejected.append(_rejection(record, reasons, annotation))
    for name, records in (("accepted", map(to_record, accepted)), ("rejected", rejected)):
        with atomic_text(folder / f"{name}.jsonl", errors="replace") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    counted = statistics(accepted, rejected)
    write_json(folder / "statistics.json", counted)
    return counted


def statistics(accepted: Sequence[Sample], rejected: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of samples by kind and modality, and by rule, as JSON values."""
    cells = Counter((sample.task, sample.modality, "accepted") for sample in accepted)
    cells += Counter((record["kind"], record["modality"], "rejected") for record in rejected)
    kinds = {}
    for kind in DATA_KINDS:
        by_modality = {
            modality: {state: cells[kind, modality, state] for state in ("accepted", "rejected")}
            for modality in ITEM_MODALITIES
        }
        totals = {state: sum(cell[state] for cell in by_modality.values()) for state in ("accepted", "rejected")}
        kinds[kind] = {**totals, "paper": PAPER_COUNTS[kind], "by_modality": by_modality}
    reasons = Counter(rule for record in rejected for rule in {reason["rule"] for reason in record["reasons"]})
    counts = {"accepted": len(accepted), "rejected": len(rejected)}
    return {**counts, "kinds": kinds, "reasons": dict(reasons.most_common())}


def read_statistics(checked: str | Path) -> dict[str, Any]:
    """The statistics of an earlier check.

    Raises:
        DataError: If the folder has none.
    """
    try:
        return json.loads((Path(checked) / "statistics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{checked} was not made by `chatbridge multis check`: {error}") from error


def table(counted: Mapping[str, Any]) -> str:
    """Statistics as text for a terminal."""
    rows = {**counted["kinds"], "all": {**counted, "paper": sum(PAPER_COUNTS.values())}}
    lines = [f"{'kind':14}{'accepted':>10}{'rejected':>10}{'paper':>9}"]
    lines += [f"{kind:14}{row['accepted']:10}{row['rejected']:10}{row['paper']:9}" for kind, row in rows.items()]
    if counted["reasons"]:
        lines.append("rejected for: " + ", ".join(f"{rule} {n}" for rule, n in counted["reasons"].items()))
    return "\n".join(lines)


def _sample(record: Mapping[str, Any], pairs: list[Pair], annotation: Annotation) -> Sample:
    messages: list[Message] = []
    for pair in pairs:
        shown = () if messages else tuple(medium.type for medium in annotation.media)
        messages += [Message("user", pair.question, shown), Message("assistant", pair.answer)]
    meta = {"request": record["id"], "model": record["model"], "item": annotation.id}
    return Sample(
        id=f"{annotation.id}:{record['kind']}",
        media=tuple(Medium(medium.type, medium.path) for medium in annotation.media),
        turns=tuple(messages),
        source=annotation.source,
        task=record["kind"],
        meta=meta | ({"licence": annotation.licence} if annotation.licence else {}),
    )


def _rejection(record: Mapping[str, Any], reasons: list[Reason], annotation: Annotation | None) -> dict[str, Any]:
    return {
        "id": f"{record['item']}:{record['kind']}",
        **{key: record[key] for key in ("item", "kind", "modality", "text")},
        "request": record["id"],
        "reasons": [{"rule": rule, "detail": detail} for rule, detail in reasons],
        "media": [medium.model_dump() for medium in annotation.media] if annotation else [],
    }


def _read_phrases(path: str | None) -> tuple[dict[str, re.Pattern[str]], dict[str, re.Pattern[str]]]:
    """The compiled phrases of ``rules/language.yaml``: by name, and ``foreign_media`` by modality.

    Raises:
        ConfigError: If a list is missing or a pattern is not a regular expression.
    """
    file = Path(path) if path else Path(__file__).parent / "rules" / "language.yaml"
    try:
        lists = yaml.safe_load(file.read_text(encoding="utf-8"))
        phrases = {name: _any_of(lists[name]) for name in _PHRASE_LISTS}
        return phrases, {name: _any_of(patterns) for name, patterns in lists["foreign_media"].items()}
    except (OSError, yaml.YAMLError, re.error, TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"cannot read the phrases of {file}: {type(error).__name__}: {error}") from error


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    """A regular expression for any of ``patterns``; a match does not begin or end inside a word."""
    whole = (rf"(?:(?<!\w)|(?=\W))(?:{pattern})(?:(?!\w)|(?<=\W))" for pattern in patterns)
    return re.compile("|".join(whole), re.IGNORECASE)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())


def _load_hook(name: str) -> Callable[[str], str | None]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load the hook {name!r}, expected MODULE:FUNCTION ({error})") from error
