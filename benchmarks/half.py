"""Half-precision weights on a CPU without products in half precision: one product, and a ChatBridge that answers.

Run from the repository's root, on a quiet machine; no weights and no data are needed::

    OMP_NUM_THREADS=1 python benchmarks/half.py [--size 7b] [--rounds 3] [--write benchmarks/half.md]

The paper's sizes with Vicuna-7B's language model take 16 GiB of memory; ``--size tiny`` runs anywhere in seconds, and
shows only that the script runs. "ours" is what the package does on such a processor by itself
(`lavis_chatbridge.models.half_precision`), "torch" is torch's own product in the weights' precision, "fp32" is a weight
that is held in fp32 to begin with, which takes twice the memory.

Products are of a feed-forward layer of the language model, forward and back to the input. The answer is one to a
question about an image, by a model with random weights in bf16: the image through EVA-ViT-G, the prompt up to the first
token, and then a token at a time. Seconds are of the clock.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from common import circumstances, status, tell
from gpu import LLAMAS, build, settings_of

from lavis_chatbridge.models import half_precision
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.prompting import Message, chat_prompt

ROWS = (1, 4, 16, 128)
QUESTION = "What is on the table, and what colour is the largest thing on it?"
MORE_TOKENS = 8


@contextmanager
def torchs_own() -> Iterator[None]:
    """As if the processor had products in half precision."""
    kept = half_precision.is_slow_on_cpu
    half_precision.is_slow_on_cpu = lambda dtype: False
    try:
        yield
    finally:
        half_precision.is_slow_on_cpu = kept


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """Median of the rounds, after one call to warm up; without rounds, the one call."""
    taken = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:] or taken)


def both_ways(x: torch.Tensor, weight: torch.Tensor) -> None:
    """A product and the way back to its input."""
    half_precision.linear(x.requires_grad_(), weight).sum().backward()


def products(size: str, rounds: int) -> Iterator[str]:
    """Rows of a table: milliseconds of a product by the number of its rows."""
    llama = LLAMAS[size]
    full = torch.randn(llama["intermediate_size"], llama["hidden_size"])
    half = full.bfloat16()
    for count in ROWS:
        x = torch.randn(count, llama["hidden_size"])
        with torchs_own():
            plain = forward_and_both(x.bfloat16(), half, 0)
        found = [plain, forward_and_both(x.bfloat16(), half, rounds), forward_and_both(x, full, rounds)]
        cells = [f"{way[part] * 1e3:.1f}" for part in (0, 1) for way in found]
        print(count, cells, file=sys.stderr)
        yield f"| {count} | " + " | ".join(cells) + " |"


def forward_and_both(x: torch.Tensor, weight: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Seconds of a product alone, and with the way back."""
    alone = seconds(lambda: half_precision.linear(x, weight), rounds)
    return alone, seconds(lambda: both_ways(x, weight), rounds)


def answer(model: ChatBridge, rounds: int) -> dict[str, float]:
    """Seconds of the parts of one answer."""
    side = model.settings.vision.image_size
    image = torch.randn(3, side, side, generator=torch.Generator().manual_seed(1))
    (encoded,) = model.encode_media("image", [image])
    pieces = chat_prompt([Message("user", QUESTION, ("image",)), Message("assistant", "")])
    samples = {"pieces": [pieces], "image": [[encoded]], "video": [[]], "audio": [[]]}

    def answered(tokens: int) -> Callable[[], Any]:
        return lambda: model.generate(samples, max_length=tokens, min_length=tokens, stop="")

    first, all_ = (seconds(answered(tokens), rounds) for tokens in (1, 1 + MORE_TOKENS))
    return {
        "image": seconds(lambda: model.encode_media("image", [image]), rounds),
        "first token": first,
        "each more": (all_ - first) / MORE_TOKENS,
    }


def report(size: str, rounds: int, options: list[str]) -> str:
    """The tables in Markdown."""
    lines = [
        "# Half-precision weights on a CPU without such products",
        "",
        circumstances("half.py", *options, modules=(torch, transformers)),
        "What is compared, and with what, stands at the head of the script.",
        "",
        "Milliseconds of a product with a weight of [{intermediate_size}, {hidden_size}]:".format_map(LLAMAS[size]),
        "",
        "| rows | torch, bf16 | ours, bf16 | fp32 | torch, both ways | ours | fp32 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *products(size, rounds),
    ]
    torch.manual_seed(0)
    before = status("VmRSS")
    model = build(settings_of(size), torch.device("cpu")).eval()
    parts = {"ours": answer(model, rounds)}
    peak = status("VmHWM") - before
    print(parts, file=sys.stderr)
    with torchs_own():
        parts["torch"] = answer(model, 0)  # minutes, beside which nothing is left to warm up
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    lines += [
        "",
        f"One answer at the sizes of `{size}`: {held / 1e9:.2f} GB of weights, a peak of {peak / 1e9:.2f} GB above "
        "what the imports take.",
        "",
        "| seconds | torch, bf16 | ours, bf16 | ratio |",
        "|---|---:|---:|---:|",
    ]
    for part, taken in parts["ours"].items():
        lines.append(f"| {part} | {parts['torch'][part]:.2f} | {taken:.2f} | {parts['torch'][part] / taken:.2f} |")
    if not half_precision.is_slow_on_cpu(torch.bfloat16):
        lines += ["", "This processor has products in bf16: both ways are torch's."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", choices=list(LLAMAS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="file for the tables")
    args = parser.parse_args()
    options = ["--size", args.size, "--rounds", str(args.rounds)]
    tell(report(args.size, args.rounds, options), args.write)


if __name__ == "__main__":
    main()
