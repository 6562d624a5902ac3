"""Evaluation by writing: captions and answers, one prediction per sample on disk, scored against what is true."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank
from lavis.common.registry import registry
from torch import nn

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import write_json
from lavis_chatbridge.prompting.pieces import Piece, Text, context_of
from lavis_chatbridge.tasks import metrics
from lavis_chatbridge.tasks.base import ChatBridgeTask, merge, result_dir
from lavis_chatbridge.tasks.journal import JOURNAL, Journal, key_of, model_mark, writable
from lavis_chatbridge.tasks.scoring.records import announce, scores_or_fault, versions
from lavis_chatbridge.tasks.settings import EvaluationSettings

_log = logging.getLogger(__name__)


@registry.register_task("chatbridge_captioning")
class GenerationTask(ChatBridgeTask):
    """Writes a caption or an answer for every sample and scores it.

    With ``run.metrics`` the official scores are computed; ``agg_metrics`` is then the mean over sources of the first
    one. Otherwise samples with accepted answers get an exact match, others with facts an attribute accuracy, and
    ``agg_metrics`` is the mean of those. What has been predicted is kept in a journal, from which an interrupted run
    goes on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._values: dict[str, dict[str, list[str]]] = {}
        self._priors: dict[str, float] = {}
        self._journal = Journal(Path(), 0)
        self._keys: _Keys | None = None
        self._mark = ""
        self._answers = _answer_list(self.settings)

    def before_evaluation(self, model: nn.Module, dataset: Any, **_unused: Any) -> None:
        """Say which scores cannot be computed here; learn the attributes' values and how far guessing gets."""
        super().before_evaluation(model, dataset)
        self._keys = None
        self._journal = Journal(result_dir() / JOURNAL, get_rank())
        if self.settings.report_metric and get_rank() == 0:
            announce(self.settings.metrics)
        train = {source.name: source for source in self._sources("train")}
        for source in getattr(dataset, "sources", []):
            seen = facts_of(source)
            learnt = facts_of(train[source.name]) if source.name in train else []
            self._values[source.name] = metrics.values_of([*learnt, *seen])
            if seen and learnt:
                self._priors[source.name] = metrics.text_prior(learnt, seen)

    def evaluation(self, model: nn.Module, data_loader: Iterable, cuda_enabled: bool = True) -> list[Any]:
        """A prediction per sample of this process: from the journal where it has one, else from the model."""
        self._mark = model_mark(model)
        self._keys = _Keys(self._evaluated, [self._mark, self._decoding(), self._media(), versions()])
        known = self._known(data_loader)
        return [*known.values(), *super().evaluation(model, data_loader, cuda_enabled)]

    def _known(self, loader: Any) -> dict[tuple[str, int], dict[str, Any]]:
        """This process's samples that an earlier run has predicted, which the loader then leaves out."""
        written = self._journal.read()
        if not written or self._keys is None or not hasattr(loader, "leave_out"):
            return {}
        places = [(source, index) for source, share in loader.shares for index in share]
        # a sample may stand elsewhere than when it was predicted, or twice
        found = {
            place: written[key] | {"index": place[1]} for place in places if (key := self._keys.of(*place)) in written
        }
        loader.leave_out(found.keys())
        if places:
            _log.info("%d of %d predictions are taken from the journal %s", len(found), len(places), self._journal.path)
        return found

    def valid_step(self, model: nn.Module, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """A prediction per sample, with the prompt that led to it."""
        answers = self._predict(model, samples)
        shared = {"source": samples["source"]}
        kept = ("index", "sample_id", "references", "answers", "facts", "task", "held_out", "meta")
        columns = {key: samples[key] for key in kept if key in samples}
        records = []
        for number, answer in enumerate(answers):
            own = {key: column[number] for key, column in columns.items()}
            prompt = prompt_text(samples["pieces"][number]) if "pieces" in samples else ""
            records.append({**shared, **own, "prompt": prompt, "prediction": answer})
        if self._keys is not None and "index" in columns:
            self._journal.add((self._keys.of(record["source"], record["index"]), record) for record in records)
        return records

    def _predict(self, model: Any, samples: Mapping[str, Any]) -> list[str]:
        if self.settings.inference_method == "rank":
            return model.predict_answers(
                samples,
                inference_method="rank",
                num_ans_candidates=self.settings.num_ans_candidates,
                answer_list=self._answers,
                length_penalty=self.settings.length_penalty,
            )
        return model.generate(samples, **self._decoding())

    def after_evaluation(self, val_result: list[dict[str, Any]], split_name: str, epoch: Any, **_unused: Any) -> Any:
        """Write the predictions and the scores of a split; after the run's last one the journal is no longer needed.

        Returns:
            The metrics on the main process, None on the others. ``samples`` have a prediction, ``not_predicted`` have
            none (in ``by_source`` too), ``written`` are the files; without any score there is no ``agg_metrics``.

        Raises:
            ConfigError: If the files cannot be written.
        """
        records = merge(val_result, key="sample_id")
        if records is None:
            return None
        media = (
            "" if self.settings.media == "normal" else f"_{self.settings.media}_{'_'.join(self.settings.media_kinds)}"
        )
        name = f"{split_name}{media}_step{epoch}"
        files = [result_dir() / f"{name}.json", result_dir() / f"{name}_metrics.json"]
        with writable(files[0].parent):
            write_json(files[0], records)
        scores = self._counted(records, self.score(records) if self.settings.report_metric else {"agg_metrics": 0.0})
        with writable(files[0].parent):
            write_json(files[1], {**scores, **self._circumstances()})
        if not self.settings.keep_journal and split_name not in self.splits[:-1]:
            self._journal.remove()
        return scores | {"written": [str(path) for path in files]}

    def _counted(self, records: Sequence[Mapping[str, Any]], scores: dict[str, Any]) -> dict[str, Any]:
        """Scores with how many samples have a prediction and how many have none, of each source too."""
        counts = Counter(record["source"] for record in records)
        unread = self.unread(counts)
        by_source = dict(scores.get("by_source") or {})
        for source in [*counts, *unread]:
            by_source[source] = {"samples": counts[source], **by_source.get(source, {})}
            by_source[source] |= {"not_predicted": unread[source]} if source in unread else {}
        kept = {key: value for key, value in scores.items() if records or key != "agg_metrics"}
        return {**kept, "by_source": by_source, "samples": len(records), "not_predicted": sum(unread.values())}

    def _circumstances(self) -> dict[str, Any]:
        """All that the scores depend on beside the predictions."""
        chosen = {key: getattr(self.settings, key) for key in ("metrics", "normalisation", "published", "zero_shot")}
        sources = getattr(self._evaluated, "sources", [])
        data = {source.name: {"samples": len(source), "sha256": data_hash(source)} for source in sources}
        processing = {source.name: _processing(source) for source in sources}
        more = {"data": data, "processing": processing, "model": self._mark, "versions": versions()}
        return {"decoding": self._decoding(), **self._media(), **chosen, **more}

    def _media(self) -> dict[str, Any]:
        return {"media": self.settings.media, "media_kinds": self.settings.media_kinds}

    def score(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Metrics per source, and ``agg_metrics``: the mean over sources of each one's first metric or accuracy.

        A source that cannot be scored has a ``fault`` in their place.
        """
        by_source: dict[str, list[Mapping[str, Any]]] = {}
        for record in records:
            by_source.setdefault(record["source"], []).append(record)
        scores = {name: self._score_source(name, group) for name, group in by_source.items()}
        if self.settings.metrics:
            heads = [score["headline"] for score in scores.values() if score.get("headline") is not None]
            return {**({"agg_metrics": sum(heads) / len(heads)} if heads else {}), "by_source": scores}
        accuracies = [score["accuracy"] for score in scores.values() if "accuracy" in score]
        overall = sum(accuracies) / len(accuracies) if accuracies else 0.0
        return {"agg_metrics": overall, "by_source": scores}

    def _score_source(self, source: str, records: list[Mapping[str, Any]]) -> dict[str, Any]:
        if self.settings.metrics:
            return scores_or_fault(records, self.settings.metrics, self.settings.normalisation)
        answered = [record for record in records if is_question(record)]
        described = [record for record in records if not is_question(record) and record.get("facts")]
        score: dict[str, Any] = {"samples": len(records)}
        if answered:
            said, accepted = [r["prediction"] for r in answered], [accepted_answers(r) for r in answered]
            score["exact_match"] = score["accuracy"] = metrics.exact_match(said, accepted).value
            score |= by_kind(answered)
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
        if s.inference_method == "rank":
            ranking = {"inference_method": "rank", "length_penalty": s.length_penalty}
            return ranking | {"num_ans_candidates": s.num_ans_candidates, "answers": key_of(self._answers)}
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


class _Keys:
    """The journal's keys of a split's samples; ``common`` is what all of them depend on."""

    def __init__(self, split: Any, common: list[Any]) -> None:
        self._sources = {source.name: source for source in getattr(split, "sources", [])}
        self._common = common
        self._of_source: dict[str, Any] = {}

    def of(self, name: str, index: int) -> str:
        """The key of one sample."""
        source = self._sources[name]
        if name not in self._of_source:
            shuffled = getattr(source, "mode", "normal") == "shuffled"  # its media are those of any other sample
            whole = [data_hash(source), source.seed] if shuffled else None
            self._of_source[name] = [name, _processing(source), whole, self._common]
        return key_of(self._of_source[name], _digest(source, index), _prompt(source, index))


def data_hash(source: Any) -> str:
    """A hash of all samples of a source: their text, and their media by name and size."""
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(_digest(source, index).encode())
    return digest.hexdigest()


def _digest(source: Any, index: int) -> str:
    return source.digest(index) if hasattr(source, "digest") else str(source.sample(index).id)


def _prompt(source: Any, index: int) -> str:
    return prompt_text(source.pieces(source.sample(index), None)) if hasattr(source, "pieces") else ""


def _processing(source: Any) -> dict[str, str]:
    """Modality -> the version of the processor that prepares it."""
    processors = getattr(source, "processors", {})
    return {kind: str(getattr(processor, "version", "")) for kind, processor in sorted(processors.items())}


def _answer_list(settings: EvaluationSettings) -> list[str]:
    """The candidates of ``rank``.

    Raises:
        ConfigError: If the list is missing or no list of texts.
    """
    if settings.inference_method != "rank":
        return []
    if settings.answer_list is None:
        raise ConfigError("run.inference_method is rank, but run.answer_list names no JSON file with the answers")
    try:
        listed = json.loads(Path(settings.answer_list).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"run.answer_list: {settings.answer_list} cannot be read: {error}") from error
    if not isinstance(listed, list) or not listed or not all(isinstance(text, str) for text in listed):
        raise ConfigError(f"run.answer_list: {settings.answer_list} holds no list of answers")
    return list(dict.fromkeys(listed))  # a repeated one would take the place of another candidate


def is_question(record: Mapping[str, Any]) -> bool:
    """Whether a prediction answers a question for which the data set lists accepted answers."""
    return bool(accepted_answers(record))


def by_kind(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The exact match of each kind of question, where the data set says (``meta.asked``) what kind each one is."""
    kinds: dict[str, metrics.Share] = {}
    for record in records:
        kind = (record.get("meta") or {}).get("asked")
        if kind is not None:
            answer, accepted = [record["prediction"]], [accepted_answers(record)]
            kinds.setdefault(str(kind), metrics.Share()).add(bool(metrics.exact_match(answer, accepted).right))
    return {"by_kind": {kind: share.value for kind, share in sorted(kinds.items())}} if kinds else {}


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
