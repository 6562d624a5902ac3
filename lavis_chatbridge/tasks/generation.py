"""The task that evaluates captions and answers: the model generates them; they are stored on disk and scored."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import hash_of, read_json
from lavis_chatbridge.prompting.conversation import Piece, Text, context_of
from lavis_chatbridge.tasks.ablation import Source
from lavis_chatbridge.tasks.base import ChatBridgeTask, gathered
from lavis_chatbridge.tasks.predictions import Prediction, PredictionFiles
from lavis_chatbridge.tasks.scoring import scores
from lavis_chatbridge.tasks.settings import EvaluationSettings, MediaSettings

if TYPE_CHECKING:
    from lavis_chatbridge.models.answering import Answering

_log = logging.getLogger(__name__)
_VALUES_PER_TENSOR = 64
_COPIED = ("index", "sample_id", "references", "answers", "facts", "task", "held_out", "meta")
"""Keys of a batch that a prediction keeps."""


@registry.register_task("chatbridge_captioning")
class GenerationTask(ChatBridgeTask):
    """Generates a caption or an answer for every sample and scores it.

    ``agg_metrics`` is the mean over sources of the first of ``run.metrics``. Without metrics, samples with accepted
    answers are scored by exact match, and others with facts by attribute accuracy. Predictions are written to disk
    immediately, so that an interrupted evaluation can resume.
    """

    def __init__(self, settings: EvaluationSettings | None = None, seed: int = 0) -> None:
        super().__init__(settings, seed)
        self.sampling = self.settings.sampling(seed)
        self._answers: list[str] = []
        """The candidates of ``inference_method: rank``."""
        if (path := self.settings.answer_list) is not None:
            listed = read_json(Path(path).expanduser())
            if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
                raise ConfigError(f"run.answer_list: {path} is not a readable JSON list of answers")
            self._answers = list(dict.fromkeys(listed))  # a duplicate would displace another candidate

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Raise a `DataError` if official metrics are requested and no sample has references, answers or options."""
        super().before_evaluation(model, dataset)
        self._files = _files({})
        scored = self.settings.report_metric and self.settings.metrics and any(map(len, self.sources))
        samples = (source.sample(index) for source in self.sources for index in range(len(source)))
        if scored and not any(s.answers or s.captions or (s.turns and s.turns[-1].role != "user") for s in samples):
            raise DataError(
                f"{', '.join(source.name for source in self.sources)}: no sample has an answer or a reference to "
                "compare with. Nothing was predicted: use a file with labels, or predict without scores "
                "(run.report_metric=false)"
            )

    def evaluation(self, model: nn.Module, data_loader: Any, cuda_enabled: bool = True) -> list[Prediction]:
        """One prediction per sample of this process: from disk if an earlier run made it, else from the model."""
        self._files = _files(self._dependencies(model))
        known = self._files.read()
        shares = [(source, index) for source, share in data_loader.shares for index in share]
        own = {key: known[key] for key in shares if key in known}
        if own:
            data_loader.leave_out(own.keys())
            _log.info("%d of %d predictions are read from %s", len(own), len(shares), self._files.folder)
        return [*own.values(), *super().evaluation(model, data_loader, cuda_enabled)]

    def valid_step(self, model: Answering, samples: Mapping[str, Any]) -> list[Prediction]:
        """One `Prediction` per sample, with its prompt."""
        source = next(source for source in self.sources if source.name == samples["source"])
        prompts = [prompt_text(pieces) for pieces in samples["pieces"]]
        if "" in prompts and self.settings.media == "withheld":
            raise DataError(
                f"{source.name}: the prompt of sample {samples['sample_id'][prompts.index('')]!r} is only its media, "
                "and run.media=withheld leaves nothing to answer: use --ablate withheld:told or shuffled "
                "(run.withheld_words=told or run.media=shuffled)"
            )
        predictions = []
        for number, reply in enumerate(self.predict(model, samples)):
            own = {key: samples[key][number] for key in _COPIED if key in samples}
            own["media"] = [(medium.modality, medium.path) for medium in source.sample(own["index"]).files]
            predictions.append(Prediction(source=source.name, prompt=prompts[number], **own, **reply))
        self._files.append(predictions)
        return predictions

    def predict(self, model: Answering, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Fields of a `Prediction` for each sample of a batch."""
        if self.settings.inference_method == "rank":
            texts = model.predict_answers(
                samples,
                inference_method="rank",
                num_ans_candidates=self.settings.num_ans_candidates,
                answer_list=self._answers,
                length_penalty=self.settings.length_penalty,
            )
        else:
            texts = model.generate(samples, sampling=self.sampling)
        return [{"prediction": text} for text in texts]

    def after_evaluation(
        self, val_result: list[Prediction], split_name: str, epoch: int | str, **_unused: Any
    ) -> dict[str, Any] | None:
        """Write the predictions and the scores of a split.

        Returns:
            The metrics on the main process, None on the others. ``samples`` and ``not_predicted`` count samples with
            and without a prediction, also per source. ``written`` lists the files.
        """
        results = gathered(val_result)
        if results is None:
            return None
        predictions = sorted(results, key=lambda prediction: prediction.key)
        metrics = self.score(predictions)
        name = "_".join(filter(None, [split_name, self.settings.file_suffix, f"step{epoch}"]))
        scoring = {"metrics", "normalisation", "published", "published_stage1", "published_in", "groups"}
        about = self.settings.model_dump(include=scoring)
        return metrics | {"written": self._files.finish(name, predictions, metrics | about)}

    def score(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Scores and numbers of samples per source; ``agg_metrics`` is the mean over sources of the first metric."""
        counts = Counter(prediction.source for prediction in predictions)
        by_source: dict[str, dict[str, Any]] = {name: {"samples": count} for name, count in counts.items()}
        for name in counts if self.settings.report_metric else ():
            own = [prediction for prediction in predictions if prediction.source == name]
            by_source[name] = scores.scored(own, self.settings, self._facts_in_training(name))
        unread = self.unread(counts)
        for name, count in unread.items():
            by_source.setdefault(name, {"samples": 0})["not_predicted"] = count
        heads = [found["headline"] for found in by_source.values() if found.get("headline") is not None]
        mean = {"agg_metrics": sum(heads) / len(heads)} if heads else {}
        return mean | {"by_source": by_source, "samples": counts.total(), "not_predicted": sum(unread.values())}

    def _dependencies(self, model: nn.Module) -> dict[str, Any]:
        """Everything that affects the predictions."""
        how = self.settings.model_dump(include={"inference_method", "option_orders", "num_ans_candidates"})
        return {
            "task": type(self).__name__,
            "decoding": self.sampling.model_dump() | how | {"answers": hash_of(self._answers)},
            **self.settings.model_dump(include=set(MediaSettings.model_fields)),
            "data": {s.name: {"samples": len(s), "sha256": data_hash(s.source)} for s in self.sources},
            "model": model_hash(model),
            "versions": scores.versions(),
        }

    def _facts_in_training(self, name: str) -> list[Mapping[str, str]]:
        """The facts of all training samples of a source, without opening media."""
        groups = [splits["train"].sources for splits in self.datasets.values() if "train" in splits]
        found = [source for group in groups for source in group if source.name == name and len(source)]
        return [s.sample(i).facts for s in found if s.sample(0).facts for i in range(len(s))]


def _files(depends_on: dict[str, Any]) -> PredictionFiles:
    return PredictionFiles(Path(registry.get_path("result_dir")), depends_on, get_rank())


def prompt_text(pieces: Sequence[Piece]) -> str:
    """The prompt as text for a report; a slot is ``[image 0]``."""
    return "".join(p.text if isinstance(p, Text) else f"[{p.modality} {p.index}]" for p in context_of(pieces))


def data_hash(source: Source) -> str:
    """A hash of a source's processors and of all samples: their text, their media by name and size, their prompts."""
    versions = {modality: getattr(processor, "version", "") for modality, processor in source.processors.items()}
    samples = range(len(source))
    prompts = [[source.sample_hash(i), prompt_text(source.pieces(source.sample(i), None))] for i in samples]
    return hash_of(versions, prompts)


def model_hash(model: nn.Module) -> str:
    """A short hash of the model's settings and of a few values of every tensor; a training step changes all of them."""
    hasher = hashlib.sha256(repr(getattr(model, "settings", "")).encode())
    # not state_dict(), which would reshard what FSDP has gathered for the evaluation
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _VALUES_PER_TENSOR)].to("cpu", torch.float64).numpy()
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + values.tobytes())
    return hasher.hexdigest()[:16]
