"""``chatbridge weights``: the weights that a model needs, fetched or not; and one layout for ChatBridge checkpoints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from lavis_chatbridge import hub
from lavis_chatbridge.config import merged, parse, read_options, read_yaml
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models.settings import ModelSettings, Weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
_PREFIX = "chatbridge_"
_BRIDGE = (
    "Qformer.", "audio_trans.", "llama_proj.", "image_query_tokens", "audio_query_tokens", "ln_vision.", "ln_audio.",
    "visual_temporal_pos_embeds", "audio_temporal_pos_embeds",
)  # fmt: skip

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ModelType = Annotated[str | None, typer.Option("--model-type", help="A shipped model type.")]
CfgPath = Annotated[str | None, typer.Option("--cfg-path", metavar="YAML", help="A configuration file.")]
Options = Annotated[list[str] | None, typer.Option("--options", help="Changes to it, KEY=VALUE.")]


_HINTS = {"model.audio.weights": "BEATs is published by https://github.com/microsoft/unilm/tree/master/beats"}


class Need(NamedTuple):
    """Weights that a setting names; see :func:`hub.find` for ``content`` and ``prefixes``."""

    setting: str
    names: Weights
    content: hub.Content = "weights"
    prefixes: tuple[str, ...] = ()

    def find(self) -> Path:
        """The local file or folder, fetched if necessary."""
        return hub.find(self.names, self.setting, self.content, self.prefixes, _HINTS.get(self.setting, ""))

    def status(self) -> hub.Found:
        """Where it is, without fetching it."""
        return hub.status(self.names, self.setting, self.content, self.prefixes, _HINTS.get(self.setting, ""))


def needs(settings: ModelSettings) -> list[Need]:
    """All weights that the settings name."""
    from lavis_chatbridge.models.state_dicts import BLIP2_BRIDGE, BLIP2_VISION

    llm = settings.language_model
    blip2 = BLIP2_VISION if settings.vision.encoder == "eva" else ()
    named: list[tuple[str, Weights | None, hub.Content, tuple[str, ...]]] = [
        ("model.language_model.weights", llm.weights, "language_model", ()),
        ("model.language_model.tokenizer", llm.tokenizer, "tokenizer", ()),
        ("model.vision.weights", settings.vision.weights, "weights", blip2),
        ("model.audio.weights", settings.audio.weights, "weights", ()),
        ("model.perceiver.weights", settings.perceiver.weights, "weights", BLIP2_BRIDGE),
        ("model.checkpoint", settings.trained, "weights", ()),
    ]
    return [Need(setting, names, *rest) for setting, names, *rest in named if names is not None]  # type: ignore[arg-type]


def find_all(settings: ModelSettings) -> dict[str, Path]:
    """Setting -> local file or folder of its weights, fetched if necessary.

    Raises:
        CheckpointError: With everything that cannot be had.
    """
    found, faults = {}, []
    for need in needs(settings):
        try:
            found[need.setting] = need.find()
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError("; ".join(faults))
    return found


def model_types() -> list[str]:
    """The shipped model types."""
    return sorted(path.stem.removeprefix(_PREFIX) for path in CONFIGS.glob(f"{_PREFIX}*.yaml"))


def config_path(model_type: str) -> Path:
    """The YAML of a shipped model type."""
    return CONFIGS / f"{_PREFIX}{model_type}.yaml"


def model_settings(model_type: str | None, cfg_path: str | None = None, changes: Any = None) -> ModelSettings:
    """The ``model`` section of a type, changed by a configuration file.

    Args:
        model_type: The type; by default that of the configuration, or ``tiny``.
        cfg_path: The configuration file.
        changes: A mapping of changes to the file's section.

    Raises:
        ConfigError: If there is no such type or file, or the section has faults.
    """
    from omegaconf import OmegaConf

    file: Any = read_yaml(cfg_path).get("model") if cfg_path is not None else None
    own: Any = merged(OmegaConf.create({}) if file is None else file, dict(changes or {}))
    chosen = model_type or own.get("model_type") or "tiny"
    if chosen not in model_types():
        raise ConfigError(f"there is no model type {chosen!r}; there are {', '.join(model_types())}")
    base = read_yaml(config_path(chosen)).model
    return parse(ModelSettings, merged(base, own, {"model_type": chosen}), "model")


def convert(source: Path, target: Path, force: bool = False) -> tuple[int, Counter[str]]:
    """Write the trained tensors of a ChatBridge checkpoint of any layout as safetensors.

    The encoders' layer norms, which are frozen, are kept: results depend on them.

    Args:
        source: A file, or a folder that training wrote.
        target: The safetensors file to write.
        force: Overwrite the target.

    Returns:
        The number of tensors written, and of those left out by their first name.

    Raises:
        CheckpointError: If the source is no ChatBridge, or the target exists; nothing is written then.
    """
    from lavis_chatbridge.models import lora, state_dicts

    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target}: the name of the file to write must end in .safetensors")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; name another file, or give --force to overwrite it")
    file = state_dicts.read(source)
    named = state_dicts.bridge_tensors(file.tensors, file.path)
    if "llama_proj.weight" not in named:
        raise CheckpointError(f"{file.path} is no ChatBridge checkpoint; it holds {state_dicts.some(file.tensors)}")
    kept = {name: t for name, t in named.items() if name.startswith(_BRIDGE) or lora.is_adapter(name)}
    state_dicts.check_finite(kept, file.path)
    adapters = {"lora": file.cfg["lora"]} if file.cfg and "lora" in file.cfg else None
    try:
        state_dicts.save(target, kept, adapters)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror or error}") from error
    written = {*kept, "query_tokens"}
    return len(kept), Counter(name.partition(".")[0] for name in file.tensors if name not in written)


def described(need: Need) -> tuple[hub.Found, str]:
    """Where the weights are, and one line about it."""
    found = need.status()
    size = "unknown size" if found.size is None else hub.in_words(found.size)
    place = found.fault or found.place or " or ".join(hub.as_list(need.names))
    return found, str(place) if found.state == "missing" else f"{need.setting:<32}{size:>12}  {place}"


@app.command("list")
def list_command(
    model_type: ModelType = None,
    cfg_path: CfgPath = None,
    options: Options = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the weights that a model needs: local, cached, to fetch or missing, with their sizes."""
    missing, rows = 0, {}
    for name, settings in _wanted(model_type, cfg_path, options):
        lines = [(need, *described(need)) for need in needs(settings)]
        missing += sum(found.state == "missing" for _, found, _ in lines)
        rows[name] = [{"setting": need.setting, "names": need.names, **found._asdict()} for need, found, _ in lines]
        if not as_json:
            typer.echo("\n".join([name, *(f"  {found.state:<9}{line}" for _, found, line in lines)]))
    if as_json:
        typer.echo(json.dumps(rows, default=str))
    if missing and (model_type or cfg_path) is not None:
        raise typer.Exit(1)


