"""Training with the next-token loss: stage 1 on captions, stage 2 on conversations. Validation computes it too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.tasks.base import ChatBridgeTask, gathered


@registry.register_task("chatbridge_alignment")
class AlignmentTask(ChatBridgeTask):
    """Stage 1: the caption is the target, after the media's soft tokens (paper, section 3.2)."""

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The loss of a batch, summed over its target tokens."""
        loss, tokens = self.weighted_loss(model, samples)
        count = int(tokens)
        total = float(loss) * count if count else 0.0
        return [{"source": samples["source"], "samples": len(samples["sample_id"]), "tokens": count, "loss": total}]

    def after_evaluation(self, val_result: list[dict[str, Any]], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """The mean loss per target token, over all sources and of each; ``agg_metrics`` is its negative.

        Returns:
            The metrics on the main process, None on the others. Without target tokens there is no loss.
        """
        results = gathered(val_result)
        if results is None:
            return None
        read, tokens = Counter[str](), Counter[str]()
        losses: dict[str, float] = {}
        for record in results:
            read[record["source"]] += record["samples"]
            tokens[record["source"]] += record["tokens"]
            losses[record["source"]] = losses.get(record["source"], 0.0) + record["loss"]
        counts = {"samples": read.total(), "not_predicted": sum(self.unread(read).values())}
        if not tokens.total():
            return counts
        loss = sum(losses[name] for name in sorted(losses)) / tokens.total()
        each = {f"loss_{name}": losses[name] / max(1, tokens[name]) for name in sorted(tokens)}
        return {"agg_metrics": -loss, "loss": loss, **(each if len(each) > 1 else {}), **counts}


@registry.register_task("chatbridge_instruction")
class InstructionTask(AlignmentTask):
    """Stage 2: the assistant's turns with their end markers are the targets.

    The data set marks the targets in the prompt's pieces, so the loss is the same as in stage 1.
    """
