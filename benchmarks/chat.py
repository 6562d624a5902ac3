"""How long a chat lets one wait: the first token of an answer, with and without what earlier turns have computed.

    python benchmarks/chat.py [--turns 10] [--width 768] [--layers 12]

A model of middle size with random weights talks on the CPU; a picture comes in turn 1, and another in turn 4. Goal: the
first token at turn 5 at least 5 times as early with the cache as without. CPU seconds are given beside those of the
clock: they count what is computed, however busy the machine is.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_chatbridge.chat import Sampling, Session
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.settings import (
    AudioSettings,
    LanguageModelSettings,
    ModelSettings,
    PerceiverSettings,
    VisionSettings,
)
from lavis_chatbridge.processors import load_processors

GOAL_TURN, GOAL = 5, 5.0
TOKENIZER = Path(__file__).resolve().parent.parent / "lavis_chatbridge" / "assets" / "tiny" / "llm"
QUESTION = "what is the colour of the shape in the picture, and where is it? tell me about the size of it as well"
PICTURES = (0, 3)
REPLY_TOKENS = 48
VOCABULARY = 598  # that of the tokenizer


def build(width: int, layers: int, context: int = 4096) -> Any:
    """A ChatBridge with a small encoder and a language model of the given size, and its processors."""
    from lavis_chatbridge.models.beats import BeatsConfig

    torch.manual_seed(0)
    small_beats = BeatsConfig(
        embed_dim=96, encoder_embed_dim=96, encoder_layers=2, encoder_ffn_embed_dim=192, encoder_attention_heads=4
    )
    model = ChatBridge(
        ModelSettings(
            vision=VisionSettings(image_size=112, patch_size=14, width=192, depth=4, heads=4),
            audio=AudioSettings(config=small_beats),
            perceiver=PerceiverSettings(width=256, layers=4, heads=4, feed_forward=1024, queries=32),
            language_model=LanguageModelSettings(
                tokenizer=str(TOKENIZER),
                config={
                    "model_type": "llama",
                    "vocab_size": VOCABULARY,
                    "hidden_size": width,
                    "intermediate_size": 3 * width,
                    "num_hidden_layers": layers,
                    "num_attention_heads": width // 64,
                    "max_position_embeddings": context,
                },
            ),
        )
    ).eval()
    processors = load_processors({"vis_processor": {"eval": {"name": "chatbridge_image_eval", "image_size": 112}}})
    return model, processors


def first_tokens(model: Any, processors: Any, keep: bool, turns: int) -> list[tuple[int, float, float]]:
    """For each turn: tokens of the prompt, seconds to the first token by the clock, and of the CPU."""
    session = Session(model, processors, keep=keep, sampling=Sampling(max_new_tokens=REPLY_TOKENS))
    rng = np.random.default_rng(0)
    found = []
    for turn in range(turns):
        images = [rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)] if turn in PICTURES else []
        clock, cpu = time.perf_counter(), time.process_time()
        answer = session.ask(QUESTION, images, max_new_tokens=1)
        found.append((answer.prompt_tokens, time.perf_counter() - clock, time.process_time() - cpu))
        session.regenerate()  # the whole reply, which the next turns come after
    return found


def latency(turns: int, width: int, layers: int) -> None:
    """Print the table of first tokens."""
    model, processors = build(width, layers)
    size = sum(p.numel() for p in model.llama_model.parameters()) / 1e6
    first_tokens(model, processors, True, 1)  # the first run of everything is slower
    without = first_tokens(model, processors, False, turns)
    kept = first_tokens(model, processors, True, turns)
    print(f"first token, language model of {size:.0f} M parameters, {torch.get_num_threads()} threads")
    names = ("turn", "tokens", "without (s)", "with (s)", "ratio", "CPU without", "CPU with", "ratio")
    print("".join(f"{name:>12}" for name in names))
    for turn, ((tokens, *slow), (_, *fast)) in enumerate(zip(without, kept, strict=True), start=1):
        if turn > 1:
            seconds = f"{slow[0]:>12.3f}{fast[0]:>12.3f}{slow[0] / fast[0]:>12.1f}"
            print(f"{turn:>12}{tokens:>12}{seconds}{slow[1]:>12.3f}{fast[1]:>12.3f}{slow[1] / fast[1]:>12.1f}")
    if turns >= GOAL_TURN:
        ratio = without[GOAL_TURN - 1][2] / kept[GOAL_TURN - 1][2]
        print(f"goal: at least {GOAL:g} times at turn {GOAL_TURN}; CPU seconds: {ratio:.1f}")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--width", type=int, default=768, help="of the language model")
    parser.add_argument("--layers", type=int, default=12, help="of the language model")
    args = parser.parse_args()
    latency(args.turns, args.width, args.layers)


if __name__ == "__main__":
    main()
