"""The rules that an answer must obey to become a sample: form, length, wording, and only what the annotation supports.

``language.yaml`` has the phrases, ``things.yaml`` the vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from lavis_chatbridge.config import Settings
from lavis_chatbridge.errors import ConfigError, DataError, MissingExtraError
from lavis_chatbridge.multis.annotation import Annotation
from lavis_chatbridge.multis.prompts import DataKind, Pair, PromptBook
from lavis_chatbridge.multis.rules.things import Things
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample

_ASK = ("question", "q", "user", "human", "person")
_REPLY = ("answer", "a", "assistant", "reply", "response")
_LABEL = re.compile(
    r"^[ \t]*(?:[-*#>]+[ \t]*)?(?:\d+[.)][ \t]*)?(?:\*\*|__)?"
    r"(?P<label>" + "|".join(_ASK + _REPLY) + r")(?:[ \t]*#?\d+)?(?:\*\*|__)?[ \t]*[:\uFF1A][ \t]*(?:\*\*|__)?",
    re.IGNORECASE | re.MULTILINE,
)
_FENCE = re.compile(r"\A\s*```[a-zA-Z]*\n(.*?)\n?```\s*\Z", re.DOTALL)
_TITLE = re.compile(r"\A(?:\*\*)?(?:detailed )?description(?:\*\*)?[ \t]*[:\uFF1A](?:\*\*)?\s*", re.IGNORECASE)
_WORDS = re.compile(r"\b[\w'\u2019-]+\b")
_CLAUSE_END = re.compile(r"[.;:!?,]")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_DENIAL = re.compile(r"\s*(?:no\b|there\s+(?:is|are)\s+no)", re.IGNORECASE)
_UNUSABLE = ("text_source", "refusal", "markup", "unsafe")
"""Lists of phrases that are also names of rules."""

Range = tuple[int, int]
"""Minimum and maximum, inclusive."""
Reason = tuple[str, str]
"""A rule's name and the detail that it found."""


class KindLimits(Settings):
    """Limits of one kind of sample: questions per sample, words per question, words per answer."""

    pairs: Range
    question_words: Range
    answer_words: Range


class Limits(Settings):
    """The limits of all kinds."""

    conversation: KindLimits = KindLimits(pairs=(2, 8), question_words=(1, 60), answer_words=(2, 120))
    detail: KindLimits = KindLimits(pairs=(1, 1), question_words=(2, 60), answer_words=(25, 400))
    reasoning: KindLimits = KindLimits(pairs=(1, 3), question_words=(4, 80), answer_words=(20, 300))


class CheckSettings(Settings):
    """The settings of the rules."""

    limits: Limits = Limits()
    duplicate_from: float = Field(default=0.8, gt=0, le=1)
    """Samples with at least this estimated Jaccard similarity of word triples are near duplicates."""
    language: str | None = None
    """A file in the format of ``rules/language.yaml``."""
    things: str | None = None
    """A file in the format of ``rules/things.yaml``."""


