"""What this package's tasks share, on LAVIS's `BaseTask`: weighted losses, evaluation, merging over processes.

A task knows batches and the model's contract; it knows no data set by name and no training loop.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from torch import Tensor, nn

from lavis_chatbridge.files import write_json
from lavis_chatbridge.tasks.settings import EvaluationSettings
from lavis_chatbridge.tasks.splits import EvaluationSplit


class ChatBridgeTask(BaseTask):
    """Base of this package's tasks.

    Args:
        settings: How answers are decoded and what the model is given.
        seed: Of what evaluation draws.
        splits: Those that a run scores, in their order.
    """

    def __init__(self, settings: EvaluationSettings | None = None, seed: int = 0, splits: Sequence[str] = ()) -> None:
        super().__init__()
        self.inst_id_key = "sample_id"
        self.settings = settings or EvaluationSettings()
        self.seed = seed
        self.splits = list(splits)
        self.datasets: Mapping[str, Mapping[str, Any]] = {}
        self._evaluated: Any = None

    @classmethod
    def setup_task(cls, cfg: Any, **_unused: Any) -> ChatBridgeTask:
        """The task as the ``run`` section describes it."""
        run = cfg.run_cfg
        return cls(EvaluationSettings.of(run), int(run.get("seed", 0)), run.get("test_splits") or ())

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Data set name -> split -> data set, by the registered builders."""
        self.datasets = super().build_datasets(cfg)
        return self.datasets  # type: ignore[return-value]

    def weighted_loss(self, model: nn.Module, samples: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and how many target tokens it is the mean of; both 0-dimensional."""
        output = model(samples)
        return output["loss"], output["target_tokens"]

    def train_step(self, model: nn.Module, samples: Mapping[str, Any]) -> Tensor:
        """The mean loss of a batch, as LAVIS's own loop asks for it."""
        return self.weighted_loss(model, samples)[0]

    def evaluation_split(self, datasets: Mapping[str, Any]) -> EvaluationSplit:
        """The data sets of a split as one, with their media as ``run.media`` says."""
        sources = [source for dataset in datasets.values() for source in dataset.sources]
        return EvaluationSplit(sources, self.settings.media, self.settings.media_kinds, self.seed)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Remember what is scored; LAVIS's base calls a method that only its own models have."""
        self._evaluated = dataset

    def evaluation(self, model: nn.Module, data_loader: Iterable, cuda_enabled: bool = True) -> list[Any]:
        """What `valid_step` gives for every batch of this process, in order."""
        results: list[Any] = []
        for samples in data_loader:
            if samples.get("sample_id", True):  # an empty list: nothing of this batch could be read
                results.extend(self.valid_step(model=model, samples=prepare_sample(samples, cuda_enabled=cuda_enabled)))
        return results

    def unread(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Source of the split -> how many of its samples are missing, where some are.

        Args:
            counts: Source -> how many of its samples there are results of.
        """
        sources = getattr(self._evaluated, "sources", [])
        missing = {source.name: len(source) - counts.get(source.name, 0) for source in sources}
        return {name: count for name, count in missing.items() if count}

    @staticmethod
    def save_result(result: list[dict], result_dir: str, filename: str, remove_duplicate: str = "") -> str:
        """Merge every process's results in the data sets' order and write them; LAVIS's signature.

        Returns:
            The path of the written file, on every process.
        """
        path = os.path.join(result_dir, f"{filename}.json")
        merged = merge(result, remove_duplicate)
        if merged is not None:
            write_json(Path(path), merged)
        if is_dist_avail_and_initialized():
            dist.barrier()
        return path


def merge(result: list[dict], key: str = "") -> list[dict] | None:
    """Every process's results on the main process, ordered by ``source`` and ``index`` where they have them.

    Args:
        result: This process's.
        key: Keep the first of those that agree in it, in their source and, where they have one, in their index.

    Returns:
        All results on the main process, None on the others.
    """
    parts: list[Any] = [result]
    if is_dist_avail_and_initialized():
        parts = [None] * get_world_size()
        dist.gather_object(result, parts if get_rank() == 0 else None, dst=0)
        if get_rank() != 0:
            return None
    together = [record for part in parts for record in part]
    if all("index" in record for record in together):
        order = {name: None for part in parts for name in (record.get("source", "") for record in part)}
        place = {name: number for number, name in enumerate(sorted(order))}
        together.sort(key=lambda record: (place[record.get("source", "")], record["index"]))
    if not key:
        return together
    first: dict[tuple, dict] = {}
    for record in together:
        first.setdefault((record.get("source", ""), record.get("index"), record[key]), record)
    return list(first.values())


def result_dir() -> Path:
    """Where LAVIS's registry says that results go."""
    return Path(registry.get_path("result_dir") or "output/result")
