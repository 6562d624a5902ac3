"""Samples become prompts and media, reproducibly; files are indexed, not loaded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lavis_chatbridge.datasets.dataset import ITEM_KEYS, SampleDataset, SplitDataset, collate, media_content
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media.source import EncodedMedium
from lavis_chatbridge.prompting.conversation import Message, Slot, Text
from lavis_chatbridge.schema import Medium, Sample
from tests.datasets.conftest import picture_source, sample_file


def evaluated(sample, templates=False):
    """A data set of one sample."""
    chosen = DataSettings(stage="instruction", templates=templates)
    return SampleDataset("s", sample_file(sample), chosen, False, {})


def test_alignment_item(pictures, processors):
    item = picture_source(pictures, processors, train=False)[3]
    assert item["pieces"] == [Slot("image", 0), Text("grey 3\n", target=True)]
    assert (item["text_output"], item["references"], item["answers"]) == ("grey 3\n", ["grey 3", "number 3"], [])
    assert (item["sample_id"], item["source"], item["facts"]) == ("s3", "grey", {"n": "3"})
    assert torch.equal(item["image"][0], torch.full((3, 4, 4), 3 / 255))
    assert set(item) == {*ITEM_KEYS, "source"}


def test_random_choices_depend_on_seed_source_sample_and_epoch_only(pictures, processors):
    one, other = (picture_source(pictures, processors, seed=s) for s in (1, 2))
    captions = {one.item(0, epoch)["text_output"] for epoch in range(20)}
    assert captions == {"grey 0\n", "number 0\n"}
    again = picture_source(pictures, processors, seed=1)
    assert torch.equal(one.item(3, 7)["image"][0], again.item(3, 7)["image"][0])
    for different in (one.item(3, 8), one.item(4, 7), other.item(3, 7)):
        assert not torch.equal(different["image"][0], one.item(3, 7)["image"][0])


def test_captions_become_instructions(pictures, processors):
    *_, request, caption = picture_source(pictures, processors, train=False, stage="instruction")[0]["pieces"]
    assert request.text == ".###Human: Describe the image in a sentence.###Assistant:"
    assert caption == Text("grey 0###", target=True)
    training = picture_source(pictures, processors, stage="instruction")
    assert len({training.item(0, epoch)["pieces"][2].text for epoch in range(30)}) > 8


def test_questions_take_the_tasks_template_and_keep_the_other_turns():
    said = ("what {style} in {question}?", "a", "and?", "b")
    turns = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))
    sample = Sample("x", turns=turns, task="image_qa", answers=("b", "bee"))
    assert evaluated(sample)[0]["pieces"][0].text == "###Human: what {style} in {question}?###Assistant:"
    item = evaluated(sample, templates=True)[0]
    first, *others = (piece.text for piece in item["pieces"])
    assert first == "###Human: what {style} in {question}? Answer in a word or two.###Assistant:"
    assert others == ["a###", "Human: and?###Assistant:", "b###"]
    assert item["references"] == item["answers"] == ["b", "bee"]
    open_question = evaluated(Sample("x", turns=turns[:1]))[0]  # is a prompt to answer
    assert (open_question["pieces"][-1].target, open_question["references"]) == (False, [])


def test_the_models_template_words_conversations():
    def prompt(messages, generate, reply_end):
        return [Text(f"{m.role} {m.text} {m.media} {generate} {reply_end}") for m in messages]

    talk = Sample("x", turns=(Message("user", "q"), Message("assistant", "a")))
    group = SplitDataset("g", [evaluated(talk)])
    group.set_template(SimpleNamespace(prompt=prompt))
    assert [piece.text for piece in group[0]["pieces"]] == ["user q () False ###", "assistant a () False ###"]


def test_unsuitable_samples_are_named(pictures):
    with pytest.raises(DataError, match="task 'image_qaa' has no template"):
        evaluated(Sample("x", captions=("c",), task="image_qaa"))[0]
    with pytest.raises(DataError, match="vis_processor is not set"):
        picture_source(pictures, {})[0]


def test_links_may_not_lead_out_of_the_root(pictures, processors):
    outside = (pictures / "p0.png").rename(pictures.with_suffix(".png"))
    (pictures / "p0.png").symlink_to(outside)
    with pytest.raises(DataError, match="leads out of the media root"):
        picture_source(pictures, processors)[0]
    assert picture_source(pictures, processors, allow_outside=True)[0]["image"]


@pytest.mark.parametrize("size", [250, 10**15])
def test_a_medium_longer_than_its_shard_is_unreadable(tmp_path, size):
    (tmp_path / "s.tar").write_bytes(b"x" * 300)
    with pytest.raises(MediaError, match="ends before byte"):
        media_content(Medium("image", str(tmp_path / "s.tar"), 100, size))


def test_stored_features_stand_in_for_media(pictures, processors):
    encoded = EncodedMedium(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool))
    group = SplitDataset("grey", [picture_source(pictures, processors)])
    group.set_features(SimpleNamespace(find=lambda medium: encoded if medium.path.endswith("p2.png") else None))
    assert group[2]["image"] == [encoded]
    assert group[3]["image"][0].shape == (3, 4, 4)


def test_collate_keeps_every_key_and_stacks_nothing(pictures, processors):
    data = picture_source(pictures, processors)
    batch = collate([data[0], data[1]])
    assert (batch["sample_id"], batch["source"], type(batch["image"])) == (["s0", "s1"], "grey", list)
    assert collate([], "grey") == {**{key: [] for key in ITEM_KEYS}, "source": "grey"}
    with pytest.raises(DataError, match="different sources: grey, other"):
        collate([data[0], {**data[1], "source": "other"}])
