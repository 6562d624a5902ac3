"""Prepares a model for distributed training: precision, equal weights, sharding, recomputation, compilation.

Every process has all trained parameters, which are small. With ``ddp`` it has all frozen ones, too; ``fsdp`` (FSDP2)
shards the language model's blocks and gathers each block when it runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import trainable

_log = logging.getLogger(__name__)


@runtime_checkable
class Bridge(Protocol):
    """A model with trained parts between frozen ones, such as ChatBridge.

    ``parts()`` are the trained ones by name; each of ``blocks()``, the language model's, runs once per forward.
    """

    def parts(self) -> Mapping[str, list[nn.Parameter]]: ...
    def blocks(self) -> list[nn.Module]: ...


def choose_trained(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Make only the parts ``names`` of a model trainable; None changes nothing.

    Returns:
        Names of the bridge's parameters, trained or not; checkpoints contain these.
    """
    bridge = list(trainable(model))
    if names is None:
        return bridge
    parts = _as_bridge(model, "run.train").parts()
    unknown = [name for name in names if name not in parts]
    if unknown or not names:
        raise ConfigError(f"run.train: expected some of {', '.join(parts)}, found {', '.join(unknown) or 'none'}")
    for name, parameters in parts.items():
        for parameter in parameters:
            parameter.requires_grad_(name in names)
    return list(dict.fromkeys([*bridge, *trainable(model)]))


def prepare(model: nn.Module, run: RunSettings, device: torch.device) -> None:
    """Move a model to its device and make its trained parameters equal on all processes."""
    for parameter in trainable(model).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):  # they round off an update of 1e-4
            parameter.data = parameter.data.float()
    if run.gradient_checkpointing:
        for block in _as_bridge(model, "run.gradient_checkpointing").blocks():
            block.forward = partial(_recompute, block.forward)
    if run.parallel == "fsdp" and distributed.in_group():
        _shard(_as_bridge(model, "run.parallel fsdp").blocks(), device)
    elif run.parallel == "fsdp":
        _log.warning("run.parallel is fsdp, but this is the only process: nothing is sharded")
    model.to(device)
    if distributed.in_group():
        for parameter in trainable(model).values():
            dist.broadcast(parameter.data, src=0)
    if run.compile:
        for block in _as_bridge(model, "run.compile").blocks():
            block.compile()


def check_trainable(model: nn.Module) -> None:
    """Raise if no parameter is trainable, or the language model is spread over devices, which is only for inference."""
    if not trainable(model):
        raise ConfigError("the model has no trainable parameters: name parts of it in run.train, or set it to null")
    settings = getattr(getattr(model, "settings", None), "language_model", None)
    if (chosen := getattr(settings, "device_map", None)) is not None:
        raise ConfigError(
            f"model.language_model.device_map is {chosen}, which is for inference: set it to null to train, and use "
            "run.parallel: fsdp if the model does not fit on one device"
        )


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather all sharded weights in the block: in evaluation, processes have different numbers of batches."""
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True)
            module.reshard()


def _as_bridge(model: nn.Module, key: str) -> Bridge:
    if not isinstance(model, Bridge):
        raise ConfigError(f"{key} is for ChatBridge, but the model is {type(model).__name__}: drop it")
    return model


def _shard(blocks: Sequence[nn.Module], device: torch.device) -> None:
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_reshard_after_forward"):  # `gathered` needs it
        raise ConfigError(f"run.parallel fsdp needs torch 2.8 or newer, found {torch.__version__}: use ddp")
    if any(not (p.is_floating_point() or p.requires_grad) for block in blocks for p in block.parameters()):
        raise ConfigError("run.parallel fsdp cannot shard a quantised language model: use ddp, or no quantization")
    mesh = dist.init_device_mesh(device.type, (distributed.world_size(),))
    for block in blocks:
        block.to(device)
        adapters = {parameter for name, parameter in block.named_parameters() if lora.is_adapter(name)}
        fsdp.fully_shard(block, mesh=mesh, ignored_params=adapters or None)


def _recompute(forward: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    """Run ``forward`` with activation checkpointing: only its inputs are kept for backward.

    transformers' own switch has no effect in evaluation mode, and frozen parts are always in it.
    """
    if not torch.is_grad_enabled():
        return forward(*inputs, **more)
    return checkpoint(forward, *inputs, use_reentrant=False, **more)
