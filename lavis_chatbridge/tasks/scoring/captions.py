"""Caption scores by pycocoevalcap, the official COCO caption evaluation: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

METEOR, SPICE and the official tokenizer are Java programs. If one cannot run or crashes, the result has the
reason instead of its metric, and all other scores. The result has the tokenizer's name, because scores from different
tokenizers are not comparable.
"""

from __future__ import annotations

import importlib.resources
import logging
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring import CAPTION_METRICS

_log = logging.getLogger(__name__)

METEOR_SECONDS = 600.0
"""Time limit of METEOR's Java, plus one second per ten captions: a degenerate caption can take hours."""

_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SCORERS = {
    "BLEU": "pycocoevalcap.bleu.bleu:Bleu",
    "ROUGE_L": "pycocoevalcap.rouge.rouge:Rouge",
    "CIDEr": "pycocoevalcap.cider.cider:Cider",
    "SPICE": "pycocoevalcap.spice.spice:Spice",
}
_PUNCTUATION = re.compile(r"[.,!?;:\"`()\[\]{}]|''|--+|(?<!\w)'|'(?!\w)|(?<!\w)-|-(?!\w)")

Texts = dict[int, list[str]]


@dataclass
class CaptionScores:
    """Scores of the corpus and of each caption, as fractions (``BLEU_1`` to ``BLEU_4``); reasons for missing metrics.

    ``tokenizer`` is ``"ptb"`` (official, Java) or ``"python"`` (a rule, without Java).
    """

    overall: dict[str, float] = field(default_factory=dict)
    each: dict[str, list[float]] = field(default_factory=dict)
    tokenizer: str = "ptb"
    left_out: dict[str, str] = field(default_factory=dict)


def unavailable(metrics: Sequence[str] = CAPTION_METRICS) -> dict[str, str]:
    """The metrics (and ``"ptb"``, the official tokenizer) that cannot be computed on this machine -> the reason."""
    reasons = {}
    java = None if shutil.which("java") else "Java is not installed (Debian: apt-get install default-jre-headless)"
    if java:
        reasons["ptb"] = f"{java}; captions are tokenised by a Python rule instead"
    if "METEOR" in metrics and java:
        reasons["METEOR"] = java
    if "SPICE" in metrics and (fault := java or _spice_fault()):
        reasons["SPICE"] = fault
    return reasons


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] = CAPTION_METRICS
) -> CaptionScores:
    """Score one predicted caption per sample against its references.

    Args:
        predictions: ``[n]`` captions.
        references: ``[n]`` one or more reference captions each.
        metrics: Names of `CAPTION_METRICS`.

    Raises:
        DataError: If a prediction has no reference, or no reference has a word.
    """
    if bare := [number for number, texts in enumerate(references) if not texts]:
        raise DataError(
            f"{len(bare)} of {len(predictions)} predictions have no reference, the first is number {bare[0]}"
        )
    missing = unavailable(metrics)
    found = CaptionScores(left_out={name: reason for name, reason in missing.items() if name != "ptb"})
    truth: Texts = {number: list(texts) for number, texts in enumerate(references)}
    said: Texts = {number: [text] for number, text in enumerate(predictions)}
    truth, said, found.tokenizer = _tokenised(truth, said, official="ptb" not in missing)
    if not any(text for texts in truth.values() for text in texts):
        raise DataError(f"the references of all {len(predictions)} predictions are empty")
    if len(predictions) == 1 and "CIDEr" in metrics:
        found.left_out["CIDEr"] = "it needs two samples or more: words are weighted by how many samples have them"
    for metric in metrics:
        if metric not in found.left_out:
            _score(metric, truth, said, found)
    return found


def _score(metric: str, truth: Texts, said: Texts, found: CaptionScores) -> None:
    """Add one metric, or the reason why its scorer failed."""
    try:
        if metric == "METEOR":
            corpus, single = _meteor(truth, said)
        else:
            more = {"verbose": 0} if metric == "BLEU" else {}
            corpus, single = resolve_name(_SCORERS[metric])().compute_score(truth, said, **more)
    except Exception as error:  # an external scorer may raise anything; only its own metric is lost
        found.left_out[metric] = f"its scorer failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        _log.warning("%s is left out: %s", metric, found.left_out[metric])
        return
    if metric == "BLEU":
        for n, (value, values) in enumerate(zip(corpus, single, strict=True), start=1):
            found.overall[f"BLEU_{n}"], found.each[f"BLEU_{n}"] = float(value), [float(v) for v in values]
        return
    each = [item["All"]["f"] for item in single] if metric == "SPICE" else single
    found.overall[metric], found.each[metric] = float(corpus), [float(value) for value in each]


def _meteor(truth: Texts, said: Texts) -> tuple[Any, Any]:
    """METEOR in a separate Java process, which is killed after a time limit.

    When the process dies, pycocoevalcap raises with its lock held, and its destructor would wait forever for that lock.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    watchdog = threading.Timer(METEOR_SECONDS + 0.1 * len(said), meteor.meteor_p.kill)
    watchdog.start()
    try:
        return meteor.compute_score(truth, said)
    except (OSError, ValueError) as error:
        meteor.meteor_p.kill()
        status = meteor.meteor_p.wait()
        raise ValueError(f"its Java process ended with status {status}") from error
    finally:
        watchdog.cancel()
        if meteor.lock.locked():
            meteor.lock.release()


def _tokenised(truth: Texts, said: Texts, official: bool) -> tuple[Texts, Texts, str]:
    """References and predictions as tokens, and the name of the tokenizer."""
    if official:
        both = _tokenise_ptb(truth), _tokenise_ptb(said)
        if all(
            {n: len(own) for n, own in done.items()} == {n: len(own) for n, own in asked.items()}
            for done, asked in zip(both, (truth, said), strict=True)
        ):
            return *both, "ptb"
        _log.warning("the official tokenizer's Java died; captions are tokenised by a Python rule instead")
    return _tokenise_python(truth), _tokenise_python(said), "python"


def _tokenise_ptb(captions: Texts) -> Texts:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # A line break inside a caption would shift all later captions, and an empty last line would be lost.
    rows = {key: [{"caption": " ".join(text.split()) or "."} for text in texts] for key, texts in captions.items()}
    return PTBTokenizer().tokenize(rows)


def _tokenise_python(captions: Texts) -> Texts:
    """Lower case without punctuation: a rule that approximates the official tokenizer."""
    return {
        key: [" ".join(_PUNCTUATION.sub(" ", text.lower()).split()) for text in texts]
        for key, texts in captions.items()
    }


def _spice_fault() -> str | None:
    """Why SPICE cannot run: its parser's jars are not part of the package, which downloads them at first use."""
    folder = importlib.resources.files("pycocoevalcap") / "spice" / "lib"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()]
    return f"SPICE's {' and '.join(missing)} are not in lib/ of pycocoevalcap's spice folder" if missing else None
