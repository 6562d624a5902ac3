"""``chatbridge shard``: training from shards is training from files; ranks and cut runs give every sample once."""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
import yaml
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_chatbridge import cli
from lavis_chatbridge.datasets import shards
from lavis_chatbridge.datasets.cache import held, remove_abandoned
from lavis_chatbridge.datasets.dataset import SourceDataset, SourceGroup, SourceSettings, media_source
from lavis_chatbridge.datasets.files import SampleFile
from lavis_chatbridge.plugin.shard import _add_ratios, _section
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.schema import Medium, Sample, to_record, write_jsonl
from lavis_chatbridge.toyworld.build import Sizes, build_world

YAML = """
model: {{arch: chatbridge, model_type: tiny, checkpoint: null}}
datasets:
  chatbridge_world_caption: {{data_root: {world}}}
run:
  task: chatbridge_alignment
  max_iters: 4
  batch_size_train: 2
  init_lr: 1e-3
  num_workers: 0
  log_every: 1
  output_dir: {output}
  job_id: ""
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "w", Sizes(8, 4, 5, 2, 1, 1), processes=1)


@pytest.fixture
def config(tmp_path, world):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(world=world, output=tmp_path / "out"))
    return path


@pytest.fixture
def mine(tmp_path):
    """A JSONL of eleven samples: one without media, one of two media, two that share one."""
    (tmp_path / "media").mkdir()
    for i in range(12):
        (tmp_path / "media" / f"m{i}.PNG").write_bytes(bytes([i]) * (600 + i))
    samples = [
        Sample(f"s{i}", (Medium("image", str(tmp_path / "media" / f"m{i}.PNG")),), (f"caption {i}",)) for i in range(9)
    ]
    both = (Medium("image", str(tmp_path / "media" / "m9.PNG")), Medium("audio", str(tmp_path / "media" / "m10.PNG")))
    samples += [
        Sample("both", (*both, Medium("video", words=("a clip",))), ("two",), meta={"ü": 1}),
        Sample("none", (), ("x",)),
    ]
    samples.insert(4, Sample("again", samples[3].media, ("the same",)))
    write_jsonl(tmp_path / "mine.jsonl", samples)
    return tmp_path / "mine.jsonl"


def shard(*words):
    return cli.main(["shard", *map(str, words)])


def contents(path, root=None):
    """Every sample of a JSONL with its media's bytes instead of their places."""
    found = []
    for sample in SampleFile(path, root):
        record = to_record(sample)
        for medium, entry in zip(sample.media, record.get("media", []), strict=True):
            if not medium.words:
                source = media_source(medium)
                data = source if isinstance(source, bytes) else Path(source).read_bytes()
                entry.pop("offset", None)
                entry["path"], entry["size"] = data, len(data)
        found.append(record)
    return found


def train(path, *options):
    cfg = load_config(path, list(options))
    torch.manual_seed(cfg.run.seed)
    task = registry.get_task_class(cfg.run.task).setup_task(cfg=cfg)
    datasets = task.build_datasets(cfg)
    runner_class = registry.get_runner_class(cfg.run.runner)
    runner_class(cfg=cfg, job_id="job", task=task, model=task.build_model(cfg), datasets=datasets).train()
    lines = [json.loads(line) for line in Path(cfg.run.output_dir, "log.txt").read_text().splitlines()]
    return [line["train_loss"] for line in lines if "train_loss" in line]


def test_training_from_shards_is_training_from_files_and_resumes_it(tmp_path, config, world, caplog):
    assert (
        shard("--cfg-path", config, "--output", tmp_path / "shards", "--splits", "train", "test", "--per-shard", 3) == 0
    )
    from_shards = yaml.safe_load(config.read_text()) | yaml.safe_load(
        (tmp_path / "shards" / "datasets.yaml").read_text()
    )
    (tmp_path / "sharded.yaml").write_text(yaml.safe_dump(from_shards))
    splits = from_shards["datasets"]["chatbridge_world_caption"]["splits"]
    assert (len(splits["train"]), len(splits["test"]), splits["heldout"]) == (3, 3, None)
    for path in splits["train"]:
        assert contents(path) == contents(f"{world}/annotations/{path.rsplit('/', 1)[1]}", world)

    files = train(config, "run.save_every_steps=2")
    assert len(files) == 4
    assert train(tmp_path / "sharded.yaml", f"run.output_dir={tmp_path / 'b'}") == files
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "step_00000004")
    assert train(tmp_path / "sharded.yaml", "run.resume=auto") == files
    assert f"going on from {tmp_path / 'out' / 'checkpoints' / 'step_00000002'}" in caplog.text


