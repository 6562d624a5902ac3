"""``chatbridge doctor``: finds faults that would stop a run, and estimates its memory.

Each check yields findings. Only faults affect the exit status. No weights are loaded.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from lavis_chatbridge.errors import INSTALL_LAVIS, ChatBridgeError, ConfigError

if TYPE_CHECKING:
    from lavis_chatbridge.models.settings import ModelSettings
    from lavis_chatbridge.runners.config import Config

DISTRIBUTION = "lavis-chatbridge"
SHOWN = ("torch", "torchvision", "torchaudio", "transformers", "salesforce-lavis", "decord", "av", "timm", "numpy")
IMPORTED = {
    "torchvision": "LAVIS imports it: install the release that belongs to your torch",
    "torchaudio": "LAVIS imports it: install the release of your torch (2.11 is the last; it needs torch<2.15)",
    "decord": "LAVIS imports it: pip install decord, or eva-decord on platforms without a wheel of it (macOS, ARM)",
    "av": "needed for videos and sounds: pip install av",
    "soundfile": "needed for sounds: pip install soundfile",
    "transformers": "pip install 'transformers>=4.57'",
}
"""Package -> remedy if it cannot be imported."""

Level = Literal["ok", "warning", "FAULT"]


class Finding(NamedTuple):
    """The result of one check."""

    level: Level
    text: str


def command(
    cfg_path: Annotated[
        str | None, typer.Option("--cfg-path", metavar="YAML", help="a configuration: also check its files and memory")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("--options", metavar="KEY=VALUE", help="settings that override the file's")
    ] = None,
) -> int:
    """Print all findings; return 1 if there are faults, else 0."""
    if options and cfg_path is None:
        raise ConfigError("--options override a configuration file: set it with --cfg-path")
    sections = {"packages": packages(), "devices": devices(), "scores": scores()}
    if cfg_path is not None:
        sections[cfg_path] = configuration(cfg_path, options or [])
    faults = 0
    for title, findings in sections.items():
        print(title)
        for level, text in findings:
            faults += level == "FAULT"
            print(f"  {level:<9}{' '.join(text.split()) if level == 'FAULT' else text}", flush=True)
    print(f"{faults} fault{'s' if faults > 1 else ''}" if faults else "nothing stops a run")
    return int(faults > 0)


def packages() -> Iterator[Finding]:
    """Versions, unmet requirements, known conflicts, and packages that cannot be imported."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    found = {name: _version(name) for name in SHOWN}
    yield Finding("ok", ", ".join(f"{name} {own}" for name, own in found.items() if own))
    yield from _unmet()
    if (clash := conflict(found["torch"], found["torchaudio"])) is not None:
        yield Finding("FAULT", clash)
    for name, remedy in IMPORTED.items():
        try:
            import_module(name)
        except Exception as error:  # a broken binary may raise anything
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield Finding("FAULT", f"{name} cannot be imported ({cause}). {remedy}")
    if find_spec("lavis") is None:
        yield Finding("FAULT", f"LAVIS is not installed: {INSTALL_LAVIS}")


def conflict(torch: str | None, torchaudio: str | None) -> str | None:
    """The known conflict between torch and torchaudio, or None."""
    from packaging.version import Version

    if torch is None or torchaudio is None:
        return None
    if Version(torch) < Version("2.15") or Version(torchaudio) >= Version("2.12"):
        return None
    remedy = "pip install 'torch<2.15' with the torchvision of that torch"
    return f"torchaudio {torchaudio} cannot be imported with torch {torch} (different CUDA): {remedy}"


def devices() -> Iterator[Finding]:
    """Devices that torch can use."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidiactl").exists():
            yield Finding("warning", f"torch (CUDA {torch.version.cuda}) cannot use the GPU: check its driver")
        yield Finding("ok", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
        return
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"cuda:{i} {gpu.name}, {_gib(gpu.total_memory)}, capability {gpu.major}.{gpu.minor}")
        if gpu.major < 8:
            yield Finding(
                "warning", f"cuda:{i} has no bf16: set run.precision to fp16 and the model's dtypes to float16"
            )


def scores() -> Iterator[Finding]:
    """Caption metrics that cannot be computed on this machine."""
    try:
        from lavis_chatbridge.tasks.scoring.captions import unavailable

        missing = unavailable()
    except ImportError as error:
        yield Finding("warning", f"caption scores cannot be computed: {error}")
        return
    for name, reason in missing.items():
        yield Finding("warning", f"{name}: {reason}")
    if not missing:
        yield Finding("ok", "Java runs: all caption scores can be computed")


def configuration(cfg_path: str, options: Sequence[str]) -> Iterator[Finding]:
    """A configuration's faults, weight files, data and memory."""
    try:
        from lavis_chatbridge.runners.config import load_config
        from lavis_chatbridge.runners.folder import RunFolder

        cfg = load_config(cfg_path, options)
    except ChatBridgeError as error:
        yield Finding("FAULT", str(error))
        with suppress(ChatBridgeError):  # the model's files, if the fault lies elsewhere
            from lavis_chatbridge.config import read_options
            from lavis_chatbridge.models.weights import model_settings

            yield from _weights(model_settings(None, cfg_path, read_options(options).get("model")))
        return
    except ImportError as error:
        yield Finding("FAULT", f"LAVIS cannot be imported ({error}): {INSTALL_LAVIS}")
        return
    if cfg.model_cfg.arch != "chatbridge":
        yield Finding("ok", f"the model is LAVIS's {cfg.model_cfg.arch}: its files are not checked")
    else:
        yield from _model(cfg)
    for name, section in cfg.datasets_cfg.items():
        yield from _data(str(name), section)
    if not cfg.run.evaluate and cfg.run.job_id is not None:  # else the run gets a folder of its own
        try:
            RunFolder(cfg.run).check()
        except ConfigError as error:
            yield Finding("FAULT", str(error))


