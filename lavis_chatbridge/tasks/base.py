"""The base class of tasks, on LAVIS's `BaseTask`: the next-token loss, evaluation, gathering over processes.

A task knows batches and the model's interface; it knows no data set by name and no training loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_dist_avail_and_initialized
from lavis.common.registry import registry
from lavis.datasets.data_utils import prepare_sample
from lavis.tasks.base_task import BaseTask
from omegaconf import OmegaConf
from torch import Tensor, nn

from lavis_chatbridge.config import parse
from lavis_chatbridge.tasks.ablation import EvaluationSource, EvaluationSplit
from lavis_chatbridge.tasks.settings import EvaluationSettings

T = TypeVar("T")


@registry.register_task("chatbridge_alignment")
@registry.register_task("chatbridge_instruction")
class ChatBridgeTask(BaseTask):
    """Trains with the mean loss per target token, and validates with it.

    The data set marks the targets in the prompt: captions in stage 1 (alignment; paper, section 3.2), the assistant's
    turns in stage 2 (instruction tuning).

    Args:
        settings: How answers are decoded and which media are replaced.
        seed: Seed of all random choices in evaluation.
    """

    def __init__(self, settings: EvaluationSettings | None = None, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings or EvaluationSettings()
        self.seed = seed
        self.datasets: Mapping[str, Mapping[str, Any]] = {}
        self.sources: Sequence[EvaluationSource] = []
        """The sources of the split that is evaluated; empty for LAVIS's own data sets."""

    @classmethod
    def setup_task(cls, cfg: Any, **_unused: Any) -> ChatBridgeTask:
        """Build the task from the ``run`` section."""
        own = OmegaConf.masked_copy(cfg.run_cfg, list(EvaluationSettings.model_fields))
        return cls(parse(EvaluationSettings, own, "run"), int(cfg.run_cfg.get("seed", 0)))

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Data set name -> split -> data set, by the registered builders."""
        self.datasets = super().build_datasets(cfg)
        return self.datasets  # type: ignore[return-value]

    def weighted_loss(self, model: nn.Module, samples: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The mean loss of a batch, and the number of its target tokens; both 0-dimensional."""
        output = model(samples)
        return output["loss"], output["target_tokens"]

    def evaluation_split(self, datasets: Mapping[str, Any]) -> EvaluationSplit:
        """The data sets of a split as one, with media kept or replaced according to ``run.media``."""
        sources = [source for dataset in datasets.values() for source in dataset.sources]
        return EvaluationSplit(sources, self.settings, self.seed)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Store the split's sources. LAVIS's own version calls a method that only its models have."""
        self.sources = getattr(dataset, "sources", [])

    def evaluation(self, model: nn.Module, data_loader: Iterable, cuda_enabled: bool = True) -> list[Any]:
        """The results of `valid_step` for every batch of this process, in order."""
        results: list[Any] = []
        for samples in data_loader:
            if samples.get("sample_id", True):  # empty if no sample of the batch was readable
                results.extend(self.valid_step(model=model, samples=prepare_sample(samples, cuda_enabled=cuda_enabled)))
        return results

    def valid_step(self, model: Any, samples: Mapping[str, Any]) -> list[Any]:
        """The loss of a batch, summed over its target tokens."""
        loss, count = self.weighted_loss(model, samples)
        total = float(loss) * int(count) if count else 0.0
        names = samples["sample_id"]
        return [{"source": samples["source"], "samples": len(names), "tokens": int(count), "loss": total}]

    def after_evaluation(self, val_result: list[Any], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """The mean loss per target token, over all sources and of each; ``agg_metrics`` is its negative.

        Returns:
            The metrics on the main process, None on the others. Without target tokens there is no loss.
        """
        results = gathered(val_result)
        if results is None:
            return None
        read, tokens, losses = Counter[str](), Counter[str](), Counter[str]()
        for record in results:
            read[record["source"]] += record["samples"]
            tokens[record["source"]] += record["tokens"]
            losses[record["source"]] += record["loss"]
        counts = {"samples": read.total(), "not_predicted": sum(self.unread(read).values())}
        if not tokens.total():
            return counts
        loss = sum(losses[name] for name in sorted(losses)) / tokens.total()
        each = {f"loss_{name}": losses[name] / max(1, tokens[name]) for name in sorted(tokens)}
        return {"agg_metrics": -loss, "loss": loss, **(each if len(each) > 1 else {}), **counts}

    def unread(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Source -> number of samples without a result, given the number with one; only of sources that lack some."""
        missing = {source.name: len(source) - counts.get(source.name, 0) for source in self.sources}
        return {name: count for name, count in missing.items() if count}


def gathered(results: list[T]) -> list[T] | None:
    """Every process's results on the main process, None on the others."""
    if not is_dist_avail_and_initialized():
        return results
    parts: list[Any] | None = [None] * get_world_size() if get_rank() == 0 else None
    dist.gather_object(results, parts, dst=0)
    return None if parts is None else [result for part in parts for result in part]
