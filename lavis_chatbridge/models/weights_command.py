"""``chatbridge weights list|check|convert``: what weight files are there, what they hold, and one layout for all."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lavis_chatbridge import config as settings_reader
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import checkpoint, hub_folder, weights
from lavis_chatbridge.models.settings import ModelSettings

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "models"
_PREFIX = "chatbridge_"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge weights``."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="the files that a model needs: found or not, size, where to get them")
    _add_model(listing)
    listing.add_argument("--fingerprint", action="store_true", help="read every file and print its SHA-256")
    listing.add_argument("--json", action="store_true", help="print the result as JSON")
    checking = actions.add_parser("check", help="which layout a file has, whether it is sound, and what it fits")
    checking.add_argument("file", type=Path, help="a weight file, a checkpoint's folder, or a language model's folder")
    _add_model(checking)
    converting = actions.add_parser("convert", help="write a ChatBridge checkpoint of any layout as safetensors")
    converting.add_argument("file", type=Path, help="the checkpoint: of the original, of LAVIS, or of this package")
    converting.add_argument("out", type=Path, metavar="OUT.safetensors", help="the file to write")
    _add_model(converting)
    converting.add_argument("--force", action="store_true", help="replace OUT if it exists")


def run(args: argparse.Namespace) -> int:
    """``chatbridge weights``: 0 if all is well, 1 if something that was asked for is missing or does not fit."""
    return {"list": _list, "check": _check, "convert": _convert}[args.action](args)


def model_types() -> list[str]:
    """The shipped model types."""
    return sorted(path.stem.removeprefix(_PREFIX) for path in CONFIGS.glob(f"{_PREFIX}*.yaml"))


def model_settings(
    model_type: str | None, cfg_path: str | None = None, changes: Mapping[str, Any] | None = None
) -> ModelSettings:
    """The model section of a type, with a configuration file's changes over it.

    Args:
        model_type: The type; without it that of the configuration, or ``tiny``.
        cfg_path: The configuration file.
        changes: To the file's section.

    Raises:
        ConfigError: If there is no such type or file, or the section has faults.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    own: Any = {}
    try:
        if cfg_path is not None:
            if not Path(cfg_path).is_file():
                raise ConfigError(f"no configuration file at {cfg_path}")
            loaded = OmegaConf.load(cfg_path)
            if not isinstance(loaded, DictConfig):
                raise ConfigError(f"{cfg_path} must hold sections such as model and run, found a list")
            own = loaded.get("model") or {}
            if not isinstance(own, Mapping):
                raise ConfigError(f"model: expected a mapping, found {settings_reader.shown(own)}")
        own = OmegaConf.merge(own, dict(changes or {}))
        chosen = model_type or own.get("model_type") or "tiny"
        if chosen not in model_types():
            raise ConfigError(f"there is no model type {chosen!r}; there are {', '.join(model_types())}")
        merged = OmegaConf.merge(OmegaConf.load(CONFIGS / f"{_PREFIX}{chosen}.yaml").model, own, {"model_type": chosen})
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise ConfigError(f"{cfg_path} cannot be read: {checkpoint.one_line(error)}") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{cfg_path} is no valid YAML: {' '.join(str(error).split())}") from error
    return settings_reader.parse(ModelSettings, values, "model")


def size_in_words(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return ""


def describe(needs: list[weights.Need], fingerprint: bool = False) -> list[str]:
    """A line for each file."""
    lines = []
    for need in needs:
        if need.fault:
            lines.append(f"  {'MISSING' if need.place is None else 'FAULT':<9}{need.fault}")
            continue
        mark = f"  sha256 {_digest(need)}" if fingerprint and need.place else ""
        lines.append(f"  {'found':<9}{need.setting:<32}{size_in_words(need.size):>10}  {need.place}{mark}")
    return lines


def _add_model(parser: argparse.ArgumentParser) -> None:
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--model-type", choices=model_types(), help="the model that the files are for")
    chosen.add_argument("--cfg-path", metavar="YAML", help="a configuration file whose model they are for")


def _asked(args: argparse.Namespace) -> dict[str, ModelSettings]:
    """What the files are for: the one that was named, or every shipped type."""
    if args.cfg_path is not None:
        return {args.cfg_path: model_settings(None, args.cfg_path)}
    types = [args.model_type] if args.model_type else model_types()
    return {name: model_settings(name) for name in types}


def _is_named(args: argparse.Namespace) -> bool:
    return args.model_type is not None or args.cfg_path is not None


def _list(args: argparse.Namespace) -> int:
    found = {name: weights.needs(settings) for name, settings in _asked(args).items()}
    if args.json:
        print(json.dumps({name: [_as_dict(need, args.fingerprint) for need in each] for name, each in found.items()}))
    else:
        for name, each in found.items():
            print("\n".join([name, *describe(each, args.fingerprint)]))
    return int(_is_named(args) and any(need.fault for each in found.values() for need in each))


def _as_dict(need: weights.Need, fingerprint: bool) -> dict[str, Any]:
    content = {**need._asdict(), "place": None if need.place is None else str(need.place)}
    content["source"] = weights.HINTS[need.setting]
    if fingerprint and need.place is not None and not need.fault:
        content["sha256"] = _digest(need)
    return content


def _digest(need: weights.Need) -> str:
    return "" if need.place is None else weights.digest(*weights.weight_files(need.setting, need.place))


def _check(args: argparse.Namespace) -> int:
    if hub_folder.is_one(args.file):
        return _check_folder(args.file)
    file = weights.open_file(args.file)
    print(f"{file.path}: {weights.LAYOUTS[weights.layout_of(file.tensors)]}")
    _print_content(file.tensors, [file.path])
    weights.check_finite(file)
    faults = {name: _fault(file, settings) for name, settings in _asked(args).items()}
    for name, fault in faults.items():
        print(f"  {'does not fit' if fault else 'fits':<13}{name}{': ' if fault else ''}{fault}")
    return int(all(faults.values()))


def _check_folder(folder: Path) -> int:
    try:
        content = hub_folder.check(folder)
    except CheckpointError as error:
        print(f"{folder}: {error}")
        return 1
    print(f"{folder}: a whole language model (Hugging Face folder)")
    _print_content(content.tensors, hub_folder.weight_files(folder))
    if content.unused:
        print(f"  not used: {checkpoint.some(content.unused)}")
    return 0


def _print_content(tensors: Mapping[str, Tensor], files: list[Path]) -> None:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())
    numbers = sum(tensor.numel() for tensor in tensors.values())
    size = sum(file.stat().st_size for file in files)
    print(f"  {len(tensors)} tensors, {numbers:,} numbers, {', '.join(f'{n} {t}' for t, n in types.items())}")
    print(f"  {size_in_words(size)}, sha256 {weights.digest(*files)}")


def _fault(file: checkpoint.WeightFile, settings: ModelSettings) -> str:
    try:
        weights.check(file, settings)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return ""


def _convert(args: argparse.Namespace) -> int:
    settings = next(iter(_asked(args).values())) if _is_named(args) else None
    done = weights.convert(args.file, args.out, settings, args.force)
    print(f"{args.out}: {len(done.kept)} tensors, {done.parameters:,} numbers, sha256 {weights.digest(args.out)}")
    if done.dropped:
        left = checkpoint.some(f"{name} ({count} tensors)" for name, count in sorted(done.dropped.items()))
        print(f"  left out: {left}")
    return 0
