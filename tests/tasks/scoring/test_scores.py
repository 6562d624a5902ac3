"""Scores of predictions: percentages, intervals, types of questions, faults; captions equal pycocoevalcap's."""

from __future__ import annotations

import random
import shutil
import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lavis_chatbridge.tasks.predictions import Prediction
from lavis_chatbridge.tasks.scoring import answers, captions, scores
from lavis_chatbridge.tasks.scoring.answers import plain, squad, vocabulary, vqa
from lavis_chatbridge.tasks.settings import EvaluationSettings


def predicted(number: int, text: str, *accepted: str, **more: Any) -> Prediction:
    return Prediction(sample_id=f"s{number}", prediction=text, answers=list(accepted), **more)


def scored(predictions: list[Prediction], *metrics: str, **settings: Any) -> dict[str, Any]:
    return scores.scored(predictions, EvaluationSettings(metrics=list(metrics), **settings))


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


@pytest.mark.parametrize(
    ("normalise", "text", "expected"),
    [
        (plain, " A Man. ", "a man"),
        (squad, "The man's, hat", "mans hat"),
        (vqa, "Two the dogs,", "2 dogs"),
        (vqa, "dont", "don't"),
        (vocabulary, "An Electric Bass.", vocabulary("electric_bass")),
        (vocabulary, "2", vocabulary("two")),
        (vocabulary, "More than ten", vocabulary("more than 10")),
    ],
)
def test_normalisations(normalise: Any, text: str, expected: str) -> None:
    assert normalise(text) == expected


def test_yes_and_no_have_precision_and_recall() -> None:
    texts = ["Yes, it is.", "yes", "No.", "no", "perhaps"]
    found, each = answers.yes_no(texts, [["Yes"], ["No"], ["No"], ["Yes"], ["Yes"]])
    assert each == [100.0, 0.0, 100.0, 0.0, 0.0]
    expected = {"yes_no": 40.0, "precision": 50.0, "recall": 100 / 3, "F1": 40.0, "yes_share": 40.0}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "value", "right"),
    [
        ("a RED ring.", "red", True),
        ("a coloured ring", "red", False),
        ("a red and blue ring", "red", False),
        ("a light blue ring", "light blue", True),
        ("a light blue ring", "blue", False),
        ("a blue ring", "light blue", False),
    ],
)
def test_a_caption_names_exactly_the_value(text: str, value: str, right: bool) -> None:
    assert answers.names_exactly(text, value, ["red", "blue", "light blue"]) is right


def test_attribute_accuracy_counts_all_pairs_of_caption_and_attribute() -> None:
    truth = [{"colour": "red", "shape": "ring"}, {"colour": "blue", "shape": "star"}, {"colour": "red"}]
    texts = ["a red ring", "a red star", "a blue thing"]
    found = scored([predicted(n, text, facts=truth[n]) for n, text in enumerate(texts)])
    assert found["headline"] == found["scores"]["attribute_accuracy"] == pytest.approx(60.0)
    assert found["scores"]["all_attributes_right"] == pytest.approx(100 / 3)
    assert found["by_type"]["attribute"]["shape"] == {"samples": 2, "attribute_accuracy": 100.0}
    low, high = found["intervals"]["attribute_accuracy"]
    assert 0.0 <= low < 60.0 < high <= 100.0


def test_the_text_prior_is_the_score_of_captions_of_other_media() -> None:
    train = [{"colour": "a", "size": "x"}, {"colour": "a", "size": "y"}, {"colour": "b", "size": "x"}]
    test = [{"colour": "a", "size": "x"}, {"colour": "b", "size": "x"}, {"colour": "b", "size": "x"}]
    assert answers.text_prior(train, test) == pytest.approx((4 / 9 + 2 / 3) / 2)  # colour: 2/3 1/3 + 1/3 2/3; size: 2/3


def test_answers_overall_and_by_type() -> None:
    predictions = [
        predicted(0, "Two.", *["2"] * 4, meta={"type": "number"}),
        predicted(
            1, "red", *["red"] * 2, *["blue"] * 8, meta={"type": "other", "types": {"asked": ["what", "colour"]}}
        ),
        predicted(2, "green", *["red"] * 10, meta={"type": "other"}),
    ]
    found = scored(predictions, "vqa_accuracy", "exact_match", normalisation="vqa")
    assert found["scores"] == {"vqa_accuracy": 53.33, "exact_match": pytest.approx(200 / 3)}
    assert (found["metric"], found["headline"]) == ("vqa_accuracy", 53.33)
    assert found["by_type"]["type"] == {
        "number": {"samples": 1, "vqa_accuracy": 100.0, "exact_match": 100.0},
        "other": {"samples": 2, "vqa_accuracy": 30.0, "exact_match": 50.0},
    }  # "red" has 60: 8 x min(1, 2/3) + 2 x min(1, 1/3), over 10
    assert set(found["by_type"]["asked"]) == {"what / colour"}
    low, high = found["intervals"]["vqa_accuracy"]
    assert low < 53.33 < high
    assert (found["samples"], found["unscored"]) == (3, 0)


