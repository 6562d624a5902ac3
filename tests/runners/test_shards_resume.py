"""Training from tar shards, read by offset: a resumed run equals an uninterrupted one with any number of workers."""

from __future__ import annotations

import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from lavis_chatbridge.datasets.dataset import SourceDataset, SourceGroup, SourceSettings
from lavis_chatbridge.datasets.files import SampleFile
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from tests.runners.runner_parts import WIDTH, WORDS, ToyModel, runner, weights

SAMPLES, PER_SHARD = 22, 8


class Row:
    """A picture of one row as a vector; in training it adds a drawn brightness."""

    version = "row-1"

    def __call__(self, source, rng=None):
        assert isinstance(source, bytes)  # what lies in a shard comes as its bytes, not as a path
        picture = np.asarray(Image.open(BytesIO(source)).convert("L"), dtype=np.float32)
        return torch.from_numpy(picture[0].copy()) / 255 + (0.0 if rng is None else float(rng.random()))


class NumberModel(ToyModel):
    """Learns a sample's number from its picture."""

    def forward(self, samples):
        return super().forward({**samples, "target": [[int(name) % WORDS] for name in samples["sample_id"]]})


class Stop(Exception):
    """Stands for a machine that goes away."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Pictures in three uncompressed tar files, and the JSONL that says where each one lies."""
    folder = tmp_path_factory.mktemp("shards")
    rng, samples = np.random.default_rng(0), []
    for first in range(0, SAMPLES, PER_SHARD):
        path = folder / f"s-{first // PER_SHARD:05d}.tar"
        numbers = range(first, min(first + PER_SHARD, SAMPLES))
        with tarfile.open(path, "w") as tar:
            for number in numbers:
                content = BytesIO()
                Image.fromarray(rng.integers(0, 255, (1, WIDTH), dtype=np.uint8)).save(content, "png")
                member = tarfile.TarInfo(f"{number:09d}.png")
                member.size = len(content.getvalue())
                tar.addfile(member, BytesIO(content.getvalue()))
        with tarfile.open(path) as tar:
            for number, member in zip(numbers, tar, strict=True):
                medium = Medium("image", str(path), member.offset_data, member.size)
                samples.append(Sample(str(number), (medium,), (f"picture {number}",)))
    write_jsonl(folder / "s.jsonl", samples)
    return folder


def from_shards(folder, shards, **run):
    settings = SourceSettings(stage="alignment", root=str(shards))
    source = SourceDataset("pictures", SampleFile(shards / "s.jsonl"), settings, None, {"image": Row()})
    data = {"pictures": {"train": SourceGroup("pictures", [source])}}
    options = {"max_iters": 9, "accum_grad_iters": 2, "batch_size_train": 2, "save_every_steps": 2, **run}
    return runner(folder, NumberModel(0.3), data=data, **options)


@pytest.mark.parametrize("workers", [(0, 2), (2, 1)])
def test_a_run_from_shards_goes_on_with_another_number_of_workers(tmp_path, shards, workers):
    whole = from_shards(tmp_path / "whole", shards)
    whole.train()
    part = from_shards(tmp_path / "cut", shards, num_workers=workers[0])
    part.state.check = lambda run: (_ for _ in ()).throw(Stop) if part.state.step == 7 else None
    with pytest.raises(Stop):
        part.train()
    resumed = from_shards(tmp_path / "cut", shards, num_workers=workers[1], resume="auto")
    assert resumed.folder.resumed.name == "step_00000006"
    resumed.train()
    assert all(torch.equal(tensor, weights(resumed)[name]) for name, tensor in weights(whole).items())
    assert resumed.state == whole.state
    untrained = weights(from_shards(tmp_path / "new", shards))
    assert not torch.equal(untrained["bridge.weight"], weights(whole)["bridge.weight"])
