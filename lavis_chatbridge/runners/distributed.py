"""Several processes: their group and devices, objects that they exchange, equal and sharded weights.

Without a launcher there is one process and no group; all functions also work then. Every process has all trained
parameters, which are small. With ``ddp`` it has all frozen ones, too; ``fsdp`` (FSDP2) shards the language model's
blocks and gathers each block when it runs.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavis_chatbridge.errors import ChatBridgeError, ConfigError, TrainingError
from lavis_chatbridge.launchers import ProcessRank, current_rank
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import trainable

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

_log = logging.getLogger(__name__)
T = TypeVar("T")


# ---- the group


def init(run: RunSettings) -> torch.device:
    """Join the process group if a launcher started several processes; returns this process's device."""
    process = current_rank(os.environ) if run.distributed else ProcessRank()
    device = choose_device(run.device, process)
    if process.world_size > 1 and not dist.is_initialized():
        _join(run, process, device)
    of_rank = f" rank {rank()}" if world_size() > 1 else ""
    logging.basicConfig(format=f"%(asctime)s [%(levelname)s]{of_rank} %(message)s")
    logging.getLogger().setLevel(logging.INFO if is_main() else logging.WARNING)
    return device


def choose_device(wanted: str, process: ProcessRank) -> torch.device:
    """The device of a process; with several GPUs, the one with its local rank."""
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError("run.device is cuda, but torch finds no CUDA device here: use run.device=cpu or auto")
    local_rank, count = process.local_rank, torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"local rank {local_rank} has no CUDA device of its own: {count} found on this machine")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join(run: RunSettings, process: ProcessRank, device: torch.device) -> None:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not address or not port:
        raise ConfigError(
            "MASTER_ADDR or MASTER_PORT is not set: before srun, put export MASTER_ADDR=$(scontrol show hostnames "
            "$SLURM_JOB_NODELIST | head -n 1) MASTER_PORT=29500"
        )
    own = f"rank {process.rank} of {process.world_size}"
    print(
        f"{own}, announced by {process.launcher}, waits for the others at {address}:{port} for up to "
        f"{run.timeout_minutes:g} minutes",
        file=sys.stderr,
        flush=True,
    )
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            rank=process.rank,
            world_size=process.world_size,
            timeout=datetime.timedelta(minutes=run.timeout_minutes),
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise TrainingError(f"{own} cannot join the others: {str(error).splitlines()[0]}") from error


def close() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The rank of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes files and logs."""
    return rank() == 0


def from_main(value: T) -> T:
    """The ``value`` of rank 0, on every process."""
    box: list[Any] = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_everywhere(value: T) -> list[T]:
    """The ``value`` of every process, in rank order, on every process."""
    box: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(box, value)
    return box


@contextmanager
def together() -> Iterator[None]:
    """Re-raise a `ChatBridgeError` of any rank on every rank, at the end of the block.

    The block must not communicate between processes after a line that can raise.
    """
    try:
        yield
    except ChatBridgeError as error:
        gather_everywhere(str(error))
        raise
    for number, other in enumerate(gather_everywhere("")):
        if other:
            raise ChatBridgeError(f"process {number}: {other}")


# ---- the model


def choose_trained(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Make only the parts ``names`` of a model trainable; None changes nothing.

    Returns:
        Names of the bridge's parameters, trained or not; checkpoints contain these.
    """
    bridge = list(trainable(model))
    if names is None:
        return bridge
    parts = _bridge(model, "run.train").parts()
    unknown = [name for name in names if name not in parts]
    if unknown or not names:
        raise ConfigError(f"run.train: expected some of {', '.join(parts)}, found {', '.join(unknown) or 'none'}")
    for name, parameters in parts.items():
        for parameter in parameters:
            parameter.requires_grad_(name in names)
    return list(dict.fromkeys([*bridge, *trainable(model)]))


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


def prepare(model: nn.Module, run: RunSettings, device: torch.device) -> None:
    """Move a model to its device and make its trained parameters equal on all processes."""
    for parameter in trainable(model).values():
        if parameter.dtype in (torch.float16, torch.bfloat16):  # they round off an update of 1e-4
            parameter.data = parameter.data.float()
    if run.gradient_checkpointing:
        for block in _bridge(model, "run.gradient_checkpointing").blocks():
            block.forward = partial(_recompute, block.forward)
    if run.parallel == "fsdp" and world_size() > 1:
        _shard(_bridge(model, "run.parallel fsdp").blocks(), device)
    elif run.parallel == "fsdp":
        _log.warning("run.parallel is fsdp, but this is the only process: nothing is sharded")
    model.to(device)
    if world_size() > 1:
        for parameter in trainable(model).values():
            dist.broadcast(parameter.data, src=0)
    if run.compile:
        for block in _bridge(model, "run.compile").blocks():
            block.compile()


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


def _bridge(model: nn.Module, key: str) -> ChatBridge:
    """The model, which must have ``parts()`` (trained parameters by name) and ``blocks()`` (the language model's)."""
    if not (hasattr(model, "parts") and hasattr(model, "blocks")):
        raise ConfigError(f"{key} is for ChatBridge, but the model is {type(model).__name__}: drop it")
    return model  # type: ignore[return-value]


def _shard(blocks: Sequence[nn.Module], device: torch.device) -> None:
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_reshard_after_forward"):  # `gathered` needs it
        raise ConfigError(f"run.parallel fsdp needs torch 2.8 or newer, found {torch.__version__}: use ddp")
    if any(not (p.is_floating_point() or p.requires_grad) for block in blocks for p in block.parameters()):
        raise ConfigError("run.parallel fsdp cannot shard a quantised language model: use ddp, or no quantization")
    mesh = dist.init_device_mesh(device.type, (world_size(),))
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
