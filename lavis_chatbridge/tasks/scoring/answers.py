"""Scores of single texts: official VQA accuracy, exact match after a normalisation, yes or no, and facts."""

from __future__ import annotations

import contextlib
import io
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace

Facts = Mapping[str, str]
"""Attribute -> value of a medium."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
_NUMBERS = f"zero one two three four five six seven eight nine ten {_TEENS}".split()
_NUMERALS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_WORD = re.compile(r"[^\W_]+")


# --- Answers ---


def vqa_accuracy(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
    """Accuracy of VQAv2 and OKVQA by the official evaluator (min(#humans / 3, 1), averaged over leave-one-out sets).

    Args:
        predictions: ``[n]`` answers.
        answers: ``[n]`` the human answers to each question (ten in VQAv2).

    Returns:
        The accuracy in percent and each question's, rounded to two digits as the evaluator does.
    """
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    types = {"question_type": "all", "answer_type": "all"}
    truth = {
        number: {"answers": [{"answer": text, "answer_id": i} for i, text in enumerate(texts, start=1)], **types}
        for number, texts in enumerate(answers)
    }
    said = {number: {"answer": text} for number, text in enumerate(predictions)}
    questions = (SimpleNamespace(qa=qa, getQuesIds=lambda: list(truth)) for qa in (truth, said))
    evaluator = VQAEval(*questions, 2)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    return float(evaluator.accuracy["overall"]), [float(evaluator.evalQA[number]) for number in said]


def exact_match(
    predictions: Sequence[str], answers: Sequence[Sequence[str]], normalisation: str = "plain"
) -> list[float]:
    """100 for each prediction that equals one of its answers after normalisation of both, 0 for the others."""
    normalise = NORMALISATIONS[normalisation]
    return [
        100.0 * (normalise(said) in {normalise(answer) for answer in accepted})
        for said, accepted in zip(predictions, answers, strict=True)
    ]


def yes_no(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> tuple[dict[str, float], list[float]]:
    """Score yes-or-no answers; yes is the positive class.

    Returns:
        ``yes_no`` (accuracy), ``precision``, ``recall``, ``F1`` and ``yes_share`` in percent, and 100 or 0 for each
        prediction. A prediction that begins with neither word is wrong and does not count as positive.
    """
    said = [_first_word(text) for text in predictions]
    truth = [_first_word(texts[0]) for texts in answers]
    positives, hits = said.count("yes"), sum(s == t == "yes" for s, t in zip(said, truth, strict=True))
    precision = 100.0 * hits / positives if positives else 0.0
    recall = 100.0 * hits / truth.count("yes") if "yes" in truth else 0.0
    each = [100.0 * (s == t) for s, t in zip(said, truth, strict=True)]
    scores = {
        "yes_no": sum(each) / len(each),
        "precision": precision,
        "recall": recall,
        "F1": 2.0 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_share": 100.0 * positives / len(said),
    }
    return scores, each


def _first_word(text: str) -> str:
    found = re.match(r"\W*([a-z]+)", text.lower())
    return found.group(1) if found else ""


# --- Normalisations ---


def plain(text: str) -> str:
    """Lower case, outer white space and a final full stop dropped: MSRVTT-QA, MSVD-QA and GQA compare single words."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def squad(text: str) -> str:
    """Lower case, punctuation and articles dropped, white space joined: the normalisation of SQuAD's evaluator."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION))
    return " ".join(words.split())


def vocabulary(text: str) -> str:
    """The entry of a closed vocabulary for a text: ``electric_bass`` is "Electric bass.", "2" is "two"."""
    return " ".join(_NUMERALS.get(word, word) for word in squad(text.replace("_", " ").replace("-", " ")).split())


def vqa(text: str) -> str:
    """The official VQA evaluator's normalisation of one answer."""
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    evaluator = VQAEval()
    return evaluator.processDigitArticle(evaluator.processPunctuation(" ".join(text.split())))


NORMALISATIONS: dict[str, Callable[[str], str]] = {"plain": plain, "squad": squad, "vqa": vqa, "vocabulary": vocabulary}


# --- Facts ---


def names_exactly(text: str, value: str, values: Iterable[str]) -> bool:
    """Whether ``text`` names ``value`` and no other of ``values``; whole words, in any case."""
    words = f" {' '.join(_WORD.findall(text.lower()))} "
    named = {candidate for candidate in {value, *values} if f" {' '.join(_WORD.findall(candidate.lower()))} " in words}
    # "light blue" contains the word "blue": a value inside a longer named one does not count
    return {name for name in named if not any(name != other and name in other for other in named)} == {value}


def text_prior(train: Iterable[Facts], test: Iterable[Facts]) -> float:
    """The share of right attributes that random training captions would have.

    The mean over attributes of the sum over values of p_train(value) p_test(value).
    """
    before, after = frequencies(train), frequencies(test)
    shared = [name for name in after if name in before]
    if not shared:
        return 0.0
    agreement = (sum(p * before[name].get(value, 0.0) for value, p in after[name].items()) for name in shared)
    return sum(agreement) / len(shared)


def frequencies(facts: Iterable[Facts]) -> dict[str, dict[str, float]]:
    """Attribute -> value -> its share, in the order of appearance."""
    counts: dict[str, Counter[str]] = {}
    for truth in facts:
        for name, value in truth.items():
            counts.setdefault(name, Counter())[value] += 1
    return {name: {value: n / count.total() for value, n in count.items()} for name, count in counts.items()}
