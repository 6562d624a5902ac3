"""LoRA on the language model (Hu et al. 2021, arXiv 2106.09685): small matrices beside frozen ones, by peft.

Adapters are put into the language model in place, so that it stays the class that it was. They train beside the bridge
and are kept where the bridge is. All but `inject` know peft's layers by their attributes and need no peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lavis_chatbridge.errors import ConfigError, MissingExtraError
from lavis_chatbridge.models.settings import LoraSettings

_ADAPTER = "default"
_A, _BASE = ".lora_A.", ".base_layer."
_MARK = ".lora_"


def check_available() -> None:
    """Refuse before anything large is loaded.

    Raises:
        MissingExtraError: If peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "lora", "model.language_model.lora")


def inject(model: nn.Module, settings: LoraSettings) -> None:
    """Put fresh adapters, which change nothing yet, into a frozen language model; they alone are trainable, in fp32.

    Raises:
        MissingExtraError: If peft is not installed.
        ConfigError: If the model has no layer of these names.
    """
    check_available()
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        bias="none",
    )
    try:
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    except ValueError as error:
        cause = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.language_model.lora.target_modules {list(settings.target_modules)} do not fit this language model "
            f"({cause}); its linear layers are named {', '.join(_linear_names(model))}"
        ) from error
    thaw(model)


def thaw(model: nn.Module) -> None:
    """Let the adapters, and nothing else that was frozen, be trained; in fp32, as all that is trained."""
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def set_training(model: nn.Module, mode: bool) -> None:
    """Switch the adapters' dropout; the model around them stays as it is."""
    for layer in _layers(model):
        layer.lora_dropout.train(mode)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _MARK in name


def without_base(name: str) -> str:
    """A frozen weight's name as it is without an adapter around it."""
    return name.replace(_BASE, ".")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Rank, alpha and targets of a model's adapters, or none without adapters."""
    layers = list(_named_layers(model))
    if not layers:
        return None
    return {
        "rank": max(layer.r[_ADAPTER] for _, layer in layers),
        "alpha": float(max(layer.lora_alpha[_ADAPTER] for _, layer in layers)),
        "target_modules": sorted({name.rpartition(".")[2] for name, _ in layers}),
    }


def described_by(tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Rank and targets of the adapters among a checkpoint's tensors, or none; the alpha is in no tensor."""
    ranks = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in tensors.items() if _A in name}
    if not ranks:
        return None
    targets = {name.partition(_A)[0].rpartition(".")[2] for name in ranks}
    return {"rank": max(ranks.values()), "target_modules": sorted(targets)}


def misfit(
    found: Mapping[str, Any] | None, expected: Mapping[str, Any] | None, fresh_is_fine: bool = False
) -> str | None:
    """Why adapters of a checkpoint cannot go into a model's, and how to mend it; none if they can.

    Args:
        found: Of the checkpoint, by `describe` or `described_by`.
        expected: Of the model.
        fresh_is_fine: A checkpoint without adapters may go into a model with fresh ones.
    """
    if found is None and (expected is None or fresh_is_fine):
        return None
    if found is None:
        return f"it has no LoRA adapters, but the model has some of {_words(expected or {})}: set lora to null"
    if expected is None:
        return (
            f"it has LoRA adapters of {_words(found)}, but the model has none: set model.language_model.lora to these"
        )
    different = [key for key in found if key in expected and found[key] != expected[key]]
    if not different:
        return None
    return (
        f"its LoRA adapters are of {_words(found)}, the model's of {_words(expected)}: make model.language_model.lora "
        "agree"
    )


def _named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def _layers(model: nn.Module) -> Iterable[Any]:
    return (layer for _, layer in _named_layers(model))


def _linear_names(model: nn.Module) -> list[str]:
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return sorted(found)


def _words(description: Mapping[str, Any]) -> str:
    """Of a model's, or of a file's, which may hold anything."""
    alpha, targets = description.get("alpha"), description["target_modules"]
    scale = "" if alpha is None else f", alpha {alpha:g}" if isinstance(alpha, (int, float)) else f", alpha {alpha!r}"
    listed = ", ".join(map(str, targets)) if isinstance(targets, (list, tuple)) else repr(targets)
    return f"rank {description['rank']}{scale} on {listed}"
