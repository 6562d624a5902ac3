"""What this package's tasks share, on LAVIS's `BaseTask`: weighted losses, evaluation, merging over processes.

A task knows batches and the model's contract; it knows no data set by name and no training loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_chatbridge.tasks.settings import EvaluationSettings
from lavis_chatbridge.tasks.splits import EvaluationSplit

T = TypeVar("T")


class ChatBridgeTask(BaseTask):
    """Base of this package's tasks.

    Args:
        settings: How answers are decoded and what becomes of media.
        seed: Of what evaluation samples at random.
    """

    def __init__(self, settings: EvaluationSettings | None = None, seed: int = 0) -> None:
        super().__init__()
        self.inst_id_key = "sample_id"
        self.settings = settings or EvaluationSettings()
        self.seed = seed
        self.datasets: Mapping[str, Mapping[str, Any]] = {}
        self._split: Any = None

    @classmethod
    def setup_task(cls, cfg: Any, **_unused: Any) -> ChatBridgeTask:
        """The task as the ``run`` section describes it."""
        return cls(EvaluationSettings.of(cfg.run_cfg), int(cfg.run_cfg.get("seed", 0)))

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Data set name -> split -> data set, by the registered builders."""
        self.datasets = super().build_datasets(cfg)
        return self.datasets  # type: ignore[return-value]

    def weighted_loss(self, model: nn.Module, samples: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the number of its target tokens; both 0-dimensional."""
        output = model(samples)
        return output["loss"], output["target_tokens"]

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> Tensor:
        """The mean loss of a batch, for LAVIS's own training loop."""
        return self.weighted_loss(model, samples)[0]

    def evaluation_split(self, datasets: Mapping[str, Any]) -> EvaluationSplit:
        """The data sets of a split as one, with their media as ``run.media`` says."""
        sources = [source for dataset in datasets.values() for source in dataset.sources]
        chosen = self.settings
        return EvaluationSplit(sources, chosen.media, chosen.media_modalities, self.seed, chosen.withheld_words)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Remember the split; LAVIS's base calls a method that only its own models have."""
        self._split = dataset

    def evaluation(self, model: nn.Module, data_loader: Iterable, cuda_enabled: bool = True) -> list[Any]:
        """The results of `valid_step` for every batch of this process, in order."""
        results: list[Any] = []
        for samples in data_loader:
            if samples.get("sample_id", True):  # an empty list: nothing of this batch could be read
                results.extend(self.valid_step(model=model, samples=prepare_sample(samples, cuda_enabled=cuda_enabled)))
        return results

    def unread(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Source of the split -> how many of its samples are missing, for sources that lack some.

        Args:
            counts: Source -> how many of its samples there are results of.
        """
        missing = {source.name: len(source) - counts.get(source.name, 0) for source in self.sources}
        return {name: count for name, count in missing.items() if count}

    @property
    def sources(self) -> Sequence[Any]:
        """The sources of the split; none of LAVIS's own data sets."""
        return getattr(self._split, "sources", [])


def gathered(results: list[T]) -> list[T] | None:
    """Every process's results on the main process, None on the others."""
    if not is_dist_avail_and_initialized():
        return results
    parts: list[Any] | None = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(results, parts, dst=0)
    return None if parts is None else [result for part in parts for result in part]


def result_dir() -> Path:
    """Where LAVIS's registry says that results go."""
    return Path(registry.get_path("result_dir") or "output/result")
