"""Decoding settings, the same for evaluation, chat, server, lmms-eval and transformers' wrappers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt

from lavis_chatbridge.config import Settings

Count: TypeAlias = Annotated[int, Field(ge=1, le=1000)]
"""A number of beams or replies; limited, because each has its own keys and values."""
Penalty: TypeAlias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Settings):
    """How the tokens of a reply are chosen."""

    max_new_tokens: PositiveInt = 256
    min_new_tokens: NonNegativeInt = 0
    """A reply does not end before this many tokens."""
    temperature: float = Field(default=0.0, ge=0, le=100)
    """0 takes the likeliest token at each position; above 0, tokens are sampled."""
    top_p: float = Field(default=0.9, gt=0, le=1)
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = Field(default=0, ge=-1)
    """Sample from this many likeliest tokens; 0 or -1 takes all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens that have at least this share of the likeliest token's probability."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Above 1: tokens that the reply already contains become less likely (positive logits are divided by it)."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the reply already contains."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit once per occurrence in the reply."""
    num_beams: Count = 1
    """Above 1: beam search for the likeliest reply; no sampling and no streaming."""
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    """A beam's score is divided by its length to this power."""
    num_return_sequences: Count = 1
    """Number of replies to each prompt."""
    seed: int | None = Field(default=None, ge=-(1 << 63), le=(1 << 63) - 1)
    """The same seed samples the same reply; null samples a new one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, in addition to the template's; the reply does not include them."""
    stop_token_ids: tuple[NonNegativeInt, ...] = ()
    """Token ids that end a reply, in addition to the template's."""
    ignore_eos: bool = False
    """Continue after the language model's end token and the template's end mark."""
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    """Report each token's log-probability, and those of this many likeliest tokens; null reports none."""

    def check(self) -> Iterable[str]:
        if self.num_beams > 1 and self.temperature > 0:
            yield f"num_beams {self.num_beams} is a search, but temperature {self.temperature} asks for sampling"
        if self.num_beams > 1 and (self.presence_penalty or self.frequency_penalty):
            yield "presence_penalty and frequency_penalty are not for beam search: set num_beams to 1"
        if self.num_return_sequences > self.num_beams and self.temperature == 0:
            yield (
                f"num_return_sequences is {self.num_return_sequences}, more than num_beams {self.num_beams}: "
                "raise num_beams, or set a temperature"
            )
