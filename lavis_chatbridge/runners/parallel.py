"""A model made ready for its device and its process group: precision, equal weights, sharding, compilation.

What is trained is small and lies on every process. What is frozen is either on every process too (``ddp``) or spread
over them block by block and gathered when a block runs (``fsdp``, FSDP2).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from lavis_chatbridge.errors import ConfigError, TrainingError
from lavis_chatbridge.models import lora
from lavis_chatbridge.runners import distributed, optim, snapshot
from lavis_chatbridge.runners.settings import RunSettings

_log = logging.getLogger(__name__)


def prepare(model: nn.Module, run: RunSettings, device: torch.device) -> dict[str, str]:
    """Move a model to its device and make it alike on all processes.

    Returns:
        The fingerprints of its frozen parts.

    Raises:
        ConfigError: If the model cannot do what the run asks for.
        TrainingError: If processes have loaded different frozen weights.
    """
    raised = optim.keep_in_fp32(optim.trainable(model).values())
    if raised:
        _log.warning("%d trainable weights were in half precision; they are kept in fp32", raised)
    marks = snapshot.fingerprints(model)
    if len({str(sorted(other.items())) for other in distributed.gather_everywhere(marks)}) > 1:
        raise TrainingError("the processes have loaded different frozen weights: give all of them the same files")
    if run.gradient_checkpointing:
        _recompute(model)
    if run.parallel == "fsdp" and distributed.in_group():
        _shard(model, device)
    elif run.parallel == "fsdp":
        _log.warning("run.parallel is fsdp, but this is the only process: nothing is spread, it runs as ddp does")
    model.to(device)
    _broadcast(model)
    if run.compile:
        for block in frozen_blocks(model):
            block.compile()
    return marks


def check_trainable(model: nn.Module, device: torch.device) -> None:
    """Refuse what can answer, but not be trained: parts on several devices, and LLM.int8 in float16 on a CPU.

    bitsandbytes computes the latter by writing into the layers' inputs, which autograd forbids.

    Raises:
        ConfigError: If the language model was loaded like that.
    """
    settings = getattr(getattr(model, "settings", None), "language_model", None)
    if (chosen := getattr(settings, "device_map", None)) is not None:
        raise ConfigError(
            f"model.language_model.device_map is {chosen}, which is for answering: set it to null to train, and use "
            "run.parallel: fsdp if the model does not fit on one device"
        )
    held = (getattr(settings, "quantization", None), getattr(settings, "dtype", None))
    if held == ("8bit", "float16") and device.type == "cpu":
        raise ConfigError(
            "model.language_model.quantization is 8bit with dtype float16, which a CPU can answer with, but not train: "
            "set model.language_model.dtype to bfloat16 or float32"
        )


def frozen_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of the frozen stacks: children of module lists, the outermost ones, in which LoRA alone is trained."""
    blocks: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for stack in model.modules():
        if not isinstance(stack, nn.ModuleList) or stack in inside:
            continue
        for block in stack:
            parameters = list(block.named_parameters())
            if parameters and not any(p.requires_grad and not lora.is_adapter(name) for name, p in parameters):
                blocks.append(block)
                inside.update(block.modules())
    return blocks


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Every process has all weights inside: evaluation takes each one through another number of passes.

    Needs the memory of the whole model on each process while it lasts.
    """
    sharded: list[Any] = [module for module in model.modules() if hasattr(module, "unshard")]
    most_passes = getattr(model, "most_passes", None)
    model.most_passes = None  # type: ignore[assignment]
    for module in sharded:
        module.set_reshard_after_forward(False)
        module.unshard()
    try:
        yield
    finally:
        model.most_passes = most_passes  # type: ignore[assignment]
        for module in sharded:
            module.set_reshard_after_forward(True)
            module.reshard()


def _shard(model: nn.Module, device: torch.device) -> None:
    from torch.distributed import fsdp

    if not hasattr(getattr(fsdp, "FSDPModule", None), "set_reshard_after_forward"):  # which `whole` needs
        raise ConfigError(f"run.parallel fsdp needs torch 2.8 or newer, found {torch.__version__}: use ddp")
    mesh = dist.init_device_mesh(device.type, (distributed.world_size(),))
    blocks = frozen_blocks(model)
    uses = Counter(parameter for block in blocks for parameter in block.parameters())
    # a weight that several blocks share (BEATs' table of relative positions) cannot be spread with one of them
    blocks = [block for block in blocks if all(uses[parameter] == 1 for parameter in block.parameters())]
    if not blocks:
        raise ConfigError("run.parallel is fsdp, but the model has no frozen stack of blocks to spread")
    if any(not (p.is_floating_point() or p.requires_grad) for block in blocks for p in block.parameters()):
        raise ConfigError("run.parallel fsdp cannot spread a quantised language model: use ddp, or no quantization")
    for block in blocks:
        block.to(device)
        # adapters are trained, and what is trained is whole on every process
        adapters = {parameter for name, parameter in block.named_parameters() if lora.is_adapter(name)}
        fsdp.fully_shard(block, mesh=mesh, ignored_params=adapters or None)
    model.most_passes = distributed.most_over_ranks  # type: ignore[assignment]


def _broadcast(model: nn.Module) -> None:
    """The main process's trainable weights, everywhere."""
    if distributed.in_group():
        for parameter in optim.trainable(model).values():
            dist.broadcast(parameter.data, src=0)


def _recompute(model: nn.Module) -> None:
    """Let frozen blocks keep only their inputs for the backward pass.

    The switch that transformers' models have for this does nothing in evaluation mode, in which frozen parts stay.
    """
    blocks = frozen_blocks(model)
    if not blocks:
        raise ConfigError("run.gradient_checkpointing is set, but the model has no frozen stack of blocks")
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any, **more: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **more)
        return checkpoint(forward, *inputs, use_reentrant=False, **more)

    return run
