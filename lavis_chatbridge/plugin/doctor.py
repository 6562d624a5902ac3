"""``chatbridge doctor``: what would stop a run, found before it starts; and how much memory and time it takes.

Every look at something yields findings; only faults decide the exit status. No model is loaded: a device multiplies two
matrices, for the estimate of time.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lavis_chatbridge.errors import ChatBridgeError, ConfigError
from lavis_chatbridge.plugin.launch import add_options

DISTRIBUTION = "lavis-chatbridge"
SHOWN = ("torch", "torchvision", "torchaudio", "transformers", "salesforce-lavis", "decord", "av", "timm", "numpy")
IMPORTED = {
    "torchvision": "LAVIS imports it: install the release that belongs to your torch",
    "torchaudio": "LAVIS imports it: install the release of your torch (2.11 is the last; it needs torch<2.15)",
    "decord": "LAVIS imports it: pip install decord, or eva-decord where decord has no wheel (macOS, ARM)",
    "av": "videos and sounds are opened with it: pip install av",
    "soundfile": "sounds are opened with it: pip install soundfile",
    "transformers": "pip install 'transformers>=4.57'",
}
"""Package -> what to do when it cannot be imported."""

Level = Literal["ok", "warning", "FAULT"]


class Finding(NamedTuple):
    """One thing that was looked at."""

    level: Level
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge doctor``."""
    parser.add_argument("--cfg-path", metavar="YAML", help="a configuration file, to look at its files and memory too")
    add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print what was found: 0 if nothing stops a run, else 1."""
    if args.options and args.cfg_path is None:
        raise ConfigError("--options change a configuration file: name it with --cfg-path")
    sections = {"packages": packages(), "devices": devices(), "scores": scores()}
    if args.cfg_path is not None:
        sections[args.cfg_path] = configuration(args.cfg_path, args.options)
    faults = 0
    for title, findings in sections.items():
        print(title)
        for level, text in findings:
            faults += level == "FAULT"
            print(f"  {level:<9}{' '.join(text.split()) if level == 'FAULT' else text}", flush=True)
    print(f"{faults} fault{'s' if faults > 1 else ''}" if faults else "nothing stops a run")
    return int(faults > 0)


def packages() -> Iterator[Finding]:
    """Versions, requirements that are not met, known conflicts, and what cannot be imported."""
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    found = {name: _version(name) for name in SHOWN}
    yield Finding("ok", ", ".join(f"{name} {own}" for name, own in found.items() if own))
    yield from _unmet()
    if (clash := conflict(found["torch"], found["torchaudio"])) is not None:
        yield Finding("FAULT", clash)
    for name, remedy in IMPORTED.items():
        try:
            import_module(name)
        except Exception as error:  # a broken binary raises whatever it likes
            cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            yield Finding("FAULT", f"{name} cannot be imported ({cause}). {remedy}")


def conflict(torch: str | None, torchaudio: str | None) -> str | None:
    """The known conflict between torch and torchaudio, or none."""
    if torch is None or torchaudio is None:
        return None
    if _numbers(torch) >= (2, 15) and _numbers(torchaudio) <= (2, 11):
        return (
            f"torchaudio {torchaudio} does not import beside torch {torch} (another CUDA): "
            "pip install 'torch<2.15' with the torchvision of that torch"
        )
    return None


def devices() -> Iterator[Finding]:
    """The devices that torch can use."""
    import torch

    if not torch.cuda.is_available():
        if torch.version.cuda and Path("/dev/nvidiactl").exists():
            yield Finding(
                "warning", f"a GPU is there, but torch (CUDA {torch.version.cuda}) cannot use it: look at its driver"
            )
        yield Finding("ok", f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        text = f"cuda:{i} {properties.name}, {_gib(properties.total_memory)}, capability "
        yield Finding("ok", f"{text}{properties.major}.{properties.minor}")
        if properties.major < 8:
            yield Finding(
                "warning", f"cuda:{i} has no bf16: set run.precision to fp16 and the model's dtypes to float16"
            )


def scores() -> Iterator[Finding]:
    """What METEOR, SPICE and the official tokenizer need."""
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
    """A configuration's faults, weights, data and memory."""
    try:
        from lavis_chatbridge.runners.config import load_config

        cfg = load_config(cfg_path, options)
    except ChatBridgeError as error:
        yield Finding("FAULT", str(error))
        yield from _weights_at_least(cfg_path, options)
        return
    except ImportError as error:
        yield Finding("FAULT", f"LAVIS cannot be imported: {error}")
        return
    if cfg.model_cfg.arch != "chatbridge":
        yield Finding("ok", f"the model is LAVIS's {cfg.model_cfg.arch}: its files are not looked at")
    else:
        yield from _model(cfg)
    for name, section in cfg.datasets_cfg.items():
        yield from _data(str(name), section)
    yield from _folder(cfg)


def _weights_at_least(cfg_path: str, options: Sequence[str]) -> Iterator[Finding]:
    """The model's files where something else of the configuration is at fault; nothing where it is the model."""
    from lavis_chatbridge.models.weights_command import model_settings
    from lavis_chatbridge.runners.config import read_options

    try:
        settings = model_settings(None, cfg_path, read_options(options).get("model"))
    except ChatBridgeError:
        return
    yield from _weights(settings)


