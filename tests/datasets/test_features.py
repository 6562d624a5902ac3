"""The feature store: the same features back, nothing stale, nothing half written."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import webdataset as wds

from lavis_chatbridge.datasets import features
from lavis_chatbridge.datasets.cache import held
from lavis_chatbridge.datasets.features import FeatureStore, build_features, salts_of
from lavis_chatbridge.datasets.files import SampleFile
from lavis_chatbridge.errors import DataError, MediaError, TrainingError
from lavis_chatbridge.media.types import EncodedMedium
from lavis_chatbridge.schema import Medium, Sample
from tests.fuzzing.annotations import FEATURE_CASES
from tests.fuzzing.target import unpacked


class Encoder:
    """Stands for a model's frozen encoder: the mean colour, as one frame of two tokens."""

    def __init__(self, fingerprint="weights-1"):
        self.fingerprint = fingerprint
        self.batches = []

    def frozen_fingerprint(self, kind):
        return f"{kind}:{self.fingerprint}"

    def encode_media(self, kind, media):
        self.batches.append(len(media))
        return [EncodedMedium(picture.mean((1, 2)).expand(1, 2, 3), torch.tensor([[True, False]])) for picture in media]


def samples(folder):
    return SampleFile(folder / "pictures.jsonl")


def test_features_come_back_and_are_made_once(pictures, processors):
    model = Encoder()
    store = build_features(model, samples(pictures), processors, pictures / "store", batch=5)
    assert model.batches == [5, 5, 2]
    assert len(store) == 12
    reopened = FeatureStore(pictures / "store", salts_of(model, processors))
    found = reopened.find(Medium("image", str(pictures / "p9.png")))
    assert found.tokens.dtype == torch.float16
    assert torch.allclose(found.tokens.float(), torch.full((1, 2, 3), 9 / 255), atol=1e-4)
    assert found.mask.tolist() == [[True, False]]
    build_features(model, samples(pictures), processors, pictures / "store", batch=5)
    assert model.batches == [5, 5, 2]


def test_changed_content_weights_or_processor_are_other_features(pictures, processors):
    medium = Medium("image", str(pictures / "p9.png"))
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    other = FeatureStore(pictures / "store", salts_of(Encoder("weights-2"), processors))
    assert other.find(medium) is None
    processors["image"].version = "picture-2"
    assert FeatureStore(pictures / "store", salts_of(Encoder(), processors)).find(medium) is None
    (pictures / "p9.png").write_bytes((pictures / "p2.png").read_bytes())
    assert torch.equal(store.find(medium).tokens, store.find(Medium("image", str(pictures / "p2.png"))).tokens)
    (pictures / "p9.png").unlink()
    with pytest.raises(MediaError, match=r"p9\.png"):
        store.find(medium)


def test_a_file_of_the_same_size_and_another_time_is_read_again(pictures, processors):
    medium = Medium("image", str(pictures / "p9.png"))
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    content = (pictures / "p9.png").read_bytes()
    (pictures / "p9.png").write_bytes(content[:-1] + b"x")
    os.utime(pictures / "p9.png", ns=(1, 1))
    assert store.find(medium) is None


