"""LoRA on the language model (Hu et al. 2021, arXiv 2106.09685) with peft: small trained matrices added to frozen ones.

Adapters are added in place, so that the language model keeps its class; a checkpoint contains them and the bridge. Only
:func:`inject` and :func:`merge` need peft.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.models.settings import LoraSettings


def inject(model: nn.Module, settings: LoraSettings) -> None:
    """Add new adapters, which have no effect yet, to a frozen language model; `thaw` makes them trainable.

    Raises:
        ConfigError: If a target is not a linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    linear = (nn.Linear, Conv1D)
    layers = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    if wrong := [name for name in settings.target_modules if name not in layers]:
        raise ConfigError(
            f"model.language_model.lora.target_modules: found {wrong[0]}, expected linear layers of this language "
            f"model: {', '.join(sorted(layers))}"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft takes any number
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
    )
    inject_adapter_in_model(config, model)


def merge(model: nn.Module) -> None:
    """Add all adapters to the weights that they adapt; the result is a plain transformers model."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    for name, layer in list(_layers(model)):
        base = layer.get_base_layer()
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


def describe(model: nn.Module) -> str | None:
    """Rank, alpha and targets of a model's adapters; None without adapters. The alpha is not in the tensors."""
    layers = list(_layers(model))
    if not layers:
        return None
    (_, first), targets = layers[0], sorted({name.rpartition(".")[2] for name, _ in layers})
    return f"rank {first.r['default']}, alpha {first.lora_alpha['default']:g} on {', '.join(targets)}"


def difference(saved: str | None, model: nn.Module) -> str:
    """Error text if a checkpoint's adapters (as from `describe`) are not those of a model, else ""."""
    own = describe(model)
    if saved == own:
        return ""
    return f"its LoRA adapters: {saved or 'none'}, the model's: {own or 'none'}; change model.language_model.lora"


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module
