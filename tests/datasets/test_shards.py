"""Shards: every sample once for any number of processes and interruptions, outdated ones written again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset as wds

from lavis_chatbridge import cli
from lavis_chatbridge.datasets import shards
from lavis_chatbridge.datasets.dataset import media_content
from lavis_chatbridge.schema import Medium, Sample, SampleFile, write_jsonl


@pytest.fixture
def mine(tmp_path):
    """A JSONL of twelve samples: one without media, one of two media, two that share one."""
    (tmp_path / "media").mkdir()
    media = [Medium("audio" if i == 10 else "image", str(tmp_path / "media" / f"m{i}.PNG")) for i in range(11)]
    for i, medium in enumerate(media):
        Path(medium.path).write_bytes(bytes([i]) * (600 + i))
    samples = [Sample(f"s{i}", (media[i],), (f"caption {i}",)) for i in range(9)]
    both = (*media[9:], Medium("video", words=("a clip",)))
    samples += [Sample("both", both, ("two",), meta={"ü": 1}), Sample("none", (), ("x",))]
    samples.insert(4, Sample("again", samples[3].media, ("the same",)))
    write_jsonl(tmp_path / "mine.jsonl", samples)
    return tmp_path / "mine.jsonl"


def shard(*words):
    return cli.main(["shard", *map(str, words)])


def contents(path, root=None):
    """Every sample of a JSONL with its media's bytes instead of their locations."""
    found = []
    for sample in SampleFile(path, root):
        data = [media_content(medium) for medium in sample.files]
        data = [Path(content).read_bytes() if isinstance(content, str) else content for content in data]
        found.append((replace(sample, media=()), [(m.modality, m.words) for m in sample.media], data))
    return found


def test_shards_are_plain_webdataset_and_store_each_medium_once(tmp_path, mine, capsys, monkeypatch):
    read, reads = shards.read_index, []
    monkeypatch.setattr(shards, "read_index", lambda path: reads.append(path.name) or read(path))
    assert shard(mine, "--output", tmp_path / "out", "--per-shard", 6) == 0
    assert reads == ["mine-00000.tar", "mine-00001.tar"] * 2  # before they are written, and for the JSONL
    assert "mine.jsonl: 12 samples in 2 shards" in capsys.readouterr().out
    assert contents(tmp_path / "out" / "mine.jsonl") == contents(mine)
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    records = list(wds.WebDataset(tars, shardshuffle=False))
    assert [record["__key__"] for record in records] == [f"{i:09d}" for i in range(12)]
    assert records[0]["png"] == bytes(600)
    assert json.loads(records[4]["json"])["media"] == [{"type": "image", "path": "000000003.png"}]
    assert {"0.png", "1.png", "json"} < set(records[10])
    assert json.loads(records[10]["json"])["media"][2] == {"type": "video", "words": ["a clip"]}


