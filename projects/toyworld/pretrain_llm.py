"""Train the tiny language model of the embedded world from random weights, only on texts about this world.

    python projects/toyworld/pretrain_llm.py --out DIR

The output is an ordinary Hugging Face folder: a byte-level tokenizer in which every word of the world is one token, and
a small LLaMA. If this model cannot answer questions about text descriptions, it cannot answer them about media.
Therefore its exact-match accuracy on joint questions (the gate) is printed and stored with the weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from reading import LEVELS, NAMING, exam, passage, random_scene
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lavis_chatbridge.prompting.conversation import Piece, Text
from lavis_chatbridge.toyworld.language import QUESTION_KINDS, QuestionKind

log = logging.getLogger(__name__)

BOS, EOS, PAD, END_OF_TURN = "<s>", "</s>", "<pad>", "###"
CONTEXT_WEIGHT = 0.05
"""Loss weight of a description's tokens; tokens of captions and answers have weight 1."""

LAST_LEVEL_FROM = 0.5
"""Share of the steps after which the curriculum is always at its last level."""


@dataclass(frozen=True)
class Recipe:
    """Settings of model and training.

    The shipped weights are from one run with these defaults; ``gate.json`` has its settings and scores. Another CPU or
    library version gives other weights, and the bridge must then be trained again.
    """

    seed: int = 0
    steps: int = 2800
    width: int = 128
    layers: int = 5
    heads: int = 4
    feed_forward: int = 320
    deviation: float = 0.07
    passages: int = 48
    groups: int = 6
    learning_rate: float = 2e-3
    final_rate: float = 0.02
    warm_up: int = 100
    decay: float = 0.45
    weight_decay: float = 0.05
    clip: float = 1.0
    threads: int = 1
    bf16: bool = False
    """Autocast to bfloat16: faster on a CPU with bfloat16 instructions, six times slower on others."""


