"""From a YAML and ``--options`` to one checked configuration: what LAVIS's tasks, builders and runners read.

Precedence, lowest first: the model type's YAML and the data sets' default YAML, the user's YAML, the options.
Everything that is wrong (unknown keys, types, contradictions, names, files) is reported together, before anything is
loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError, MissingExtraError
from lavis_chatbridge.runners.settings import RunSettings, parse_run

if TYPE_CHECKING:
    from lavis_chatbridge.runners.folder import RunFolder

_log = logging.getLogger(__name__)

SECTIONS = ("model", "datasets", "run", "preprocess", "env")
_LONGEST_FAULT = 4000
_DEFAULT_ARCH = "chatbridge"
_NUMBERED_BY = {"vqa": "question_id", "gqa": "question_id", "aok_vqa": "question_id", "captioning": "image_id"}
"""LAVIS's tasks that score -> what they know a sample by."""
_LAVIS_AUTHORS_CACHE = "/export/home/.cache/lavis"


@dataclasses.dataclass
class EnvSettings:
    """The ``env`` section: where things lie on this machine."""

    data_root: str | None = None
    """Folder under which the data sets' relative paths are looked up; null takes ``$CHATBRIDGE_DATA``."""
    cache_root: str | None = None
    """Folder of what LAVIS downloads; null takes LAVIS's setting if somebody changed it, else ``~/.cache/lavis``."""


class Config:
    """A checked configuration with the attributes of LAVIS's own ``Config``.

    Attributes:
        config: All sections, merged.
        run: The ``run`` section, typed.
        env: The ``env`` section, typed.
        folder: The run's folder, where it was chosen before a runner is made.
    """

    folder: RunFolder | None = None

    def __init__(self, config: DictConfig, run: RunSettings, env: EnvSettings) -> None:
        self.config = config
        self.run = run
        self.env = env

    @property
    def run_cfg(self) -> DictConfig:
        """The ``run`` section with all defaults filled in, as LAVIS's tasks read it."""
        return self.config.run

    @property
    def model_cfg(self) -> DictConfig:
        """The ``model`` section."""
        return self.config.model

    @property
    def datasets_cfg(self) -> DictConfig:
        """The ``datasets`` section: name -> its configuration."""
        return self.config.datasets

    @property
    def preprocess_cfg(self) -> DictConfig:
        """The ``preprocess`` section of the model type's YAML, with the user's changes."""
        return self.config.preprocess

    def get_config(self) -> DictConfig:
        """All sections, merged (LAVIS's name)."""
        return self.config

    def to_dict(self) -> dict[str, Any]:
        """All sections as plain dictionaries, lists and scalars."""
        return _plain(self.config)

    def pretty_print(self) -> None:
        """Log every section as YAML."""
        for section in ("run", "datasets", "model"):
            _log.info("%s:\n%s", section, OmegaConf.to_yaml(self.config[section], resolve=True).rstrip())


