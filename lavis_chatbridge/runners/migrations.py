"""Checkpoints of other programs, read as ours: those of LAVIS's runners and of the original ChatBridge's.

Both are one ``torch.save`` file with ``model``, ``optimizer`` (by the parameters' order), ``config`` and ``epoch`` or
``iters``. They hold no random state and no fingerprints, so a run goes on from them, but not bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.runners import optim


class Foreign(NamedTuple):
    """What another program's checkpoint gives.

    Attributes:
        format: The migration's name: ``lavis`` or ``original``.
        model: Trained weights by name.
        optimizer: Optimiser tensors by ``PARAMETER|STATE``; empty where its order is unknown.
        epochs: Passes over the data that were done, or None.
        steps: Steps that were done, or None.
    """

    format: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    epochs: int | None
    steps: int | None


def read(path: Path, model: nn.Module) -> Foreign:
    """Read another program's checkpoint for a model.

    Raises:
        CheckpointError: If the file is damaged, holds code, or is of no known form.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        cause = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"cannot read the checkpoint {path} (only tensors and plain values are read): {cause}"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(
            f"{path} is no checkpoint of LAVIS's or the original's form: it has no weights under 'model'"
        )
    held = {str(name).removeprefix("module."): tensor for name, tensor in content["model"].items()}
    trained = optim.trainable(model)
    weights = {name: held[name].float() for name in trained if name in held}
    optimizer = content.get("optimizer") or {}
    name, order = _order(model, optimizer.get("param_groups") or [])
    return Foreign(
        name,
        weights,
        _by_name(order, optimizer.get("state") or {}, trained),
        None if content.get("epoch") is None else int(content["epoch"]) + 1,
        None if content.get("iters") is None else int(content["iters"]),
    )


def _order(model: nn.Module, groups: list[Mapping[str, Any]]) -> tuple[str, list[str]]:
    """Which program wrote an optimiser with these groups, and the parameters in the order of its numbers."""
    sizes = [len(group.get("params", [])) for group in groups]
    every = [name for name, _ in model.named_parameters()]
    trained = optim.trainable(model)
    if len(sizes) == 1:  # the original: one group, frozen parameters too in some versions
        return "original", next((names for names in (every, list(trained)) if len(names) == sizes[0]), [])
    plain = [name for name, parameter in trained.items() if _lavis_decays(name, parameter)]
    rest = [name for name in trained if name not in set(plain)]
    return "lavis", [*plain, *rest] if sizes == [len(plain), len(rest)] else []


def _lavis_decays(name: str, parameter: nn.Parameter) -> bool:
    """LAVIS's rule of which parameters decay (its ``runner_base.py``)."""
    return parameter.ndim >= 2 and not any(part in name for part in ("bias", "ln", "bn"))


def _by_name(order: list[str], state: Mapping[Any, Mapping[str, Any]], trained: Mapping[str, Any]) -> dict[str, Tensor]:
    named = {order[int(number)]: values for number, values in state.items() if int(number) < len(order)}
    return {
        f"{name}|{key}": torch.as_tensor(value, dtype=torch.float32)
        for name, values in named.items()
        if name in trained
        for key, value in values.items()
    }
