"""Loading: the same batches with any number of workers, unreadable media counted, evaluation divided exactly."""

from __future__ import annotations

import logging
import resource
import time
from itertools import chain

import pytest
import torch

from lavis_chatbridge.datasets.dataset import SampleDataset, SplitDataset
from lavis_chatbridge.datasets.loader import EvaluationLoader, LoaderSettings, MixtureLoader, source_ratios
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.errors import ConfigError, DataError, TrainingError
from lavis_chatbridge.prompting.conversation import Message
from lavis_chatbridge.schema import Medium, Sample
from tests.datasets.conftest import PictureProcessor, picture_source, sample_file


def group(folder, processors, name="grey", indices=None):
    return SplitDataset(name, [picture_source(folder, processors, name, indices=indices)])


def loading(**settings):
    return LoaderSettings(**{"num_workers": 0, **settings})


def ids(batches):
    return [batch["sample_id"] for batch in batches]


def test_batches_do_not_depend_on_workers_and_resume_anywhere(pictures, processors):
    groups = {"grey": group(pictures, processors)}
    whole = list(MixtureLoader(groups, loading(batch_size_train=5)).batches(0, 6))
    assert set(chain(*ids(whole[:3]))) == {f"s{i}" for i in range(12)}
    rest = list(MixtureLoader(groups, loading(batch_size_train=5, num_workers=2)).batches(2, 6))
    for batch, expected in zip(rest, whole[2:], strict=True):
        assert all(batch[key] == expected[key] for key in ("sample_id", "text_output"))
        assert all(torch.equal(a[0], b[0]) for a, b in zip(batch["image"], expected["image"], strict=True))


def test_accumulation_divides_a_step(pictures, processors):
    groups = {"a": group(pictures, processors, "a"), "b": group(pictures, processors, "b")}
    big = list(MixtureLoader(groups, loading(batch_size_train=4)).batches(0, 4))
    parts = list(MixtureLoader(groups, loading(batch_size_train=2, accum_grad_iters=2)).batches(0, 4))
    assert [b["source"] for b in parts] == [b["source"] for b in big for _ in range(2)]
    assert [first + second for first, second in zip(ids(parts[::2]), ids(parts[1::2]), strict=True)] == ids(big)


