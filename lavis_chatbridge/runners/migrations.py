"""Checkpoints of other programs, read as ours: those of LAVIS's runners and of the original ChatBridge's.

Both are one ``torch.save`` file with ``model``, ``optimizer`` (by the parameters' order), ``config`` and ``epoch`` or
``iters``. They hold no random state and no fingerprints, so a run goes on from them, but not bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.models import checkpoint
from lavis_chatbridge.runners import optim

_MOST_STEPS = 1 << 40


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
        content = checkpoint.load_torch(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"no checkpoint to go on from (only tensors and plain values are read): {error}"
        ) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("model"), Mapping):
        raise CheckpointError(
            f"{path} is no checkpoint of LAVIS's or the original's form: it has no weights under 'model'"
        )
    held = {str(name).removeprefix("module."): t for name, t in content["model"].items() if isinstance(t, Tensor)}
    trained = optim.trainable(model)
    weights = {name: held[name] for name in trained if name in held}
    epoch, iters = _count(content, "epoch", path), _count(content, "iters", path)
    try:
        optimizer = content.get("optimizer") or {}
        name, order = _order(model, optimizer.get("param_groups") or [])
        state = _by_name(order, optimizer.get("state") or {}, trained)
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds an optimiser of a form that is not known: {error}") from error
    state = {key: tensor.float() for key, tensor in state.items()}
    weights = {key: tensor.float() for key, tensor in weights.items()}
    return Foreign(name, weights, state, None if epoch is None else epoch + 1, iters)


def _count(content: Mapping[str, Any], key: str, path: Path) -> int | None:
    value = content.get(key)
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST_STEPS):
        return value
    raise CheckpointError(f"{path}: {key} is {str(value)[:60]!r}, expected a number of passes or steps")


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
        f"{name}|{key}": value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float32)
        for name, values in named.items()
        if name in trained
        for key, value in values.items()
    }