def test_shards_are_plain_webdataset_and_hold_each_medium_once(tmp_path, mine, capsys):
    assert shard(mine, "--output", tmp_path / "out", "--per-shard", 6) == 0
    assert "mine.jsonl: 12 samples (10 image, 1 image+audio, 1 text) in 2 shards" in capsys.readouterr().out
    assert contents(tmp_path / "out" / "mine.jsonl") == contents(mine)
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    records = list(wds.WebDataset(tars, shardshuffle=False))
    assert [record["__key__"] for record in records] == [f"{i:09d}" for i in range(12)]
    assert records[0]["png"] == bytes(600)
    assert json.loads(records[4]["json"])["media"] == [{"type": "image", "path": "000000003.png"}]
    assert {"0.png", "1.png", "json"} < set(records[10])
    assert json.loads(records[10]["json"])["media"][2] == {"type": "video", "words": ["a clip"]}
    manifest = json.loads((tmp_path / "out" / "mine.manifest.json").read_text())
    assert (manifest["samples"], manifest["media"], manifest["left_out"]) == (12, 11, 0)
    assert [one["sha256"] for one in manifest["shards"]] == [
        shards.sha256_of(tmp_path / "out" / one["name"]) for one in manifest["shards"]
    ]


def test_ranks_make_what_one_process_makes(tmp_path, mine, capsys, monkeypatch):
    shard(mine, "--output", tmp_path / "one", "--per-shard", 2)
    assert shard(mine, "--output", tmp_path / "two", "--per-shard", 2, "--rank", 1, "--world", 2) == 0
    assert "1 of 1 files wait for the shards of other processes" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "two").glob("*.tar")) == [f"mine-0000{i}.tar" for i in (1, 3, 5)]
    assert not (tmp_path / "two" / "mine.jsonl").exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert shard(mine, "--output", tmp_path / "two", "--per-shard", 2) == 0
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in names)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, mine, monkeypatch):
    out, fill, made = tmp_path / "out", shards._fill, []

    def stop_at_the_third(path, name, chosen, part):
        made.append(name)
        index = fill(path, name, chosen, part)
        if len(made) == 3:
            raise KeyboardInterrupt
        return index

    monkeypatch.setattr(shards, "_fill", stop_at_the_third)
    assert shard(mine, "--output", out, "--per-shard", 2) == 130
    assert sorted(path.name for path in out.iterdir()) == [
        f"mine-0000{i}.{kind}" for i in (0, 1) for kind in ("index.json", "tar")
    ]
    (out / ".mine-00002.tar.abc.tmp").write_text("left by a process that was killed")
    (out / "mine-00001.index.json").write_text("damag")
    assert shard(mine, "--output", out, "--per-shard", 2) == 0
    assert made[3:] == [f"mine-0000{i}.tar" for i in (1, 2, 3, 4, 5)]
    assert contents(out / "mine.jsonl") == contents(mine)
    assert not list(out.glob(".*"))

    assert shard(mine, "--output", out, "--per-shard", 2) == 0
    assert len(made) == 8
    (tmp_path / "media" / "m5.PNG").write_bytes(b"another picture")
    damaged = out / "mine-00004.tar"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert shard(mine, "--output", out, "--per-shard", 2, "--verify") == 0
    assert made[8:] == ["mine-00003.tar", "mine-00004.tar"]
    assert contents(out / "mine.jsonl") == contents(mine)
    assert shard(mine, "--output", out, "--per-shard", 6) == 0
    assert sorted(path.name for path in out.glob("*.tar")) == ["mine-00000.tar", "mine-00001.tar"]


def test_unreadable_media_are_left_out_counted_and_limited(tmp_path, mine, capsys):
    (tmp_path / "media" / "m0.PNG").unlink()
    (tmp_path / "media" / "m9.PNG").write_bytes(b"")
    assert shard(mine, "--output", tmp_path / "out") == 0
    assert "10 samples" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "mine.manifest.json").read_text())
    assert [name for name, _ in manifest["left_out_first"]] == ["s0", "both"]
    assert SampleFile(tmp_path / "out" / "mine.jsonl")[0].id == "s1"
    many = [Sample(str(i), (Medium("image", str(tmp_path / f"{i}.png")),), ("x",)) for i in range(25)]
    write_jsonl(tmp_path / "many.jsonl", many)
    assert shard(tmp_path / "many.jsonl", "--output", tmp_path / "out") == 2
    assert "25 of 25 samples have media that cannot be read, more than the 5%" in capsys.readouterr().err


