"""``chatbridge shard`` and ``cache-features``: training from shards is training from files; media are encoded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from lavis.common.registry import registry
from omegaconf import OmegaConf

from lavis_chatbridge import cli
from lavis_chatbridge.datasets.dataset import SampleDataset, SplitDataset
from lavis_chatbridge.datasets.settings import DataSettings
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.plugin.launch import Runs
from lavis_chatbridge.plugin.shard import _add_ratios, _files_of, _section
from lavis_chatbridge.schema import SampleFile
from lavis_chatbridge.toyworld.build import Sizes, build_world
from tests.datasets.test_shards import contents, mine, shard  # noqa: F401
from tests.runners.runner_parts import YAML, logged


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world") / "w", Sizes(8, 4, 5, 2, 1, 1), processes=1)


@pytest.fixture
def config(tmp_path, world):
    path = tmp_path / "run.yaml"
    path.write_text(YAML.format(world=world, output=tmp_path / "out", task="chatbridge_alignment"))
    return path


def train(path, *options):
    with Runs() as runs:
        runs.run(str(path), ["run.device=cpu", *options], evaluate=False)
    return logged(Path(runs.cfg.run.output_dir), "train_loss")


def test_training_from_shards_is_training_from_files_and_resumes_it(tmp_path, config, world, caplog):
    words = ["--output", tmp_path / "shards", "--splits", "train", "test", "--per-shard", 3]
    assert shard("--cfg-path", config, *words) == 0
    sections = yaml.safe_load((tmp_path / "shards" / "datasets.yaml").read_text())
    from_shards = yaml.safe_load(config.read_text()) | sections
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
    assert f"{tmp_path / 'out' / 'checkpoints' / 'step_00000002'}" in caplog.text


def test_the_cache_of_features_is_filled_once(tmp_path, world, config, capsys, monkeypatch):
    folder, command = tmp_path / "features", ["cache-features", "--cfg-path", str(config), "--options"]
    assert cli.main([*command, f"run.feature_cache={folder}"]) == 0
    assert f"{folder} has the features of 17 media of this configuration\n" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(ChatBridge, "encode_media", None)
    assert cli.main([*command, f"run.feature_cache={folder}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == shards
    picture = next(Path(world, "images", "train").iterdir())
    pixels = picture.read_bytes()
    picture.write_bytes(b"rubbish")
    assert cli.main([*command, f"run.feature_cache={folder}"]) == 0
    picture.write_bytes(pixels)
    assert "features of 16 media of this configuration; 1 cannot be read, and training" in capsys.readouterr().out
    assert cli.main([*command, "run.feature_cache=null"]) == 2
    assert "run.feature_cache is null: name a folder" in capsys.readouterr().err


def test_a_jsonl_or_a_configuration_is_needed(capsys):
    assert shard("--output", "o") == 2
    assert "name either a JSONL or a configuration" in capsys.readouterr().err


def test_every_annotation_file_of_a_data_set_has_shards_of_its_own(tmp_path, mine):  # noqa: F811
    places = [tmp_path / name for name in ("x/train.jsonl", "y/train.jsonl", "train-1.jsonl", "other.jsonl")]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(mine.read_bytes())
    files = [SampleFile(place, tmp_path) for place in places]
    sources = [SampleDataset(f"set/{i}", file, DataSettings()) for i, file in enumerate([*files, files[0]])]
    found = _files_of(SplitDataset("set", sources))
    assert [name for name, _ in found.items()] == [("set", stem) for stem in ("train", "train-1", "train-1-1", "other")]
    assert list(found.values()) == files


def test_a_mixture_becomes_its_parts_with_their_shares(tmp_path, mine):  # noqa: F811
    vqa, caption = (registry.get_builder_class(name) for name in ("multis_vqav2", "multis_coco_caption"))
    own = {"data_root": "d", "reply_end": "</s>", "vis_processor": {"train": {"image_size": 32}}}
    mixture = OmegaConf.create({**own, "audio_processor": None, "parts": ["multis_vqav2"]})
    section = _section(mixture, vqa, of_mixture=True)
    assert {key: section[key] for key in own} == own
    assert (section["media"], "audio_processor" in section) == (None, False)
    assert section["splits"] == dict.fromkeys(vqa.DEFAULTS["splits"])
    sections = {"multis_vqav2": section, "multis_coco_caption": _section(mixture, caption, of_mixture=True)}
    names = ("multis_vqav2/a", "multis_vqav2/b", "multis_coco_caption")
    sources = [SampleDataset(name, SampleFile(mine), DataSettings()) for name in names]
    for source, ratio in zip(sources, (1.0, 2.0, 1.0), strict=True):
        source.ratio = ratio
    _add_ratios(sections, {"multis": SplitDataset("multis", sources, 8.0)})
    assert [one["ratio"] for one in sections.values()] == [6.0, 2.0]
