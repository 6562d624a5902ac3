"""Settings of an evaluation: decoding, scoring, and replacement of media.

These keys are in the ``run`` section of a YAML, together with the runner's own, as in LAVIS.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, TypeAlias, get_args

from pydantic import Field

from lavis_chatbridge.config import Settings
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality

CaptionMetric: TypeAlias = Literal["BLEU", "METEOR", "ROUGE_L", "CIDEr", "SPICE"]
Metric: TypeAlias = Literal[CaptionMetric, "vqa_accuracy", "exact_match", "yes_no", "choice"]
CAPTION_METRICS: tuple[str, ...] = get_args(CaptionMetric)
"""Metrics of pycocoevalcap, against reference captions."""


class MediaSettings(Settings):
    """Which media an evaluation replaces."""

    media: Literal["normal", "shuffled", "withheld"] = "normal"
    """``shuffled``: every sample gets another sample's media; ``withheld``: none. Tests the use of media."""
    media_modalities: list[Modality] = list(MODALITIES)
    """The modalities that ``media`` applies to; the others are unchanged."""
    withheld_words: Literal["kept", "removed", "told"] = "kept"
    """The words that introduce a withheld medium: ``kept``, ``removed``, or replaced by words that say it is missing
    (``told``)."""

    @property
    def file_suffix(self) -> str:
        """The condition of the media in file names: ``""`` or ``"withheld_image_audio"``."""
        if self.media == "normal":
            return ""
        words = [] if self.media == "shuffled" or self.withheld_words == "kept" else [self.withheld_words]
        return "_".join([self.media, *self.media_modalities, *words])

    @property
    def label(self) -> str:
        """The condition in tables: ``""``, ``"image and audio withheld"``, ``"audio withheld, told"``."""
        if self.media == "normal":
            return ""
        words = "" if self.withheld_words == "kept" else f", {self.withheld_words}"
        return f"{' and '.join(self.media_modalities)} {self.media}{words}"

    @property
    def options(self) -> list[str]:
        """The options that set this condition in a configuration."""
        modalities = f"run.media_modalities=[{','.join(self.media_modalities)}]"
        return [f"run.media={self.media}", modalities, f"run.withheld_words={self.withheld_words}"]


class EvaluationSettings(MediaSettings):
    """Keys of the ``run`` section that concern tasks; names and meanings follow LAVIS."""

    num_beams: int = Field(default=1, ge=1)
    """Number of beams; 1 is greedy decoding."""
    use_nucleus_sampling: bool = False
    """Sample from the most likely tokens (nucleus sampling) instead of beam search."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Temperature of nucleus sampling."""
    max_len: int = 30
    """Most tokens of an answer."""
    min_len: int = Field(default=1, ge=1)
    """Fewest tokens of an answer."""
    length_penalty: float = 1.0
    """Beam search divides a score by the length to this power; above 1 prefers longer answers."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divisor of the logits of tokens that already occur in the answer; 1 changes nothing."""
    inference_method: Literal["generate", "rank"] = "generate"
    """``generate`` an answer, or ``rank`` a list of answers (in multiple choice: the options) by likelihood."""
    num_ans_candidates: int = Field(default=128, ge=1)
    """With ``rank``: number of answers that are scored completely (those with the likeliest first token)."""
    answer_list: str | None = None
    """With ``rank``: a JSON file with the list of answers. (LAVIS's ``vqa`` task uses its data set's list.)"""
    option_orders: int | None = Field(default=None, ge=1)
    """Multiple choice: number of orders of the options; null means all rotations, which are fair to all letters."""
    prompt: str = ""
    """For LAVIS's own tasks: the template of the question."""
    report_metric: bool = True
    """Score the predictions; false only writes them."""
    metrics: list[Metric] = []
    """Official metrics; the first is the suite's main one. Empty: exact match and attribute accuracy."""
    normalisation: Literal["plain", "squad", "vqa", "vocabulary"] = "plain"
    """How ``exact_match`` normalises answers."""
    published: dict[str, float] = {}
    """The paper's figures, metric -> percent, shown beside the scores."""
    published_stage1: dict[str, float] = {}
    """The paper's figures of the model after stage 1 only."""
    published_in: str = ""
    """The publication of these figures."""
    groups: list[str] = []
    """Groups of this suite for ``chatbridge evaluate --suite``: ``paper``, ``zero-shot``, ``av``, ..."""

    def check(self) -> Iterable[str]:
        """Yields contradictions between keys."""
        if self.min_len > self.max_len:
            yield f"min_len {self.min_len} is more than max_len {self.max_len}"
        if self.use_nucleus_sampling and self.num_beams > 1:
            yield f"use_nucleus_sampling samples and num_beams {self.num_beams} searches: choose one"

    def sampling(self, seed: int = 0) -> Sampling:
        """How answers are decoded."""
        return Sampling(
            max_new_tokens=self.max_len,
            min_new_tokens=self.min_len,
            temperature=self.temperature if self.use_nucleus_sampling else 0.0,
            top_p=self.top_p,
            num_beams=self.num_beams,
            length_penalty=self.length_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
        )
