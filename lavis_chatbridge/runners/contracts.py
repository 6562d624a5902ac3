"""What the runner expects of the tasks, models and loaders that it works with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from lavis_chatbridge.datasets.plan import MixturePlan

Samples: TypeAlias = Mapping[str, Any]
"""One batch as a loader collates it."""

Datasets: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Data set name -> split name -> data set, as tasks build them."""

Loss: TypeAlias = Callable[[nn.Module, Samples], tuple[Tensor, Tensor]]
"""(model, batch) -> (mean loss, number of target tokens), both 0-dimensional."""


class Task(Protocol):
    """LAVIS's contract of a task, as far as the runner calls it."""

    def train_step(self, model: nn.Module, samples: Samples) -> Tensor: ...
    def before_evaluation(self, model: nn.Module, dataset: Any) -> None: ...
    def evaluation(self, model: nn.Module, data_loader: Iterable[Samples], cuda_enabled: bool = True) -> list[Any]: ...
    def after_evaluation(self, val_result: list[Any], split_name: str, epoch: Any) -> Mapping[str, Any] | None: ...


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task of this package: it returns a loss with its number of target tokens, and merges a split's data sets."""

    def weighted_loss(self, model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]: ...
    def evaluation_split(self, datasets: Mapping[str, Any]) -> Any: ...


class TrainLoader(Protocol):
    """The training batches of one process: ``batches`` has the micro-batches of steps ``start`` to ``stop - 1``."""

    plan: MixturePlan

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]: ...


@runtime_checkable
class PartlyTrained(Protocol):
    """A model whose bridge has named parts, of which ``run.train`` chooses some."""

    def parts(self) -> Mapping[str, list[nn.Parameter]]: ...


@runtime_checkable
class Shardable(Protocol):
    """A model with the blocks of its language model, each of which runs once per forward, on every batch."""

    def blocks(self) -> list[nn.Module]: ...
