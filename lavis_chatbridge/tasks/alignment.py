"""Training by next-token loss: stage 1 on captions, stage 2 on conversations; validation gives the loss as well."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.tasks.base import ChatBridgeTask, merge


@registry.register_task("chatbridge_alignment")
class AlignmentTask(ChatBridgeTask):
    """Stage 1: after the media's soft tokens, the caption is the target (paper, section 3.2)."""

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The loss of a batch, summed over its target tokens."""
        loss, tokens = self.weighted_loss(model, samples)
        count = int(tokens)
        source, number = samples["source"], len(samples.get("sample_id", ()))
        return [{"source": source, "samples": number, "tokens": count, "loss": float(loss) * count if count else 0.0}]

    def after_evaluation(self, val_result: list[dict[str, Any]], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """The mean loss over target tokens, of all sources and of each; ``agg_metrics`` is its negative.

        Returns:
            The metrics on the main process, None on the others. ``samples`` were read and ``not_predicted`` were not;
            where there was no target token there is no loss.
        """
        merged = merge(val_result)
        if merged is None:
            return None
        sums: dict[str, list[float]] = {}
        read: Counter[str] = Counter()
        for record in merged:
            read[record["source"]] += record["samples"]
            total = sums.setdefault(record["source"], [0.0, 0.0])
            total[0] += record["loss"]
            total[1] += record["tokens"]
        counts = {"samples": read.total(), "not_predicted": sum(self.unread(read).values())}
        if not any(tokens for _, tokens in sums.values()):
            return counts
        loss = sum(total[0] for total in sums.values()) / max(1.0, sum(total[1] for total in sums.values()))
        each = {f"loss_{name}": total[0] / max(1.0, total[1]) for name, total in sorted(sums.items())}
        return {"agg_metrics": -loss, "loss": loss, **(each if len(each) > 1 else {}), **counts}


@registry.register_task("chatbridge_instruction")
class InstructionTask(AlignmentTask):
    """Stage 2: conversations, of which the assistant's turns with their end marks are the targets.

    The targets are marked in the prompt's pieces by the data side, so the loss itself is that of stage 1.
    """