def test_as_many_unreadable_samples_as_are_allowed_do_not_stop(tmp_path, mine):
    (tmp_path / "ok.bin").write_bytes(b"x")
    names = ["gone.bin", *["ok.bin"] * 24]
    write_jsonl(
        tmp_path / "many.jsonl",
        [Sample(str(i), (Medium("image", str(tmp_path / name)),), ("x",)) for i, name in enumerate(names)],
    )
    assert shard(tmp_path / "many.jsonl", "--output", tmp_path / "a", "--max-bad-share", "0.04") == 0
    assert shard(tmp_path / "many.jsonl", "--output", tmp_path / "b", "--max-bad-share", "0.039") == 2


def test_a_manifest_names_the_first_samples_that_are_left_out(tmp_path):
    (tmp_path / "ok.bin").write_bytes(b"x")
    names = [f"gone{i}.bin" for i in range(23)] + ["ok.bin"]
    write_jsonl(
        tmp_path / "many.jsonl",
        [Sample(str(i), (Medium("image", str(tmp_path / name)),), ("x",)) for i, name in enumerate(names)],
    )
    assert shard(tmp_path / "many.jsonl", "--output", tmp_path / "a", "--max-bad-share", "1") == 0
    manifest = json.loads((tmp_path / "a" / "many.manifest.json").read_text())
    assert (manifest["left_out"], len(manifest["left_out_first"])) == (23, 20)


def test_a_medium_that_changes_its_size_or_goes_is_noticed(tmp_path, mine):
    out, medium = tmp_path / "out", tmp_path / "media" / "m2.PNG"
    shard(mine, "--output", out)
    time_before = os.stat(medium).st_mtime_ns
    medium.write_bytes(b"another size")
    os.utime(medium, ns=(time_before, time_before))
    assert shard(mine, "--output", out) == 0
    assert contents(out / "mine.jsonl") == contents(mine)
    medium.unlink()
    (tmp_path / "media" / "m3.PNG").write_bytes(b"of now")
    assert shard(mine, "--output", out) == 0
    assert "s2" not in [sample.id for sample in SampleFile(out / "mine.jsonl")]
    (tmp_path / "media" / "m3.PNG").unlink()
    assert shard(mine, "--output", out) == 0
    assert "s3" not in [sample.id for sample in SampleFile(out / "mine.jsonl")]


def test_a_medium_twice_in_a_sample_is_stored_once_and_json_is_no_medium(tmp_path):
    (tmp_path / "a.json").write_bytes(b"sound")
    (tmp_path / "b.jpg").write_bytes(b"picture")
    twice = [Medium(kind, str(tmp_path / name)) for kind, name in (("audio", "a.json"), ("image", "b.jpg"))] * 2
    write_jsonl(tmp_path / "twice.jsonl", [Sample("x", tuple(twice), ("c",)), Sample("y", twice[:1], ("c",))])
    assert shard(tmp_path / "twice.jsonl", "--output", tmp_path / "out") == 0
    assert contents(tmp_path / "out" / "twice.jsonl") == contents(tmp_path / "twice.jsonl")
    [first, second] = wds.WebDataset(str(tmp_path / "out" / "twice-00000.tar"), shardshuffle=False)
    assert {key: value for key, value in first.items() if key in ("0.audio", "1.jpg", "2.audio", "3.jpg")} == {
        "0.audio": b"sound",
        "1.jpg": b"picture",
    }
    assert "audio" not in second