def make_tokenizer(seed: int = 0, passages: int = 2400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: a word of the world with its leading space is one token; any text can be encoded."""
    rng = random.Random(f"tokenizer/{seed}")
    pieces = (piece for _ in range(passages) for piece in passage(rng, LEVELS[-1]) if isinstance(piece, Text))
    texts = (part for piece in pieces for part in piece.text.split(END_OF_TURN))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(END_OF_TURN, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        add_prefix_space=True,
        clean_up_tokenization_spaces=False,
    )


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A randomly initialised LLaMA with tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.feed_forward,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=1024,
        initializer_range=recipe.deviation,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # on a CPU, at these sizes, much faster than the fused one
    return model


@dataclass
class Encoded:
    """A tokenised passage: ids, and the loss weight of each token."""

    ids: list[int]
    weights: list[float]


def encode(passages: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """Tokenise each piece separately, BOS first, as the model with media does."""
    texts = [[piece for piece in pieces if isinstance(piece, Text)] for pieces in passages]
    flat = [piece.text for pieces in texts for piece in pieces]
    ids = iter(tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"])
    encoded = []
    for pieces in texts:
        row = Encoded([tokenizer.bos_token_id], [0.0])
        for piece in pieces:
            tokens = next(ids)
            described = not piece.target and END_OF_TURN not in piece.text
            row.ids += tokens
            row.weights += [1.0 if piece.target else CONTEXT_WEIGHT if described else 0.0] * len(tokens)
        encoded.append(row)
    return encoded


@dataclass
class Batch:
    """Passages of similar length, padded on the right: ``B`` passages, ``L`` tokens."""

    ids: torch.Tensor  # [B, L]
    weights: torch.Tensor  # [B, L], of the token as a target


def group(encoded: Sequence[Encoded], pad: int, groups: int) -> list[Batch]:
    """Passages in batches of nearly equal size, sorted by length."""
    ordered = sorted(encoded, key=lambda one: len(one.ids))
    size = math.ceil(len(ordered) / groups)
    return [_pad(ordered[start : start + size], pad) for start in range(0, len(ordered), size)]


def _pad(encoded: Sequence[Encoded], pad: int) -> Batch:
    length = max(len(one.ids) for one in encoded)
    missing = [length - len(one.ids) for one in encoded]
    return Batch(
        ids=torch.tensor([one.ids + [pad] * extra for one, extra in zip(encoded, missing, strict=True)]),
        weights=torch.tensor([one.weights + [0.0] * extra for one, extra in zip(encoded, missing, strict=True)]),
    )


@dataclass
class Curriculum:
    """The current level. It rises when most answers to yes/no questions are right, or after a share of the steps."""

    level: int = 0
    right: float = 0.5

    def learn(self, right: float, done: float, wanted: float = 0.9, memory: float = 0.95) -> None:
        """Update with the share of right yes/no answers of one step, and the share of finished steps."""
        self.right = memory * self.right + (1 - memory) * right
        last = len(LEVELS) - 1
        late = self.level < int(done / LAST_LEVEL_FROM * last)
        if self.level < last and (self.right > wanted or late):
            self.level, self.right = self.level + 1, 0.5

    def passage(self, rng: random.Random) -> list[Piece]:
        """A passage of this level; before the last level, a quarter of the passages are from `NAMING`."""
        level = LEVELS[self.level]
        return passage(rng, level if level.values is None or rng.random() < 0.75 else NAMING)


def scores_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For the N tokens with a weight: logits [N, V], tokens [N], weights [N]."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    counted = batch.weights[:, 1:] > 0
    return model.lm_head(hidden[:, :-1][counted]).float(), batch.ids[:, 1:][counted], batch.weights[:, 1:][counted]


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, report_every: int, out: Path
) -> None:
    """Train on random passages: AdamW with warm-up, a constant rate, and a decay over the last part."""
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    rng, curriculum = random.Random(f"passages/{recipe.seed}"), Curriculum()
    verdicts = torch.tensor(tokenizer(["yes", "no"], add_special_tokens=False)["input_ids"]).flatten()
    model.train()
    begun, losses = time.perf_counter(), []
    for step in range(1, recipe.steps + 1):
        passages = [curriculum.passage(rng) for _ in range(recipe.passages)]
        parts = group(encode(passages, tokenizer), tokenizer.pad_token_id, recipe.groups)
        for settings in optimizer.param_groups:
            settings["lr"] = recipe.learning_rate * _rate(step, recipe)
        loss, right = _step(model, parts, verdicts, recipe)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        curriculum.learn(right, step / recipe.steps)
        losses.append(loss)
        if step % report_every == 0 or step == recipe.steps:
            scores = gate(model, tokenizer, questions=40, seed=step)
            table = " ".join(f"{kind} {score:.2f}" for kind, score in scores.items())
            mean, seconds = sum(losses) / len(losses), time.perf_counter() - begun
            level = f"level {curriculum.level} ({curriculum.right:.2f})"
            log.info("step %d, %.0f s, loss %.4f, %s: %s", step, seconds, mean, level, table)
            losses.clear()
            save(model, tokenizer, out)


def _step(
    model: LlamaForCausalLM, parts: Sequence[Batch], verdicts: torch.Tensor, recipe: Recipe
) -> tuple[float, float]:
    """Compute gradients of the weighted mean loss; returns the loss and the share of right yes/no tokens."""
    total = sum(float(part.weights.sum()) for part in parts)
    summed, right, judged = 0.0, 0, 0
    for part in parts:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits, wanted, weights = scores_of(model, part)
        loss = (torch.nn.functional.cross_entropy(logits, wanted, reduction="none") * weights).sum() / total
        loss.backward()
        summed += loss.item()
        verdict = torch.isin(wanted, verdicts)
        right += int((logits.argmax(-1) == wanted)[verdict].sum())
        judged += int(verdict.sum())
    return summed, right / max(judged, 1)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the folder in half precision, with a tokenizer class that transformers 4 and 5 both have."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    settings.write_text(
        json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=1) + "\n"
    )
    copy.deepcopy(model).half().save_pretrained(out)


def _rate(step: int, recipe: Recipe) -> float:
    if step <= recipe.warm_up:
        return step / recipe.warm_up
    decay = recipe.decay * recipe.steps
    return min(1.0, recipe.final_rate + (1 - recipe.final_rate) * (recipe.steps - step) / decay)


@torch.no_grad()
def right_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Sequence[Piece]]
) -> list[bool]:
    """Whether greedy decoding gives exactly each prompt's last answer, with its end marker.

    That is the case if the most likely token at each of the answer's positions is the answer's.
    """
    training = model.training
    model.eval()
    encoded = encode(prompts, tokenizer)
    right = []
    for start in range(0, len(encoded), 32):
        part = encoded[start : start + 32]
        length = max(len(one.ids) for one in part)
        ids = torch.tensor([one.ids + [tokenizer.pad_token_id] * (length - len(one.ids)) for one in part])
        best = model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1)
        target = torch.zeros_like(ids, dtype=torch.bool)
        for row, one in enumerate(part):
            target[row, : len(one.ids)] = torch.tensor(one.weights) == 1.0
        right += ((best == ids[:, 1:]) | ~target[:, 1:]).all(-1).tolist()
    model.train(training)
    return right


def gate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: int, seed: int = 0
) -> dict[QuestionKind, float]:
    """Exact-match accuracy per kind on new joint questions about descriptions of a picture or clip, and of a sound."""
    rng = random.Random(f"gate/{seed}")
    scores: dict[QuestionKind, float] = {}
    for kind in QUESTION_KINDS:
        prompts = []
        for _ in range(questions):
            scenes = [random_scene(rng.choice(("image", "video")), rng), random_scene("audio", rng)]
            rng.shuffle(scenes)
            prompts.append(exam(kind, scenes, rng))
        scores[kind] = sum(right_answers(model, tokenizer, prompts)) / questions
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the model and write it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=500, help="questions of each kind in the gate")
    parser.add_argument("--report-every", type=int, default=100)
    parser.add_argument("--bf16", action="store_true", help="for a CPU with bfloat16 instructions (avx512_bf16, AMX)")
    for name, value in asdict(Recipe()).items():
        if name != "bf16":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    out, report_every, asked = (options.pop(name) for name in ("out", "report_every", "questions"))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    recipe = Recipe(**options)
    torch.set_num_threads(recipe.threads)
    tokenizer = make_tokenizer()
    model = make_model(recipe, tokenizer)
    log.info("%d tokens, %d parameters", len(tokenizer), model.num_parameters())
    train(model, tokenizer, recipe, report_every, out)
    scores = gate(model, tokenizer, questions=asked)
    save(model, tokenizer, out)
    (out / "gate.json").write_text(json.dumps({"recipe": asdict(recipe), "gate": scores}, indent=1) + "\n")
    log.info("gate: %s", scores)


if __name__ == "__main__":
    main()
