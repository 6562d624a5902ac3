"""``chatbridge cache-features``: everything encoded once, and found again by training's own reading of the cache."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from lavis_chatbridge import cli
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


@pytest.fixture
def config(tmp_path):
    world = build_world(tmp_path / "world", Sizes(6, 3, 3, 2, 1, 1), processes=1)
    (tmp_path / "run.yaml").write_text(YAML.format(world=world, output=tmp_path / "out"))
    return str(tmp_path / "run.yaml")


def test_the_cache_is_filled_once_and_training_finds_it(tmp_path, config, capsys, monkeypatch):
    from lavis_chatbridge.models.chatbridge import ChatBridge

    folder = tmp_path / "features"
    options = ["--options", f"run.feature_cache={folder}"]
    assert cli.main(["cache-features", "--cfg-path", config, *options]) == 0
    printed = capsys.readouterr().out
    assert f"{folder}: features of 3 audio files, 6 image files, 3 video files for this configuration" in printed
    assert not (tmp_path / "out").exists()
    shards = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    def never(self, modality, media):
        raise AssertionError("encoded again")

    monkeypatch.setattr(ChatBridge, "encode_media", never)
    for name in ("soft.npz", "soft.safetensors"):
        assert cli.main(["cache-features", "--cfg-path", config, *options, "--soft", str(tmp_path / name)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == shards
    npz, tensors = np.load(tmp_path / "soft.npz"), load_file(tmp_path / "soft.safetensors")
    assert len(tensors) == 12
    assert {(soft.ndim, soft.dtype) for soft in tensors.values()} == {(2, np.dtype("float32"))}
    assert all((npz[name] == soft).all() for name, soft in tensors.items())
    image, other = [soft for name, soft in tensors.items() if name.startswith("image:")][:2]
    assert np.abs(image - other).max() > 1e-3


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--options", "run.feature_cache=null"], "run.feature_cache is null: name a folder"),
        (["--soft", "soft.txt"], "expected a file .npz or .safetensors"),
    ],
)
def test_a_folder_and_a_known_format_are_needed(capsys, words, why):
    assert cli.main(["cache-features", "--cfg-path", "align", *words]) == 2
    assert why in capsys.readouterr().err
