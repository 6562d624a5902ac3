"""Reads a run's configuration: merges its YAML files and ``--options``, checks every key, returns LAVIS's ``Config``.

The user's YAML overrides the YAML of the model type and those of the data sets; ``--options`` override both. All faults
are reported together, before weights or data are loaded.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lavis.common.optims  # noqa: F401  (registers schedulers; `import lavis` does not)
from lavis.common.registry import registry
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_chatbridge.config import Settings, hint, merged, parse, read_options, read_yaml, shown
from lavis_chatbridge.errors import ConfigError, MissingExtraError, one_line
from lavis_chatbridge.runners.settings import RunSettings

SECTIONS = ("model", "datasets", "run", "preprocess", "env")
_ID_KEYS = {"vqa": "question_id", "gqa": "question_id", "aok_vqa": "question_id", "captioning": "image_id"}
"""LAVIS's tasks with scores -> the key of a sample's id."""
_SPLITS = ("train", "val", "test")
_LAVIS_AUTHORS_CACHE = "/export/home/.cache/lavis"


class EnvSettings(Settings):
    """The ``env`` section: paths of this machine."""

    data_root: str | None = None
    """Folder of the data sets' relative paths; null: ``$CHATBRIDGE_DATA``."""
    cache_root: str | None = None
    """Folder of LAVIS's downloads; null: LAVIS's own setting if it was changed, else ``~/.cache/lavis``."""


class Config:
    """A checked configuration with the attributes of LAVIS's ``Config``.

    Attributes:
        config: All sections, merged; each also as an attribute: ``run_cfg`` (with all defaults), ``model_cfg``,
            ``datasets_cfg`` and ``preprocess_cfg``.
        run: The ``run`` section, typed.
    """

    def __init__(self, config: DictConfig, run: RunSettings) -> None:
        self.config, self.run = config, run
        self.run_cfg, self.model_cfg, self.datasets_cfg = config.run, config.model, config.datasets
        self.preprocess_cfg = config.get("preprocess")

    def get_config(self) -> DictConfig:
        """All sections (LAVIS's name)."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """All sections as plain dictionaries, lists and scalars."""
        return _plain(self.config)


def load_config(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> Config:
    """Read, merge and check a configuration, and register it and its paths with LAVIS.

    Args:
        cfg_path: A YAML with the sections ``model``, ``datasets`` and ``run``, as in LAVIS.
        options: Overrides, as ``["run.seed=1", ...]``.

    Raises:
        ConfigError: With every fault that was found.
    """
    user = merged(read_yaml(cfg_path), read_options(options or []))
    faults = [_unknown("sections of a configuration", key, SECTIONS) for key in user if key not in SECTIONS]
    config = OmegaConf.create({section: {} for section in SECTIONS})
    for section in SECTIONS:
        with _collected(faults):
            config[section] = _section(user, section)
    with _collected(faults):  # first: data sets look for their files under env.data_root
        _set_paths(config.env)
    with _collected(faults):
        _merge_model(config)
    if not config.datasets:
        faults.append("datasets is missing: name at least one registered data set")
    for name in list(config.datasets):
        with _collected(faults):
            config.datasets[name] = _dataset(str(name), config)
    run = None
    with _collected(faults):
        run = _parse_run(config)
        if not faults:
            _check_splits(config.datasets, run)
    if faults or run is None:
        raise ConfigError(f"{cfg_path}: " + "; ".join(faults))
    of_lavis = {"amp": run.precision == "fp16", "log_freq": run.log_every, "resume_ckpt_path": run.resume}
    config.run = run.model_dump() | of_lavis
    loaded = Config(config, run)
    registry.register("configuration", loaded)
    return loaded


def dataset_sections(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The ``datasets`` section without defaults, unchecked. Sets the data root to ``env.data_root``."""
    user = merged(read_yaml(cfg_path), read_options(options or []))
    _set_paths(user.get("env") or {})
    sections = _section(user, "datasets")
    return {str(name): _plain(_section(sections, str(name), "datasets.")) for name in sections}


@contextmanager
def _collected(faults: list[str]) -> Iterator[None]:
    """Collect an error of the block instead of raising it, so that other parts are checked too."""
    try:
        yield
    except (ConfigError, OmegaConfBaseException) as error:
        faults.append(one_line(error, 4000))


def _section(config: DictConfig, name: str, where: str = "") -> DictConfig:
    """A section, which must be a mapping; empty if it is missing."""
    part = OmegaConf.create({}) if config.get(name) is None else config[name]
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{where}{name}: expected a mapping, found {shown(part)}")
    return part


def _merge_model(config: DictConfig) -> None:
    """Merge the user's ``model`` and ``preprocess`` sections over the model type's YAML, and check the result."""
    arch = config.model.setdefault("arch", "chatbridge")
    model_class = _registered(registry.get_model_class, "model.arch", arch, registry.list_models())
    types = list(model_class.PRETRAINED_MODEL_CONFIG_DICT)
    model_type = config.model.get("model_type") or getattr(model_class, "DEFAULT_MODEL_TYPE", types[0])
    if model_type not in types:
        raise ConfigError(_unknown("model.model_type", model_type, types))
    defaults = read_yaml(model_class.default_config_path(model_type))
    config.model = merged(_section(defaults, "model"), config.model, {"model_type": model_type})
    config.preprocess = merged(_section(defaults, "preprocess"), config.preprocess)
    config.preprocess = _plain(config.preprocess)  # resolves `encoder: ${model.vision}`
    _check_processors(config.preprocess)
    if hasattr(model_class, "check_config"):  # LAVIS's own models have none
        model_class.check_config(_plain(config.model), "model")


