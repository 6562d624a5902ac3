"""Configurations: what overrides what, what LAVIS's code reads, and that every fault is reported at once."""

from __future__ import annotations

import os
import sys

import pytest
from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from lavis.models.base_model import BaseModel

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.runners.config import load_config
from lavis_chatbridge.runners.settings import RunSettings, parse_run

RUN = "run:\n  task: chatbridge_alignment\n  max_iters: 10\n"


@pytest.fixture
def yaml_of(tmp_path, monkeypatch):
    """A model with two types and a data set, registered for one test; returns a writer of configuration files."""
    small, large = tmp_path / "small.yaml", tmp_path / "large.yaml"
    processors = (
        "preprocess:\n  vis_processor: {train: {name: v, image_size: 56}}\n  text_processor: {train: {name: t}}\n"
    )
    small.write_text(f"model: {{arch: toy_arch, width: 4, extra: {{depth: 1, heads: 2}}}}\n{processors}")
    large.write_text(f"model: {{arch: toy_arch, width: 400, extra: {{depth: 10, heads: 2}}}}\n{processors}")
    data = tmp_path / "data.yaml"
    data.write_text("datasets: {toy_data: {data_type: images, batch: 3}}\n")

    class Model(BaseModel):
        PRETRAINED_MODEL_CONFIG_DICT = {"small": str(small), "large": str(large)}
        DEFAULT_MODEL_TYPE = "small"

    class Builder(BaseDatasetBuilder):
        DATASET_CONFIG_DICT = {"default": str(data)}

        @classmethod
        def check_config(cls, cfg, where):
            if "batsh" in cfg:
                raise ConfigError(settings.unknown_key("batsh", ["batch"], where))

    monkeypatch.setitem(registry.mapping["model_name_mapping"], "toy_arch", Model)
    monkeypatch.setitem(registry.mapping["builder_name_mapping"], "toy_data", Builder)

    def write(
        run=RUN, model="model: {arch: toy_arch, extra: {heads: 8}}\n", datasets="datasets: {toy_data: }\n", more=""
    ):
        path = tmp_path / "run.yaml"
        path.write_text(model + datasets + run + more)
        return path

    return write


def test_defaults_lie_under_the_users_yaml_and_options_over_it(yaml_of):
    cfg = load_config(yaml_of(), ["run.max_iters=20", "datasets.toy_data.batch=5"])
    assert cfg.model_cfg.model_type == "small"
    assert (cfg.model_cfg.width, cfg.model_cfg.extra.depth, cfg.model_cfg.extra.heads) == (4, 1, 8)
    assert (cfg.datasets_cfg.toy_data.data_type, cfg.datasets_cfg.toy_data.batch) == ("images", 5)
    assert cfg.run.max_iters == 20
    assert registry.get("configuration") is cfg


@pytest.mark.parametrize("options", ["model.model_type=large run.seed=7", "model.model_type large run.seed 7"])
def test_an_option_selects_the_model_types_yaml_in_both_of_laviss_forms(yaml_of, options):
    cfg = load_config(yaml_of(), options.split())
    assert (cfg.model_cfg.width, cfg.model_cfg.extra.depth, cfg.model_cfg.extra.heads) == (400, 10, 8)
    assert cfg.run.seed == 7


def test_data_sets_take_the_models_processors(yaml_of):
    cfg = load_config(yaml_of(datasets="datasets: {toy_data: {vis_processor: {train: {image_size: 28}}}}\n"))
    data = cfg.datasets_cfg.toy_data
    assert (data.vis_processor.train.name, data.vis_processor.train.image_size) == ("v", 28)
    assert data.text_processor.train.name == "t"


def test_lavis_code_finds_what_it_reads(yaml_of):
    cfg = load_config(yaml_of(run=RUN + "  amp: true\n  log_freq: 7\n  beta2: 0.98\n"))
    assert cfg.run_cfg.num_beams == 1
    assert cfg.run_cfg.get("max_len", None) == 30
    assert cfg.run_cfg.evaluate is False
    assert (cfg.run.precision, cfg.run.log_every, cfg.run.betas) == ("fp16", 7, (0.9, 0.98))
    assert (cfg.run_cfg.amp, cfg.run_cfg.log_freq) == (True, 7)
    assert parse_run(cfg.to_dict()["run"]) == cfg.run
    cfg.pretty_print()


