"""What an evaluation is told: how answers are decoded, and what the model is given of each sample's media.

These keys stand in the ``run`` section of a YAML, beside the runner's own, as LAVIS has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.tasks.scoring.names import METRICS, NORMALISATION_NAMES

MediaMode: TypeAlias = Literal["normal", "shuffled", "withheld"]


@dataclass
class EvaluationSettings:
    """Keys of the ``run`` section that concern tasks; names and meanings are LAVIS's where it has them."""

    num_beams: int = 1
    """Beams of the search; 1 is greedy decoding."""
    use_nucleus_sampling: bool = False
    """Draw from the most likely tokens instead of searching; scores then depend on the seed."""
    top_p: float = 0.9
    """Probability mass that nucleus sampling draws from."""
    temperature: float = 1.0
    """Divisor of the logits in nucleus sampling."""
    max_len: int = 30
    """Longest answer, in tokens."""
    min_len: int = 1
    """Shortest answer, in tokens."""
    length_penalty: float = 1.0
    """Exponent of the length by which beam search divides a score; above 1 prefers longer answers."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens that have been said; 1 changes nothing."""
    inference_method: Literal["generate", "rank"] = "generate"
    """Write an answer, or choose one of an answer list."""
    num_ans_candidates: int = 128
    """With ``rank``: how many answers of the list are scored in full (those with the likeliest first token)."""
    answer_list: str | None = None
    """With ``rank``: a JSON file with the list of answers. (LAVIS's ``vqa`` task takes its data set's list.)"""
    prompt: str = ""
    """For LAVIS's own tasks: the template of the question."""
    report_metric: bool = True
    """Score the predictions; false only writes them."""
    metrics: list[str] = field(default_factory=list)
    """Official scores, the first of which is the suite's own; empty: exact match and attribute accuracy only."""
    normalisation: str = "plain"
    """What is done to answers before ``exact_match`` compares them: ``plain``, ``squad`` or ``vqa``."""
    published: dict[str, float] = field(default_factory=dict)
    """The paper's figures, metric -> percent, shown beside the scores."""
    zero_shot: bool = False
    """Nothing of this benchmark was trained on; ``chatbridge evaluate --suite zero-shot`` runs those."""
    keep_journal: bool = False
    """Keep the journal of predictions after the scores are written, so that the same run takes them from there."""
    media: MediaMode = "normal"
    """``shuffled`` gives every sample another sample's media, ``withheld`` none: does the model really use them?"""
    media_kinds: list[Modality] = field(default_factory=lambda: list(MODALITIES))
    """The kinds of media which ``media`` concerns; the others stay as they are."""

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
        if self.use_nucleus_sampling and self.num_beams > 1:
            yield f"use_nucleus_sampling draws and num_beams {self.num_beams} searches: choose one"
        for name in self.metrics:
            if name not in METRICS:
                yield f"metrics: unknown {name!r}; known are {', '.join(METRICS)}"
        if self.normalisation not in NORMALISATION_NAMES:
            yield f"normalisation: unknown {self.normalisation!r}; known are {', '.join(NORMALISATION_NAMES)}"

    @classmethod
    def of(cls, run_cfg: Mapping[str, Any]) -> EvaluationSettings:
        """These keys out of a whole ``run`` section (LAVIS hands tasks all of it)."""
        names = {item.name for item in dataclasses.fields(EvaluationSettings)}
        plain = OmegaConf.to_container(run_cfg, resolve=True) if isinstance(run_cfg, DictConfig) else run_cfg
        return EvaluationSettings(**{str(key): value for key, value in dict(plain).items() if key in names})  # type: ignore[arg-type]
