"""``chatbridge weights``: lists, downloads and converts weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tqdm import tqdm

from lavis_chatbridge import hub
from lavis_chatbridge.config import merged, parse, read_options, read_yaml
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models.settings import ModelSettings, Weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
_PREFIX = "chatbridge_"
_BEATS = "https://github.com/microsoft/unilm/tree/master/beats"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
ModelType = Annotated[str | None, typer.Option("--model-type", help="A shipped model type.")]
CfgPath = Annotated[str | None, typer.Option("--cfg-path", metavar="YAML", help="A configuration file.")]
Options = Annotated[list[str] | None, typer.Option("--options", help="Overrides, KEY=VALUE.")]


class Need(NamedTuple):
    """Weights that a setting names; see :func:`hub.find` for ``content`` and ``prefixes``."""

    setting: str
    names: Weights
    content: hub.Content = "weights"
    prefixes: tuple[str, ...] = ()

    def find(self) -> Path:
        """The local file or folder, downloaded if necessary."""
        return hub.find(self.names, self.setting, self.content, self.prefixes)

    def status(self) -> hub.Found:
        """Its location and size, without downloading it."""
        return hub.status(self.names, self.setting, self.content, self.prefixes)

    def with_origin(self, fault: str) -> str:
        """Add to an error text where to get weights that cannot be downloaded."""
        is_beats = self.setting == "model.audio.weights" and "BEATs" in str(self.names)
        return f"{fault} (BEATs is published by {_BEATS})" if fault and is_beats else fault


def needs(settings: ModelSettings) -> list[Need]:
    """All weights that the settings name."""
    from lavis_chatbridge.models.state_dicts import BLIP2_BRIDGE, BLIP2_VISION

    llm, vision = settings.language_model, settings.vision
    named: list[tuple[str, Weights | None, hub.Content, tuple[str, ...]]] = [
        ("model.language_model.weights", llm.weights, "language_model", ()),
        ("model.language_model.tokenizer", llm.tokenizer, "tokenizer", ()),
        ("model.vision.weights", vision.weights, "weights", BLIP2_VISION if vision.encoder == "eva" else ()),
        ("model.audio.weights", settings.audio.weights, "weights", ()),
        ("model.perceiver.weights", settings.perceiver.weights, "weights", BLIP2_BRIDGE),
        ("model.checkpoint", settings.trained, "weights", ()),
    ]
    return [Need(setting, names, content, p) for setting, names, content, p in named if names is not None]


def find_all(settings: ModelSettings) -> dict[str, Path]:
    """Setting -> local file or folder, downloaded if necessary; a `CheckpointError` names all missing ones."""
    found, faults = {}, []
    for need in needs(settings):
        try:
            found[need.setting] = need.find()
        except CheckpointError as error:
            faults.append(need.with_origin(str(error)))
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
    """The settings of a model type (by default that of ``cfg_path``, or ``tiny``), overridden by the file's ``model``
    section, then by ``changes``; a `ConfigError` names all faults.
    """
    from omegaconf import OmegaConf

    file: Any = read_yaml(cfg_path).get("model") if cfg_path is not None else None
    own: Any = merged(OmegaConf.create({}) if file is None else file, dict(changes or {}))
    chosen = model_type or own.get("model_type") or "tiny"
    if chosen not in model_types():
        raise ConfigError(f"there is no model type {chosen!r}; there are {', '.join(model_types())}")
    base = read_yaml(config_path(chosen)).model
    return parse(ModelSettings, merged(base, own, {"model_type": chosen}), "model")


def described(need: Need) -> tuple[hub.Found, str]:
    """The location of weights, and a line that describes it."""
    found = need.status()
    size = "unknown size" if found.size is None else tqdm.format_sizeof(found.size, "B", 1024)
    place = need.with_origin(found.fault) or found.place or " or ".join(hub.as_list(need.names))
    return found, str(place) if found.state == "missing" else f"{need.setting:<32}{size:>12}  {place}"


@app.command("list")
def list_command(
    model_type: ModelType = None,
    cfg_path: CfgPath = None,
    options: Options = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the weights that a model needs (local, cached, to fetch or missing) with their sizes."""
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
    """Download the weights that a model needs and that are not on this machine."""
    if (model_type is None) == (cfg_path is None):
        raise ConfigError("name a model type or --cfg-path")
    for _, settings in _wanted(model_type, cfg_path, options):
        for setting, place in find_all(settings).items():
            typer.echo(f"{setting:<32}{place}")


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(help="A ChatBridge checkpoint of the original, LAVIS or this package.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="The file to write.")],
) -> None:
    """Write the bridge of a ChatBridge checkpoint (any layout) as safetensors, without the frozen models."""
    from lavis_chatbridge.models import lora, state_dicts

    if out.exists():
        raise CheckpointError(f"{out} exists: name another file")
    file = state_dicts.read(source)
    named = state_dicts.bridge_tensors(file.tensors, file.path)
    frozen = ("visual_encoder.", "audio_encoder.", "llama_model.")  # the layer norms are kept: results need them
    kept = {name: t for name, t in named.items() if not name.startswith(frozen) or lora.is_adapter(name)}
    if "llama_proj.weight" not in kept:
        raise CheckpointError(f"{source} is no ChatBridge checkpoint; it holds {state_dicts.some(file.tensors)}")
    state_dicts.check_finite(kept, source)
    state_dicts.save(out, kept, {"lora": file.cfg["lora"]} if file.cfg and "lora" in file.cfg else None)
    typer.echo(f"{out}: {len(kept)} tensors of {len(file.tensors)}")


def _wanted(
    model_type: str | None, cfg_path: str | None, options: list[str] | None
) -> Iterator[tuple[str, ModelSettings]]:
    """Name and settings of the chosen model, or of every shipped type."""
    changes = read_options(options or []).get("model")
    if cfg_path is not None:
        yield cfg_path, model_settings(model_type, cfg_path, changes)
        return
    for name in [model_type] if model_type else model_types():
        yield name, model_settings(name, None, changes)
