"""Configurations: what overrides what, what LAVIS's code reads, and that every fault is reported at once."""

from __future__ import annotations

import os
import sys

import pytest
from lavis.common.registry import registry

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.runners.settings import RunSettings

RUN = "run:\n  task: chatbridge_alignment\n  max_iters: 10\n"
DATA = "datasets: {chatbridge_world_caption: }\n"


def yaml_of(folder, run=RUN, model="model: {arch: chatbridge}\n", datasets=DATA, more=""):
    path = folder / "run.yaml"
    path.write_text(model + datasets + run + more)
    return path


def test_options_override_the_users_yaml_which_overrides_defaults(tmp_path):
    path = yaml_of(
        tmp_path,
        model="model: {arch: chatbridge, perceiver: {queries: 5}}\n",
        datasets="datasets: {chatbridge_world_caption: {limit: 3, vis_processor: {train: {encoder: {width: 28}}}}}\n",
    )
    cfg = load_config(path, ["run.max_iters=20", "datasets.chatbridge_world_caption.limit=5"])
    assert registry.get("configuration") is cfg
    assert cfg.run.max_iters == 20
    model, data = cfg.model_cfg, cfg.datasets_cfg.chatbridge_world_caption
    assert (model.model_type, model.perceiver.queries, model.perceiver.layers) == ("tiny", 5, 4)
    assert (data.reader, data.limit) == ("jsonl", 5)
    processor = data.vis_processor.train
    assert (processor.name, processor.encoder.width, processor.encoder.depth) == ("chatbridge_image_train", 28, 3)
    large = load_config(path, ["model.model_type=vicuna13b"]).model_cfg
    assert (large.perceiver.queries, large.vision.depth) == (5, 39)


def test_lavis_code_finds_what_it_reads(tmp_path):
    cfg = load_config(yaml_of(tmp_path, run=RUN + "  amp: true\n  log_freq: 7\n  beta2: 0.98\n"))
    assert cfg.run_cfg.num_beams == 1
    assert cfg.run_cfg.get("max_len", None) == 30
    assert cfg.run_cfg.evaluate is False
    assert (cfg.run.precision, cfg.run.log_every, cfg.run.betas) == ("fp16", 7, (0.9, 0.98))
    assert (cfg.run_cfg.amp, cfg.run_cfg.log_freq) == (True, 7)
    assert settings.parse(RunSettings, cfg.to_dict()["run"], "run") == cfg.run


def test_every_fault_is_reported_at_once(tmp_path):
    path = yaml_of(
        tmp_path,
        run="run:\n  task: chatbridge_alignement\n  max_iter: 10\n  init_lr: fast\n",
        model="model: {arch: chatbridge, model_type: smal}\n",
        datasets="datasets: {chatbridge_world_caption: {limt: 3}, chatbridge_world_captio: }\n",
        more="runn: 1\nseed: 3\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in (
        "sections of a configuration: unknown name 'runn', did you mean 'run'?",
        "sections of a configuration: unknown name 'seed'; known are datasets, env, model, preprocess, run",
        "model.model_type: unknown name 'smal', did you mean 'small'?",
        "unknown key datasets.chatbridge_world_caption.limt, did you mean 'limit'?",
        "datasets: unknown name 'chatbridge_world_captio', did you mean 'chatbridge_world_caption'?",
        "unknown key run.max_iter, did you mean 'max_iters'?",
        "run.init_lr: expected float, found 'fast'",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("run", "fault"),
    [
        ("  max_epoch: 3\n", "give either max_iters"),
        ("  warmup_steps: 11\n", "warmup_steps 11 is more than max_iters 10"),
        ("  train_splits: []\n", "train_splits is empty"),
        ("  evaluate: true\n", "evaluate is set, but test_splits names no split"),
        (
            "  evaluate: true\n  test_splits: [a]\n  resume: x\n",
            "resume is for training: set it to null; to evaluate a",
        ),
        ("  seed: 99999999999999\n", "run.seed is 99999999999999, expected less than 4294967296"),
        ("  overwrite: true\n  resume: auto\n  job_id: ''\n", "overwrite deletes the earlier run"),
        ("  resume: auto\n", "resume: auto needs a job_id"),
        ("  init_lr: .inf\n", "run.init_lr: Input should be a finite number, found inf"),
        ("  min_lr: 1\n", "init_lr 0.0001 is less than min_lr 1.0 or warmup_lr 0.0"),
        ("  num_beams: 3\n  use_nucleus_sampling: true\n", "choose one"),
        (
            "  train_dataset_ratios: {chatbridge_world_caption: 1, toydata: 2}\n",
            "run.train_dataset_ratios: unknown name 'toydata'",
        ),
        ("  job_id: ../x\n", "job_id is '../x', expected a folder's name"),
        ("  train: [foo]\n", "run.train: unknown name 'foo'; known are audio_queries"),
        (
            "preprocess: {vis_processor: {eval: {name: chatbridge_image_evil}}}\n",
            "preprocess.vis_processor.eval.name: unknown name 'chatbridge_image_evil', did you mean",
        ),
        ("  runner: chatbridge_runer\n", "run.runner: unknown name 'chatbridge_runer', did you mean"),
    ],
)
def test_contradictions(tmp_path, run, fault):
    with pytest.raises(ConfigError) as caught:
        load_config(yaml_of(tmp_path, run=RUN + run))
    assert fault in str(caught.value)


def test_a_misspelt_split_is_named(tmp_path):
    data = "datasets.chatbridge_world_caption.splits"
    with pytest.raises(ConfigError, match=rf"{data}\.trian: no split of run; did you mean 'train'\?"):
        load_config(yaml_of(tmp_path), [f"{data}.trian=x.jsonl"])
    load_config(yaml_of(tmp_path), [f"{data}.test1=x.jsonl"])


def test_caches_lie_where_this_user_may_write(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", "/export/home/.cache/lavis")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CHATBRIDGE_DATA", raising=False)
    load_config(yaml_of(tmp_path))
    assert registry.get_path("cache_root") == str(tmp_path / "xdg" / "lavis")
    load_config(yaml_of(tmp_path), [f"env.cache_root={tmp_path}/c", f"env.data_root={tmp_path}/d"])
    assert registry.get_path("cache_root") == str(tmp_path / "c")
    assert os.environ["CHATBRIDGE_DATA"] == str(tmp_path / "d")
    monkeypatch.setenv("CHATBRIDGE_DATA", "")  # undone with the rest


@pytest.mark.parametrize(
    ("written", "name"), [("5", "5"), ("123_4", "123_4"), ("007", "007"), ("null", None), ("''", ""), ("mine", "mine")]
)
def test_a_job_id_may_be_a_number_as_slurm_gives_it(tmp_path, written, name):
    assert load_config(yaml_of(tmp_path), [f"run.job_id={written}"]).run.job_id == name
    assert load_config(yaml_of(tmp_path, run=f"{RUN}  job_id: 5\n")).run.job_id == "5"


def test_a_missing_extra_is_named_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run.wandb .*pip install 'lavis-chatbridge\[wandb\]'"):
        load_config(yaml_of(tmp_path), ["run.wandb=true"])
