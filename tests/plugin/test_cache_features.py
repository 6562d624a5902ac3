"""``chatbridge cache-features``: everything encoded once, and found again by training's own reading of the cache."""

from __future__ import annotations

from lavis_chatbridge import cli
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.toyworld.build import Sizes, build_world

YAML = """
model: {{arch: chatbridge, model_type: tiny}}
datasets:
  chatbridge_world_caption: {{data_root: {world}}}
run:
  task: chatbridge_alignment
  max_iters: 1
  num_workers: 0
  output_dir: {output}
"""


def test_the_cache_is_filled_once_and_training_finds_it(tmp_path, capsys, monkeypatch):
    world = build_world(tmp_path / "world", Sizes(6, 3, 3, 2, 1, 1), processes=1)
    config, folder = tmp_path / "run.yaml", tmp_path / "features"
    config.write_text(YAML.format(world=world, output=tmp_path / "out"))
    command = ["cache-features", "--cfg-path", str(config), "--options"]
    assert cli.main([*command, f"run.feature_cache={folder}"]) == 0
    assert f"{folder} has the features of 12 media" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def never(self, modality, media):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ChatBridge, "encode_media", never)
    assert cli.main([*command, f"run.feature_cache={folder}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == shards
    assert cli.main([*command, "run.feature_cache=null"]) == 2
    assert "run.feature_cache is null: name a folder" in capsys.readouterr().err
