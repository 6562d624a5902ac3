"""Answer scores: the official VQA accuracy, and exact match after the benchmark's own normalisation."""

from __future__ import annotations

import contextlib
import io
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from lavis_chatbridge.errors import DataError


def vqa_accuracy(
    predictions: Mapping[str, str],
    answers: Mapping[str, Sequence[str]],
    groups: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Accuracy of VQAv2 and OKVQA by the official evaluator (min(#humans / 3, 1), averaged over leave-one-out sets).

    Args:
        predictions: Question id to answer.
        answers: Question id to the human answers (ten of them in VQAv2).
        groups: Question id to answer type, for the accuracies per type.

    Returns:
        ``{"overall": percent, "by_type": {type: percent}, "each": {question id: percent}}``, rounded to two digits as
        the evaluator does.

    Raises:
        DataError: If a prediction has no human answers.
    """
    _check(predictions, answers)
    truth = {
        key: {
            "answers": [{"answer": text, "answer_id": number} for number, text in enumerate(answers[key], start=1)],
            "question_type": "all",
            "answer_type": (groups or {}).get(key, "all"),
        }
        for key in predictions
    }
    evaluator = _evaluator_class()(_Questions(truth), _Questions({k: {"answer": v} for k, v in predictions.items()}), 2)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    return {
        "overall": evaluator.accuracy["overall"],
        "by_type": evaluator.accuracy["perAnswerType"],
        "each": dict(evaluator.evalQA),
    }


def exact_match(
    predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]], normalisation: str = "plain"
) -> dict[str, Any]:
    """Share of predictions (percent) that equal one of their answers after `NORMALISATIONS` of both.

    Raises:
        DataError: If a prediction has no answer, or the normalisation is unknown.
    """
    _check(predictions, answers)
    normalise = NORMALISATIONS.get(normalisation)
    if normalise is None:
        raise DataError(f"unknown normalisation {normalisation!r}; known are {', '.join(NORMALISATIONS)}")
    each = {
        key: 100.0 * (normalise(said) in {normalise(answer) for answer in answers[key]})
        for key, said in predictions.items()
    }
    return {"overall": sum(each.values()) / len(each), "each": each}


def plain(text: str) -> str:
    """Lower case, outer white space and a final full stop dropped: MSRVTT-QA, MSVD-QA and GQA compare single words."""
    return " ".join(text.lower().split()).rstrip(".").strip()


def squad(text: str) -> str:
    """Lower case, punctuation and articles dropped, white space joined: the normalisation of SQuAD's evaluator."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_NO_PUNCTUATION))
    return " ".join(words.split())


def vqa(text: str) -> str:
    """The official VQA evaluator's normalisation of one answer."""
    evaluator = _normaliser()
    return evaluator.processDigitArticle(evaluator.processPunctuation(" ".join(text.split())))


NORMALISATIONS: dict[str, Callable[[str], str]] = {"plain": plain, "squad": squad, "vqa": vqa}
"""Name to normalisation of an answer before it is compared."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class _Questions:
    """What the official evaluator reads of a VQA object: ``qa`` and ``getQuesIds``."""

    def __init__(self, qa: dict[str, Any]) -> None:
        self.qa = qa

    def getQuesIds(self) -> list[str]:
        return list(self.qa)


def _check(predictions: Mapping[str, str], answers: Mapping[str, Sequence[str]]) -> None:
    if not predictions:
        raise DataError("there are no predictions to score")
    bare = [key for key in predictions if not answers.get(key)]
    if bare:
        raise DataError(f"{len(bare)} of {len(predictions)} predictions have no answer, the first is {bare[0]!r}")


def _evaluator_class() -> Any:
    from lavis.common.vqa_tools.vqa_eval import VQAEval

    return VQAEval


@lru_cache(maxsize=1)
def _normaliser() -> Any:
    return _evaluator_class()()
