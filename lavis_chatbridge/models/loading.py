"""Fills a ChatBridge from weight files: a trained bridge, or a whole model, or BLIP-2's perceiver."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import checkpoint, lora
from lavis_chatbridge.models.settings import Weights

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

log = logging.getLogger(__name__)

_BLIP2 = ("image_query_tokens", "Qformer.", "ln_vision.")


def load_trained(model: ChatBridge, names: Weights, frozen: tuple[str, ...]) -> None:
    """Load trained tensors only, or a whole state dict, from safetensors or a torch file.

    Args:
        model: It stays unchanged if the file does not fit.
        names: The file.
        frozen: Names of the model's frozen parts; a file has each of them whole or not at all.

    Raises:
        CheckpointError: If the file is missing, unsafe or does not fit.
    """
    file = checkpoint.read(hub.find(names, "model.checkpoint"))
    expected = checkpoint.bridge_tensors(model.state_dict())
    own = {lora.without_base(name): name for name in expected}
    found = {own.get(name, name): t for name, t in checkpoint.bridge_tensors(file.tensors).items()}
    new = _check_adapters(model, file, found)
    required = [n for n, p in model.named_parameters() if p.requires_grad and not (new and lora.is_adapter(n))]
    plain = [name for name in found if not lora.is_adapter(name)]
    held = tuple(f"{part}." for part in frozen if any(name.startswith(f"{part}.") for name in plain))
    required += [n for n in expected if held and n.startswith(held) and not lora.is_adapter(n)]
    if "llama_model." in held and (how := model.settings.language_model.quantization) is not None:
        raise CheckpointError(
            f"{file.path} holds a whole language model, but this one's is quantised to {how}: set "
            "model.language_model.quantization to null, or keep the trained tensors alone in the file"
        )
    checkpoint.check_fit(expected, found, required, file.path, "this model")
    checkpoint.check_finite({name: tensor.to(expected[name].dtype) for name, tensor in found.items()}, file.path)
    model.load_state_dict(found, strict=False)
    log.info("loaded %d tensors from %s", len(found), file.path)


def load_blip2(model: ChatBridge, names: Weights) -> None:
    """Load query tokens, perceiver and ``ln_vision`` of BLIP-2.

    Raises:
        CheckpointError: If the file is missing or does not fit.
    """
    prefixes = checkpoint.BLIP2_BRIDGE
    file = checkpoint.read(hub.find(names, "model.perceiver.weights", prefixes=prefixes), prefixes)
    tensors = checkpoint.bridge_tensors(file.tensors, file.path)
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(_BLIP2)}
    expected = checkpoint.bridge_tensors(model.state_dict())
    required = [name for name in expected if name.startswith(_BLIP2)]
    checkpoint.check_fit(expected, found, required, file.path, "model.perceiver")
    checkpoint.check_finite(found, file.path)
    own = {name: t.to(torch.float32, copy=True).contiguous() for name, t in found.items()}  # training writes to it
    model.load_state_dict(own, strict=False, assign=True)


def _check_adapters(model: ChatBridge, file: checkpoint.WeightFile, found: Mapping[str, Tensor]) -> bool:
    """Refuse a file's adapters that do not fit; returns whether the model keeps its new ones."""
    own, held = lora.describe(model.llama_model), lora.described_by(found)
    if held is not None and file.cfg is not None and isinstance(file.cfg.get("lora"), Mapping):
        held |= dict(file.cfg["lora"])
    if fault := lora.misfit(held, own, fresh_is_fine=True):
        raise CheckpointError(f"{file.path} does not fit this model: {fault}")
    if held is None and own is not None:
        log.info("%s has no LoRA adapters: this model's are new and change nothing yet", file.path)
    return held is None