def test_links_out_of_the_root_are_refused(tmp_path, mine, capsys):
    (tmp_path / "media" / "m0.PNG").unlink()
    (tmp_path / "media" / "m0.PNG").symlink_to("/etc/hostname")
    assert shard(mine, "--output", tmp_path / "out") == 2
    assert "leads out of the media root" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "o"], "name either a JSONL or a configuration"),
        (["mine.jsonl", "--output", "o", "--rank", "1"], "--rank and --world belong together"),
        (["mine.jsonl", "--output", "o", "--rank", "2", "--world", "2"], "rank 2 is not one of 2 processes"),
        (["mine.jsonl", "--output", "o", "--per-shard", "0"], "--per-shard must be at least 1"),
        (["--cfg-path", "none.yaml", "--output", "o"], "no configuration file at none.yaml"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert shard(*words) == 2
    assert message in capsys.readouterr().err


def test_a_jsonl_beside_its_own_media_is_not_replaced(tmp_path, mine, capsys):
    before = mine.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    for output in (tmp_path, tmp_path / "link"):
        assert shard(mine, "--output", output) == 2
        assert f"{mine}: the shards' JSONL would replace it; name another --output" in capsys.readouterr().err
    assert mine.read_bytes() == before
    assert not list(tmp_path.glob("*.tar"))


def test_a_jsonl_of_other_shards_is_gone_before_one_is_replaced(tmp_path, mine, monkeypatch):
    """Media of one size lie at the same bytes whatever the shard: an older JSONL would name others' with no fault."""
    out = tmp_path / "out"
    shard(mine, "--output", out, "--per-shard", 2)

    def stop(*_):
        assert not (out / "mine.jsonl").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "_fill", stop)
    assert shard(mine, "--output", out, "--per-shard", 3) == 130
    assert not (out / "mine.jsonl").exists()
    assert not (out / "mine.manifest.json").exists()
    monkeypatch.undo()
    assert shard(mine, "--output", out, "--per-shard", 3) == 0
    assert contents(out / "mine.jsonl") == contents(mine)


def test_verify_mends_the_jsonl_too(tmp_path, mine):
    out = tmp_path / "out"
    shard(mine, "--output", out, "--per-shard", 5)
    written = (out / "mine.jsonl").read_bytes()
    (out / "mine.jsonl").write_bytes(written[: written.index(b"\n") + 1])
    assert shard(mine, "--output", out, "--per-shard", 5, "--verify") == 0
    assert (out / "mine.jsonl").read_bytes() == written
    (out / "mine.jsonl").unlink()
    assert shard(mine, "--output", out, "--per-shard", 5) == 0
    assert (out / "mine.jsonl").read_bytes() == written


