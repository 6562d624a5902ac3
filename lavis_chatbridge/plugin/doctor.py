"""``chatbridge doctor``: finds faults that would stop a run, and estimates its memory.

Each check yields findings. Only faults affect the exit status. No weights are loaded: memory is estimated from a model
on the meta device, whose activations are those of a LLaMA-like language model.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lavis_chatbridge import hub
from lavis_chatbridge.config import find_yaml
from lavis_chatbridge.errors import INSTALL_LAVIS, ChatBridgeError, one_line
from lavis_chatbridge.plugin.launch import CfgPathOrNone, Options, load

if TYPE_CHECKING:
    from lavis_chatbridge.models.settings import EncoderSettings, ModelSettings, Weights
    from lavis_chatbridge.runners.config import Config

SHOWN = ("torch", "torchvision", "torchaudio", "transformers", "salesforce-lavis", "decord", "av", "timm", "numpy")
IMPORTED = {
    "lavis": f"If it is not installed: {INSTALL_LAVIS}",
    "torchvision": "LAVIS imports it: install the release that belongs to your torch",
    "torchaudio": "LAVIS imports it: install the release of your torch (2.11 is the last; it needs torch<2.15)",
    "decord": "LAVIS imports it: pip install decord, or eva-decord on platforms without a wheel of it (macOS, ARM)",
    "av": "needed for videos and sounds: pip install av",
    "soundfile": "needed for sounds: pip install soundfile",
    "transformers": "pip install 'transformers>=4.57'",
}
"""Package -> remedy if it cannot be imported."""

_QUANTIZED = {"8bit": 1.01, "4bit": 0.52}
"""Bytes per quantised parameter, scales included."""

Level = Literal["ok", "warning", "FAULT"]


class Finding(NamedTuple):
    level: Level
    text: str


def command(cfg_path: CfgPathOrNone = None, options: Options = None) -> int:
    """Print all findings, with a configuration also about its files and memory; return 1 if there are faults."""
    if cfg_path is not None:
        find_yaml(cfg_path)
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
    """Versions, unmet requirements, and packages that cannot be imported."""
    from packaging.requirements import Requirement

    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("ok", ", ".join(f"{name} {own}" for name in SHOWN if (own := _version(name))))
    try:
        requirements = [Requirement(text) for text in requires("lavis-chatbridge") or []]
    except PackageNotFoundError:
        requirements = []
        yield Finding("FAULT", "lavis-chatbridge is not installed, so LAVIS cannot find it: pip install its wheel")
    for requirement in requirements:
        own = _version(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if own is None or not requirement.specifier.contains(own, prereleases=True):
            found = f"{requirement.name} {own or ''}".strip()
            yield Finding("FAULT", f"{found} is {'' if own else 'not '}installed: pip install '{requirement}'")
    for name, remedy in IMPORTED.items():
        try:
            import_module(name)
        except Exception as error:  # a broken binary may raise anything
            cause = f"{type(error).__name__}: {one_line(error)}"
            yield Finding("FAULT", f"{name} cannot be imported ({cause}). {remedy}")


def devices() -> Iterator[Finding]:
    """Devices that torch can use."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("ok", f"no GPU; CPU cores: {os.cpu_count()}, threads: {torch.get_num_threads()}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"cuda:{i} {gpu.name}, {_gib(gpu.total_memory)}, capability {gpu.major}.{gpu.minor}")
        if gpu.major < 8:
            yield Finding("warning", f"cuda:{i} has no bf16: set run.precision=fp16 and the model's dtypes to float16")


def scores() -> Iterator[Finding]:
    """Caption metrics that cannot be computed on this machine."""
    try:
        from lavis_chatbridge.tasks.scoring.captions import unavailable

        missing = unavailable()
    except ImportError as error:
        missing = {"caption scores cannot be computed": str(error)}
    for name, reason in missing.items():
        yield Finding("warning", f"{name}: {reason}")
    if not missing:
        yield Finding("ok", "Java runs: all caption scores can be computed")


def configuration(cfg_path: str, options: Sequence[str]) -> Iterator[Finding]:
    """A configuration's faults and missing files, its weights and its memory."""
    try:
        cfg = load(cfg_path, options)
    except (ChatBridgeError, ImportError) as error:
        yield Finding("FAULT", str(error))
        with suppress(ChatBridgeError, ImportError):  # the model's files, if the fault lies elsewhere
            from lavis_chatbridge.config import read_options
            from lavis_chatbridge.models.weights import model_settings

            yield from _weights(model_settings(None, cfg_path, read_options(options).get("model")))
        return
    from lavis_chatbridge.runners.folder import RunFolder

    if cfg.model_cfg.arch == "chatbridge":
        from lavis_chatbridge.models.chatbridge import ChatBridge
        from lavis_chatbridge.models.language_model import check_available

        settings = ChatBridge.check_config(cfg.model_cfg)
        yield from _weights(settings)
        yield from _fault_of(lambda: check_available(settings.language_model))
        yield _memory(cfg, settings)
    if not cfg.run.evaluate and cfg.run.job_id is not None:  # else the run gets a folder of its own
        yield from _fault_of(RunFolder(cfg.run).check)


