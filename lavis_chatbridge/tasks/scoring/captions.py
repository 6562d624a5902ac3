"""Caption scores by pycocoevalcap, the official COCO caption evaluation: BLEU, METEOR, ROUGE-L, CIDEr, SPICE.

METEOR, SPICE and the official tokenizer are Java programs. If one cannot run or crashes, the result has the
reason instead of its metric, and all other scores.
"""

from __future__ import annotations

import importlib.resources
import logging
import re
import shutil
import threading
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import Any, NamedTuple

import numpy as np

from lavis_chatbridge.errors import DataError, one_line

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


def unavailable() -> dict[str, str]:
    """The metrics (and ``"ptb"``, the official tokenizer) that cannot be computed on this machine -> the reason."""
    if not shutil.which("java"):
        java = "Java is not installed (Debian: apt-get install default-jre-headless)"
        return {"ptb": f"{java}; captions are tokenised by a Python rule instead", "METEOR": java, "SPICE": java}
    folder = importlib.resources.files("pycocoevalcap") / "spice" / "lib"
    if missing := [name for name in _SPICE_JARS if not (folder / name).is_file()]:  # SPICE would download them
        return {"SPICE": f"SPICE's {' and '.join(missing)} are not in lib/ of pycocoevalcap's spice folder"}
    return {}


class CaptionScores(NamedTuple):
    """Scores in percent."""

    tokenizer: str
    """``"ptb"`` (official, Java) or ``"python"`` (a rule); their scores are not comparable."""
    scores: dict[str, float]
    each: dict[str, np.ndarray]
    """Metric -> ``[n]``, for metrics that are means over samples."""
    left_out: dict[str, str]
    """Metric -> the reason why it was not computed."""


def score(predictions: Sequence[str], references: Sequence[list[str]], metrics: Sequence[str]) -> CaptionScores:
    """Caption metrics of ``[n]`` predictions; a `DataError` if no reference has a word."""
    truth, said = dict(enumerate(references)), {number: [text] for number, text in enumerate(predictions)}
    missing = unavailable()
    truth, said, tokenizer = _tokenised(truth, said, official="ptb" not in missing)
    if not any(text for texts in truth.values() for text in texts):
        raise DataError(f"the references of all {len(said)} predictions are empty")
    if len(said) == 1:
        missing["CIDEr"] = "it needs two samples or more: words are weighted by how many samples have them"
    found = CaptionScores(tokenizer, {}, {}, {metric: missing[metric] for metric in metrics if metric in missing})
    for metric in metrics:
        if metric not in missing:
            _add(found, metric, truth, said)
    return found


def _add(found: CaptionScores, metric: str, truth: Texts, said: Texts) -> None:
    """Add one metric, or the reason why its scorer failed."""
    try:
        if metric == "METEOR":
            corpus, each = _meteor(truth, said)
        else:
            quiet = {"verbose": 0} if metric == "BLEU" else {}
            corpus, each = resolve_name(_SCORERS[metric])().compute_score(truth, said, **quiet)
    except Exception as error:  # an external scorer may raise anything; only its own metric is lost
        found.left_out[metric] = f"its scorer failed: {type(error).__name__}: {one_line(error)}"
        _log.warning("%s is left out: %s", metric, found.left_out[metric])
        return
    if metric == "BLEU":
        found.scores.update({f"BLEU_{n}": 100.0 * float(value) for n, value in enumerate(corpus, start=1)})
        return
    found.scores[metric] = 100.0 * float(corpus)
    if metric != "METEOR":  # the others are means over samples
        single = [item["All"]["f"] for item in each] if metric == "SPICE" else each
        found.each[metric] = 100.0 * np.asarray(single, dtype=float)


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
        raise ValueError(f"its Java process ended with status {meteor.meteor_p.wait()}") from error
    finally:
        watchdog.cancel()
        if meteor.lock.locked():
            meteor.lock.release()


def _tokenised(truth: Texts, said: Texts, official: bool) -> tuple[Texts, Texts, str]:
    """References and predictions as tokens, and the name of the tokenizer."""
    if official:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        # A line break inside a caption would shift all later captions, and an empty last line would be lost.
        rows = [
            {n: [{"caption": " ".join(text.split()) or "."} for text in own] for n, own in texts.items()}
            for texts in (truth, said)
        ]
        done = [PTBTokenizer().tokenize(captions) for captions in rows]
        if all(len(done[i].get(n, ())) == len(own) for i, texts in enumerate(rows) for n, own in texts.items()):
            return done[0], done[1], "ptb"
        _log.warning("the official tokenizer's Java died; captions are tokenised by a Python rule instead")
    # lower case without punctuation: a rule that approximates the official tokenizer
    plain = [
        {n: [" ".join(_PUNCTUATION.sub(" ", text.lower()).split()) for text in own] for n, own in texts.items()}
        for texts in (truth, said)
    ]
    return plain[0], plain[1], "python"