def test_captions_are_in_percent_and_by_type(no_java: None) -> None:
    texts = [f"a {word} cat sits" for word in ("red", "blue", "small")]
    near = {"meta": {"type": "near-domain"}}
    predictions = [predicted(n, text, references=[text], **near) for n, text in enumerate(texts)]
    found = scored([*predictions, predicted(9, "?")], "BLEU", "CIDEr", "METEOR", "SPICE")
    assert found["scores"]["BLEU_1"] == pytest.approx(100.0)
    assert found["headline"] == found["scores"]["BLEU_4"]
    assert set(found["intervals"]) == {"CIDEr"}  # BLEU is no mean over samples
    assert found["by_type"]["type"]["near-domain"] == {"samples": 3, "CIDEr": pytest.approx(found["scores"]["CIDEr"])}
    assert (found["unscored"], found["tokenizer"]) == (1, "python")
    assert set(found["left_out"]) == {"METEOR", "SPICE"}
    assert found["left_out"]["METEOR"].startswith("Java is not installed")
    assert scored(predictions[:1], "CIDEr")["left_out"]["CIDEr"].startswith("it needs two samples or more")


def test_what_cannot_be_scored_has_its_fault(no_java: None) -> None:
    both = [predicted(0, "a", "a", index=n) for n in (0, 1)]  # a data set that uses an id twice
    assert scored(both, "exact_match")["scores"] == {"exact_match": 100.0}
    empty = scored([predicted(n, "a cat", "", ".") for n in range(2)], "CIDEr")
    assert empty["fault"] == "the references of all 2 predictions are empty"


@pytest.mark.parametrize(
    ("meta", "types"),
    [
        ({"type": ["a", 1], "question_type": "b"}, {"type": "a / 1", "question type": "b"}),
        ({"type": "", "types": {"turn": 3}}, {"turn": "3"}),
    ],
)
def test_a_type_of_questions_may_be_anything(meta: dict[str, Any], types: dict[str, str]) -> None:
    assert scores.types_of(predicted(0, "a", meta=meta)) == types


# --- intervals and p-values


def test_samples_that_share_a_medium_are_resampled_together() -> None:
    widths = []
    for size in (1, 5):
        media = [[("image", f"{n // size}.png")] for n in range(1000)]
        predictions = [predicted(n, "red" if n // 5 % 2 else "blue", "red", media=media[n]) for n in range(1000)]
        low, high = scored(predictions, "exact_match")["intervals"]["exact_match"]
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] * 5**0.5, rel=0.1)  # five answers about a picture count as one


def test_a_clear_difference_has_a_small_p_and_none_has_p_1() -> None:
    rng, clusters = np.random.default_rng(4), range(400)
    a = 100.0 * (rng.random(400) < 0.5)
    b = np.where(rng.random(400) < 0.12, 100.0, a)
    found = scores.paired(a, b, None, clusters)
    assert (found.low, found.high) == scores.interval(b - a, None, clusters)
    assert 0.0 < found.low < found.value == pytest.approx(b.mean() - a.mean())
    assert found.p < 0.001
    assert scores.paired(a, a + rng.normal(0.0, 30.0, 400), None, clusters).p > 0.01
    assert scores.paired(a, a, None, clusters) == scores.Difference(0.0, 0.0, 0.0, 1.0, 400)


def test_a_comparison_agrees_with_scipys_paired_bootstrap_of_both_runs() -> None:
    rng = np.random.default_rng(3)
    a = rng.random(80) < 0.5
    b = a | (rng.random(80) < 0.2)
    found = scores.paired(a, b, None, range(80))
    expected = stats.bootstrap(
        (a.astype(float), b.astype(float)),
        lambda x, y, axis: y.mean(axis) - x.mean(axis),
        paired=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.015)


def test_weights_make_a_mean_of_all_parts() -> None:
    assert scores.interval([100.0, 0.0], [3.0, 1.0], range(2)) == (0.0, 100.0)
    assert scores.paired([0.0, 0.0], [100.0, 0.0], [3.0, 1.0], range(2)).value == 75.0


def test_intervals_cover_the_truth_in_95_percent_of_simulated_suites() -> None:
    rng, truth = np.random.default_rng(0), 0.4
    covered = 0
    for _ in range(2000):  # 60 media with two questions each, which are right together more often than alone
        shared = rng.random((60, 1)) < 0.5
        right = np.where(shared, rng.random((60, 1)) < truth, rng.random((60, 2)) < truth).ravel()
        low, high = scores.interval(right, None, [n // 2 for n in range(120)], seed=int(rng.integers(2**31)))
        covered += low <= truth <= high
    assert 0.93 <= covered / 2000 <= 0.97


# --- captions

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
    found = captions.score(predictions, references, ["BLEU", "ROUGE_L", "CIDEr", "METEOR"])
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
    found = captions.score(["a dog runs", "a cat"], [["a dog runs"], ["a cat"]], ["METEOR", "ROUGE_L"])
    assert found.scores == {"ROUGE_L": 100.0}
    assert "its Java process ended with status -9" in found.left_out["METEOR"]
    assert time.monotonic() - began < 60


@needs_java
def test_an_empty_or_broken_caption_shifts_no_other() -> None:
    predictions = ["a dog runs", "", "a cat\u2028sits\r\non a mat", ""]
    references = [["a dog runs"], ["a bird"], ["a cat sits on a mat"], ["x"]]
    assert captions.score(predictions, references, ["ROUGE_L"]).each["ROUGE_L"].tolist() == [100.0, 0.0, 100.0, 0.0]
