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

    def train_step(self, model: nn.Module, samples: Samples) -> Tensor:
        """The mean loss of a batch."""

    def before_evaluation(self, model: nn.Module, dataset: Any) -> None:
        """Called once before `evaluation`."""

    def evaluation(self, model: nn.Module, data_loader: Iterable[Samples], cuda_enabled: bool = True) -> list[Any]:
        """The predictions of this process's batches."""

    def after_evaluation(self, val_result: list[Any], split_name: str, epoch: Any) -> Mapping[str, Any] | None:
        """Merge the predictions of all processes and score them; ``agg_metrics`` chooses the best weights."""


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task of this package: it knows the number of target tokens, and merges the data sets of a split."""

    def weighted_loss(self, model: nn.Module, samples: Samples) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch and its number of target tokens."""

    def evaluation_split(self, datasets: Mapping[str, Any]) -> Any:
        """The data sets of a split as one."""


class TrainLoader(Protocol):
    """The training batches of one process."""

    plan: MixturePlan

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The micro-batches of steps ``start`` to ``stop - 1``, in order."""


@runtime_checkable
class PartlyTrained(Protocol):
    """A model whose parts can be trained one by one (``run.train``)."""

    def parts(self) -> Mapping[str, list[nn.Parameter]]:
        """Name of a part -> its parameters; together all that the model trains by default."""


@runtime_checkable
class Shardable(Protocol):
    """A model that ``run.parallel: fsdp`` and ``run.gradient_checkpointing`` can be used with."""

    def blocks(self) -> list[nn.Module]:
        """The blocks of the language model, each of which runs once per forward, on every batch."""
