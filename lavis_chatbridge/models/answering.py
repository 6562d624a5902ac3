"""LAVIS's answering methods of ChatBridge: ``generate``, ``predict_answers`` and the ranking of candidates.

Shapes: ``B`` samples, ``C`` candidates, ``P`` pairs of a sample and a candidate, ``L`` positions, ``D`` width.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.models.decoding import Decoder, Generation, padded, read
from lavis_chatbridge.models.encoding import own_precision
from lavis_chatbridge.models.families import LanguageModel, free_positions
from lavis_chatbridge.models.layout import Media, MediaRanges, contexts, elements_of, is_alignment, media_of
from lavis_chatbridge.models.remote import RemoteLanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.settings import Layout, ModelSettings
from lavis_chatbridge.models.templates import Template
from lavis_chatbridge.models.tokenizer import Tokenizer
from lavis_chatbridge.prompting.conversation import END_OF_CAPTION, Piece

log = logging.getLogger(__name__)


class Answering:
    """Mixin with the answering methods of :class:`chatbridge.ChatBridge`."""

    settings: ModelSettings
    prompt_layout: Layout
    llama_model: LanguageModel
    llama_tokenizer: Tokenizer
    template: Template

    def soft_tokens(self, prompts: Sequence[Sequence[Piece]], media: Media) -> tuple[Tensor | None, list[MediaRanges]]:
        """See :class:`chatbridge.ChatBridge`."""
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 1,
        max_length: int = 30,
        min_length: int = 1,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        length_penalty: float = 1.0,
        num_captions: int = 1,
        temperature: float = 1.0,
        *,
        prompt: str | Sequence[str] | None = None,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """Captions or answers: ``num_captions`` consecutive texts for each sample.

        The positional arguments are LAVIS's; ``sampling`` replaces them. ``temperature`` and ``top_p`` have an effect
        only with ``use_nucleus_sampling``. ``prompt`` is the question, for a batch without one.

        Raises:
            PromptError: If prompts and media do not fit together, or a prompt exceeds the language model's positions.
        """
        if sampling is None:
            sampled = {"temperature": temperature, "top_p": top_p}
            searched = {"num_beams": num_beams, "length_penalty": length_penalty}
            limits = {"max_new_tokens": max_length, "min_new_tokens": min_length}
            others = {"repetition_penalty": repetition_penalty, "num_return_sequences": num_captions}
            chosen = sampled if use_nucleus_sampling else searched
            sampling = parse(Sampling, {**limits, **others, **chosen}, "generate")
        replies = self.replies(samples, sampling, prompt)
        llm = self.llama_model
        (llm if isinstance(llm, RemoteLanguageModel) else Decoder(llm)).complete(replies)
        return [reply.stream.text for reply in replies]

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Mapping[str, Any],
        num_beams: int = 1,
        inference_method: str = "generate",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        length_penalty: float = 0.0,
    ) -> list[str]:
        """Answers to questions, with LAVIS's arguments.

        Args:
            inference_method: ``"generate"`` free text, or ``"rank"`` the candidates of ``answer_list``.
            num_ans_candidates: Number of candidates per question to rank: those with the likeliest first token.
            prompt: A template with ``{}`` for the question.
            length_penalty: A score is divided by the number of tokens to this power.
        """
        questions = samples.get("text_input")
        if prompt and questions:
            listed = [questions] if isinstance(questions, str) else questions
            samples = {**samples, "text_input": [prompt.format(q) for q in listed]}
        if inference_method == "generate":
            limits: dict[str, Any] = {"max_length": max_len, "min_length": min_len, "length_penalty": length_penalty}
            return self.generate(samples, num_beams=num_beams, **limits)
        if inference_method != "rank":
            raise ConfigError(f"inference_method {inference_method!r} is neither 'generate' nor 'rank'")
        if not answer_list:
            raise ConfigError("inference_method 'rank' needs answer_list, the candidates")
        scores, lengths = self.answer_scores(samples, answer_list, num_ans_candidates)
        return [answer_list[i] for i in (scores / lengths**length_penalty).argmax(1).tolist()]

    @torch.no_grad()
    def answer_scores(
        self, samples: Mapping[str, Any], answers: Sequence[str], keep: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """``[B, C]`` log-probabilities of candidates as replies, each with its end mark, and ``[C]`` numbers of tokens.

        Targets in the prompts are ignored. ``keep`` is that of :func:`candidate_scores`; None scores all candidates.
        """
        llm = self.llama_model
        embeds, mask = padded(llm, self.replies(samples, Sampling()))
        closed = [self.template.reply(answer) for answer in answers]
        candidates = [self.llama_tokenizer.encode(text.text) if text.ids is None else text.ids for text in closed]
        with own_precision(llm):
            most = keep or len(candidates)
            scores = candidate_scores(llm, embeds, mask, candidates, most, self.settings.encoder_batch)
        return scores, torch.tensor([len(ids) for ids in candidates], device=scores.device)

    def replies(
        self, samples: Mapping[str, Any], sampling: Sampling, question: str | Sequence[str] | None = None
    ) -> list[Generation]:
        """``num_return_sequences`` replies to each sample, to be run by a :class:`Decoder`; see :meth:`generate`."""
        media = media_of(samples)
        prompts = contexts(samples, media, self.template, question)
        soft, ranges = self.soft_tokens(prompts, media)
        bos = self.prompt_layout != "original"  # the original evaluates without it
        seed = int(torch.randint(1 << 31, ())) if sampling.seed is None and sampling.temperature else sampling.seed
        replies: list[Generation] = []
        for pieces, spans in zip(prompts, ranges, strict=True):
            own = {slot: (str(slot), soft[span.start : span.stop]) for slot, span in spans.items() if soft is not None}
            elements = elements_of(pieces, own, self.llama_tokenizer, bos)
            stops = (END_OF_CAPTION,) if is_alignment(pieces) else self.template.stops
            room = free_positions(self.llama_model.config, len(elements))
            if room < sampling.max_new_tokens:
                log.warning("answers end after %d tokens, at the language model's last position", room)
            limit = int(min(room, sampling.max_new_tokens))
            parts = elements, dict(own.values()), self.llama_tokenizer
            for _ in range(sampling.num_return_sequences):
                changes = {"max_new_tokens": limit, "seed": None if seed is None else seed + len(replies)}
                how = sampling.model_copy(update=changes)
                replies.append(Generation(*parts, how, stops, self.template.end_ids))
        return replies


def candidate_scores(
    model: LanguageModel, embeds: Tensor, mask: Tensor, candidates: Sequence[Sequence[int]], keep: int, chunk: int
) -> Tensor:
    """``[B, C]`` log-probabilities in fp32 of candidates as continuations of each row. Each row is read once.

    Args:
        model: The language model.
        embeds: ``[B, L, D]``, padded on the left.
        mask: ``[B, L]``, zero at padding.
        candidates: ``C`` lists of ids, none of them empty.
        keep: Only this many candidates of a row are scored, those with the likeliest first token (as in BLIP's
            ranking); the others get minus infinity.
        chunk: Number of candidates to score at once.
    """
    device = embeds.device
    lengths = torch.tensor([len(candidate) for candidate in candidates], device=device)
    if (room := free_positions(model.config, int(mask.sum(1).max()))) < (longest := int(lengths.max())):
        raise PromptError(f"a candidate has {longest} tokens, but the longest prompt leaves {room:g} positions")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache = read(model, None, mask, positions, last_only=True, inputs_embeds=embeds)
    ids = pad_sequence([torch.tensor(list(candidate)) for candidate in candidates], batch_first=True).to(device)
    openings = logits[:, -1].float().log_softmax(-1)[:, ids[:, 0]]
    scores = torch.full_like(openings, float("-inf"))
    chosen = openings.topk(min(keep, len(candidates)), dim=1).indices
    rows = torch.arange(len(embeds), device=device).repeat_interleave(chosen.shape[1])
    for row, candidate in zip(rows.split(chunk), chosen.flatten().split(chunk), strict=True):
        own = copy.deepcopy(cache)
        own.batch_select_indices(row)
        rest = _rest_scores(model, own, mask[row], ids[candidate], lengths[candidate])
        scores[row, candidate] = openings[row, candidate] + rest
    return scores


def _rest_scores(model: LanguageModel, cache: Any, mask: Tensor, ids: Tensor, lengths: Tensor) -> Tensor:
    """``[P]`` log-probabilities of ``P`` candidates without their first token, each after its row of the cache."""
    steps = int(lengths.max()) - 1
    if not steps:
        return torch.zeros(len(ids), device=ids.device)
    steps_mask = torch.cat([mask, torch.ones_like(ids[:, :steps])], dim=1)
    positions = mask.sum(1, keepdim=True) + torch.arange(steps, device=ids.device)
    logits, _ = read(model, cache, steps_mask, positions, input_ids=ids[:, :steps])
    values = logits.float().log_softmax(-1).gather(-1, ids[:, 1 : steps + 1, None]).squeeze(-1)
    counts = torch.arange(1, steps + 1, device=ids.device) < lengths[:, None]
    return (values * counts).sum(1)
