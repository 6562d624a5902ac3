"""How long a chat lets one wait: the first token of an answer, with and without what earlier turns have computed.

    python benchmarks/chat.py [--turns 10] [--width 768] [--layers 12] [--write benchmarks/chat.md]

A model of middle size with random weights talks on the CPU; a picture comes in turn 1, and another in turn 4. Goal: the
first token at turn 5 at least 5 times as early with the cache as without. CPU seconds are given beside those of the
clock: they count what is computed, however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from common import circumstances, tell

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
VOCABULARY = json.loads((TOKENIZER / "config.json").read_text())["vocab_size"]


def build(width: int, layers: int, context: int = 4096) -> Any:
    """A ChatBridge with a small encoder and a language model of the given size, and its processors."""
    from lavis_chatbridge.models.settings import BeatsConfig

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


def latency(turns: int, width: int, layers: int) -> str:
    """The table of first tokens, in Markdown."""
    model, processors = build(width, layers)
    size = sum(p.numel() for p in model.llama_model.parameters()) / 1e6
    first_tokens(model, processors, True, 1)  # the first run of everything is slower
    without = first_tokens(model, processors, False, turns)
    kept = first_tokens(model, processors, True, turns)
    lines = [
        f"First token of an answer, language model of {size:.0f} M parameters:",
        "",
        "| turn | tokens of the prompt | without cache (s) | with (s) | ratio | CPU s without | with | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for turn, ((tokens, *slow), (_, *fast)) in enumerate(zip(without, kept, strict=True), start=1):
        if turn > 1:
            both = zip(slow, fast, strict=True)
            cells = " | ".join(f"{one:.3f} | {other:.3f} | {one / other:.1f}" for one, other in both)
            lines.append(f"| {turn} | {tokens} | {cells} |")
    if turns >= GOAL_TURN:
        clock, cpu = (without[GOAL_TURN - 1][i] / kept[GOAL_TURN - 1][i] for i in (1, 2))
        told = "reached" if cpu >= GOAL else "missed"
        lines += ["", f"Goal: at least {GOAL:g} times at turn {GOAL_TURN}: {told}, {cpu:.1f} times in CPU seconds "]
        lines[-1] += f"({clock:.1f} by the clock, which counts what else the machine does)."
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--width", type=int, default=768, help="of the language model")
    parser.add_argument("--layers", type=int, default=12, help="of the language model")
    parser.add_argument("--write", type=Path, metavar="FILE", help="a Markdown file for the table")
    args = parser.parse_args()
    options = [f"--{name}={getattr(args, name)}" for name in ("turns", "width", "layers")]
    how = circumstances("chat.py", *options, modules=(torch, transformers))
    table = latency(args.turns, args.width, args.layers)
    tell(f"# What the cache of a conversation is worth\n\n{how}\n{table}", args.write)


if __name__ == "__main__":
    main()