def load_config(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> Config:
    """Read, merge and check a configuration; tell LAVIS's registry where its caches lie.

    Args:
        cfg_path: A YAML with the sections ``model``, ``datasets`` and ``run``, as in LAVIS.
        options: Overrides, as ``["run.seed=1", ...]`` or as LAVIS's pairs ``["run.seed", "1", ...]``.

    Raises:
        ConfigError: With every fault that was found.
    """
    import lavis  # noqa: F401  (fills the registry with models, builders and tasks)
    from lavis.common.registry import registry

    user = _over(_read_yaml(cfg_path), _read_options(options or []))
    faults = [_no_section(str(key), user[key]) for key in user if key not in SECTIONS]
    collect = _Collector(faults)
    merged = OmegaConf.create({section: {} for section in SECTIONS})
    for section in SECTIONS:
        merged[section] = collect(functools.partial(_section, user, section)) or {}
    env = collect(lambda: settings.parse(EnvSettings, _plain(merged.env), "env"))
    if env is not None:
        _set_paths(env)  # first: data sets look for their files under env.data_root
    collect(lambda: _merge_model(merged))
    collect(lambda: _merge_datasets(merged))
    run = collect(lambda: _check_run(merged.run))
    if not faults and run is not None:
        faults += _unknown_splits(merged.datasets, run)
        faults += _not_to_score(merged.datasets, run)
    if faults or run is None or env is None:
        raise ConfigError(f"{cfg_path}: " + "; ".join(faults))
    merged.run = OmegaConf.create(_for_lavis(run))
    config = Config(merged, run, env)
    registry.register("configuration", config)
    return config


def dataset_sections(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """The ``datasets`` section as file and options have it, without defaults and unchecked; data roots are set.

    Raises:
        ConfigError: If the file or the options cannot be read.
    """
    import lavis  # noqa: F401  (fills the registry with builders)

    with _as_config_error(cfg_path):
        user = _over(_read_yaml(cfg_path), _read_options(options or []))
        _set_paths(settings.parse(EnvSettings, _plain(OmegaConf.create(user.get("env") or {})), "env"))
        sections = _section(user, "datasets")
        return {str(name): _plain(_section(sections, str(name), "datasets.")) for name in sections}


def run_section(cfg_path: str | os.PathLike, options: Sequence[str] | None = None) -> dict[str, Any]:
    """The ``run`` section as file and options have it, without defaults and unchecked.

    Raises:
        ConfigError: If the file or the options cannot be read.
    """
    with _as_config_error(cfg_path):
        return _plain(_section(_over(_read_yaml(cfg_path), _read_options(options or [])), "run"))


@contextmanager
def _as_config_error(cfg_path: str | os.PathLike) -> Iterator[None]:
    """What cannot be resolved (``${nothing}``) is a mistake of the configuration."""
    try:
        yield
    except OmegaConfBaseException as error:
        raise ConfigError(f"{cfg_path}: {' '.join(str(error).split())[:_LONGEST_FAULT]}") from error


def read_options(options: Sequence[str]) -> dict[str, Any]:
    """Overrides as nested plain values.

    Raises:
        ConfigError: If one of them has no value.
    """
    return _plain(_read_options(options))


def _section(config: DictConfig, name: str, where: str = "") -> DictConfig:
    """A part of a configuration that must be a mapping, empty where there is none."""
    part = config.get(name)
    if part is None or isinstance(part, DictConfig):
        return OmegaConf.create({}) if part is None else part
    raise ConfigError(f"{where}{name}: expected a mapping, found {settings.shown(part)}")


class _Collector:
    """Calls parts of the reading and keeps their faults instead of stopping at the first."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults

    def __call__(self, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except (ConfigError, OmegaConfBaseException) as error:
            self.faults.append(" ".join(str(error).split())[:_LONGEST_FAULT])
            return None


def _read_yaml(path: str | os.PathLike) -> DictConfig:
    if not Path(path).is_file():
        raise ConfigError(f"no configuration file at {path}")
    try:
        loaded = OmegaConf.load(Path(path))
    except (YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold the sections {', '.join(SECTIONS)}, found a list")
    return loaded


def _read_options(options: Sequence[str]) -> DictConfig:
    """``--options`` in either of LAVIS's two forms."""
    if options and "=" not in options[0]:
        mixed = [key for key in options[::2] if "=" in key]
        if mixed:
            raise ConfigError(f"--options: {mixed[0]!r} stands among pairs KEY VALUE; write all as KEY=VALUE")
        if len(options) % 2:
            raise ConfigError(f"--options: {options[-1]!r} has no value; write KEY=VALUE")
        options = [f"{key}={value}" for key, value in zip(options[::2], options[1::2], strict=True)]
    without = [option for option in options if "=" not in option]
    if without:
        raise ConfigError(f"--options: {without[0]!r} has no value; write KEY=VALUE")
    try:
        read = OmegaConf.from_dotlist(list(options))
        for key, _, text in (option.partition("=") for option in options):
            if key == "run.job_id" and isinstance(OmegaConf.select(read, key), (int, float)):
                OmegaConf.update(read, key, text)  # Slurm's 123_4 is the number 1234 in YAML
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"--options: {' '.join(str(error).split())}") from error
    return read


def _no_section(key: str, value: Any) -> str:
    """The sentence for a key that is no section: one that is misspelt, or a setting without its section."""
    if isinstance(value, DictConfig) or difflib.get_close_matches(key[:80], SECTIONS, n=1):
        return _unknown_name("the configuration's sections", key, SECTIONS)
    if key in {field.name for field in dataclasses.fields(RunSettings)}:
        return f"{key} stands in no section, did you mean run.{key}?"
    return f"{settings.shown(key)} stands in no section; name one of {', '.join(SECTIONS)}, as in run.seed"


def _merge_model(merged: DictConfig) -> None:
    """Put the model type's YAML under the user's ``model`` and ``preprocess`` sections, and check the result."""
    from lavis.common.registry import registry

    arch = _word(merged.model.setdefault("arch", _DEFAULT_ARCH), "model.arch")
    model_class = registry.get_model_class(arch)
    if model_class is None:
        raise ConfigError(_unknown_name("model.arch", arch, registry.list_models()))
    types = list(model_class.PRETRAINED_MODEL_CONFIG_DICT)
    model_type = merged.model.get("model_type") or getattr(model_class, "DEFAULT_MODEL_TYPE", types[0])
    if _word(model_type, "model.model_type") not in types:
        raise ConfigError(_unknown_name("model.model_type", model_type, types))
    defaults = _read_yaml(model_class.default_config_path(model_type))
    merged.model = _over(_section(defaults, "model"), merged.model)
    merged.preprocess = _over(_section(defaults, "preprocess"), merged.preprocess)
    merged.model.model_type = model_type
    _check_by(model_class, merged.model, "model")


def _merge_datasets(merged: DictConfig) -> None:
    """Put each builder's default YAML under the user's section of that name; processors come from the model's YAML."""
    if not merged.datasets:
        raise ConfigError("datasets is missing: name at least one registered data set")
    ratios = _section(merged.run, "train_dataset_ratios", "run.")
    unknown = [str(name) for name in ratios if name not in merged.datasets]
    faults = [_unknown_name("run.train_dataset_ratios", name, list(merged.datasets)) for name in unknown]
    for name in list(merged.datasets):
        try:
            merged.datasets[name] = _dataset(_word(name, "datasets"), merged)
        except ConfigError as error:
            faults.append(str(error))
    if faults:
        raise ConfigError("; ".join(faults))


def _dataset(name: str, merged: DictConfig) -> DictConfig:
    from lavis.common.registry import registry

    chosen = _section(merged.datasets, name, "datasets.")
    builder = registry.get_builder_class(name)
    if builder is None:
        raise ConfigError(_unknown_name("datasets", name, registry.list_datasets()))
    kind = _word(chosen.get("type", "default"), f"datasets.{name}.type")
    if kind not in builder.DATASET_CONFIG_DICT:
        raise ConfigError(_unknown_name(f"datasets.{name}.type", kind, list(builder.DATASET_CONFIG_DICT)))
    defaults = _read_yaml(builder.default_config_path(type=kind))
    # LAVIS's video captions name their section otherwise (`msvd_cap`) than their builder; its builders take the first
    section = defaults.datasets.get(name) or next(iter(defaults.datasets.values()))
    whole = _over(OmegaConf.create(dict(merged.preprocess.items())), section, chosen)
    _check_by(builder, whole, f"datasets.{name}")
    return whole


def _check_by(owner: type, section: DictConfig, where: str) -> None:
    """Let the class that will read a section check it, where it can (``check_config(cfg, where)``)."""
    check = getattr(owner, "check_config", None)
    if check is not None:
        check(_plain(section), where)


def _check_run(section: DictConfig) -> RunSettings:
    import lavis.runners  # noqa: F401  (registers LAVIS's own, which `import lavis` does not)
    from lavis.common.registry import registry

    run = parse_run(_plain(section))
    faults = []
    if run.task not in registry.list_tasks():
        faults.append(_unknown_name("run.task", run.task, registry.list_tasks()))
    if run.runner not in registry.list_runners():
        faults.append(_unknown_name("run.runner", run.runner, registry.list_runners()))
    for extra in ("tensorboard", "wandb"):
        if getattr(run, extra) and not run.evaluate and find_spec(extra) is None:
            faults.append(str(MissingExtraError(extra, extra, f"run.{extra}")))
    if faults:
        raise ConfigError("; ".join(faults))
    return run


def _unknown_splits(datasets: DictConfig, run: RunSettings) -> list[str]:
    """The splits that the run names and no data set has; nothing where a builder cannot tell its own (LAVIS's)."""
    from lavis.common.registry import registry

    there: set[str] = set()
    for name, section in datasets.items():
        split_names = getattr(registry.get_builder_class(str(name)), "split_names", None)
        if split_names is None:
            return []
        there.update(split_names(_plain(section)))
    return run.unknown_splits(there)


def _not_to_score(datasets: DictConfig, run: RunSettings) -> list[str]:
    """Why a task of LAVIS's cannot score splits of this package's data sets; nothing where it can, or need not."""
    from lavis.common.registry import registry

    number = _NUMBERED_BY.get(run.task)
    if number is None or not registry.get_task_class(run.task).__module__.startswith("lavis."):
        return []
    scored = {*run.test_splits, *([] if run.evaluate else run.valid_splits)}
    own = []
    for name, section in datasets.items():
        split_names = getattr(registry.get_builder_class(str(name)), "split_names", None)
        if split_names is not None and scored.intersection(split_names(_plain(section))):
            own.append(str(name))
    if not own:
        return []
    return [
        f"run.task {run.task!r} is LAVIS's own and scores by {number}, which {', '.join(own)} does not have: set "
        "run.task=chatbridge_captioning, which scores captions and answers (run.metrics)"
    ]


def _for_lavis(run: RunSettings) -> dict[str, Any]:
    """The run section with every default, and with LAVIS's names beside ours, for tasks that read those."""
    values = dataclasses.asdict(run)
    values["betas"] = list(run.betas)
    values |= {"amp": run.precision == "fp16", "log_freq": run.log_every, "resume_ckpt_path": run.resume}
    return values


def _over(*configs: DictConfig) -> DictConfig:
    """Later ones over earlier ones."""
    try:
        merged = OmegaConf.merge(*configs)
    except (TypeError, ValueError) as error:  # a list where a mapping stands
        raise ConfigError(" ".join(str(error).split())) from error
    if not isinstance(merged, DictConfig):
        raise ConfigError(f"expected mappings, found {merged!r}")
    return merged


def _word(value: Any, where: str) -> str:
    if isinstance(value, str):
        return value
    raise ConfigError(f"{where}: expected a name, found {settings.shown(value)}")


def _plain(section: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(section, resolve=True)  # type: ignore[return-value]


def _unknown_name(where: str, name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name)[:80], list(known), n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
    return f"{where}: unknown name {settings.shown(name)}{hint}"


def _set_paths(env: EnvSettings) -> None:
    """Tell LAVIS's registry (and the readers of data) where data and caches lie.

    LAVIS refuses to register a path twice and comes with its authors' cache folder, so the mapping is written itself.
    """
    from lavis.common.registry import registry

    paths = registry.mapping["paths"]
    if env.data_root is not None:
        os.environ["CHATBRIDGE_DATA"] = str(Path(env.data_root).expanduser().resolve())
    if env.cache_root is not None:
        paths["cache_root"] = str(Path(env.cache_root).expanduser().resolve())
    elif paths.get("cache_root") in (None, _LAVIS_AUTHORS_CACHE):
        paths["cache_root"] = str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lavis")
