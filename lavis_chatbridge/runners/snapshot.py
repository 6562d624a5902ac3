"""Between a living run and a `Checkpoint`: what is taken out of model, optimiser and generators, and put back.

Frozen weights are not kept, only their fingerprints, so that a checkpoint cannot be continued on other ones unnoticed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import random
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import checkpoint, lora
from lavis_chatbridge.runners import checkpoints, optim

_PROBES = 1024
"""Values of a frozen tensor that its fingerprint reads, evenly spread: 26 GB would take half a minute to hash whole."""

_WORD_PROBES = 256

_SEPARATOR = "|"
_ADAMW = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter."""
_PACKAGES = ("torch", "transformers", "salesforce-lavis", "safetensors", "numpy", "lavis-chatbridge")


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trainable parameters, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in optim.trainable(model).items()}


def check_trained_weights(
    model: nn.Module, weights: Mapping[str, Tensor], where: str, adapters: Mapping[str, Any] | None = None
) -> None:
    """Look at trained weights before anything is put into the model.

    Args:
        model: The model.
        weights: Trained weights by name.
        where: Where they come from, for the message.
        adapters: What the checkpoint says of its LoRA adapters; without it, what the weights tell.

    Raises:
        CheckpointError: With the differences, if names, shapes or adapters do not fit, or a value is not finite.
    """
    misfit = lora.misfit(adapters or lora.described_by(weights), lora.describe(model))
    if misfit is not None:
        raise CheckpointError(f"{where} is for another model: {misfit}")
    parameters = optim.trainable(model)
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    expected = {name: list(parameter.shape) for name, parameter in parameters.items()}
    faults = checkpoints.differences(shapes, expected)
    if faults:
        raise CheckpointError(f"{where} is for another model: {'; '.join(faults)}")
    checkpoint.check_fit(parameters, weights, parameters, where, "this model")
    checkpoint.check_finite(weights, where)


def load_trained_weights(
    model: nn.Module, weights: Mapping[str, Tensor], where: str, adapters: Mapping[str, Any] | None = None
) -> None:
    """Put trained weights into the model, once `check_trained_weights` has found no fault in them."""
    check_trained_weights(model, weights, where, adapters)
    with torch.no_grad():
        for name, parameter in optim.trainable(model).items():
            parameter.copy_(weights[name])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter name; parameters that never had a gradient have none."""
    named: dict[Tensor, str] = {parameter: name for name, parameter in optim.trainable(model).items()}
    return {
        f"{named[parameter]}{_SEPARATOR}{key}": torch.as_tensor(value).detach().cpu().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def check_optimizer(model: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Look at the optimiser's state before it is put back.

    Raises:
        CheckpointError: If it lacks a part of what AdamW keeps for a parameter, or a part has another shape, holds no
            real numbers, or is not finite.
    """
    parameters = optim.trainable(model)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(_SEPARATOR)
        if name in parameters:
            parts.setdefault(name, {})[part] = tensor
    faults = []
    for name, state in parts.items():
        expected = {part: [] if part == "step" else list(parameters[name].shape) for part in _ADAMW}
        found = {part: list(state[part].squeeze().shape if part == "step" else state[part].shape) for part in state}
        faults += checkpoints.differences(found, expected)
        faults += [f"{part} holds no real numbers" for part, tensor in state.items() if not tensor.is_floating_point()]
    if faults:
        raise CheckpointError(f"{where} holds an optimiser's state that does not fit: {'; '.join(faults[:5])}")
    checkpoint.check_finite(tensors, where)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the optimiser's state back; learning rates and decay stay those of the configuration."""
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(_SEPARATOR)
        states.setdefault(name, {})[part] = tensor
    names = {parameter: name for name, parameter in optim.trainable(model).items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    current = optimizer.state_dict()
    current["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
    optimizer.load_state_dict(current)


def rng_state() -> dict[str, Any]:
    """The state of this process's random generators, as JSON's types."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": _encode(torch.get_rng_state()),
        "numpy": [
            name,
            np.asarray(keys).tolist(),
            *(float(value) if isinstance(value, float) else int(value) for value in rest),
        ],
        "python": [version, list(internal), gauss],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = _encode(torch.cuda.get_rng_state())
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put this process's random generators back."""
    torch.set_rng_state(_decode(state["torch"]))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A digest of every top-level part's frozen weights and of the tokenizer.

    Values are rounded to bfloat16 first, so that the same weights loaded in another precision count as the same.
    """
    digests: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            part = digests.setdefault(name.split(".")[0], hashlib.blake2b(digest_size=16))
            part.update(f"{lora.without_base(name)} {tuple(parameter.shape)}".encode())
            part.update(_probe(parameter))
    found = {name: digest.hexdigest() for name, digest in digests.items()}
    for name in ("llama_tokenizer", "tokenizer", "llm_tokenizer"):
        tokenizer = getattr(model, name, None)
        if tokenizer is not None:
            found["tokenizer"] = _vocabulary_digest(tokenizer)
            break
    return found


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _probe(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    if flat.numel() > _PROBES:
        flat = flat[torch.linspace(0, flat.numel() - 1, _PROBES, dtype=torch.float64).long().to(flat.device)]
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    return flat.cpu().numpy().tobytes()


def _vocabulary_digest(tokenizer: Any) -> str:
    """A digest of a tokenizer's size and of words spread over its vocabulary."""
    size = len(tokenizer)
    ids = sorted({number * max(1, size - 1) // _WORD_PROBES for number in range(_WORD_PROBES)} | {size - 1})
    words = [tokenizer.decode([number]) for number in ids if 0 <= number < size]
    return hashlib.blake2b(json.dumps([size, words]).encode(), digest_size=16).hexdigest()


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
