"""Caption scores equal pycocoevalcap's, and a scorer that cannot run costs its own metric only."""

from __future__ import annotations

import random
import shutil
import time

import pytest

from lavis_chatbridge.tasks.scoring import captions

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="the official tokenizer and METEOR need Java")

WORDS = ["a", "dog", "the", "man's", "2", "ten", "red-hot", "U.S.", "runs", "can't", "quickly", "Mr.", "café", "ball"]
ENDS = ["", ".", "!", "?", " ...", ";", ' "quoted"', " (aside)", ", and", " -", "\nnext line", " 3,000", "'"]


def make_captions(count: int = 60, seed: int = 5) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def sentence() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 12))) + rng.choice(ENDS)

    references = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(count)]
    return [rng.choice(texts) if rng.random() < 0.3 else sentence() for texts in references], references


def official(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """The steps of pycocoevalcap's COCOEvalCap.evaluate, without SPICE."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(references)})
    said = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(predictions)})
    scores = {f"BLEU_{n}": value for n, value in enumerate(Bleu(4).compute_score(truth, said, verbose=0)[0], 1)}
    more = {"ROUGE_L": Rouge(), "CIDEr": Cider(), "METEOR": Meteor()}
    return scores | {name: scorer.compute_score(truth, said)[0] for name, scorer in more.items()}


@needs_java
def test_scores_equal_the_official_ones_to_the_last_digit() -> None:
    predictions, references = make_captions()
    scored = captions.score_captions(predictions, references, ("BLEU", "ROUGE_L", "CIDEr", "METEOR"))
    assert scored.overall == official(predictions, references)
    assert scored.tokenizer == "ptb"
    assert len(scored.each["CIDEr"]) == len(predictions)


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
    scored = captions.score_captions(["a dog runs", "a cat"], [["a dog runs"], ["a cat"]], ("METEOR", "ROUGE_L"))
    assert scored.overall == {"ROUGE_L": 1.0}
    assert "its Java process ended with status -9" in scored.left_out["METEOR"]
    assert time.monotonic() - began < 60


@needs_java
def test_an_empty_or_broken_caption_shifts_no_other() -> None:
    predictions = ["a dog runs", "", "a cat\u2028sits\r\non a mat", ""]
    references = [["a dog runs"], ["a bird"], ["a cat sits on a mat"], ["x"]]
    scored = captions.score_captions(predictions, references, ("ROUGE_L",))
    assert scored.each["ROUGE_L"] == [1.0, 0.0, 1.0, 0.0]


def test_without_java_the_reason_is_logged_and_the_rest_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    scored = captions.score_captions(["A dog runs."], [["a dog runs"]])
    assert scored.tokenizer == "python"
    assert "Java is not installed" in scored.left_out["METEOR"]
    assert "it needs two samples or more" in scored.left_out["CIDEr"]
    assert set(scored.left_out) == {"METEOR", "SPICE", "CIDEr"}
    assert scored.overall["ROUGE_L"] == 1.0
    assert set(captions.unavailable()) == {"ptb", "METEOR", "SPICE"}