def test_every_fault_is_reported_at_once(yaml_of):
    path = yaml_of(
        run="run:\n  task: chatbridge_alignement\n  max_iter: 10\n  init_lr: fast\n",
        model="model: {arch: toy_arch, model_type: largo}\n",
        datasets="datasets: {toy_data: {batsh: 3}, toy_dat: }\n",
        more="runn: 1\nseed: 3\nfoo: 4\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in (
        "the configuration's sections: unknown name 'runn', did you mean 'run'?",
        "seed stands in no section, did you mean run.seed?",
        "'foo' stands in no section; name one of model, datasets, run, preprocess, env, as in run.seed",
        "model.model_type: unknown name 'largo', did you mean 'large'?",
        "unknown key datasets.toy_data.batsh, did you mean 'batch'?",
        "datasets: unknown name 'toy_dat', did you mean 'toy_data'?",
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
        ("  precision: bf16\n  amp: true\n", "run.amp is LAVIS's name of run.precision, which is 'bf16'"),
        ("  log_freq: 3\n  log_every: 4\n", "run.log_freq is LAVIS's name of run.log_every, which is 4"),
        ("  evaluate: true\n", "evaluate is set, but test_splits names no split"),
        ("  resume: /nowhere/step_1\n", "resume: no checkpoint folder at /nowhere/step_1"),
        (f"  feature_cache: '{__file__}'\n", "feature_cache: expected a folder, found a file at "),
        ("  seed: -1\n", "run.seed is -1, expected at least 0"),
        ("  seed: 99999999999999\n", "run.seed is 99999999999999, expected less than 4294967296"),
        ("  overwrite: true\n  resume: auto\n  job_id: ''\n", "overwrite deletes the earlier run"),
        ("  resume: auto\n", "resume: auto needs a job_id"),
        ("  save_every_minutes: true\n", "save_every_minutes: expected a number, found True"),
        ("  init_lr: .inf\n", "run.init_lr: Input should be a finite number, found inf"),
        ("  job_id: true\n", "run.job_id: expected str, found True"),
        ("  batch_size_train: 0\n", "run.batch_size_train is 0, expected more than 0"),
        ("  max_bad_share: 5\n", "run.max_bad_share is 5, expected at most 1"),
        ("  min_lr: 1\n", "init_lr 0.0001 is less than min_lr 1.0 or warmup_lr 0.0"),
        ("  num_beams: 3\n  use_nucleus_sampling: true\n", "choose one"),
        ("  media: shufled\n", "'shufled' is not one of 'normal', 'shuffled', 'withheld', did you mean 'shuffled'?"),
        ("  train_dataset_ratios: {toy_data: 1, toydata: 2}\n", "run.train_dataset_ratios: unknown name 'toydata'"),
        (
            "  runner: chatbridge_runer\n",
            "run.runner: unknown name 'chatbridge_runer', did you mean 'chatbridge_runner'?",
        ),
    ],
)
def test_contradictions(yaml_of, run, fault):
    with pytest.raises(ConfigError) as caught:
        load_config(yaml_of(run=RUN + run))
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["run.seed"], "'run.seed' has no value"),
        (["run.seed=1", "run.max_iters"], "'run.max_iters' has no value"),
        (["run.lr=1"], "unknown key run.lr"),
        (["seed=1"], "seed stands in no section, did you mean run.seed?"),
        (["run.seed", "1", "run.max_iters=2", "run.min_lr=0"], "'run.max_iters=2' stands among pairs KEY VALUE"),
    ],
)
def test_faulty_options(yaml_of, options, fault):
    with pytest.raises(ConfigError, match=fault.replace(".", r"\.")):
        load_config(yaml_of(), options)


def test_a_missing_or_broken_file(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file at"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("run: [1, 2\n")
    with pytest.raises(ConfigError, match="is no valid YAML"):
        load_config(tmp_path / "broken.yaml")


def test_caches_lie_where_this_user_may_write(yaml_of, monkeypatch, tmp_path):
    monkeypatch.setitem(registry.mapping["paths"], "cache_root", "/export/home/.cache/lavis")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("CHATBRIDGE_DATA", raising=False)
    load_config(yaml_of())
    assert registry.get_path("cache_root") == str(tmp_path / "xdg" / "lavis")
    load_config(yaml_of(), [f"env.cache_root={tmp_path}/c", f"env.data_root={tmp_path}/d"])
    assert registry.get_path("cache_root") == str(tmp_path / "c")
    assert os.environ["CHATBRIDGE_DATA"] == str(tmp_path / "d")
    monkeypatch.setenv("CHATBRIDGE_DATA", "")  # undone with the rest


@pytest.mark.parametrize(
    ("written", "name"), [("5", "5"), ("123_4", "123_4"), ("007", "007"), ("null", None), ("''", ""), ("mine", "mine")]
)
def test_a_job_id_may_be_a_number_as_slurm_gives_it(yaml_of, written, name):
    assert load_config(yaml_of(), [f"run.job_id={written}"]).run.job_id == name
    assert load_config(yaml_of(run=f"{RUN}  job_id: 5\n")).run.job_id == "5"


def test_numbers_in_yaml_1_1_and_whole_numbers_for_floats():
    run = parse_run({"task": "t", "max_iters": 5, "init_lr": "1e-3", "min_lr": 0, "betas": [0.9, 0.98]})
    assert (run.init_lr, run.min_lr, run.betas) == (1e-3, 0.0, (0.9, 0.98))
    assert isinstance(run, RunSettings)


@pytest.mark.parametrize("extra", ["tensorboard", "wandb"])
def test_a_missing_extra_is_named_before_anything_is_loaded(yaml_of, monkeypatch, extra):
    monkeypatch.setitem(sys.modules, extra, None)
    with pytest.raises(ConfigError, match=rf"run.{extra} .*pip install {extra}"):
        load_config(yaml_of(), [f"run.{extra}=true"])
