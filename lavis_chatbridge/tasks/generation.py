"""Evaluation by writing: captions and answers, one prediction per sample on disk, scored against what is true."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.prompting.pieces import Piece, Text, context_of
from lavis_chatbridge.tasks import metrics
from lavis_chatbridge.tasks.base import ChatBridgeTask, merge, result_dir, write_json


@registry.register_task("chatbridge_captioning")
class GenerationTask(ChatBridgeTask):
    """Writes a caption or an answer for every sample and scores it.

    Samples with accepted answers get an exact match, others with facts an attribute accuracy. Both are given per
    source, and ``agg_metrics`` is their mean over sources.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._values: dict[str, dict[str, list[str]]] = {}
        self._priors: dict[str, float] = {}

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Learn which values each attribute can take, and how far guessing without looking gets."""
        train = {source.name: source for source in self._sources("train")}
        for source in getattr(dataset, "sources", []):
            seen = facts_of(source)
            learnt = facts_of(train[source.name]) if source.name in train else []
            self._values[source.name] = metrics.values_of([*learnt, *seen])
            if seen and learnt:
                self._priors[source.name] = metrics.text_prior(learnt, seen)

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A prediction per sample, with the prompt that led to it."""
        answers = model.generate(samples, **self._decoding())  # type: ignore[operator]
        shared = {"source": samples["source"]}
        kept = ("index", "sample_id", "references", "answers", "facts", "task", "held_out", "meta")
        columns = {key: samples[key] for key in kept if key in samples}
        records = []
        for number, answer in enumerate(answers):
            own = {key: column[number] for key, column in columns.items()}
            prompt = prompt_text(samples["pieces"][number]) if "pieces" in samples else ""
            records.append({**shared, **own, "prompt": prompt, "prediction": answer})
        return records

    def after_evaluation(self, val_result: list[dict[str, Any]], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """Write the predictions and the scores of a split.

        Returns:
            The metrics on the main process, None on the others.
        """
        records = merge(val_result, key="sample_id")
        if records is None:
            return None
        media = (
            "" if self.settings.media == "normal" else f"_{self.settings.media}_{'_'.join(self.settings.media_kinds)}"
        )
        name = f"{split_name}{media}_step{epoch}"
        write_json(result_dir() / f"{name}.json", records)
        scores = self.score(records) if self.settings.report_metric else {"agg_metrics": 0.0}
        settings = {
            "decoding": self._decoding(),
            "media": self.settings.media,
            "media_kinds": self.settings.media_kinds,
        }
        write_json(result_dir() / f"{name}_metrics.json", {**scores, **settings})
        return scores

    def score(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics per source, and ``agg_metrics``: the mean over sources of each one's accuracy."""
        by_source: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            by_source.setdefault(record["source"], []).append(record)
        scores = {name: self._score_source(name, group) for name, group in by_source.items()}
        accuracies = [score["accuracy"] for score in scores.values() if "accuracy" in score]
        overall = sum(accuracies) / len(accuracies) if accuracies else 0.0
        return {"agg_metrics": overall, "by_source": scores}

    def _score_source(self, source: str, records: list[Mapping[str, Any]]) -> dict[str, Any]:
        answered = [record for record in records if is_question(record)]
        described = [record for record in records if not is_question(record) and record.get("facts")]
        score: dict[str, Any] = {"samples": len(records)}
        if answered:
            said, accepted = [r["prediction"] for r in answered], [accepted_answers(r) for r in answered]
            score["exact_match"] = score["accuracy"] = metrics.exact_match(said, accepted).value
        if described:
            facts = [record["facts"] for record in described]
            values = self._values.get(source) or metrics.values_of(facts)
            found = metrics.attribute_accuracy([r["prediction"] for r in described], facts, values)
            score |= found.to_dict()
            if not answered:
                score["accuracy"] = found.overall.value
        if source in self._priors:
            score["text_prior"] = self._priors[source]
        return score

    def _decoding(self) -> dict[str, Any]:
        s = self.settings
        return {
            "use_nucleus_sampling": s.use_nucleus_sampling,
            "num_beams": s.num_beams,
            "max_length": s.max_len,
            "min_length": s.min_len,
            "top_p": s.top_p,
            "temperature": s.temperature,
            "length_penalty": s.length_penalty,
            "repetition_penalty": s.repetition_penalty,
        }

    def _sources(self, split: str) -> Iterable[Any]:
        for splits in self.datasets.values():
            yield from getattr(splits.get(split), "sources", [])


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether a prediction answers a question for which the data set lists accepted answers."""
    return bool(accepted_answers(record))


def accepted_answers(record: Mapping[str, Any]) -> list[str]:
    """The answers that count as right."""
    answers = record.get("answers") or (record.get("facts") or {}).get("answers") or []
    return [answers] if isinstance(answers, str) else list(answers)


def facts_of(source: Any) -> list[Mapping[str, str]]:
    """The facts of all samples of a source, without opening media; none if its first sample has none."""
    if not len(source) or not hasattr(source, "sample") or not source.sample(0).facts:
        return []
    return [source.sample(index).facts for index in range(len(source))]


def prompt_text(pieces: Sequence[Piece]) -> str:
    """What the model was given, as text for a report; slots stand as ``[image 0]``."""
    parts = (piece.text if isinstance(piece, Text) else f"[{piece.kind} {piece.index}]" for piece in context_of(pieces))
    return "".join(parts)
