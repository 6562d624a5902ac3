"""Tasks as runners use them: losses with weights, predictions on disk, media shuffled or withheld, multiple choice."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_chatbridge.datasets.loader import EvaluationLoader
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.prompting.conversation import Message, Slot, Text, alignment_prompt, chat_prompt
from lavis_chatbridge.prompting.templates import listed, without_letters
from lavis_chatbridge.schema import Medium, Sample
from lavis_chatbridge.tasks.ablation import EvaluationSource, EvaluationSplit
from lavis_chatbridge.tasks.base import ChatBridgeTask
from lavis_chatbridge.tasks.choice import ChoiceTask, chosen
from lavis_chatbridge.tasks.generation import GenerationTask, prompt_text
from lavis_chatbridge.tasks.predictions import Prediction, read_predictions
from lavis_chatbridge.tasks.scoring.scores import scored
from lavis_chatbridge.tasks.settings import EvaluationSettings, MediaSettings

COLOURS = ("red", "green", "blue")


class Source:
    """``size`` pictures, each a number that stands for its colour; every question asks for it."""

    modalities = ("image",)
    processors = {}

    def __init__(self, name, size, bad=(), paths=None):
        self.name, self.size, self.bad, self.paths = name, size, bad, paths
        self.lengths = [7 * index % 5 for index in range(size)]

    def __len__(self):
        return self.size

    def sample(self, index):
        path = f"{index}.png" if self.paths is None else self.paths[index]
        media = (Medium("image", path),) if path else ()
        return Sample(f"{self.name}{index}", media, captions=("a thing",), facts={"colour": COLOURS[index % 3]})

    def sample_hash(self, index):
        return str(index)

    def pieces(self, sample, rng):
        return [Slot("image"), Text("colour?"), Text("red", target=True)]

    def item(self, index, epoch=0):
        if index in self.bad:
            raise MediaError(f"{index}.png", "gone")
        colour = COLOURS[index % 3]
        return {
            "sample_id": f"{self.name}{index}",
            "source": self.name,
            "pieces": self.pieces(None, None),
            "image": [torch.tensor([float(index)])],
            "video": [],
            "audio": [],
            "references": [f"a {colour} thing"],
            "answers": [],
            "facts": {"colour": colour},
        }


class Seer(torch.nn.Module):
    """Answers with the colour of its picture; without one, with red."""

    def generate(self, samples, sampling):
        return [COLOURS[int(media[0]) % 3] if media else "red" for media in samples["image"]]


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "result_dir", str(tmp_path))
    return tmp_path


def evaluate(task, sources, train=()):
    group = SimpleNamespace(sources=list(sources))
    task.datasets = {"toy": {"test": group, "train": SimpleNamespace(sources=list(train))}}
    split = task.evaluation_split({"toy": group})
    task.before_evaluation(Seer(), split)
    found = task.evaluation(Seer(), EvaluationLoader(split, 2), cuda_enabled=False)
    return task.after_evaluation(val_result=found, split_name="test", epoch=5)


def test_a_model_that_sees_is_right_and_its_predictions_are_written(results):
    task = GenerationTask(EvaluationSettings(max_len=7))
    scores = evaluate(task, [Source("a", 9), Source("b", 6)], [Source("a", 30)])
    assert scores["agg_metrics"] == 100.0
    assert scores["by_source"]["a"]["by_type"]["attribute"]["colour"] == {"samples": 9, "attribute_accuracy": 100.0}
    assert scores["by_source"]["a"]["chance"] == pytest.approx(100 / 3)
    assert "chance" not in scores["by_source"]["b"]
    records = read_predictions(results / "test_step5.jsonl")
    assert [record.sample_id for record in records] == [f"a{i}" for i in range(9)] + [f"b{i}" for i in range(6)]
    assert (records[1].prompt, records[1].media) == ("[image 0]colour?", [("image", "1.png")])
    assert (records[1].prediction, records[1].references) == ("green", ["a green thing"])
    written = json.loads((results / "test_step5_metrics.json").read_text())
    assert (written["agg_metrics"], written["decoding"]["max_new_tokens"]) == (100.0, 7)


@pytest.mark.parametrize(("mode", "low", "high"), [("shuffled", 10, 60), ("withheld", 33.3, 33.4)])
def test_a_model_that_sees_is_wrong_without_its_media(results, mode, low, high):
    task = GenerationTask(EvaluationSettings(media=mode, media_modalities=["image"]))
    scores = evaluate(task, [Source("a", 60)])
    assert low <= scores["agg_metrics"] <= high
    records = read_predictions(results / f"test_{mode}_image_step5.jsonl")
    assert records[0].prompt == ("colour?" if mode == "withheld" else "[image 0]colour?")
    assert evaluate(task, [Source("a", 60)]) == scores


def test_a_prompt_of_media_only_cannot_be_answered_without_them():
    captions = Source("a", 3)
    captions.pieces = lambda sample, rng: alignment_prompt(sample.modalities if sample else ("image",), "a thing")
    for words in ("kept", "removed"):
        task = GenerationTask(EvaluationSettings(media="withheld", withheld_words=words))
        with pytest.raises(DataError, match=r"a: .* 'a\d' is only its media, and .* use --ablate withheld:told"):
            evaluate(task, [captions])
    told = GenerationTask(EvaluationSettings(media="withheld", withheld_words="told"))
    assert evaluate(told, [captions])["samples"] == 3


def shuffled(source, modality="image", seed=0):
    return EvaluationSource(source, MediaSettings(media="shuffled", media_modalities=[modality]), seed)


def test_shuffled_media_are_those_of_another_readable_sample():
    pictures = shuffled(Source("a", 10), seed=1)
    assert all(int(pictures.item(index)["image"][0]) != index for index in range(10))
    assert pictures.item(3)["facts"] == {"colour": "red"}
    assert int(shuffled(Source("a", 10), "audio").item(3)["image"][0]) == 3
    same = shuffled(Source("a", 6, paths=["x.png"] * 3 + ["y.png"] * 3))
    assert [int(same.item(index)["image"][0]) < 3 for index in range(6)] == [False] * 3 + [True] * 3
    among_texts = shuffled(Source("a", 60, paths=["0.png", "1.png"] + [""] * 58))
    assert [int(among_texts.item(index)["image"][0]) for index in (0, 1, 2)] == [1, 0, 2]  # the third has no picture
    unread = shuffled(Source("a", 12, bad=range(2, 12)))
    assert [int(unread.item(index)["image"][0]) for index in (0, 1)] == [1, 0]
    with pytest.raises(MediaError, match="another sample's media for 'a0': a has no other readable sample"):
        shuffled(Source("a", 1)).item(0)


def test_sources_without_such_media_are_left_out():
    words = Source("w", 4)
    words.modalities = ()
    withheld = MediaSettings(media="withheld", media_modalities=["image"])
    assert [s.name for s in EvaluationSplit([Source("a", 4), words], withheld).sources] == ["a"]
    assert [s.name for s in EvaluationSplit([Source("a", 4), words], MediaSettings()).sources] == ["a", "w"]
    other = MediaSettings(media="shuffled", media_modalities=["video", "audio"])
    with pytest.raises(DataError, match=r"run.media is shuffled, but a, w have no video and no audio"):
        EvaluationSplit([Source("a", 4), words], other)


class Loser:
    """A loss that depends on the sample, over as many tokens as its index."""

    def __call__(self, samples):
        numbers = torch.stack([media[0] for media in samples["image"]]).flatten()
        tokens = numbers.sum()
        return {"loss": (numbers * numbers).sum() / tokens.clamp(min=1), "target_tokens": tokens.long()}


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_validation_loss_is_the_mean_over_tokens_in_any_batches(batch_size):
    task = ChatBridgeTask()
    split = EvaluationSplit([Source("a", 7), Source("b", 4)], MediaSettings())
    loader = EvaluationLoader(split, batch_size)
    results = task.evaluation(Loser(), loader, cuda_enabled=False)
    scores = task.after_evaluation(val_result=results, split_name="val", epoch=1)
    numbers = [*range(7), *range(4)]
    assert scores["loss"] == pytest.approx(sum(n * n for n in numbers) / sum(numbers))
    assert scores["loss_b"] == pytest.approx(14 / 6)
    assert scores["agg_metrics"] == -scores["loss"]


def test_laviss_contract_setup_and_train_step():
    own = {"num_beams": 3, "max_len": 12, "seed": 9, "media_modalities": ["audio"]}
    run = OmegaConf.create({"task": "chatbridge_captioning", **own})
    task = registry.get_task_class("chatbridge_captioning").setup_task(cfg=SimpleNamespace(run_cfg=run))
    assert (task.settings.num_beams, task.settings.max_len, task.seed) == (3, 12, 9)
    assert task.settings.media_modalities == ["audio"]
    assert float(ChatBridgeTask().train_step(Loser(), {"image": [[torch.tensor([2.0])]]})) == 2.0


class Asked(Source):
    """A video with its sound and a question, as a data set's source words it."""

    modalities = ("video", "audio")

    def sample(self, index):
        media = (Medium("video", "a.mp4"), Medium("audio", "a.mp4"))
        turns = (Message("user", "What is it?", ("video", "audio")), Message("assistant", "red"))
        return Sample("s", media, turns=turns)

    def pieces(self, sample, rng):
        return chat_prompt(sample.turns)

    def item(self, index, epoch=0):
        return {"sample_id": "s", "pieces": self.pieces(self.sample(0), None), "video": [1], "audio": [2]}


