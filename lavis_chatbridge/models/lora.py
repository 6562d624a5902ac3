"""LoRA on the language model (Hu et al. 2021, arXiv 2106.09685) with peft: small trained matrices added to frozen ones.

Adapters are added in place, so that the language model keeps its class; a checkpoint contains them and the bridge. Only
:func:`inject` and :func:`merge` need peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lavis_chatbridge.errors import ConfigError, MissingExtraError
from lavis_chatbridge.models.settings import LoraSettings

_ADAPTER, _A = "default", ".lora_A."


def check_available() -> None:
    """Raise a `MissingExtraError` if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora", "model.language_model.lora")


def inject(model: nn.Module, settings: LoraSettings) -> None:
    """Add new adapters, which have no effect yet, to a frozen language model. They are trainable and in fp32.

    Raises:
        ConfigError: If a target is not a linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    linear = (nn.Linear, Conv1D)
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    if wrong := [name for name in settings.target_modules if name not in layers]:
        raise ConfigError(
            f"model.language_model.lora.target_modules: {wrong[0]} is no linear layer of this language model; those "
            f"are named {', '.join(sorted(layers))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
    )
    inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    thaw(model)


def merge(model: nn.Module) -> None:
    """Add all adapters to the weights that they adapt; the result is a plain transformers model."""
    for name, layer in list(_layers(model)):
        base = layer.get_base_layer()
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        if base.weight is embeddings.weight:  # tied: the token embeddings stay as they are
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        layer.merge(safe_merge=True)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, base)


def thaw(model: nn.Module) -> None:
    """Make the adapters trainable, in fp32; the rest stays frozen."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def set_training(model: nn.Module, mode: bool) -> None:
    """Set the training mode of the adapters only (for their dropout)."""
    for _, layer in _layers(model):
        layer.lora_dropout.train(mode)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def without_base(name: str) -> str:
    """A frozen weight's name without the prefix that its adapter adds."""
    return name.replace(".base_layer.", ".")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Rank, alpha and targets of a model's adapters, or None without adapters."""
    layers = list(_layers(model))
    if not layers:
        return None
    return {
        "rank": max(layer.r[_ADAPTER] for _, layer in layers),
        "alpha": float(max(layer.lora_alpha[_ADAPTER] for _, layer in layers)),
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
    }


def described_by(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Rank and targets of the adapters in a checkpoint, or None. The tensors do not tell the alpha."""
    ranks = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items() if _A in name}
    if not ranks:
        return None
    targets = {name.partition(_A)[0].rpartition(".")[2] for name in ranks}
    return {"rank": max(ranks.values()), "target_modules": sorted(targets)}


def misfit(
    found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, new_is_fine: bool = False
) -> str | None:
    """Error text if a checkpoint's adapters do not fit a model's (both as from `describe`), else None.

    With ``new_is_fine`` a checkpoint without adapters fits a model with new ones.
    """
    if found is None and (expected is None or new_is_fine):
        return None
    if found is not None and expected is not None and all(found[key] == expected.get(key) for key in found):
        return None
    return f"its LoRA adapters: {_words(found)}, the model's: {_words(expected)}; change model.language_model.lora"


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _words(description: Mapping[str, Any] | None) -> str:
    if description is None:
        return "none"
    alpha = f", alpha {description['alpha']:g}" if "alpha" in description else ""
    return f"rank {description['rank']}{alpha} on {', '.join(description['target_modules'])}"