def test_a_file_of_the_same_size_and_time_is_read_again(pictures, processors):
    """As tar and rsync leave it, which set the time of another version's file."""
    medium = Medium("image", str(pictures / "p9.png"))
    before = os.stat(medium.path)
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    content = (pictures / "p9.png").read_bytes()
    (pictures / "p9.png").write_bytes(content[:-1] + b"x")
    os.utime(pictures / "p9.png", ns=(before.st_mtime_ns, before.st_mtime_ns))
    after = os.stat(medium.path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    for one in (store, FeatureStore(pictures / "store", store.salts)):
        assert one.find(medium) is None


def test_paths_relative_to_another_folder_are_other_files(tmp_path, monkeypatch):
    store, tokens = FeatureStore(tmp_path / "store"), torch.ones(1, 1, 2)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.bin").write_bytes(folder.encode())
        os.utime(tmp_path / folder / "x.bin", ns=(5, 5))
    stamp = features._stamp(str(tmp_path / "a" / "x.bin"))
    monkeypatch.setattr(features, "_stamp", lambda path: stamp)
    monkeypatch.chdir(tmp_path / "a")
    store.add([(Medium("image", "x.bin"), EncodedMedium(tokens, torch.ones(1, 1, dtype=torch.bool)))])
    assert store.find(Medium("image", str(tmp_path / "a" / "x.bin"))) is not None
    monkeypatch.chdir(tmp_path / "b")
    assert store.find(Medium("image", "x.bin")) is None


def test_digests_are_kept_and_not_made_again(pictures, processors, monkeypatch):
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    with open(pictures / "s.tar", "wb") as shard:
        shard.write((pictures / "p1.png").read_bytes()[:-1] + b"y")
        inside = Medium("image", str(pictures / "s.tar"), 0, shard.tell())
    store.add([(inside, EncodedMedium(torch.ones(1, 1, 2), torch.ones(1, 1, dtype=torch.bool)))])
    reopened = FeatureStore(pictures / "store", store.salts)
    monkeypatch.setattr(features, "_sha256", None)
    for medium in (Medium("image", str(pictures / "p9.png")), inside):
        assert reopened.find(medium) is not None


def test_the_index_of_an_earlier_version_is_read_and_its_digests_are_not_trusted(pictures, processors):
    medium = Medium("image", str(pictures / "p9.png"))
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    [index] = (pictures / "store").glob("*.index.json")
    content = json.loads(index.read_text())
    size, time = os.stat(medium.path).st_size, os.stat(medium.path).st_mtime_ns
    index.write_text(json.dumps(content | {"files": {medium.path: [size, time, "another"]}}))
    assert FeatureStore(pictures / "store", store.salts).find(medium) is not None


def test_a_medium_that_changes_while_it_is_encoded_is_left_out(pictures, processors, caplog):
    class Changing(Encoder):
        def encode_media(self, kind, media):
            (pictures / "p3.png").write_bytes((pictures / "p4.png").read_bytes() + b" ")
            (pictures / "p5.png").unlink(missing_ok=True)
            return super().encode_media(kind, media)

    store = build_features(Changing(), samples(pictures), processors, pictures / "store")
    assert len(store) == 10
    assert store.find(Medium("image", str(pictures / "p3.png"))) is None
    assert "p3.png has changed while it was encoded" in caplog.text
    assert "p5.png" in caplog.text


def test_one_file_has_features_of_its_own_for_each_kind(pictures):
    store = FeatureStore(pictures / "store")
    keys = {store.key(Medium(kind, str(pictures / "p0.png"))) for kind in ("image", "video", "audio")}
    assert len(keys) == 3


def test_features_whose_mask_is_of_another_medium_are_refused(pictures):
    store, medium = FeatureStore(pictures / "store"), Medium("image", str(pictures / "p0.png"))
    store.add([(medium, EncodedMedium(torch.ones(1, 3, 4), torch.ones(1, 2, dtype=torch.bool)))])
    with pytest.raises(DataError, match=r"float16 \[1, 3, 4\] and bool \[1, 2\] are stored"):
        store.find(medium)


def test_features_that_lie_column_by_column_in_memory_come_back_and_such_files_are_refused(pictures, monkeypatch):
    store, medium = FeatureStore(pictures / "store"), Medium("image", str(pictures / "p0.png"))
    turned = torch.arange(6.0).reshape(1, 2, 3).transpose(1, 2)
    store.add([(medium, EncodedMedium(turned, torch.ones(1, 3, dtype=torch.bool)))])
    assert torch.equal(store.find(medium).tokens, turned.half())
    save = np.save
    monkeypatch.setattr(features.np, "save", lambda file, array: save(file, np.asfortranarray(array)))
    store.add([(medium, EncodedMedium(torch.ones(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)))])
    with pytest.raises(DataError, match=r"an array float16 \[2, 3, 4\] does not fit"):
        store.find(medium)


def test_equal_files_are_encoded_once_and_unreadable_ones_left_out(pictures, processors, caplog):
    (pictures / "p1.png").write_bytes((pictures / "p0.png").read_bytes())
    (pictures / "p2.png").write_bytes(b"broken")
    (pictures / "p3.png").unlink()
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    assert len(store) == 9
    assert sum("no features: cannot read" in message for message in caplog.messages) == 2
    assert store.find(Medium("image", str(pictures / "p1.png"))) is not None


def test_shards_are_webdataset_tars_and_are_cut_by_size(pictures, processors, monkeypatch):
    monkeypatch.setattr(features, "SHARD_BYTES", 5000)
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    shards = sorted(str(path) for path in (pictures / "store").glob("*.tar"))
    assert len(shards) > 2
    records = list(wds.WebDataset(shards, shardshuffle=False).decode())
    assert {record["__key__"] for record in records} == set(store._places)
    for record in records:
        assert (record["tokens.npy"] == store.get(record["__key__"]).tokens.numpy()).all()


def test_ranks_share_the_work(pictures, processors):
    models = [Encoder(), Encoder(), Encoder()]
    for rank, model in enumerate(models):
        build_features(model, samples(pictures), processors, pictures / "store", rank=rank, world_size=3)
    assert sum(sum(model.batches) for model in models) == 12
    assert all(model.batches for model in models)
    assert len(FeatureStore(pictures / "store")) == 12


def sample(folder, *numbers):
    return [Sample(f"s{n}", (Medium("image", str(folder / f"p{n}.png")),), ("c",)) for n in numbers]


def test_two_commands_that_fill_one_folder_at_once_get_their_own_features(pictures, processors):
    ours, theirs = sample(pictures, 0, 1, 2), sample(pictures, 0, 3, 4)  # the first picture is the same

    class Interrupted(Encoder):
        """The other command, whole, runs between this one's look at the folder and its own writing."""

        def encode_media(self, kind, media):
            self.other = build_features(Encoder(), theirs, processors, pictures / "store")
            return super().encode_media(kind, media)

    model = Interrupted()
    own = build_features(model, ours, processors, pictures / "store")
    together = FeatureStore(pictures / "store", salts_of(model, processors))
    for store, numbers in ((own, (0, 1, 2)), (model.other, (0, 3, 4)), (together, (0, 1, 2, 3, 4))):
        for number in numbers:
            [one] = sample(pictures, number)
            assert round(store.find(one.files[0]).tokens[0, 0, 0].item() * 255) == number


def test_equal_features_of_two_commands_are_one_shard(pictures, processors):
    class Interrupted(Encoder):
        def encode_media(self, kind, media):
            build_features(Encoder(), samples(pictures), processors, pictures / "store")
            return super().encode_media(kind, media)

    build_features(Interrupted(), samples(pictures), processors, pictures / "store")
    assert sorted(path.suffix for path in (pictures / "store").iterdir()) == [".json", ".tar"]


def test_an_entry_of_another_medium_is_not_taken(pictures, processors):
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    media = [Medium("image", str(pictures / f"p{n}.png")) for n in (4, 9)]
    mine, other = map(store.key, media)
    name, (*tokens, at, size) = store._places[mine]
    _, place = store._places[other]
    for wrong in (place, [*place[:2], at, size], [*tokens, *place[2:]], [at, size, at, size], [1, 700, at, size]):
        store._places[mine] = (name, wrong)
        with pytest.raises(DataError, match=r"features cannot be read.*delete"):
            store.find(media[0])
    assert round(store.find(media[1]).tokens[0, 0, 0].item() * 255) == 9


def test_a_file_where_the_folder_should_be_is_named(pictures, processors):
    (pictures / "b.yaml").write_text("run: {}")
    with pytest.raises(DataError, match=r"b\.yaml: features are kept in a folder, and this is a file"):
        build_features(Encoder(), samples(pictures), processors, pictures / "b.yaml")
    with pytest.raises(DataError, match=r"features cannot be written there: Not a directory"):
        build_features(Encoder(), samples(pictures), processors, pictures / "b.yaml" / "store")


def test_media_inside_shards_have_their_own_keys(pictures, processors):
    content = b"".join((pictures / f"p{i}.png").read_bytes() for i in (1, 2))
    (pictures / "s.tar").write_bytes(content)
    half = len((pictures / "p1.png").read_bytes())
    media = [
        Medium("image", str(pictures / "s.tar"), 0, half),
        Medium("image", str(pictures / "s.tar"), half, len(content) - half),
    ]
    store = build_features(Encoder(), [Sample("x", tuple(media), ("c",))], processors, pictures / "store")
    assert [round(store.find(m).tokens[0, 0, 0].item() * 255) for m in media] == [1, 2]
    assert store.key(media[0]) == store.key(Medium("image", str(pictures / "p1.png")))


def test_a_crash_while_writing_leaves_nothing_behind(pictures, processors):
    class Breaks(Encoder):
        def encode_media(self, kind, media):
            if self.batches:
                raise RuntimeError("out of memory")
            return super().encode_media(kind, media)

    with pytest.raises(RuntimeError, match="out of memory"):
        build_features(Breaks(), samples(pictures), processors, pictures / "store", batch=4)
    assert os.listdir(pictures / "store") == []
    assert len(build_features(Encoder(), samples(pictures), processors, pictures / "store")) == 12


class _Dies:
    version = "dies-1"

    def __call__(self, source, rng=None):
        os._exit(3)


def test_a_dead_worker_is_named(pictures):
    with pytest.raises(TrainingError, match=r"a data worker died.*run\.num_workers"):
        build_features(Encoder(), samples(pictures), {"image": _Dies()}, pictures / "store", workers=1)


def test_damage_is_named(pictures, processors):
    store = build_features(Encoder(), samples(pictures), processors, pictures / "store")
    [shard] = (pictures / "store").glob("*.tar")
    content = shard.read_bytes()
    for damaged in (content[:700], content[:512] + b"NUMPY" + content[517:]):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=r"features cannot be read.*delete"):
            [store.find(Medium("image", str(pictures / f"p{number}.png"))) for number in range(12)]
    (pictures / "store" / "x.index.json").write_text("[]")
    with pytest.raises(DataError, match="not the index of a feature shard"):
        FeatureStore(pictures / "store")


