"""Caption scores by pycocoevalcap, the official COCO caption evaluation: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

METEOR, SPICE and the official tokenizer are Java programs. Where they cannot run, the reason is told before anything is
scored (`unavailable`), the other scores are still computed, and the result names the tokenizer that was used: figures
from different tokenizers are not comparable.
"""

from __future__ import annotations

import importlib.resources
import logging
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring.names import CAPTION_METRICS

METRICS = CAPTION_METRICS
METEOR_HEAP_MIB = 2048
"""The heap that pycocoevalcap asks of Java for METEOR; about 1.2 GB of it are used."""

_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_PUNCTUATION = re.compile(r"[.,!?;:\"`()\[\]{}]|''|--+|(?<!\w)'|'(?!\w)|(?<!\w)-|-(?!\w)")


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores, and each caption's own.

    Attributes:
        overall: Metric to corpus score, as pycocoevalcap gives it (not times 100); ``BLEU_1`` to ``BLEU_4``.
        each: Metric to scores in the order of the predictions.
        tokenizer: ``"ptb"`` (official, Java) or ``"python"`` (where there is no Java).
        left_out: Metric to the reason why it was not computed.
    """

    overall: dict[str, float]
    each: dict[str, list[float]]
    tokenizer: str
    left_out: dict[str, str]


def unavailable(metrics: Sequence[str] = METRICS) -> dict[str, str]:
    """Which of the metrics (and ``"ptb"``, the official tokenizer) cannot be computed here, and why."""
    reasons = {}
    java = _java_fault(64)
    if java:
        reasons["ptb"] = f"{java}; captions are tokenised by a Python rule instead"
    if "METEOR" in metrics and (fault := java or _java_fault(METEOR_HEAP_MIB)):
        reasons["METEOR"] = fault
    if "SPICE" in metrics and (fault := java or _spice_fault()):
        reasons["SPICE"] = fault
    return reasons


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], metrics: Sequence[str] = METRICS
) -> CaptionScores:
    """Score one predicted caption per sample against its references.

    Args:
        predictions: Sample id to caption.
        references: Sample id to one or more reference captions.
        metrics: Which of `METRICS`.

    Raises:
        DataError: If a prediction has no reference, no reference has a word, or a metric is unknown.
    """
    _check(predictions, references, metrics)
    missing = unavailable(metrics)
    for name, reason in missing.items():
        logging.warning("%s is not available: %s", name, reason)
    ids = list(predictions)
    tokenizer = "python" if "ptb" in missing else "ptb"
    tokenise = _tokenise_ptb if tokenizer == "ptb" else _tokenise_python
    truth = tokenise({key: list(references[key]) for key in ids})
    said = tokenise({key: [predictions[key]] for key in ids})
    if not any(text for texts in truth.values() for text in texts):
        raise DataError(f"no reference of {len(ids)} predictions holds a word")
    overall: dict[str, float] = {}
    each: dict[str, list[float]] = {}
    for metric in metrics:
        if metric not in missing:
            _score(metric, truth, said, overall, each)
    left_out = {name: reason for name, reason in missing.items() if name != "ptb"}
    return CaptionScores(overall, each, tokenizer, left_out)


def _check(predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], metrics: Sequence[str]) -> None:
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown:
        raise DataError(f"unknown caption metrics {unknown}; known are {', '.join(METRICS)}")
    if not predictions:
        raise DataError("there are no predictions to score")
    bare = [key for key in predictions if not references.get(key)]
    if bare:
        raise DataError(f"{len(bare)} of {len(predictions)} predictions have no reference, the first is {bare[0]!r}")


def _score(metric: str, truth: dict, said: dict, overall: dict[str, float], each: dict[str, list[float]]) -> None:
    corpus, single = _scorer(metric).compute_score(truth, said)
    if metric == "BLEU":
        for n, (value, values) in enumerate(zip(corpus, single, strict=True), start=1):
            overall[f"BLEU_{n}"], each[f"BLEU_{n}"] = float(value), [float(v) for v in values]
    elif metric == "SPICE":
        overall[metric], each[metric] = float(corpus), [float(item["All"]["f"]) for item in single]
    else:
        overall[metric], each[metric] = float(corpus), [float(value) for value in single]


def _scorer(metric: str) -> Any:
    if metric == "METEOR":
        return _meteor()
    if metric == "BLEU":
        from pycocoevalcap.bleu.bleu import Bleu

        return _QuietBleu(Bleu(4))
    if metric == "ROUGE_L":
        from pycocoevalcap.rouge.rouge import Rouge

        return Rouge()
    if metric == "CIDEr":
        from pycocoevalcap.cider.cider import Cider

        return Cider()
    from pycocoevalcap.spice.spice import Spice

    return Spice()


class _QuietBleu:
    """pycocoevalcap's BLEU without its line on standard output."""

    def __init__(self, bleu: Any) -> None:
        self.bleu = bleu

    def compute_score(self, truth: dict, said: dict) -> tuple:
        return self.bleu.compute_score(truth, said, verbose=0)


@lru_cache(maxsize=1)
def _meteor() -> Any:
    """One METEOR process for all calls: starting it takes 10 to 20 seconds."""
    from pycocoevalcap.meteor.meteor import Meteor

    return Meteor()


def _tokenise_ptb(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line break inside a caption would shift all later captions, and an empty last line would be lost.
    rows = {key: [{"caption": " ".join(text.split()) or "."} for text in texts] for key, texts in captions.items()}
    return PTBTokenizer().tokenize(rows)


def _tokenise_python(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    """Lower case, punctuation dropped, as near to the official tokenizer as a rule gets."""
    return {
        key: [" ".join(_PUNCTUATION.sub(" ", text.lower()).split()) for text in texts]
        for key, texts in captions.items()
    }


def _java_fault(heap_mib: int) -> str | None:
    """Why Java cannot run with this heap, or None if it can."""
    java = shutil.which("java")
    if java is None:
        return "Java is not installed (Debian: apt-get install default-jre-headless)"
    return _heap_fault(java, heap_mib)


@lru_cache(maxsize=8)
def _heap_fault(java: str, heap_mib: int) -> str | None:
    try:
        result = subprocess.run(
            [java, f"-Xms{min(heap_mib, 1200)}m", f"-Xmx{heap_mib}m", "-version"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"Java does not start: {error}"
    if result.returncode == 0:
        return None
    last = (result.stderr or result.stdout).strip().splitlines()
    return f"Java does not start with a heap of {heap_mib} MiB: {last[0] if last else 'no message'}"


def _spice_fault() -> str | None:
    """Why SPICE cannot run: its parser's jars are not part of the package and are downloaded by it at first use."""
    folder = Path(str(importlib.resources.files("pycocoevalcap"))) / "spice" / "lib"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    if missing:
        return f"SPICE's {' and '.join(missing)} are not in {folder.name}/ of pycocoevalcap's spice folder"
    return None