def _weights(settings: Any) -> Iterator[Finding]:
    from lavis_chatbridge.models import weights
    from lavis_chatbridge.models.weights_command import size_in_words

    for need in weights.needs(settings):
        if need.fault:
            yield Finding("FAULT", need.fault)
        else:
            yield Finding("ok", f"{need.setting:<32}{size_in_words(need.size):>10}  {need.place}")


def _model(cfg: Any) -> Iterator[Finding]:
    from lavis_chatbridge.models.chatbridge import ChatBridge
    from lavis_chatbridge.models.language_model import check_available

    settings = ChatBridge.check_config(cfg.model_cfg)
    yield from _weights(settings)
    try:
        check_available(settings.language_model)
    except ChatBridgeError as error:
        yield Finding("FAULT", str(error))
    yield _memory(cfg, settings)
    if not cfg.run.evaluate:
        yield from _time(cfg, settings)


def _memory(cfg: Any, settings: Any) -> Finding:
    import torch

    from lavis_chatbridge.models import weights
    from lavis_chatbridge.models.memory import training_memory

    config = weights.llm_config(settings)
    if config is None:
        return Finding("warning", "GPU memory is not estimated: the language model's folder is not there")
    batch, size = cfg.run.batch_size_train, f"batch {cfg.run.batch_size_train}"
    if cfg.run.batch_tokens is not None:
        batch = -(-cfg.run.batch_tokens // (settings.perceiver.queries + settings.max_text_length))
        size = f"batch_tokens {cfg.run.batch_tokens}, {batch} of the longest samples"
    try:
        parts = training_memory(
            settings,
            config,
            batch,
            checkpointing=cfg.run.gradient_checkpointing,
            cached=cfg.run.feature_cache is not None,
        )
    except KeyError as error:
        return Finding("warning", f"GPU memory is not estimated: the language model's config.json lacks {error}")
    total = sum(parts.values())
    largest = sorted(parts.items(), key=lambda part: -part[1])[:4]
    text = f"GPU memory of a training process, estimated: {_gib(total)} at {size} ("
    text += ", ".join(f"{name} {_gib(size)}" for name, size in largest) + " ...)"
    if cfg.run.parallel == "fsdp":
        text += "; fsdp spreads the frozen parts over the processes"
    elif torch.cuda.is_available() and cfg.run.device != "cpu":
        least = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        if total > least:
            remedy = (
                "lower run.batch_size_train or run.batch_tokens, or set run.gradient_checkpointing or parallel: fsdp"
            )
            return Finding("warning", f"{text}; the smallest GPU has {_gib(least)}: {remedy}")
    return Finding("ok", text)


def _time(cfg: Any, settings: Any) -> Iterator[Finding]:
    """How long the training takes on this machine; what an estimate lacks has been said with that of memory."""
    import torch

    from lavis_chatbridge.models import weights
    from lavis_chatbridge.plugin import step_time

    config = weights.llm_config(settings)
    if config is None:
        return
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.run.device != "cpu" else "cpu")
    try:
        yield Finding("ok", step_time.describe(settings, config, cfg.run, device))
    except torch.OutOfMemoryError:
        yield Finding("warning", "time is not estimated: the device has no memory left")
    except KeyError:
        return


def _data(name: str, section: Any) -> Iterator[Finding]:
    from lavis.common.registry import registry

    from lavis_chatbridge.datasets.builders import ChatBridgeBuilder
    from lavis_chatbridge.datasets.settings import WORLD_PREFIX
    from lavis_chatbridge.models.weights_command import size_in_words

    builder = registry.get_builder_class(name)
    if not issubclass(builder, ChatBridgeBuilder):
        yield Finding("ok", f"datasets.{name} is LAVIS's own: its files are not looked at")
        return
    own = builder(section).settings
    files = [path for split in own.used_splits for path in own.files(split).values()]
    there = [path for path in dict.fromkeys(files) if os.path.isfile(path)]
    if own.parts:
        yield Finding("ok", f"datasets.{name}: the files of {', '.join(own.parts)} are there")
    elif name.startswith(WORLD_PREFIX) and not there:
        yield Finding("ok", f"datasets.{name}: the embedded world will be built in {own.root}")
    for path in there:
        yield Finding("ok", f"{'datasets.' + name:<32}{size_in_words(os.path.getsize(path)):>10}  {path}")


def _folder(cfg: Any) -> Iterator[Finding]:
    """What an earlier training left where this one would write."""
    from lavis_chatbridge.runners.folder import RunFolder

    if cfg.run.evaluate or cfg.run.job_id is None:  # which has a folder of its own
        return
    refusal = RunFolder.choose(cfg.run, cfg.to_dict(), "").refusal()
    if refusal:
        yield Finding("FAULT", refusal)


def _unmet() -> Iterator[Finding]:
    """Requirements of this package that what is installed does not meet."""
    from packaging.requirements import Requirement

    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        yield Finding(
            "FAULT", f"{DISTRIBUTION} is not installed, so LAVIS does not know it: pip install {DISTRIBUTION}"
        )
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