@pytest.mark.parametrize("damage", ["gone", "cut off"])
def test_a_shard_that_is_gone_or_cut_off_is_made_anew(pictures, processors, damage, caplog):
    build_features(Encoder(), samples(pictures), processors, pictures / "store")
    [shard] = (pictures / "store").glob("*.tar")
    content = shard.read_bytes()
    os.truncate(shard, 3000) if damage == "cut off" else shard.unlink()
    model = Encoder()
    assert len(FeatureStore(pictures / "store", salts_of(model, processors))) == 0
    assert len(build_features(model, samples(pictures), processors, pictures / "store")) == 12
    assert f"{shard}: " + ("it ends before byte" if damage == "cut off" else "No such file") in caplog.text
    assert sum(model.batches) == 12
    assert shard.read_bytes() == content


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(pictures, processors, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_append", full)
    with pytest.raises(DataError, match=r"store: features cannot be written there: No space left on device; the same"):
        build_features(Encoder(), samples(pictures), processors, pictures / "store")
    assert os.listdir(pictures / "store") == []


def test_what_a_killed_process_left_is_removed_and_what_another_writes_is_not(pictures, processors):
    class Interrupted(Encoder):
        def encode_media(self, kind, media):
            if len(self.batches) == 1:
                [self.unfinished] = (pictures / "store").glob("*.tmp")
                build_features(Encoder(), sample(pictures, 0, 1), processors, pictures / "store")
            return super().encode_media(kind, media)

    (pictures / "store").mkdir()
    (pictures / "store" / "tmpabc.tmp").write_bytes(b"half a shard")
    model = Interrupted()
    assert len(build_features(model, samples(pictures), processors, pictures / "store", batch=4)) == 12
    assert model.unfinished.name != "tmpabc.tmp"
    assert not list((pictures / "store").glob("*.tmp"))
    (pictures / "store" / "tmpdef.tmp").write_bytes(b"half a shard")
    with held(pictures / "store" / "tmpdef.tmp"):
        build_features(Encoder("weights-2"), samples(pictures), processors, pictures / "store")
        assert (pictures / "store" / "tmpdef.tmp").exists()


@pytest.mark.parametrize("case", FEATURE_CASES)
def test_a_lying_cache_is_refused(tmp_path, case):
    for name, content in unpacked(FEATURE_CASES[case]()).items():
        (tmp_path / name).write_bytes(content)

    def read():
        store = FeatureStore(tmp_path)
        if not len(store):
            raise DataError("it is passed over, and features are made anew")
        store.get(next(iter(store._places)))

    with pytest.raises(DataError, match=r"not the index of a feature shard|features cannot be read|passed over"):
        read()
