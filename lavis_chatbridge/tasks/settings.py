"""Settings of an evaluation: how answers are decoded and scored, and what becomes of each sample's media.

These keys stand in the ``run`` section of a YAML, beside the runner's own, as LAVIS has them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from lavis_chatbridge.config import Settings
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.tasks.scoring import Metric, Normalisation

MediaMode: TypeAlias = Literal["normal", "shuffled", "withheld"]
WithheldWords: TypeAlias = Literal["kept", "removed", "told"]


class EvaluationSettings(Settings):
    """Keys of the ``run`` section that concern tasks; names and meanings are LAVIS's where it has them."""

    num_beams: int = Field(default=1, ge=1)
    """Beams of the search; 1 is greedy decoding."""
    use_nucleus_sampling: bool = False
    """Sample from the most likely tokens instead of searching."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Probability mass of nucleus sampling."""
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Divisor of the logits in nucleus sampling."""
    max_len: int = 30
    """Longest answer, in tokens."""
    min_len: int = Field(default=1, ge=1)
    """Shortest answer, in tokens."""
    length_penalty: float = 1.0
    """Exponent of the length by which beam search divides a score; above 1 prefers longer answers."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divisor of the logits of tokens that already occur in the answer; 1 changes nothing."""
    inference_method: Literal["generate", "rank"] = "generate"
    """Generate an answer, or choose the most likely one of a list (of multiple choice: of the options)."""
    num_ans_candidates: int = Field(default=128, ge=1)
    """With ``rank``: how many answers of the list are scored in full (those with the likeliest first token)."""
    answer_list: str | None = None
    """With ``rank``: a JSON file with the list of answers. (LAVIS's ``vqa`` task takes its data set's list.)"""
    option_orders: int | None = Field(default=None, ge=1)
    """Multiple choice: orders in which the options are asked; null asks every rotation, so that no letter pays."""
    prompt: str = ""
    """For LAVIS's own tasks: the template of the question."""
    report_metric: bool = True
    """Score the predictions; false only writes them."""
    metrics: list[Metric] = []
    """Official scores, the first of which is the suite's own; empty: exact match and attribute accuracy."""
    normalisation: Normalisation = "plain"
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
        if self.min_len > self.max_len:
            yield f"min_len {self.min_len} is more than max_len {self.max_len}"
        if self.use_nucleus_sampling and self.num_beams > 1:
            yield f"use_nucleus_sampling samples and num_beams {self.num_beams} searches: choose one"

    @classmethod
    def of(cls, run_cfg: Mapping[str, Any]) -> EvaluationSettings:
        """These keys out of a whole ``run`` section (LAVIS gives tasks all of it)."""
        plain: Any = OmegaConf.to_container(run_cfg, resolve=True) if isinstance(run_cfg, DictConfig) else run_cfg
        known = EvaluationSettings.model_fields
        return EvaluationSettings(**{str(key): value for key, value in dict(plain).items() if key in known})

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

    @property
    def condition(self) -> str:
        """What became of the media, as names of files say it: ``""`` or ``"withheld_image_audio"``."""
        if self.media == "normal":
            return ""
        words = [] if self.media == "shuffled" or self.withheld_words == "kept" else [self.withheld_words]
        return "_".join([self.media, *self.media_modalities, *words])