def _weights(settings: ModelSettings) -> Iterator[Finding]:
    from lavis_chatbridge.models import weights

    for need in weights.needs(settings):
        found, line = weights.described(need)
        level: Level = "FAULT" if found.state == "missing" else "warning" if found.state == "to fetch" else "ok"
        yield Finding(level, line)


def _model(cfg: Config) -> Iterator[Finding]:
    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.models.language_model import check_available

    settings = ChatBridge.check_config(cfg.model_cfg)
    yield from _weights(settings)
    try:
        check_available(settings.language_model)
    except ChatBridgeError as error:
        yield Finding("FAULT", str(error))
    yield _memory(cfg, settings)


def _memory(cfg: Config, settings: ModelSettings) -> Finding:
    import torch

    from lavis_chatbridge.models.memory import training_memory

    batch, size = cfg.run.batch_size_train, f"batch {cfg.run.batch_size_train}"
    if cfg.run.batch_tokens is not None:
        batch = -(-cfg.run.batch_tokens // (settings.perceiver.queries + settings.max_text_length))
        size = f"batch_tokens {cfg.run.batch_tokens}, {batch} of the longest samples"
    try:
        parts = training_memory(settings, batch, cfg.run.gradient_checkpointing)
    except (ChatBridgeError, AttributeError) as error:  # the latter: no LLaMA-like configuration
        return Finding("warning", f"GPU memory is not estimated: {error}")
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    text = f"GPU memory of a training process, estimated: {_gib(total)} at {size} ("
    text += ", ".join(f"{name} {_gib(size)}" for name, size in largest) + " ...)"
    if cfg.run.parallel == "fsdp":
        text += "; fsdp shards the language model over the processes"
    elif torch.cuda.is_available() and cfg.run.device != "cpu":
        least = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        if total > least:
            remedy = (
                "lower run.batch_size_train or run.batch_tokens, or set run.gradient_checkpointing or parallel: fsdp"
            )
            return Finding("warning", f"{text}; the smallest GPU has {_gib(least)}: {remedy}")
    return Finding("ok", text)


def _data(name: str, section: Any) -> Iterator[Finding]:
    from lavis.common.registry import registry

    from lavis_chatbridge.datasets.builders import ChatBridgeBuilder
    from lavis_chatbridge.datasets.settings import WORLD_PREFIX
    from lavis_chatbridge.hub import in_words

    builder = registry.get_builder_class(name)
    if not issubclass(builder, ChatBridgeBuilder):
        yield Finding("ok", f"datasets.{name} is LAVIS's own: its files are not checked")
        return
    own = builder(section).settings
    files = [path for split in own.used_splits for paths in own.files(split).values() for path in paths]
    there = [path for path in dict.fromkeys(files) if os.path.isfile(path)]
    if own.parts:
        yield Finding("ok", f"datasets.{name}: the files of {', '.join(own.parts)} exist")
    elif name.startswith(WORLD_PREFIX) and not there:
        yield Finding("ok", f"datasets.{name}: the embedded world will be built in {own.root}")
    for path in there:
        yield Finding("ok", f"{'datasets.' + name:<32}{in_words(os.path.getsize(path)):>10}  {path}")


def _unmet() -> Iterator[Finding]:
    """Requirements of this package that the installed versions do not meet."""
    from packaging.requirements import Requirement

    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        yield Finding("FAULT", f"{DISTRIBUTION} is not installed, so LAVIS cannot find it: pip install its wheel")
        return
    for requirement in map(Requirement, listed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        own = _version(requirement.name)
        if own is None:
            yield Finding("FAULT", f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(own, prereleases=True):
            yield Finding("FAULT", f"{requirement.name} {own} is installed: pip install '{requirement}'")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
