"""Caption scores equal pycocoevalcap's, and a scorer that cannot run costs its own metric only."""

from __future__ import annotations

import random
import shutil
import time

import pytest

from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import captions
from lavis_chatbridge.tasks.statistics import Measured

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer and METEOR need Java")

WORDS = ["a", "dog", "the", "man's", "2", "ten", "red-hot", "U.S.", "runs", "can't", "quickly", "Mr.", "café", "ball"]
ENDS = ["", ".", "!", "?", " ...", ";", ' "quoted"', " (aside)", ", and", " -", "\nnext line", " 3,000", "'"]


def make_captions(count: int = 60, seed: int = 5) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(ENDS)

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(count)]
    return [rng.choice(texts) if rng.random() < 0.3 else sentence() for texts in references], references


def scored(predictions: list[str], references: list[list[str]], *metrics: str) -> Measured:
    pairs = zip(predictions, references, strict=True)
    found = Measured([Prediction(sample_id="x", prediction=said, references=texts) for said, texts in pairs])
    captions.score(found, metrics)
    return found


def official(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The steps of pycocoevalcap's COCOEvalCap.evaluate, without SPICE; in percent."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(references)})
    said = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(predictions)})
    scores = {f"BLEU_{n}": value for n, value in enumerate(Bleu(4).compute_score(truth, said, verbose=0)[0], 1)}
    for name, scorer in {"ROUGE_L": Rouge(), "CIDEr": Cider(), "METEOR": Meteor()}.items():
        scores[name] = scorer.compute_score(truth, said)[0]
    return {name: 100.0 * value for name, value in scores.items()}


@needs_java
def test_scores_equal_the_official_ones_to_the_last_digit() -> None:
    predictions, references = make_captions()
    found = scored(predictions, references, "BLEU", "ROUGE_L", "CIDEr", "METEOR")
    assert found.scores == official(predictions, references)
    assert found.tokenizer == "ptb"
    assert found.each["CIDEr"].mean() == pytest.approx(found.scores["CIDEr"])


@needs_java
@pytest.mark.parametrize("fault", ["killed", "hangs"])
def test_a_meteor_that_dies_costs_meteor_only(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap.meteor.meteor import Meteor

    def killed(meteor: Meteor, *_: object) -> str:
        if fault == "killed":
            meteor.meteor_p.kill()
        return meteor.meteor_p.stdout.readline().decode().strip()  # Java was asked nothing and stays silent

    monkeypatch.setattr(Meteor, "_stat", killed)
    monkeypatch.setattr(captions, "METEOR_SECONDS", 1.0)
    began = time.monotonic()
    found = scored(["a dog runs", "a cat"], [["a dog runs"], ["a cat"]], "METEOR", "ROUGE_L")
    assert found.scores == {"ROUGE_L": 100.0}
    assert "its Java process ended with status -9" in found.left_out["METEOR"]
    assert time.monotonic() - began < 60


@needs_java
def test_an_empty_or_broken_caption_shifts_no_other() -> None:
    predictions = ["a dog runs", "", "a cat\u2028sits\r\non a mat", ""]
    references = [["a dog runs"], ["a bird"], ["a cat sits on a mat"], ["x"]]
    assert scored(predictions, references, "ROUGE_L").each["ROUGE_L"].tolist() == [100.0, 0.0, 100.0, 0.0]


def test_without_java_the_reason_is_logged_and_the_rest_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    found = scored(["A dog runs."], [["a dog runs"]], "BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE")
    assert found.tokenizer == "python"
    assert "Java is not installed" in found.left_out["METEOR"]
    assert "it needs two samples or more" in found.left_out["CIDEr"]
    assert set(found.left_out) == {"METEOR", "SPICE", "CIDEr"}
    assert found.scores["ROUGE_L"] == 100.0
    assert set(captions.unavailable()) == {"ptb", "METEOR", "SPICE"}
