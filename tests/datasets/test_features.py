"""The feature store: the same features back, nothing outdated, nothing half written."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from lavis_chatbridge.datasets import features
from lavis_chatbridge.datasets.features import FeatureStore, build_features, encoder_hashes
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media.source import EncodedMedium
from lavis_chatbridge.schema import Medium, SampleFile


class Encoder:
    """Stands for a model's frozen encoder: the mean colour, as one frame of two tokens."""

    def __init__(self, frozen="weights-1"):
        self.frozen = frozen
        self.batches = []

    def frozen_hash(self, modality):
        return f"{modality}:{self.frozen}"

    def encode_media(self, modality, media):
        self.batches.append(len(media))
        return [EncodedMedium(picture.mean((1, 2)).expand(1, 2, 3), torch.tensor([[True, False]])) for picture in media]


def picture(folder, number):
    return Medium("image", str(folder / f"p{number}.png"))


def build(folder, processors, model=None, **settings):
    """The store of the folder's twelve pictures."""
    media = [medium for sample in SampleFile(folder / "pictures.jsonl") for medium in sample.files]
    return build_features(model or Encoder(), media, processors, folder / "store", **settings)


def test_features_come_back(pictures, processors):
    model = Encoder()
    store = build(pictures, processors, model, batch=5)
    assert model.batches == [5, 5, 2]
    assert len(store.locations) == 12
    reopened = FeatureStore(pictures / "store", encoder_hashes(model, processors))
    found = reopened.find(picture(pictures, 9))
    assert found.tokens.dtype == torch.float16
    assert torch.allclose(found.tokens.float(), torch.full((1, 2, 3), 9 / 255), atol=1e-4)
    assert found.mask.tolist() == [[True, False]]


def test_changed_content_weights_or_processor_are_other_features(pictures, processors):
    medium = picture(pictures, 9)
    store = build(pictures, processors)
    other = FeatureStore(pictures / "store", encoder_hashes(Encoder("weights-2"), processors))
    assert other.find(medium) is None
    (pictures / "p9.png").write_bytes((pictures / "p2.png").read_bytes())
    assert torch.equal(store.find(medium).tokens, store.find(picture(pictures, 2)).tokens)
    before = os.stat(medium.path)
    (pictures / "p9.png").write_bytes((pictures / "p2.png").read_bytes()[:-1] + b"x")
    os.utime(medium.path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and time are those of another version
    for one in (store, FeatureStore(pictures / "store", encoder_hashes(Encoder(), processors))):
        assert one.find(medium) is None
    processors["image"].version = "picture-2"
    changed = FeatureStore(pictures / "store", encoder_hashes(Encoder(), processors))
    assert changed.find(picture(pictures, 2)) is None
    (pictures / "p9.png").unlink()
    with pytest.raises(MediaError, match=r"p9\.png"):
        store.find(medium)


def test_equal_files_are_encoded_once_and_unreadable_ones_left_out(pictures, processors, caplog):
    (pictures / "p1.png").write_bytes((pictures / "p0.png").read_bytes())
    (pictures / "p2.png").write_bytes(b"broken")
    (pictures / "p3.png").unlink()
    store = build(pictures, processors)
    assert len(store.locations) == 9
    assert sum("no features: cannot read" in message for message in caplog.messages) == 2


def test_ranks_share_the_work(pictures, processors, monkeypatch):
    monkeypatch.setattr(features, "PER_SHARD", 3)
    models = [Encoder(), Encoder()]
    for rank, model in enumerate(models):
        build(pictures, processors, model, rank=rank, world_size=2)
    assert sum(sum(model.batches) for model in models) == len(FeatureStore(pictures / "store", {}).locations) == 12
    assert all(model.batches for model in models)
    assert len(list((pictures / "store").glob("*.tar"))) >= 4


def test_media_inside_shards_have_their_own_keys(pictures, processors):
    content = b"".join((pictures / f"p{i}.png").read_bytes() for i in (1, 2))
    (pictures / "s.tar").write_bytes(content)
    half = len((pictures / "p1.png").read_bytes())
    places = ((0, half), (half, len(content) - half))
    media = [Medium("image", str(pictures / "s.tar"), *place) for place in places]
    store = build_features(Encoder(), media, processors, pictures / "store")
    assert [round(store.find(medium).tokens[0, 0, 0].item() * 255) for medium in media] == [1, 2]
    assert store.key(media[0]) == store.key(picture(pictures, 1))


def test_a_damaged_shard_is_made_again_or_named(pictures, processors):
    store = build(pictures, processors)
    [shard] = (pictures / "store").glob("*.tar")
    shard.write_bytes(shard.read_bytes().replace(b'"mask"', b'"musk"'))
    with pytest.raises(DataError, match=r"features cannot be read .*delete this file"):
        store.find(picture(pictures, 1))
    os.truncate(shard, 3000)
    model = Encoder()
    assert len(build(pictures, processors, model).locations) == sum(model.batches) == 12
    shutil.rmtree(pictures / "store")
    (pictures / "store").write_text("")
    with pytest.raises(DataError, match=r"features cannot be written there: (Not a directory|File exists)"):
        build(pictures, processors)


def test_a_medium_that_changes_while_it_is_encoded_has_no_features(pictures, processors, caplog):
    def changing(content):
        (pictures / "p3.png").write_bytes((pictures / "p2.png").read_bytes())
        return processors["image"](content)

    changing.version = "picture-1"
    store = build(pictures, {"image": changing}, batch=1)
    assert len(store.locations) == 11
    assert "p3.png: changed while it was encoded" in caplog.text