def test_a_shard_that_is_cut_off_or_gone_is_written_anew(tmp_path, mine):
    out = tmp_path / "out"
    shard(mine, "--output", out, "--per-shard", 4)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / "mine-00000.tar").write_bytes(whole["mine-00000.tar"][:-512])
    (out / "mine-00001.tar").unlink()
    (out / "mine-00002.index.json").write_text(
        json.dumps({key: json.loads(whole["mine-00002.index.json"])[key] for key in ("format", "stamp")})
    )
    assert shard(mine, "--output", out, "--per-shard", 4) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_full_disk_is_one_line_and_the_command_goes_on(tmp_path, mine, capsys):
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        assert shard(mine, "--output", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"{out}: shards cannot be written there: File too large; the same command goes on" in error
    assert list(out.iterdir()) == []
    assert shard(mine, "--output", out) == 0
    assert contents(out / "mine.jsonl") == contents(mine)


def test_what_another_process_is_writing_stays(tmp_path, mine):
    out = tmp_path / "out"
    out.mkdir()
    fresh, others = (out / f".mine-00000.tar.{name}.tmp" for name in ("fresh", "others"))
    names = (
        ".mine-00007.tar.left.tmp",
        ".mine-00000.index.json.l_t.tmp",
        ".mine.jsonl.1.tmp",
        ".mine.manifest.json.2.tmp",
    )
    for path in (others, *(out / name for name in names)):
        path.write_text("half of it")
    foreign = [out / ".mine2.jsonl.1.tmp", out / "mine-x-00007.tar", out / "mine-notes.json"]
    for path in foreign:
        path.write_text("somebody's")
    fresh.touch()
    os.utime(fresh, (time.time() + 1000,) * 2)
    with held(others):
        assert shard(mine, "--output", out) == 0
    assert not any((out / name).exists() for name in names)
    assert all(path.exists() for path in (fresh, others, *foreign))
    for path in foreign:
        path.unlink()
    os.utime(fresh, (0, 0))
    (out / "mine.manifest.json").unlink()
    assert shard(mine, "--output", out) == 0
    assert not list(out.glob(".*"))


def test_the_file_being_written_is_held(tmp_path, mine, monkeypatch):
    fill = shards._fill

    def beside(path, *rest):
        index = fill(path, *rest)
        remove_abandoned(path)
        return index

    monkeypatch.setattr(shards, "_fill", beside)
    assert shard(mine, "--output", tmp_path / "out", "--per-shard", 4) == 0
    assert contents(tmp_path / "out" / "mine.jsonl") == contents(mine)


def test_a_shard_that_another_process_begins_anew_is_not_left_out(tmp_path, mine, monkeypatch, capsys):
    out, manifest = tmp_path / "out", shards._all_samples

    def other_process(chosen, modalities):
        chosen.index(1).unlink()
        return manifest(chosen, modalities)

    monkeypatch.setattr(shards, "_all_samples", other_process)
    assert shard(mine, "--output", out, "--per-shard", 4) == 2
    assert "mine-00001.tar: another process has begun to write it anew; repeat this command" in capsys.readouterr().err
    assert not (out / "mine.jsonl").exists()


def test_without_a_readable_sample_no_jsonl_is_left(tmp_path, mine, capsys):
    for path in (tmp_path / "media").iterdir():
        path.unlink()
    mine.write_text("".join(line for line in mine.read_text().splitlines(keepends=True) if '"none"' not in line))
    assert shard(mine, "--output", tmp_path / "out") == 2
    assert "none of its 11 samples has media that can be read" in capsys.readouterr().err
    assert not (tmp_path / "out" / "mine.jsonl").exists()


def test_every_annotation_file_of_a_data_set_has_shards_of_its_own(tmp_path, mine):
    places = [tmp_path / name for name in ("x/train.jsonl", "y/train.jsonl", "train-1.jsonl", "other.jsonl")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(mine.read_bytes())
    files = [SampleFile(place, tmp_path) for place in places]
    group = SourceGroup("set", [SourceDataset(f"set/{i}", file, SourceSettings()) for i, file in enumerate(files)])
    sets = shards.shard_sets(group, tmp_path / "out", "train", 5)
    assert [one.stem for one in sets] == ["train-0", "train-2", "train-1", "other"]
    assert shards.write_shards(sets) == sets
    assert all(contents(one.jsonl) == contents(mine) for one in sets)


def test_a_choice_of_samples_is_one_set_whatever_the_number_of_sources(tmp_path, mine):
    file = SampleFile(mine)
    parts = [SourceDataset(f"set/{n}", file, SourceSettings(), np.array(part)) for n, part in enumerate(([7, 3], [5]))]
    [chosen] = shards.shard_sets(SourceGroup("set", parts), tmp_path / "out", "train", 2)
    assert chosen.indices.tolist() == [3, 5, 7]
    assert shards.write_shards([chosen]) == [chosen]
    every = contents(mine)
    assert contents(chosen.jsonl) == [every[3], every[5], every[7]]
    records = wds.WebDataset(str(chosen.shard(0)), shardshuffle=False)
    assert [record["__key__"] for record in records] == ["000000003", "000000005"]


def test_processors_of_a_data_set_are_kept(mine):
    own = {"data_root": "d", "vis_processor": {"train": {"image_size": 32}}, "audio_processor": None}
    builder = registry.get_builder_class("chatbridge_jsonl")
    for of_mixture in (False, True):
        section = _section(OmegaConf.create(own), builder, of_mixture)
        assert section["vis_processor"] == {"train": {"image_size": 32}}
        assert "audio_processor" not in section


def test_a_mixture_becomes_its_parts_with_their_shares(tmp_path, mine):
    vqa, caption = (registry.get_builder_class(name) for name in ("multis_vqav2", "multis_coco_caption"))
    mixture = OmegaConf.create({"data_root": "d", "reply_end": "</s>", "parts": ["multis_vqav2"]})
    section = _section(mixture, vqa, of_mixture=True)
    assert (section["data_root"], section["reply_end"], section["media"]) == ("d", "</s>", None)
    assert section["splits"] == dict.fromkeys(vqa.ROW["splits"])
    sections = {"multis_vqav2": section, "multis_coco_caption": _section(mixture, caption, of_mixture=True)}
    sources = [
        SourceDataset(name, SampleFile(mine), SourceSettings(), ratio=ratio)
        for name, ratio in (("multis_vqav2/a", 1.0), ("multis_vqav2/b", 2.0), ("multis_coco_caption", 1.0))
    ]
    _add_ratios(sections, {"multis": SourceGroup("multis", sources, 8.0)})
    assert [one["ratio"] for one in sections.values()] == [6.0, 2.0]
