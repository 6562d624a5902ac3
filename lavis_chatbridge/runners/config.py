"""From a YAML and ``--options`` to one checked configuration, with the attributes of LAVIS's own ``Config``.

Precedence, lowest first: the YAML of model type and data sets, the user's YAML, the options. Faults are
reported together, before anything is loaded.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lavis_chatbridge.config import Settings, merged, parse, read_options, read_yaml, shown
from lavis_chatbridge.errors import ConfigError, MissingExtraError
from lavis_chatbridge.runners.settings import RunSettings, parse_run

if TYPE_CHECKING:
    from lavis_chatbridge.runners.folder import RunFolder

_log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "preprocess", "env")
_LONGEST_FAULT = 4000
_ID_KEYS = {"vqa": "question_id", "gqa": "question_id", "aok_vqa": "question_id", "captioning": "image_id"}
"""LAVIS's tasks that score -> the key by which they identify a sample."""
_LAVIS_AUTHORS_CACHE = "/export/home/.cache/lavis"


class EnvSettings(Settings):
    """The ``env`` section: paths of this machine."""

    data_root: str | None = None
    """Folder of the data sets' relative paths; null: ``$CHATBRIDGE_DATA``."""
    cache_root: str | None = None
    """Folder of LAVIS's downloads; null: LAVIS's setting if it was changed, else ``~/.cache/lavis``."""


class Config:
    """A checked configuration with the attributes of LAVIS's own ``Config``.

    Attributes:
        config: All sections, merged; also one by one as ``run_cfg`` (with all defaults), ``model_cfg``,
            ``datasets_cfg`` and ``preprocess_cfg``.
        run: The ``run`` section, typed.
        env: The ``env`` section, typed.
        folder: The run's folder if it was chosen before the runner is made.
    """

    folder: RunFolder | None = None

    def __init__(self, config: DictConfig, run: RunSettings, env: EnvSettings) -> None:
        self.config, self.run, self.env = config, run, env
        self.run_cfg, self.model_cfg, self.datasets_cfg = config.run, config.model, config.datasets
        self.preprocess_cfg = config.get("preprocess")

    def get_config(self) -> DictConfig:
        """All sections (LAVIS's name)."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """All sections as plain dictionaries, lists and scalars."""
        return _plain(self.config)

    def pretty_print(self) -> None:
        """Log every section as YAML."""
        for section in ("run", "datasets", "model"):
            _log.info("%s:\n%s", section, OmegaConf.to_yaml(self.config[section], resolve=True).rstrip())


class _Faults(list[str]):
    @contextmanager
    def collected(self) -> Iterator[None]:
        """Keep the error of a part of the configuration, so that the other parts are checked too."""
        try:
            yield
        except (ConfigError, OmegaConfBaseException) as error:
            self.append(" ".join(str(error).split())[:_LONGEST_FAULT])


def load_config(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> Config:
    """Read, merge and check a configuration, and register it and its paths with LAVIS.

    Args:
        cfg_path: A YAML with the sections ``model``, ``datasets`` and ``run``, as in LAVIS.
        options: Overrides, as ``["run.seed=1", ...]`` or as LAVIS's pairs ``["run.seed", "1", ...]``.

    Raises:
        ConfigError: With every fault that was found.
    """
    import lavis.common.optims
    import lavis.runners  # noqa: F401  (`import lavis` registers neither runners nor schedulers)
    from lavis.common.registry import registry

    user = merged(read_yaml(cfg_path), read_options(options or []))
    faults = _Faults(_misplaced(str(key), user[key]) for key in user if key not in SECTIONS)
    config = OmegaConf.create({section: {} for section in SECTIONS})
    run = env = None
    for section in SECTIONS:
        with faults.collected():
            config[section] = _section(user, section)
    with faults.collected():
        env = parse(EnvSettings, config.env, "env")
        _set_paths(env)  # first: data sets look for their files under env.data_root
    with faults.collected():
        _merge_model(config)
    with faults.collected():
        _merge_datasets(config)
    with faults.collected():
        run = _check_run(config.run)
    if not faults and run is not None:
        with faults.collected():
            _check_splits(config.datasets, run)
    if faults or run is None or env is None:
        raise ConfigError(f"{cfg_path}: " + "; ".join(faults))
    config.run = run.model_dump() | {
        "amp": run.precision == "fp16",
        "log_freq": run.log_every,
        "resume_ckpt_path": run.resume,
    }
    loaded = Config(config, run, env)
    registry.register("configuration", loaded)
    return loaded


def dataset_sections(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The ``datasets`` section without defaults, unchecked; ``env.data_root`` is set."""
    import lavis  # noqa: F401  (registers builders)

    user = merged(read_yaml(cfg_path), read_options(options or []))
    _set_paths(parse(EnvSettings, user.get("env") or {}, "env"))
    sections = _section(user, "datasets")
    return {str(name): _plain(_section(sections, str(name), "datasets.")) for name in sections}


