"""Settings of an evaluation: how answers are decoded and scored, and what becomes of each sample's media.

These keys stand in the ``run`` section of a YAML, beside the runner's own, as LAVIS has them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.config import Settings
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.tasks.scoring import METRICS, NORMALISATION_NAMES

MediaMode: TypeAlias = Literal["normal", "shuffled", "withheld"]
WithheldWords: TypeAlias = Literal["kept", "removed", "told"]


class EvaluationSettings(Settings):
    """Keys of the ``run`` section that concern tasks; names and meanings are LAVIS's where it has them."""

    num_beams: int = 1
    """Beams of the search; 1 is greedy decoding."""
    use_nucleus_sampling: bool = False
    """Sample from the most likely tokens instead of searching; scores then depend on the seed."""
    top_p: float = 0.9
    """Probability mass of nucleus sampling."""
    temperature: float = 1.0
    """Divisor of the logits in nucleus sampling."""
    max_len: int = 30
    """Longest answer, in tokens."""
    min_len: int = 1
    """Shortest answer, in tokens."""
    length_penalty: float = 1.0
    """Exponent of the length by which beam search divides a score; above 1 prefers longer answers."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens that already occur in the answer; 1 changes nothing."""
    inference_method: Literal["generate", "rank"] = "generate"
    """Generate an answer, or choose the most likely one of a list (of multiple choice: of the options)."""
    num_ans_candidates: int = 128
    """With ``rank``: how many answers of the list are scored in full (those with the likeliest first token)."""
    answer_list: str | None = None
    """With ``rank``: a JSON file with the list of answers. (LAVIS's ``vqa`` task takes its data set's list.)"""
    option_orders: int | None = None
    """Multiple choice: orders in which the options are asked; null asks every rotation, so that no letter pays."""
    prompt: str = ""
    """For LAVIS's own tasks: the template of the question."""
    report_metric: bool = True
    """Score the predictions; false only writes them."""
    metrics: list[str] = []
    """Official scores, the first of which is the suite's own; empty: exact match and attribute accuracy."""
    normalisation: str = "plain"
    """How ``exact_match`` normalises answers: ``plain``, ``squad``, ``vqa`` or ``vocabulary``."""
    published: dict[str, float] = {}
    """The paper's figures, metric -> percent, shown beside the scores."""
    published_stage1: dict[str, float] = {}
    """The paper's figures of the model after stage 1 only."""
    published_in: str = ""
    """Where the published figures stand."""
    groups: list[str] = []
    """Names under which ``chatbridge evaluate --suite`` finds this suite: ``paper``, ``zero-shot``, ``av``, ..."""
    media: MediaMode = "normal"
    """``shuffled`` gives every sample another sample's media, ``withheld`` none: does the model really use them?"""
    media_modalities: list[Modality] = list(MODALITIES)
    """The modalities which ``media`` concerns; the others stay as they are."""
    withheld_words: WithheldWords = "kept"
    """The words that introduce a withheld medium: ``kept``, ``removed``, or replaced by words that say it is missing
    (``told``)."""

    def check(self) -> Iterable[str]:
        """Contradictions between the keys."""
        if self.num_beams < 1:
            yield f"num_beams must be at least 1, found {self.num_beams}"
        if not 1 <= self.min_len <= self.max_len:
            yield f"expected 1 <= min_len <= max_len, found min_len {self.min_len} and max_len {self.max_len}"
        if not 0 < self.top_p <= 1:
            yield f"top_p must lie in (0, 1], found {self.top_p}"
        if not 0 < self.temperature < math.inf:
            yield f"temperature must be positive and finite, found {self.temperature}"
        if self.repetition_penalty <= 0:
            yield f"repetition_penalty must be positive, found {self.repetition_penalty}"
        if self.num_ans_candidates < 1:
            yield f"num_ans_candidates must be at least 1, found {self.num_ans_candidates}"
        if self.option_orders is not None and self.option_orders < 1:
            yield f"option_orders must be at least 1, found {self.option_orders}"
        if self.use_nucleus_sampling and self.num_beams > 1:
            yield f"use_nucleus_sampling samples and num_beams {self.num_beams} searches: choose one"
        for name in self.metrics:
            if name not in METRICS:
                yield f"metrics: unknown {name!r}; known are {', '.join(METRICS)}"
        if self.normalisation not in NORMALISATION_NAMES:
            yield f"normalisation: unknown {self.normalisation!r}; known are {', '.join(NORMALISATION_NAMES)}"

    @classmethod
    def of(cls, run_cfg: Mapping[str, Any]) -> EvaluationSettings:
        """These keys out of a whole ``run`` section (LAVIS gives tasks all of it)."""
        plain: Any = OmegaConf.to_container(run_cfg, resolve=True) if isinstance(run_cfg, DictConfig) else run_cfg
        known = EvaluationSettings.model_fields
        return EvaluationSettings(**{str(key): value for key, value in dict(plain).items() if key in known})

    def decoding(self) -> dict[str, Any]:
        """Arguments of ``ChatBridge.generate``, under LAVIS's names."""
        return {
            "use_nucleus_sampling": self.use_nucleus_sampling,
            "num_beams": self.num_beams,
            "max_length": self.max_len,
            "min_length": self.min_len,
            "top_p": self.top_p,
            "temperature": self.temperature,
            "length_penalty": self.length_penalty,
            "repetition_penalty": self.repetition_penalty,
        }

    @property
    def condition(self) -> str:
        """What became of the media, as names of files say it: ``""`` or ``"withheld_image_audio"``."""
        if self.media == "normal":
            return ""
        words = [] if self.media == "shuffled" or self.withheld_words == "kept" else [self.withheld_words]
        return "_".join([self.media, *self.media_modalities, *words])