def test_ranks_make_what_one_process_makes(tmp_path, mine, capsys, monkeypatch):
    shard(mine, "--output", tmp_path / "one", "--per-shard", 2)
    assert shard(mine, "--output", tmp_path / "two", "--per-shard", 2, "--rank", 1, "--world", 2) == 0
    assert "process 1 of 2: 1 of 1 files wait for other processes" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "two").glob("*.tar")) == [f"mine-0000{i}.tar" for i in (1, 3, 5)]
    assert not (tmp_path / "two" / "mine.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shard(mine, "--output", tmp_path / "two", "--per-shard", 2) == 0
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_an_interrupted_run_continues_and_outdated_shards_are_written_again(tmp_path, mine, monkeypatch):
    out, fill, made = tmp_path / "out", shards._fill, []

    def stop_at_the_third(path, part):
        made.append(path.name)
        index = fill(path, part)
        if len(made) == 3:
            raise KeyboardInterrupt
        return index

    monkeypatch.setattr(shards, "_fill", stop_at_the_third)
    assert shard(mine, "--output", out, "--per-shard", 2) == 130
    assert not (out / "mine.jsonl").exists()
    (out / "mine-00001.index.json").write_text("damag")
    assert shard(mine, "--output", out, "--per-shard", 2) == 0
    assert made[3:] == [f"mine-0000{i}.tar" for i in (1, 2, 3, 4, 5)]
    assert contents(out / "mine.jsonl") == contents(mine)
    assert shard(mine, "--output", out, "--per-shard", 2) == 0
    assert len(made) == 8

    (tmp_path / "media" / "m5.PNG").write_bytes(b"another picture")
    (out / "mine-00000.tar").unlink()
    os.truncate(out / "mine-00001.tar", 1024)
    assert shard(mine, "--output", out, "--per-shard", 2) == 0
    assert made[8:] == ["mine-00000.tar", "mine-00001.tar", "mine-00003.tar"]
    assert contents(out / "mine.jsonl") == contents(mine)
    assert shard(mine, "--output", out, "--per-shard", 6) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["mine-00000.tar", "mine-00001.tar"]
    assert contents(out / "mine.jsonl") == contents(mine)


def test_unreadable_media_are_left_out_counted_and_limited(tmp_path, mine, capsys):
    (tmp_path / "media" / "m0.PNG").unlink()
    (tmp_path / "media" / "m9.PNG").write_bytes(b"")
    assert shard(mine, "--output", tmp_path / "out") == 0
    assert "10 samples" in (out := capsys.readouterr().out)
    assert "left out 2 whose media cannot be read (first s0: cannot read" in out
    assert SampleFile(tmp_path / "out" / "mine.jsonl")[0].id == "s1"
    (tmp_path / "ok.bin").write_bytes(b"x")
    gone, ok = (Medium("image", str(tmp_path / name)) for name in ("gone.bin", "ok.bin"))
    many = tmp_path / "many.jsonl"
    write_jsonl(many, [Sample(str(i), (medium,), ("x",)) for i, medium in enumerate([gone, *[ok] * 24])])
    assert shard(many, "--output", tmp_path / "a", "--max-bad-share", "0.04") == 0
    assert shard(many, "--output", tmp_path / "b", "--max-bad-share", "0.039") == 2
    assert "1 of 25 samples could not be read, more than the 4%" in capsys.readouterr().err
    Path(ok.path).unlink()
    assert shard(many, "--output", tmp_path / "c", "--max-bad-share", 1) == 2
    assert "none of 25 samples has readable media" in capsys.readouterr().err


def test_a_medium_twice_in_a_sample_is_stored_once_and_json_is_no_medium(tmp_path):
    (tmp_path / "a.json").write_bytes(b"sound")
    (tmp_path / "b.jpg").write_bytes(b"picture")
    twice = (Medium("audio", str(tmp_path / "a.json")), Medium("image", str(tmp_path / "b.jpg"))) * 2
    write_jsonl(tmp_path / "twice.jsonl", [Sample("x", twice, ("c",)), Sample("y", twice[:1], ("c",))])
    assert shard(tmp_path / "twice.jsonl", "--output", tmp_path / "out") == 0
    assert contents(tmp_path / "out" / "twice.jsonl") == contents(tmp_path / "twice.jsonl")
    [first, second] = wds.WebDataset(str(tmp_path / "out" / "twice-00000.tar"), shardshuffle=False)
    stored = {key: value for key, value in first.items() if key.endswith(("audio", "jpg"))}
    assert stored == {"0.audio": b"sound", "1.jpg": b"picture"}
    assert "audio" not in second


def test_the_samples_own_folder_is_refused(tmp_path, mine, capsys):
    before = mine.read_bytes()
    assert shard(mine, "--output", tmp_path) == 2
    assert f"{mine}: the shards' JSONL would replace it; name another --output" in capsys.readouterr().err
    assert mine.read_bytes() == before
