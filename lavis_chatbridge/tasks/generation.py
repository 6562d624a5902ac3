"""Evaluation by generation: captions and answers. Predictions are stored on disk and scored."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import hash_of, write_json
from lavis_chatbridge.prompting.pieces import Piece, Text, context_of
from lavis_chatbridge.tasks.base import ChatBridgeTask, gathered, result_dir
from lavis_chatbridge.tasks.predictions import Prediction, PredictionFiles, writable
from lavis_chatbridge.tasks.scoring import facts, records
from lavis_chatbridge.tasks.settings import EvaluationSettings

_log = logging.getLogger(__name__)
_VALUES_PER_TENSOR = 64


@registry.register_task("chatbridge_captioning")
class GenerationTask(ChatBridgeTask):
    """Generates a caption or an answer for every sample and scores it.

    ``agg_metrics`` is the mean over sources of the first of ``run.metrics``. Without metrics, samples with accepted
    answers are scored by exact match, and others with facts by attribute accuracy. Predictions are written to disk
    immediately, so that an interrupted evaluation can resume.
    """

    ranks_a_list = True
    """With ``inference_method: rank``, ``answer_list`` has the candidates."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._files: PredictionFiles | None = None
        self._depends_on: dict[str, Any] = {}
        ranks = self.ranks_a_list and self.settings.inference_method == "rank"
        self._answers = _answer_list(self.settings) if ranks else []

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Log metrics that cannot be computed on this machine, and check that the split has references.

        Raises:
            DataError: If official metrics are requested and no sample has references, answers or options.
        """
        super().before_evaluation(model, dataset)
        self._files = None
        if self.settings.report_metric and self.settings.metrics:
            if get_rank() == 0:
                records.announce(self.settings.metrics)
            samples = [source.sample(index) for source in self.sources for index in range(len(source))]
            if samples and not any(map(_has_truth, samples)):
                raise DataError(
                    f"{', '.join(source.name for source in self.sources)}: no sample has an answer or a reference to "
                    "compare with. Nothing was predicted: use a file with labels, or predict without scores "
                    "(run.report_metric=false)"
                )

    def evaluation(self, model: nn.Module, data_loader: Any, cuda_enabled: bool = True) -> list[Prediction]:
        """One prediction per sample of this process: from disk if an earlier run made it, else from the model."""
        self._depends_on = self._dependencies(model)
        self._files = PredictionFiles(result_dir(), hash_of(self._depends_on), get_rank())
        known = self._files.read() if hasattr(data_loader, "leave_out") else {}
        own: dict[tuple[str, int | None], Prediction] = {}
        if known:
            shares = [(source, index) for source, share in data_loader.shares for index in share]
            own = {place: known[place] for place in shares if place in known}
            data_loader.leave_out(own.keys())
            _log.info("%d of %d predictions are read from %s", len(own), len(shares), result_dir())
        return [*own.values(), *super().evaluation(model, data_loader, cuda_enabled)]

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[Prediction]:
        """One prediction per sample, with its prompt."""
        replies = self.predict(model, samples)
        kept = ("index", "sample_id", "references", "answers", "facts", "task", "held_out", "meta")
        columns = {key: samples[key] for key in kept if key in samples}
        source = next((source for source in self.sources if source.name == samples["source"]), None)
        predictions = []
        for number, reply in enumerate(replies):
            own = {key: column[number] for key, column in columns.items()}
            prompt = prompt_text(samples["pieces"][number]) if "pieces" in samples else ""
            own |= {"source": samples["source"], "prompt": prompt, "media": _media(source, own.get("index"))}
            predictions.append(Prediction(**own, **reply))
        if self._files is not None and "index" in columns:
            self._files.append(predictions)
        return predictions

    def predict(self, model: Any, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Fields of a `Prediction` for each sample of a batch."""
        if self.settings.inference_method == "rank":
            said = model.predict_answers(
                samples,
                inference_method="rank",
                num_ans_candidates=self.settings.num_ans_candidates,
                answer_list=self._answers,
                length_penalty=self.settings.length_penalty,
            )
        else:
            said = model.generate(samples, sampling=self.settings.sampling(self.seed))
        return [{"prediction": text} for text in said]

    def after_evaluation(self, val_result: list[Prediction], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """Write the predictions and the scores of a split.

        Returns:
            The metrics on the main process, None on the others. ``samples`` and ``not_predicted`` count samples with
            and without a prediction, also per source. ``written`` lists the files.

        Raises:
            ConfigError: If the files cannot be written.
        """
        predictions = gathered(val_result)
        if predictions is None:
            return None
        if all(record.index is not None for record in predictions):
            unique = {(record.source, record.index or 0): record for record in predictions}
            predictions = [unique[place] for place in sorted(unique)]
        name = "_".join(filter(None, [split_name, self.settings.condition, f"step{epoch}"]))
        files = self._files or PredictionFiles(result_dir(), hash_of(self._depends_on))
        path = files.finish(name, predictions)
        scores = self._counted(predictions, self.score(predictions) if self.settings.report_metric else {})
        target = path.with_name(f"{name}_metrics.json")
        with writable(path.parent):
            write_json(target, {**scores, **self._circumstances(), "depends_on": files.depends_on})
        return scores | {"written": [str(path), str(target)]}

    def score(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Scores per source, and ``agg_metrics``, the mean over sources of the first metric."""
        groups: dict[str, list[Prediction]] = {}
        for record in predictions:
            groups.setdefault(record.source, []).append(record)
        by_source = {}
        for name, group in groups.items():
            learnt, seen = self._facts("train", name), [record.facts for record in group if record.facts]
            by_source[name] = records.scores_or_fault(
                group, self.settings.metrics, self.settings.normalisation, values=facts.values_of([*learnt, *seen])
            )
            if learnt and seen:
                by_source[name]["chance"] = 100.0 * facts.text_prior(learnt, seen)
        heads = [found["headline"] for found in by_source.values() if found.get("headline") is not None]
        return {**({"agg_metrics": sum(heads) / len(heads)} if heads else {}), "by_source": by_source}

    def _counted(self, predictions: Sequence[Prediction], scores: dict[str, Any]) -> dict[str, Any]:
        """Add the numbers of samples with and without a prediction, in total and per source, to scores."""
        counts = Counter(record.source for record in predictions)
        unread = self.unread(counts)
        by_source = dict(scores.get("by_source") or {})
        for source in [*counts, *unread]:
            by_source[source] = {"samples": counts[source], **by_source.get(source, {})}
            by_source[source] |= {"not_predicted": unread[source]} if source in unread else {}
        return {**scores, "by_source": by_source, "samples": len(predictions), "not_predicted": sum(unread.values())}

    def _dependencies(self, model: nn.Module) -> dict[str, Any]:
        """Everything that affects the predictions."""
        chosen = self.settings
        decoding = chosen.sampling(self.seed).model_dump()
        if chosen.inference_method == "rank":
            decoding = {key: getattr(chosen, key) for key in ("inference_method", "length_penalty")}
            decoding |= {"num_ans_candidates": chosen.num_ans_candidates, "answers": hash_of(self._answers)}
        media = {key: getattr(chosen, key) for key in ("media", "media_modalities", "withheld_words")}
        return {
            "task": type(self).__name__,
            "decoding": decoding | {"option_orders": chosen.option_orders},
            **media,
            "seed": self.seed if chosen.media == "shuffled" else None,
            "data": {source.name: {"samples": len(source), "sha256": data_hash(source)} for source in self.sources},
            "processing": {
                source.name: {modality: str(getattr(one, "version", "")) for modality, one in sorted(own.items())}
                for source, own in ((source, getattr(source, "processors", {})) for source in self.sources)
            },
            "model": model_hash(model),
            "versions": records.versions(),
        }

    def _circumstances(self) -> dict[str, Any]:
        """The context of the scores: everything that affects the predictions, and the settings of scoring."""
        keys = ("metrics", "normalisation", "published", "published_stage1", "published_in", "groups")
        return {**self._depends_on, **{key: getattr(self.settings, key) for key in keys}}

    def _facts(self, split: str, name: str) -> list[Mapping[str, str]]:
        """The facts of all samples of a source in another split, without opening media."""
        groups = [getattr(splits.get(split), "sources", []) for splits in self.datasets.values()]
        found = [source for group in groups for source in group if source.name == name and len(source)]
        return [s.sample(i).facts for s in found if s.sample(0).facts for i in range(len(s))]


def data_hash(source: Any) -> str:
    """A hash of all samples of a source: their text, their media by name and size, and their prompts."""
    digests = []
    for index in range(len(source)):
        sample = source.sample(index)
        prompt = prompt_text(source.pieces(sample, None)) if hasattr(source, "pieces") else ""
        digests.append([source.digest(index) if hasattr(source, "digest") else str(sample.id), prompt])
    return hash_of(digests)


def _has_truth(sample: Any) -> bool:
    turns = getattr(sample, "turns", None)
    return turns is None or bool(sample.answers or sample.captions or (turns and turns[-1].role == "assistant"))


def _media(source: Any, index: int | None) -> list[tuple[str, str]]:
    """Modality and path of a sample's own files; empty if the source does not have them."""
    if source is None or index is None:
        return []
    return [(medium.modality, str(medium.path)) for medium in getattr(source.sample(index), "files", ())]


def _answer_list(settings: EvaluationSettings) -> list[str]:
    """The candidates of ``rank``.

    Raises:
        ConfigError: If the list is missing, cannot be read, or is no list of texts.
    """
    if settings.answer_list is None:
        raise ConfigError("run.inference_method is rank, but run.answer_list names no JSON file with the answers")
    try:
        listed = json.loads(Path(settings.answer_list).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.answer_list: {settings.answer_list} cannot be read: {error}") from error
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
        raise ConfigError(f"run.answer_list: {settings.answer_list} is not a list of answers")
    return list(dict.fromkeys(listed))  # a duplicate would displace another candidate


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The prompt as text for a report; a slot is ``[image 0]``."""
    return "".join(p.text if isinstance(p, Text) else f"[{p.modality} {p.index}]" for p in context_of(pieces))


def model_hash(model: nn.Module) -> str:
    """A short hash that changes when a model's weights or settings do.

    It reads a few evenly spaced values of every tensor: a training step changes all of them, and reading 13e9 would be
    slow.
    """
    digest = hashlib.sha256(repr(getattr(model, "settings", "")).encode())
    # not state_dict(), which would reshard what FSDP has gathered for the evaluation
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].to("cpu", torch.float64).numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.tobytes())
    return digest.hexdigest()[:16]
