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
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import Any

from lavis_chatbridge.errors import DataError, one_line
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

    ``tokenizer`` is ``"ptb"`` (official, Java) or ``"python"`` (a rule): their scores are not comparable.
    """

    overall: dict[str, float] = field(default_factory=dict)
    each: dict[str, list[float]] = field(default_factory=dict)
    tokenizer: str = "ptb"
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, metric: str, truth: Texts, said: Texts) -> None:
        """Add one metric, or the reason why its scorer failed."""
        try:
            corpus, single = (_meteor if metric == "METEOR" else _scored)(metric, truth, said)
        except Exception as error:  # an external scorer may raise anything; only its own metric is lost
            self.left_out[metric] = f"its scorer failed: {type(error).__name__}: {one_line(error)}"
            _log.warning("%s is left out: %s", metric, self.left_out[metric])
            return
        if metric == "BLEU":
            named = {f"BLEU_{n}": values for n, values in enumerate(zip(corpus, single, strict=True), start=1)}
        else:
            named = {metric: (corpus, [item["All"]["f"] for item in single] if metric == "SPICE" else single)}
        self.overall |= {name: float(value) for name, (value, _) in named.items()}
        self.each |= {name: [float(value) for value in values] for name, (_, values) in named.items()}


def unavailable(metrics: Sequence[str] = CAPTION_METRICS) -> dict[str, str]:
    """The metrics (and ``"ptb"``, the official tokenizer) that cannot be computed on this machine -> the reason."""
    if not shutil.which("java"):
        java = "Java is not installed (Debian: apt-get install default-jre-headless)"
        reasons = {name: java for name in ("METEOR", "SPICE") if name in metrics}
        return {"ptb": f"{java}; captions are tokenised by a Python rule instead", **reasons}
    folder = importlib.resources.files("pycocoevalcap") / "spice" / "lib"
    missing = [name for name in _SPICE_JARS if not (folder / name).is_file()]  # SPICE would download them
    if "SPICE" in metrics and missing:
        return {"SPICE": f"SPICE's {' and '.join(missing)} are not in lib/ of pycocoevalcap's spice folder"}
    return {}


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], metrics: Sequence[str] = CAPTION_METRICS
) -> CaptionScores:
    """Score one predicted caption per sample against its references.

    Args:
        predictions: ``[n]`` captions.
        references: ``[n]`` one or more reference captions each.
        metrics: Names of `CAPTION_METRICS`.

    Raises:
        DataError: If no reference has a word.
    """
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
            found.add(metric, truth, said)
    return found


def _scored(metric: str, truth: Texts, said: Texts) -> tuple[Any, Any]:
    quiet = {"verbose": 0} if metric == "BLEU" else {}
    return resolve_name(_SCORERS[metric])().compute_score(truth, said, **quiet)


def _meteor(_metric: str, truth: Texts, said: Texts) -> tuple[Any, Any]:
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
