"""Caption scores equal pycocoevalcap's own on the same captions, and degrade honestly without Java."""

from __future__ import annotations

import random
import shutil

import pytest

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.tasks.scoring import captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer and METEOR need Java")

WORDS = ["a", "dog", "the", "man's", "2", "ten", "red-hot", "U.S.", "runs", "can't", "quickly", "Mr.", "café", "ball"]
ENDS = ["", ".", "!", "?", " ...", ";", ' "quoted"', " (aside)", ", and", " -", "\nnext line", " 3,000", "'"]


def make_captions(count: int = 220, seed: int = 5) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(ENDS)

    references = {f"v{n}": [sentence() for _ in range(rng.randint(1, 5))] for n in range(count)}
    predictions = {key: rng.choice(texts) if rng.random() < 0.3 else sentence() for key, texts in references.items()}
    return predictions, references


def official(predictions: dict[str, str], references: dict[str, list[str]], meteor: bool) -> dict[str, float]:
    """The steps of pycocoevalcap's COCOEvalCap.evaluate, without SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    said = tokenizer.tokenize({key: [{"caption": text}] for key, text in predictions.items()})
    scores = {f"BLEU_{n}": value for n, value in enumerate(Bleu(4).compute_score(truth, said, verbose=0)[0], 1)}
    scores["ROUGE_L"] = Rouge().compute_score(truth, said)[0]
    scores["CIDEr"] = Cider().compute_score(truth, said)[0]
    if meteor:
        from pycocoevalcap.meteor.meteor import Meteor

        scores["METEOR"] = Meteor().compute_score(truth, said)[0]
    return scores


@needs_java
def test_scores_equal_the_official_ones_to_the_last_digit() -> None:
    predictions, references = make_captions()
    scored = captions.score_captions(predictions, references, ("BLEU", "ROUGE_L", "CIDEr"))
    assert scored.overall == official(predictions, references, meteor=False)
    assert scored.tokenizer == "ptb"
    assert len(scored.each["CIDEr"]) == len(predictions)


@needs_java
def test_meteor_equals_the_official_one() -> None:
    if "METEOR" in captions.unavailable(("METEOR",)):
        pytest.skip("Java has too little memory for METEOR")
    predictions, references = make_captions(24)
    scored = captions.score_captions(predictions, references, ("METEOR",))
    assert scored.overall["METEOR"] == official(predictions, references, meteor=True)["METEOR"]


@needs_java
def test_too_little_memory_for_meteor_is_told_and_the_rest_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions, "METEOR_HEAP_MIB", 10**10)  # no machine has it
    reason = captions.unavailable(captions.METRICS)["METEOR"]
    assert reason.startswith("Java does not start with a heap of 10000000000 MiB: ")
    scored = captions.score_captions({"a": "a dog runs"}, {"a": ["a dog runs"]}, ("METEOR", "ROUGE_L"))
    assert scored.left_out == {"METEOR": reason}
    assert scored.overall == {"ROUGE_L": 1.0}


@needs_java
def test_an_empty_or_broken_caption_shifts_no_other() -> None:
    predictions = {"a": "a dog runs", "b": "", "c": "a cat\u2028sits\r\non a mat", "d": ""}
    references = {"a": ["a dog runs"], "b": ["a bird"], "c": ["a cat sits on a mat"], "d": ["x"]}
    scored = captions.score_captions(predictions, references, ("ROUGE_L",))
    assert scored.each["ROUGE_L"] == [1.0, 0.0, 1.0, 0.0]


def test_without_java_the_reason_is_told_and_the_rest_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    predictions, references = {"a": "A dog runs."}, {"a": ["a dog runs"]}
    scored = captions.score_captions(predictions, references)
    assert scored.tokenizer == "python"
    assert set(scored.left_out) == {"METEOR", "SPICE"}
    assert "Java is not installed" in scored.left_out["METEOR"]
    assert scored.overall["ROUGE_L"] == 1.0
    assert set(captions.unavailable()) == {"ptb", "METEOR", "SPICE"}


def test_a_prediction_without_reference_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 predictions have no reference, the first is 'b'"):
        captions.score_captions({"a": "x", "b": "y"}, {"a": ["x"]}, ("CIDEr",))
    with pytest.raises(DataError, match="unknown caption metrics"):
        captions.score_captions({"a": "x"}, {"a": ["x"]}, ("CIDER",))