@app.command("download")
def download_command(
    model_type: Annotated[str | None, typer.Argument(help="A shipped model type.")] = None,
    cfg_path: CfgPath = None,
    options: Options = None,
) -> None:
    """Fetch the weights that a model needs and that are not on this disk."""
    if (model_type is None) == (cfg_path is None):
        raise ConfigError("name a model type or --cfg-path")
    for _, settings in _wanted(model_type, cfg_path, options):
        for setting, place in find_all(settings).items():
            typer.echo(f"{setting:<32}{place}")


@app.command("convert")
def convert_command(
    file: Annotated[Path, typer.Argument(help="A ChatBridge checkpoint of the original, LAVIS or this package.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write a ChatBridge checkpoint of any layout as safetensors."""
    written, dropped = convert(file, out, force)
    left = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(dropped.items()))
    typer.echo(f"{out}: {written} tensors" + (f"; left out: {left}" if left else ""))


def _wanted(
    model_type: str | None, cfg_path: str | None, options: list[str] | None
) -> Iterator[tuple[str, ModelSettings]]:
    """Name and settings of the model that was named, or of every shipped type."""
    changes = read_options(options or []).get("model")
    if cfg_path is not None:
        yield cfg_path, model_settings(model_type, cfg_path, changes)
        return
    for name in [model_type] if model_type else model_types():
        yield name, model_settings(name, None, changes)
