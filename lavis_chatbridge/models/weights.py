"""``chatbridge weights``: lists the weights that a model's settings name, and downloads missing ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from tqdm import tqdm

from lavis_chatbridge import hub
from lavis_chatbridge.config import merged, parse, read_yaml
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models.settings import ModelSettings, Weights

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
_BEATS = "https://github.com/microsoft/unilm/tree/master/beats"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)
CfgPath = Annotated[str | None, typer.Option("--cfg-path", metavar="YAML", help="A configuration file.")]


class Need(NamedTuple):
    """Weights that a setting names: the arguments of :func:`hub.find`."""

    names: Weights
    setting: str
    content: hub.Content = "weights"
    prefixes: tuple[str, ...] = ()


def needs(settings: ModelSettings) -> list[Need]:
    """All weights that the settings name."""
    from lavis_chatbridge.models.state_dicts import BLIP2_BRIDGE, BLIP2_VISION

    llm, vision = settings.language_model, settings.vision
    possible = [
        Need(llm.weights or (), "model.language_model.weights", "language_model"),
        Need(llm.tokenizer or (), "model.language_model.tokenizer", "tokenizer"),
        Need(vision.weights or (), "model.vision.weights", prefixes=BLIP2_VISION if vision.encoder == "eva" else ()),
        Need(settings.audio.weights or (), "model.audio.weights"),
        Need(settings.perceiver.weights or (), "model.perceiver.weights", prefixes=BLIP2_BRIDGE),
        Need(settings.checkpoint or (), "model.checkpoint"),
    ]
    return [need for need in possible if need.names]


def find_all(settings: ModelSettings) -> dict[str, Path]:
    """Setting -> local file or folder, downloaded if necessary; a `CheckpointError` names all missing ones."""
    found, faults = {}, []
    for need in needs(settings):
        try:
            found[need.setting] = hub.find(*need)
        except CheckpointError as error:
            faults.append(f"{error}{_origin(need)}")
    if faults:
        raise CheckpointError("; ".join(faults))
    return found


def model_types() -> list[str]:
    """The shipped model types."""
    return sorted(path.stem.removeprefix("chatbridge_") for path in CONFIGS.glob("chatbridge_*.yaml"))


def config_path(model_type: str) -> Path:
    """The YAML of a shipped model type; a `ConfigError` if there is none."""
    if model_type not in model_types():
        path = Path(model_type)
        weight_file = path / "model.safetensors" if path.is_dir() else path
        if weight_file.is_file():
            raise ConfigError(f"{path} has no configuration: name a model type, and set model.checkpoint={weight_file}")
        if path.is_dir():
            raise ConfigError(f"no config.yaml in the folder {path}: expected a run's folder or a model type")
        raise ConfigError(f"unknown model type {model_type!r}; known are {', '.join(model_types())}")
    return CONFIGS / f"chatbridge_{model_type}.yaml"


def model_settings(model_type: str | None, cfg_path: str | None = None, changes: Any = None) -> ModelSettings:
    """The settings of a model type (by default that of ``cfg_path``, or ``tiny``), overridden by the file's ``model``
    section, then by ``changes``; a `ConfigError` names all faults.
    """
    file: Any = read_yaml(cfg_path).get("model") if cfg_path is not None else None
    own: Any = merged(file or {}, dict(changes or {}))
    chosen = model_type or own.get("model_type") or "tiny"
    base = read_yaml(config_path(chosen)).model
    return parse(ModelSettings, merged(base, own, {"model_type": chosen}), "model")


def described(need: Need) -> tuple[hub.Found, str]:
    """The location of weights, and a line that describes it."""
    found = hub.status(*need)
    if found.state == "missing":
        return found, f"{found.fault}{_origin(need)}"
    size = "unknown size" if found.size is None else tqdm.format_sizeof(found.size, "B", 1024)
    return found, f"{need.setting:<32}{size:>12}  {found.path or ' or '.join(hub.as_list(need.names))}"


@app.command("list")
def list_command(
    model_type: Annotated[str | None, typer.Option("--model-type", help="A shipped model type.")] = None,
    cfg_path: CfgPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the weights that a model needs (local, cached, to fetch or missing) with their sizes."""
    report: dict[str, list[dict[str, Any]]] = {}
    for name, settings in _wanted(model_type, cfg_path):
        report[name], lines = [], [name]
        for need in needs(settings):
            found, line = described(need)
            report[name].append({"setting": need.setting, "names": need.names, **found._asdict()})
            lines.append(f"  {found.state:<9}{line}")
        if not as_json:
            typer.echo("\n".join(lines))
    if as_json:
        typer.echo(json.dumps(report, default=str))
    missing = any(row["state"] == "missing" for rows in report.values() for row in rows)
    if missing and (model_type or cfg_path) is not None:
        raise typer.Exit(1)


@app.command("download")
def download_command(
    model_type: Annotated[str | None, typer.Argument(help="A shipped model type.")] = None,
    cfg_path: CfgPath = None,
) -> None:
    """Download the weights that a model needs and that are not on this machine."""
    if (model_type is None) == (cfg_path is None):
        raise ConfigError("name a model type or --cfg-path")
    for _, settings in _wanted(model_type, cfg_path):
        for setting, path in find_all(settings).items():
            typer.echo(f"{setting:<32}{path}")


def _origin(need: Need) -> str:
    """For error texts: where to get weights that cannot be downloaded."""
    return f" (BEATs is published by {_BEATS})" if "BEATs" in str(need.names) else ""


def _wanted(model_type: str | None, cfg_path: str | None) -> Iterator[tuple[str, ModelSettings]]:
    """Name and settings of the chosen model, or of every shipped type."""
    for name in [model_type] if model_type or cfg_path else model_types():
        yield cfg_path or str(name), model_settings(name, cfg_path)