def _check_processors(preprocess: DictConfig) -> None:
    """Raise for a processor that is not registered; their other settings may need the encoders' files."""
    for kind in map(str, preprocess):
        splits = _section(preprocess, kind, "preprocess.")
        for split in map(str, splits):
            if isinstance(own := splits[split], DictConfig) and (name := own.get("name")) is not None:
                where = f"preprocess.{kind}.{split}.name"
                _registered(registry.get_processor_class, where, name, registry.list_processors())


def _dataset(name: str, config: DictConfig) -> DictConfig:
    """A data set's section merged over its builder's default YAML; default processors are from the model's YAML."""
    where, user = f"datasets.{name}", _section(config.datasets, name, "datasets.")
    builder = _registered(registry.get_builder_class, "datasets", name, registry.list_datasets())
    variant = user.get("type", "default")
    if variant not in builder.DATASET_CONFIG_DICT:
        raise ConfigError(_unknown(f"{where}.type", variant, builder.DATASET_CONFIG_DICT))
    defaults = read_yaml(builder.default_config_path(type=variant)).datasets
    # The section in LAVIS's YAML of video captions has another name (`msvd_cap`) than the builder: take the first one.
    section = merged(dict(config.preprocess.items()), defaults.get(name) or next(iter(defaults.values())), user)
    if hasattr(builder, "check_config"):
        builder.check_config(_plain(section), where)
    return section


def _parse_run(config: DictConfig) -> RunSettings:
    """The ``run`` section; its names must be registered, and its extras installed."""
    run = parse(RunSettings, _plain(config.run), "run")
    _registered(registry.get_task_class, "run.task", run.task, registry.list_tasks())
    _registered(registry.get_runner_class, "run.runner", run.runner, registry.list_runners())
    parts = getattr(registry.get_model_class(config.model.get("arch")), "PART_NAMES", run.train or ())
    if unknown := [name for name in run.train or () if name not in parts]:
        raise ConfigError(_unknown("run.train", unknown[0], parts))
    if unknown := [name for name in run.train_dataset_ratios or () if name not in config.datasets]:
        raise ConfigError(_unknown("run.train_dataset_ratios", unknown[0], list(config.datasets)))
    for extra in ("tensorboard", "wandb"):
        if getattr(run, extra) and not run.evaluate and find_spec(extra) is None:
            raise ConfigError(str(MissingExtraError(extra, extra, f"run.{extra}")))
    return run


def _check_splits(datasets: DictConfig, run: RunSettings) -> None:
    """Raise for splits that no data set has (unknown for LAVIS's data sets), and for our data sets in LAVIS's tasks."""
    builders = {str(name): registry.get_builder_class(str(name)) for name in datasets}
    own = {n: set(b.split_names(_plain(datasets[n]))) for n, b in builders.items() if hasattr(b, "split_names")}
    if len(own) == len(builders):
        run.check_splits(set().union(*own.values()))
    for name, splits in own.items():
        for split in sorted(splits - {*_SPLITS, *run.used_splits}):
            near = difflib.get_close_matches(split, _SPLITS, 1, 0.7)
            if near and {*split} <= {*near[0]}:  # misspelt, and not such as test1
                raise ConfigError(f"datasets.{name}.splits.{split}: no split of run; did you mean {near[0]!r}?")
    scored = {*run.test_splits, *([] if run.evaluate else run.valid_splits)}
    unfit = [name for name, splits in own.items() if scored & splits]
    if run.task in _ID_KEYS and unfit:
        raise ConfigError(
            f"run.task {run.task!r} is LAVIS's own and scores by {_ID_KEYS[run.task]}, which {', '.join(unfit)} does "
            "not have: set run.task=chatbridge_captioning, which scores captions and answers (run.metrics)"
        )


def _registered(get: Any, where: str, name: Any, known: Collection[str]) -> Any:
    """The class registered with LAVIS under a name."""
    if (found := get(name) if isinstance(name, str) else None) is None:
        raise ConfigError(_unknown(where, name, known))
    return found


def _unknown(where: str, name: object, known: Collection[str]) -> str:
    return f"{where}: unknown name {shown(name)}{hint(str(name), known)}"


def _plain(section: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:  # an interpolation of a missing key
        raise ConfigError(one_line(error)) from error


def _set_paths(section: Any) -> None:
    """Check ``env``, and set its paths in LAVIS's mapping itself: a path cannot be registered twice."""
    env, paths = parse(EnvSettings, section, "env"), registry.mapping["paths"]
    if env.data_root is not None:
        os.environ["CHATBRIDGE_DATA"] = str(Path(env.data_root).expanduser().resolve())
    if env.cache_root is not None:
        paths["cache_root"] = str(Path(env.cache_root).expanduser().resolve())
    elif paths.get("cache_root") in (None, _LAVIS_AUTHORS_CACHE):
        paths["cache_root"] = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lavis")