@pytest.mark.parametrize(
    ("words", "withheld", "prompt"),
    [
        ("kept", ["video"], "Given following video:  and its background audio: [audio 0].###Human: What is it?"),
        ("removed", ["video"], "Given following audio: [audio 0].###Human: What is it?"),
        ("told", ["video"], "Given following audio: [audio 0].###Human: The video is missing. What is it?"),
        ("told", ["audio"], "Given following video: [video 0].###Human: The audio is missing. What is it?"),
        ("told", ["video", "audio"], "The video and the audio are missing. What is it?"),
    ],
)
def test_the_prompt_without_a_medium(words, withheld, prompt):
    how = MediaSettings(media="withheld", media_modalities=withheld, withheld_words=words)
    item = EvaluationSource(Asked("a", 1), how).item(0)
    assert prompt_text(item["pieces"]) == f"###Human: {prompt}###Assistant:"
    assert all(item[modality] == [] for modality in withheld)


def test_nothing_is_predicted_where_nothing_can_be_compared():
    bare = Asked("a", 3)
    bare.sample = lambda index: Sample("s", turns=(Message("user", "What?"),))
    split = EvaluationSplit([bare], MediaSettings())
    with pytest.raises(DataError, match="a: no sample has an answer or a reference to compare with"):
        GenerationTask(EvaluationSettings(metrics=["CIDEr"])).before_evaluation(Seer(), split)
    unscored = EvaluationSettings(metrics=["CIDEr"], report_metric=False)
    GenerationTask(unscored).before_evaluation(Seer(), split)


