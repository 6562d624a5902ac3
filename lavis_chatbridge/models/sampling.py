"""The one set of decoding settings: evaluation, chat, server, lmms-eval and transformers' wrappers use it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, TypeAlias

from pydantic import Field, NonNegativeInt, PositiveInt

from lavis_chatbridge.config import Settings

MOST = 1000
"""The most beams of a search, and the most results of a prompt: each holds its own keys and values."""

Several: TypeAlias = Annotated[int, Field(ge=1, le=MOST)]
Penalty: TypeAlias = Annotated[float, Field(ge=-100, le=100)]


class Sampling(Settings):
    """How the tokens of a reply are chosen."""

    max_new_tokens: PositiveInt = 256
    """Upper limit of a reply's tokens."""
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
    repetition_penalty: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Above 1: a token of the reply becomes less likely to be repeated (logits are divided by it)."""
    presence_penalty: Penalty = 0.0
    """Subtracted from the logits of tokens that the reply already holds."""
    frequency_penalty: Penalty = 0.0
    """Subtracted from a token's logit once for each time the reply already holds it."""
    num_beams: Several = 1
    """Above 1: beam search for the likeliest whole reply, which is neither sampled nor streamed."""
    length_penalty: float = Field(default=1.0, ge=-10, le=10)
    """Exponent of the length that a beam's score is divided by."""
    num_return_sequences: Several = 1
    """Replies to one prompt."""
    seed: int | None = None
    """The same seed samples the same reply; null samples a new one each time."""
    stop: tuple[str, ...] = ()
    """Texts that end a reply, beside those of the template; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a reply, beside those of the template."""
    ignore_eos: bool = False
    """Do not end at the language model's end token, nor at the template's end mark."""
    logprobs: Annotated[int, Field(ge=0, le=MOST)] | None = None
    """Report each token's log-probability, and those of this many likeliest tokens; null reports none."""

    def check(self) -> Iterable[str]:
        if self.num_beams > 1 and self.temperature > 0:
            yield f"num_beams is {self.num_beams}, a search, but temperature {self.temperature} asks for sampling"
        if self.num_beams > 1 and (self.presence_penalty or self.frequency_penalty):
            yield "presence_penalty and frequency_penalty are not for beam search: set num_beams to 1"
        if self.num_return_sequences > self.num_beams and self.temperature == 0:
            yield (
                f"num_return_sequences is {self.num_return_sequences}, but {self.num_beams} beam(s) find no more than "
                "that: raise num_beams, or set a temperature"
            )