class Checker:
    """Applies all rules. ``book`` has the questions of descriptions, and the examples that answers must not copy."""

    def __init__(self, options: CheckSettings | None = None, book: PromptBook | None = None) -> None:
        self._options, self._book = options or CheckSettings(), book or PromptBook()
        file = Path(self._options.language or Path(__file__).parent / "language.yaml")
        try:
            lists = yaml.safe_load(file.read_text(encoding="utf-8"))
            self._phrases = {name: _any_of(lists[name]) for name in (*_UNUSABLE, "negation", "hedge")}
            self._foreign = {modality: _any_of(patterns) for modality, patterns in lists["foreign_media"].items()}
        except (OSError, yaml.YAMLError, re.error, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(f"cannot read the phrases of {file}: {type(error).__name__}: {error}") from error
        self._things = Things(self._options.things)
        self._known = NearDuplicates(self._options.duplicate_from)
        for (kind, modality), examples in self._book.examples.items():
            for number, (_, answer) in enumerate(examples, start=1):
                self._known.add(f"seed example {number} of {kind}/{modality}", answer)

    def check(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[Sample | None, list[Reason]]:
        """Check one answer; returns the sample, or None and all reasons for rejection."""
        kind = record["kind"]
        pairs, reasons = self._parse(record, annotation)
        reasons += self._lengths(pairs, getattr(self._options.limits, kind)) if pairs else ()
        reasons += self._wording(pairs, annotation.modality)
        reasons += self._repeats(pairs)
        reasons += self._absent(pairs, annotation, kind)
        if reasons:
            return None, reasons
        text = "\n".join(f"{pair.question}\n{pair.answer}" for pair in pairs)
        for words in (text, pairs[0].answer) if kind == "detail" else (text,):
            if near := self._known.find(words):
                return None, [("near_duplicate", f"{round(100 * near[1])} % like {near[0]}")]
        self._known.add(f"{annotation.id}:{kind}", text)
        messages: list[Message] = []
        for pair in pairs:
            shown = () if messages else tuple(medium.type for medium in annotation.media)
            messages += [Message("user", pair.question, shown), Message("assistant", pair.answer)]
        meta = {"request": record["id"], "model": record["model"], "item": annotation.id}
        sample = Sample(
            id=f"{annotation.id}:{kind}",
            media=tuple(Medium(medium.type, medium.path) for medium in annotation.media),
            turns=tuple(messages),
            source=annotation.source,
            task=kind,
            meta=meta | ({"licence": annotation.licence} if annotation.licence else {}),
        )
        return sample, []

    def _parse(self, record: Mapping[str, Any], annotation: Annotation) -> tuple[list[Pair], list[Reason]]:
        reasons: list[Reason] = []
        if record["finish"] in ("length", "max_tokens"):
            reasons.append(("truncated", "the answer reached the token limit"))
        elif record["finish"] == "content_filter":
            reasons.append(("refusal", "the server's content filter stopped the answer"))
        try:
            if record["kind"] == "detail":
                question = self._book.question(annotation.modality, annotation.id)
                return [Pair(question=question, answer=read_description(record["text"]))], reasons
            return read_pairs(record["text"]), reasons
        except DataError as error:
            return [], [*reasons, ("form", str(error))]

    def _lengths(self, pairs: list[Pair], limits: KindLimits) -> Iterator[Reason]:
        counts = [(len(pairs), limits.pairs, "questions")]
        for pair in pairs:
            counts.append((len(_words(pair.question)), limits.question_words, "words of a question"))
            counts.append((len(_words(pair.answer)), limits.answer_words, "words of an answer"))
        for count, (least, most), what in counts:
            if not least <= count <= most:
                yield "length", f"{what}: {count}, expected {least} to {most}"

    def _wording(self, pairs: list[Pair], modality: str) -> Iterator[Reason]:
        for text in (text for pair in pairs for text in (pair.question, pair.answer)):
            for rule in _UNUSABLE:
                if found := self._phrases[rule].search(text):
                    yield rule, found.group()
            if modality in self._foreign and (found := self._foreign[modality].search(text)):
                yield "foreign_media", f"{found.group()} ({modality})"

    def _repeats(self, pairs: list[Pair]) -> Iterator[Reason]:
        """Repeated questions, runs of four words, and things."""
        questions = Counter(" ".join(_words(pair.question)) for pair in pairs)
        yield from (("repetition", f"asked {n} times: {q}") for q, n in questions.items() if n > 1)
        words = [word for pair in pairs for word in _words(pair.answer)]
        runs = Counter(zip(words, words[1:], words[2:], words[3:], strict=False))
        for run, count in runs.most_common(1):
            if count >= 3 and 4 * count > 0.2 * len(words):
                yield "repetition", f"{count} times: {' '.join(run)}"
        for pair in pairs:
            length = len(_words(pair.answer))
            for name, count in Counter(name for name, _ in self._things.mentions(pair.answer)).most_common(1):
                if count >= 5 and count > 0.15 * length:
                    yield "repetition", f"{count} times in {length} words: {name}"

    def _absent(self, pairs: list[Pair], annotation: Annotation, kind: DataKind) -> Iterator[Reason]:
        """Things, sounds and colours that an answer mentions but the annotation does not support."""
        supported_by = [*annotation.captions, *annotation.sound_captions, *annotation.tags]
        for frame in annotation.frames:
            supported_by += [frame.caption, *(region.text for region in frame.regions), *frame.semantics]
        supported = self._things.support("\n".join(supported_by))
        absent: dict[str, None] = {}
        for pair in pairs:
            for text in (pair.answer,) if _DENIAL.match(pair.answer) else (pair.question, pair.answer):
                for name, at in self._things.mentions(text):
                    if name not in supported and not self._excused(text, at, hedged=kind == "reasoning"):
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


def read_pairs(text: str) -> list[Pair]:
    """Parse a conversation: questions and answers that alternate."""
    text = _unfenced(text)
    marks = list(_LABEL.finditer(text))
    if not marks:
        raise DataError("no line begins with 'Question:' or 'Answer:'")
    parts = []
    for position, mark in enumerate(marks):
        asks = mark["label"].lower() in _ASK
        end = marks[position + 1].start() if position + 1 < len(marks) else len(text)
        words = text[mark.end() : end].strip().strip("*_").strip()
        if asks != (position % 2 == 0):
            raise DataError(f"part {position + 1} is {'a question' if asks else 'an answer'}, expected the other")
        if not words:
            raise DataError(f"part {position + 1} is empty")
        parts.append(words)
    if len(parts) % 2:
        raise DataError("the last question has no answer")
    return [Pair(question=q, answer=a) for q, a in zip(parts[::2], parts[1::2], strict=True)]


def read_description(text: str) -> str:
    """Parse a description that was requested without a question."""
    text = _TITLE.sub("", _unfenced(text)).strip()
    if not text:
        raise DataError("the answer is empty")
    if any(mark["label"].lower() in _ASK for mark in _LABEL.finditer(text)):
        raise DataError("questions and answers, expected a description")
    return text


def _unfenced(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    fence = _FENCE.match(text)
    return (fence[1] if fence else text).strip()


def _any_of(patterns: list[str]) -> re.Pattern[str]:
    """A regular expression for any of ``patterns``; a match does not begin or end inside a word."""
    whole = (rf"(?:(?<!\w)|(?=\W))(?:{pattern})(?:(?!\w)|(?<=\W))" for pattern in patterns)
    return re.compile("|".join(whole), re.IGNORECASE)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())