# --- multiple choice

OPTIONS = ["a drum", "an oboe", "a bass drum", "none"]


@pytest.mark.parametrize(
    ("reply", "position"),
    [
        ("A", 0), ("b", 1), ("(C) a bass drum", 2), ("D. none", 3), ("B\nbecause", 1), ("The answer is C.", 2),
        ("An oboe.", 1), ("It is an oboe, I think.", 1), ("a bass drum", 2), ("E", -1), ("", -1),
        ("a drum or an oboe", -1), ("drums and basses", -1), ("A drum", 0),
    ],
)  # fmt: skip
def test_a_reply_names_an_option_by_letter_or_words(reply: str, position: int) -> None:
    assert chosen(reply, OPTIONS) == position


def test_letters_of_the_publisher_are_removed() -> None:
    assert without_letters(["A. red", "(B) blue", "C: U.S."]) == ["red", "blue", "U.S."]
    assert without_letters(["A. red", "blue"]) == ["A. red", "blue"]


class Model:
    """Answers every question by ``answer(letter -> option)``, and finds the last option the likeliest."""

    def __init__(self, answer) -> None:
        self.answer, self.prompts = answer, []

    def generate(self, samples, sampling):
        texts = ["".join(piece.text for piece in pieces if isinstance(piece, Text)) for pieces in samples["pieces"]]
        return [self.answer(dict(re.findall(r"^([A-Z])\. (.*)$", text, re.MULTILINE))) for text in texts]

    def answer_scores(self, sample, answers):
        self.prompts += ["".join(piece.text for piece in sample["pieces"][0] if isinstance(piece, Text))]
        return torch.arange(len(answers)).float()[None], torch.ones(len(answers))


def asked(model, count: int = 40, **settings) -> dict:
    rng, how = np.random.default_rng(0), EvaluationSettings(metrics=["choice"], **settings)
    options = [OPTIONS[: rng.integers(2, 5)] for _ in range(count)]
    meta = [{"options": own, "correct": int(rng.integers(len(own)))} for own in options]
    pieces = [[Slot("audio"), Text(f"What plays?\n{listed(own)}")] for own in options]
    samples = {"sample_id": [f"s{n}" for n in range(count)], "pieces": pieces, "meta": meta, "source": "toy"}
    replies = ChoiceTask(how).predict(model, samples)
    return scored(
        [Prediction(sample_id=f"s{n}", meta=meta[n], answers=["x"], **reply) for n, reply in enumerate(replies)], how
    )


def oboe(lettered: dict[str, str]) -> str:
    return next((f"{letter}. {text}" for letter, text in lettered.items() if text == "an oboe"), "none")


def test_a_favourite_letter_scores_chance_and_a_known_option_counts_under_any_letter() -> None:
    favourite = asked(Model(lambda lettered: "A"))
    assert favourite["headline"] == favourite["scores"]["choice"] == pytest.approx(favourite["chance"])
    assert 25.0 < favourite["chance"] < 50.0
    known, fixed = asked(Model(oboe)), asked(Model(oboe), option_orders=1)
    assert known["scores"]["choice"] == fixed["scores"]["choice"] > known["chance"]


def test_ranking_asks_without_the_options_and_once() -> None:
    model = Model(oboe)
    assert asked(model, inference_method="rank")["samples"] == 40
    assert model.prompts == ["What plays?"] * 40


def test_a_sample_without_options_is_named() -> None:
    with pytest.raises(DataError, match=r"sample 's0' has no meta.options and meta.correct"):
        ChoiceTask().predict(SimpleNamespace(), {"meta": [{}], "sample_id": ["s0"]})