def _weights(settings: ModelSettings) -> Iterator[Finding]:
    from lavis_chatbridge.models import weights

    for need in weights.needs(settings):
        found, line = weights.described(need)
        level: Level = "FAULT" if found.state == "missing" else "warning" if found.state == "to fetch" else "ok"
        yield Finding(level, line)


def _memory(cfg: Config, settings: ModelSettings) -> Finding:
    import torch

    batch = cfg.run.batch_size_train
    if cfg.run.batch_tokens is not None:  # of the longest samples
        batch = -(-cfg.run.batch_tokens // (settings.perceiver.queries + settings.max_text_length))
    try:
        parts = training_memory(settings, batch, cfg.run.gradient_checkpointing)
    except (ChatBridgeError, AttributeError) as error:  # the latter: no LLaMA-like configuration
        return Finding("warning", f"GPU memory is not estimated: {error}")
    total, largest = sum(parts.values()), sorted(parts.items(), key=lambda part: -part[1])[:4]
    shares = ", ".join(f"{name} {_gib(size)}" for name, size in largest)
    text = f"GPU memory of a training process, estimated: {_gib(total)} with batches of {batch} ({shares} ...)"
    if cfg.run.parallel == "fsdp":
        return Finding("ok", f"{text}; fsdp shards the language model over the processes")
    gpus = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    if gpus and total > min(gpus):
        remedy = "lower run.batch_size_train or batch_tokens, or set run.gradient_checkpointing or run.parallel=fsdp"
        return Finding("warning", f"{text}; the smallest GPU has {_gib(min(gpus))}: {remedy}")
    return Finding("ok", text)


def training_memory(settings: ModelSettings, batch: int, checkpointing: bool = False) -> dict[str, int]:
    """Bytes by part, for micro-batches of ``batch`` samples with one medium and ``max_text_length`` text tokens.

    With ``checkpointing`` the language model's activations are recomputed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from lavis_chatbridge.models import encoders, encoding, state_dicts
    from lavis_chatbridge.models.settings import torch_dtype

    own, perceiver = settings.language_model, settings.perceiver
    described = _config_of(own.weights) if own.weights is not None else dict(own.config or {})
    config = AutoConfig.for_model(described.pop("model_type", "llama"), **described).get_text_config()
    with state_dicts.on_meta():
        llm = AutoModelForCausalLM.from_config(config)
        vision = encoders.build_vision(_without_weights(settings.vision))
        audio = encoders.build_audio(_without_weights(settings.audio))
        trained = _count(encoding.build_perceiver(perceiver, vision.width))
    half = torch_dtype(own.dtype).itemsize
    embeddings = llm.get_input_embeddings().weight.numel() * (1 if config.tie_word_embeddings else 2)
    trained += audio.width * vision.width + perceiver.width * (config.hidden_size + 2 * perceiver.queries)
    blocks = (_count(llm) - embeddings) * _QUANTIZED.get(own.quantization or "", half)
    positions = batch * (perceiver.queries + settings.max_text_length)
    layer = positions * (8 * config.hidden_size + 3 * config.intermediate_size) * half
    kept = positions * config.hidden_size * half
    layers = config.num_hidden_layers
    parts = {
        "vision encoder": _count(vision) * torch_dtype(settings.vision.dtype).itemsize,
        "audio encoder": _count(audio) * torch_dtype(settings.audio.dtype).itemsize,
        "language model": int(blocks) + embeddings * half,
        "trained weights, gradients, AdamW": trained * 16,
        "activations": layers * kept + layer if checkpointing else layers * layer,
        "logits": min(positions, 1024) * config.vocab_size * 8,
        "CUDA": 600 << 20,
    }
    return parts | {"slack": sum(parts.values()) // 10}


def _without_weights(own: EncoderSettings) -> Any:
    """An encoder's settings for random weights, with the sizes in the weights' folder."""
    changes: dict[str, Any] = {"weights": None}
    if own.weights is not None and own.encoder in ("timm", "transformers"):
        config = _config_of(own.weights)
        changes |= {"config": config, "name": own.name or config.get("architecture")}
    return own.model_copy(update=changes)


def _config_of(weights: Weights) -> dict[str, Any]:
    return hub.read_config(hub.find(weights, "weights", "processor"))


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _fault_of(check: Callable[[], object]) -> Iterator[Finding]:
    try:
        check()
    except ChatBridgeError as error:
        yield Finding("FAULT", str(error))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
