"""Small real data for the data tests: pictures on disk, and a processor that opens them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from lavis_chatbridge.datasets.dataset import SampleDataset
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.media.image import open_image
from lavis_chatbridge.schema import Medium, Sample, SampleFile, write_jsonl

_FOLDERS: list[tempfile.TemporaryDirectory] = []


class PictureProcessor:
    """Opens a picture as ``[3, S, S]``; in training it adds a drawn brightness."""

    version = "picture-1"

    def __call__(self, source, rng=None):
        tensor = torch.from_numpy(open_image(source)).permute(2, 0, 1) / 255
        return tensor if rng is None else tensor + float(rng.random())


def picture_source(folder, processors, name="grey", train=True, seed=0, indices=None, **settings):
    """The data set of the fixture ``pictures``, for alignment by default."""
    chosen = DataSettings(**{"stage": "alignment", **settings})
    samples = SampleFile(folder / "pictures.jsonl", allow_outside=chosen.allow_outside)
    return SampleDataset(name, samples, chosen, train, processors, indices, seed=seed)


def sample_file(*samples):
    """The samples as a JSONL file, which exists until the tests end."""
    _FOLDERS.append(tempfile.TemporaryDirectory())
    path = Path(_FOLDERS[-1].name, "samples.jsonl")
    write_jsonl(path, samples)
    return SampleFile(path, allow_outside=True)


@pytest.fixture
def pictures(tmp_path):
    """Twelve captioned pictures, ``tmp_path/pictures.jsonl``; picture ``i`` has grey value ``i``."""
    samples = []
    for i in range(12):
        medium = Medium("image", str(tmp_path / f"p{i}.png"))
        Image.new("RGB", (4, 4), (i, i, i)).save(medium.path)
        samples.append(Sample(f"s{i}", (medium,), (f"grey {i}", f"number {i}"), facts={"n": str(i)}))
    write_jsonl(tmp_path / "pictures.jsonl", samples)
    return tmp_path


@pytest.fixture
def processors():
    return {"image": PictureProcessor()}