def test_unreadable_media_are_skipped_counted_and_named(pictures, processors, caplog):
    (pictures / "p4.png").write_bytes(b"no picture")
    loader = MixtureLoader({"grey": group(pictures, processors)}, loading(batch_size_train=6))
    with caplog.at_level(logging.WARNING):
        batches = list(loader.batches(0, 6))
    assert sorted(len(b["sample_id"]) for b in batches) == [5, 5, 5, 6, 6, 6]
    assert all(len(b["image"]) == len(b["sample_id"]) for b in batches)
    assert loader.skipped == {"grey": 3}
    assert sum("grey: skipped sample s4: cannot read" in message for message in caplog.messages) == 3
    alone = {"grey": group(pictures, processors, indices=[4])}
    [batch] = MixtureLoader(alone, loading(batch_size_train=2)).batches(0, 1)
    assert (batch["sample_id"], batch["pieces"], batch["source"], len(batch["skipped"])) == ([], [], "grey", 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_malformed_sample_ends_with_its_own_message(workers):
    data = SampleDataset("s", sample_file(Sample("x", turns=(Message("user", "q"),))), DataSettings(stage="alignment"))
    loader = MixtureLoader({"s": SplitDataset("s", [data])}, loading(num_workers=workers))
    with pytest.raises(DataError, match=r"^s: sample 'x' has no captions; alignment needs one$"):
        next(loader.batches(0, 1))


class _Hangs(PictureProcessor):
    """Sleeps longer than a test may take for one picture, as a decoder that never returns."""

    def __call__(self, source, rng=None):
        if str(source).endswith("p4.png"):
            time.sleep(600)
        return super().__call__(source, rng)


def test_a_sample_whose_decoder_hangs_is_skipped_and_counted(pictures, processors):
    settings = loading(batch_size_train=3, num_workers=2, hang_seconds=1.0)
    loader = MixtureLoader({"grey": group(pictures, {"image": _Hangs()})}, settings)
    found = list(loader.batches(0, 8))
    skipped = [("s4", "its decoder did not return in time")]
    assert [batch["skipped"] for batch in found if batch["skipped"]] == [skipped, skipped]
    assert loader.skipped == {"grey": 2}
    plain = MixtureLoader({"grey": group(pictures, processors)}, loading(batch_size_train=3)).batches(0, 8)
    assert ids(found) == [[name for name in batch if name != "s4"] for batch in ids(plain)]
    split = EvaluationLoader(group(pictures, {"image": _Hangs()}), 4, settings=settings)
    assert sorted(chain(*ids(split))) == sorted(f"s{i}" for i in range(12) if i != 4)


class _FillsDisk(PictureProcessor):
    """Leaves no space for the shared memory in which its worker returns the batch."""

    def __call__(self, source, rng=None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().__call__(source, rng)


def test_a_batch_that_cannot_be_handed_over_ends_with_an_error(pictures):
    settings = loading(num_workers=1, hang_seconds=0.2)
    with pytest.raises(TrainingError, match=r"sent no batch for 2 s.* shared memory .*set run\.num_workers=0"):
        list(EvaluationLoader(group(pictures, {"image": _FillsDisk()}), 4, settings=settings))


@pytest.mark.parametrize("world", [1, 2, 5, 16])
def test_evaluation_is_divided_exactly(pictures, processors, world):
    split = SplitDataset("x", [picture_source(pictures, processors, name) for name in "ab"])
    loaders = [EvaluationLoader(split, 3, rank, world) for rank in range(world)]
    shares = [[(batch["source"], i) for batch in loader for i in batch["sample_id"]] for loader in loaders]
    assert sorted(chain(*shares)) == sorted((name, f"s{i}") for name in "ab" for i in range(12))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    loaders[0].leave_out({("a", index) for index in range(12)})  # predicted samples
    left = [(batch["source"], i) for batch in loaders[0] for i in batch["sample_id"]]
    assert left == [(name, i) for name, i in shares[0] if name == "b"]


def test_a_token_budget_counts_the_conversations_format():
    turns = (Message("user", "is it a dog?", ("image",)), Message("assistant", "yes"))
    samples = [Sample(str(i), (Medium("image", "a.png"),), turns=turns) for i in range(600)]
    source = SampleDataset("qa", sample_file(*samples), DataSettings(task="image_qa"))
    loader = MixtureLoader({"qa": SplitDataset("qa", [source])}, loading(batch_tokens=2000), world_size=2)
    assert 28 < loader.plan.batch_sizes["qa"] < 36  # about 36 tokens without the format, which would make 55


def test_ratios_are_shared_out(pictures, processors):
    def sized(name, size, ratio=None):
        source = picture_source(pictures, processors, name, indices=list(range(size)))
        source.ratio = ratio
        return source

    two = SplitDataset("two", [sized("two/image", 9), sized("two/audio", 3)])
    one = SplitDataset("one", [sized("one", 12)])
    assert source_ratios({"two": two, "one": one}) == {"two/image": 9, "two/audio": 3, "one": 12}
    assert source_ratios({"two": two, "one": one}, {"two": 4, "one": 1}) == {"two/image": 3, "two/audio": 1, "one": 1}
    fixed = SplitDataset("f", [sized("f/a", 9, 1.0), sized("f/b", 3, 3.0)], ratio=8)
    assert source_ratios({"f": fixed}) == {"f/a": 2, "f/b": 6}
    with pytest.raises(ConfigError, match="ratios name three; the data sets are one, two"):
        source_ratios({"two": two, "one": one}, {"three": 1})
    with pytest.raises(ConfigError, match="two has no ratio"):
        source_ratios({"two": two, "f": fixed})