def run_section(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> dict[str, Any]:
    """The ``run`` section without defaults, unchecked."""
    return _plain(_section(merged(read_yaml(cfg_path), read_options(options or [])), "run"))


def _section(config: DictConfig, name: str, where: str = "") -> DictConfig:
    """A part of a configuration that must be a mapping; empty if it is absent."""
    part = OmegaConf.create({}) if config.get(name) is None else config[name]
    if not isinstance(part, DictConfig):
        raise ConfigError(f"{where}{name}: expected a mapping, found {shown(part)}")
    return part


def _misplaced(key: str, value: Any) -> str:
    """The fault of a top-level key that is no section."""
    if isinstance(value, DictConfig) or difflib.get_close_matches(key[:80], SECTIONS, n=1):
        return _unknown_name("the configuration's sections", key, SECTIONS)
    if key in RunSettings.model_fields:
        return f"{key} stands in no section, did you mean run.{key}?"
    return f"{shown(key)} stands in no section; name one of {', '.join(SECTIONS)}, as in run.seed"


def _merge_model(config: DictConfig) -> None:
    """Put the model type's YAML under the user's ``model`` and ``preprocess`` sections, and check the result."""
    from lavis.common.registry import registry

    arch = _word(config.model.setdefault("arch", "chatbridge"), "model.arch")
    model_class = registry.get_model_class(arch)
    if model_class is None:
        raise ConfigError(_unknown_name("model.arch", arch, registry.list_models()))
    types = list(model_class.PRETRAINED_MODEL_CONFIG_DICT)
    model_type = config.model.get("model_type") or getattr(model_class, "DEFAULT_MODEL_TYPE", types[0])
    _word(model_type, "model.model_type", types)
    defaults = read_yaml(model_class.default_config_path(model_type))
    config.model = merged(_section(defaults, "model"), config.model, {"model_type": model_type})
    config.preprocess = merged(_section(defaults, "preprocess"), config.preprocess)
    config.preprocess = _plain(config.preprocess)  # resolves `encoder: ${model.vision}` beside the model's section
    _check_by(model_class, config.model, "model")


def _merge_datasets(config: DictConfig) -> None:
    """Put each builder's default YAML under the user's section of that name; processors come from the model's YAML."""
    if not config.datasets:
        raise ConfigError("datasets is missing: name at least one registered data set")
    faults = _Faults(
        _unknown_name("run.train_dataset_ratios", name, list(config.datasets))
        for name in _section(config.run, "train_dataset_ratios", "run.")
        if name not in config.datasets
    )
    for name in list(config.datasets):
        with faults.collected():
            config.datasets[name] = _dataset(_word(name, "datasets"), config)
    if faults:
        raise ConfigError("; ".join(faults))


def _dataset(name: str, config: DictConfig) -> DictConfig:
    from lavis.common.registry import registry

    where, user = f"datasets.{name}", _section(config.datasets, name, "datasets.")
    builder = registry.get_builder_class(name)
    if builder is None:
        raise ConfigError(_unknown_name("datasets", name, registry.list_datasets()))
    variant = _word(user.get("type", "default"), f"{where}.type", builder.DATASET_CONFIG_DICT)
    defaults = read_yaml(builder.default_config_path(type=variant)).datasets
    # LAVIS's video captions name their section otherwise (`msvd_cap`) than their builder; its builders take the first.
    section = merged(dict(config.preprocess.items()), defaults.get(name) or next(iter(defaults.values())), user)
    _check_by(builder, section, where)
    return section


def _check_by(owner: type, section: DictConfig, where: str) -> None:
    """Call the ``check_config(cfg, where)`` of the class that will read a section, if it has one."""
    if (check := getattr(owner, "check_config", None)) is not None:
        check(_plain(section), where)


def _check_run(section: DictConfig) -> RunSettings:
    from lavis.common.registry import registry

    run = parse_run(_plain(section))
    known = {"task": registry.list_tasks(), "runner": registry.list_runners()}
    chosen = {key: getattr(run, key) for key in known}
    faults = [_unknown_name(f"run.{key}", name, known[key]) for key, name in chosen.items() if name not in known[key]]
    for extra in ("tensorboard", "wandb"):
        if getattr(run, extra) and not run.evaluate and find_spec(extra) is None:
            faults.append(str(MissingExtraError(extra, extra, f"run.{extra}")))
    if faults:
        raise ConfigError("; ".join(faults))
    return run


def _check_splits(datasets: DictConfig, run: RunSettings) -> None:
    """Refuse splits that no data set has (LAVIS's cannot say which they have), and our data sets in LAVIS's tasks."""
    from lavis.common.registry import registry

    names = [(str(name), getattr(registry.get_builder_class(str(name)), "split_names", None)) for name in datasets]
    own = {name: set(split_names(_plain(datasets[name]))) for name, split_names in names if split_names is not None}
    if len(own) == len(names):
        run.check_splits(set().union(*own.values()))
    scored = {*run.test_splits, *([] if run.evaluate else run.valid_splits)}
    id_key = _ID_KEYS.get(run.task)
    unfit = [name for name, splits in own.items() if scored & splits]
    if id_key is not None and unfit and registry.get_task_class(run.task).__module__.startswith("lavis."):
        raise ConfigError(
            f"run.task {run.task!r} is LAVIS's own and scores by {id_key}, which {', '.join(unfit)} does not have: set "
            "run.task=chatbridge_captioning, which scores captions and answers (run.metrics)"
        )


def _word(value: Any, where: str, known: Collection[str] | None = None) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{where}: expected a name, found {shown(value)}")
    if known is not None and value not in known:
        raise ConfigError(_unknown_name(where, value, known))
    return value


def _plain(section: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:  # an interpolation of something that is not there
        raise ConfigError(" ".join(str(error).split())) from error


def _unknown_name(where: str, name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    return f"{where}: unknown name {shown(name)}{hint}"


def _set_paths(env: EnvSettings) -> None:
    """Set the folders of data and caches; directly in LAVIS's mapping, which refuses to register a path twice."""
    from lavis.common.registry import registry

    paths = registry.mapping["paths"]
    if env.data_root is not None:
        os.environ["CHATBRIDGE_DATA"] = str(Path(env.data_root).expanduser().resolve())
    if env.cache_root is not None:
        paths["cache_root"] = str(Path(env.cache_root).expanduser().resolve())
    elif paths.get("cache_root") in (None, _LAVIS_AUTHORS_CACHE):
        paths["cache_root"] = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lavis")
