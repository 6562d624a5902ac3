"""A language model in 8 and 4 bits against 16: bytes of its weights, errors, seconds.

Run from the repository's root::

    OMP_NUM_THREADS=1 python benchmarks/quantize.py [--size 0.5b] [--write benchmarks/quantize.md]

Each way loads the same folder by ``model.language_model.quantization`` and computes in bfloat16; 16 bits, the named
baseline, is that without quantization. "Of the logits" is the length of the difference from the logits of the same
folder in float32, by their length; "first" is how often both rank the same token first. "Of the gradients" is the same
for the gradients that reach the inputs, which are what trains the bridge. Bytes are of all tensors that the loaded
model holds, scales and code books among them. Seconds are of the processor, which other work does not stretch much.

Two models are measured: a LLaMA of the size that is asked for, with random weights and random inputs, for bytes and
seconds; and the shipped tiny one, because it is trained: errors of random weights say little about those of trained
ones, and these two say little about a large model's. The second's loss is on captions of the embedded world.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from common import circumstances, tell
from torch import Tensor
from torch.nn import functional

from lavis_chatbridge.models import half_precision
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.settings import LanguageModelSettings, Quantization
from lavis_chatbridge.prompting import Text
from lavis_chatbridge.toyworld.reading import captioned

SIZES: dict[str, dict[str, int]] = {
    "0.5b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
WAYS: dict[str, Quantization | None] = {"16 bits": None, "8bit": "8bit", "4bit": "4bit"}
TRAINED = "package:assets/tiny/llm"
ROWS, POSITIONS, CAPTIONS = 2, 16, 64
_MIB = 1 << 20


@dataclass(frozen=True)
class Pass:
    """What a model says to inputs, and what reaches them."""

    logits: Tensor
    gradients: Tensor
    loss: float
    forward: float
    both: float


@dataclass(frozen=True)
class Row:
    """One way: bytes, errors against float32, seconds."""

    way: str
    held: int
    logits: float
    first: float
    gradients: float
    loss: float
    forward: float
    both: float


def load(folder: str, how: Quantization | None, dtype: Any = "bfloat16") -> tuple[Any, Any]:
    """The language model of a folder and its tokenizer, which the random one borrows."""
    model, codec = load_language_model(LanguageModelSettings(folder, TRAINED, dtype=dtype, quantization=how))
    half_precision.use_fp32_products(model)  # as in a whole ChatBridge
    return model, codec


def held(model: Any) -> int:
    """Bytes of a model's tensors, each once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def run(model: Any, ids: Tensor, mask: Tensor) -> Pass:
    """A pass without gradients, and one with."""
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    start = time.process_time()
    with torch.no_grad():
        model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
    forward, start = time.process_time() - start, time.process_time()
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()
    read = mask[:, 1:].bool()
    loss = functional.cross_entropy(logits[:, :-1][read], ids[:, 1:][read])
    [gradients] = torch.autograd.grad(loss, embeds)
    both = time.process_time() - start
    return Pass(logits.detach()[mask.bool()], gradients[mask.bool()].float(), loss.item(), forward, both)


def rows(folder: str, ids: Tensor, mask: Tensor) -> list[Row]:
    """All ways on one folder, against float32."""
    reference = run(load(folder, None, "float32")[0], ids, mask)
    found = []
    for way, how in WAYS.items():
        model, _ = load(folder, how)
        own = run(model, ids, mask)
        first = (own.logits.argmax(-1) == reference.logits.argmax(-1)).float().mean().item()
        apart = [error(getattr(own, part), getattr(reference, part)) for part in ("logits", "gradients")]
        found.append(Row(way, held(model), apart[0], first, apart[1], own.loss, own.forward, own.both))
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """The length of a difference, by the length of what is expected."""
    return ((found - expected).norm() / expected.norm()).item()


def captions() -> tuple[Tensor, Tensor]:
    """``[B, L]`` ids of captions of the embedded world, and which are no padding."""
    rng = random.Random("quantize")
    _, codec = load(TRAINED, None)
    texts = ["".join(piece.text for piece in captioned(rng) if isinstance(piece, Text)) for _ in range(CAPTIONS)]
    listed = [torch.tensor([codec.bos_id, *codec.encode(text)]) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(listed, batch_first=True, padding_value=codec.pad_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in listed], batch_first=True)
    return ids, mask


def random_folder(folder: Path, size: str) -> int:
    """Write a LLaMA with random weights in bfloat16; the number of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES[size], vocab_size=32_000)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def table(found: Sequence[Row]) -> list[str]:
    """The ways in Markdown; 16 bits is the baseline of the ratios."""
    titles = ["way", "weights, MiB", "of 16 bits", "of the logits", "first", "of the gradients", "loss"]
    titles += ["CPU s forward", "ratio", "both ways", "ratio"]
    lines = [f"| {' | '.join(titles)} |", f"|---|{'---:|' * (len(titles) - 1)}"]
    base = found[0]
    for row in found:
        cells = [row.way, f"{row.held / _MIB:.1f}", f"{row.held / base.held:.3f}", f"{row.logits:.2%}"]
        cells += [f"{row.first:.1%}", f"{row.gradients:.2%}", f"{row.loss:.3f}"]
        cells += [f"{row.forward:.2f}", f"{row.forward / base.forward:.2f}"]
        cells += [f"{row.both:.2f}", f"{row.both / base.both:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(size: str) -> str:
    """Both models measured, in Markdown."""
    import bitsandbytes

    with tempfile.TemporaryDirectory() as temporary:
        numbers = random_folder(Path(temporary), size)
        ids = torch.randint(3, 32_000, (ROWS, POSITIONS), generator=torch.Generator().manual_seed(1))
        large = rows(temporary, ids, torch.ones_like(ids))
    ids, mask = captions()
    small = rows(TRAINED, ids, mask)
    lines = [
        "# A language model in 8 and 4 bits\n",
        circumstances("quantize.py", f"--size {size}", modules=(torch, transformers, bitsandbytes)),
        f"CPU ({torch.backends.cpu.get_cpu_capability()}), threads: {torch.get_num_threads()}. No GPU was used: "
        "nothing here is of one. What is compared, and with what, stands at the head of the script.\n",
        f"A LLaMA of {numbers / 1e6:.0f} million random weights, {ids_in_words(ROWS, POSITIONS)}:\n",
        *table(large),
        f"\nThe shipped tiny language model, trained, {ids_in_words(*ids.shape)} at most, captions of its world:\n",
        *table(small),
    ]
    return "\n".join(lines) + "\n"


def ids_in_words(count: int, length: int) -> str:
    """The size of a batch."""
    return f"{count} rows of {length} positions"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    tell(report(args.size), args.write)


if __name__ == "__main__":
    main()
