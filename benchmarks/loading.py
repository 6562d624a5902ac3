"""Host memory of loading a language model and a whole ChatBridge, against their sizes and against the plain way.

Run from the repository's root::

    python benchmarks/loading.py [--size 1g] [--write benchmarks/loading.md]
    python benchmarks/loading.py --size 7b --ways ours [--write benchmarks/loading_7b.md]

The second has the real sizes of a ChatBridge with Vicuna-7B: it needs 31 GB for files in the temporary folder
(``TMPDIR``) and 20 GB of memory; the plain way would take 45. ``--size 13b`` has those with Vicuna-13B, as safetensors
only: it needs 30 GB for files.

Random weights are written in the layouts that the real ones are published in: a LLaMA in bfloat16 as sharded
safetensors and as sharded ``.bin`` (Vicuna), EVA-ViT in float16 with a block and a norm that are not used, BEATs in
float32 with its configuration and a classifier, BLIP-2 in float32 with the Q-Former's text branch. In the whole model
the encoders and the LLaMA run in bfloat16, what is trained in float32. Each row loads in a fresh process, reads every
weight once, and gives the peaks above what that process has after its imports: "resident" is what the kernel counts
(VmHWM), pages of mapped files among them, which it takes back when memory is short; "own" leaves those out (RssAnon,
looked at every 5 ms).

The plain way, the named baseline, builds each part as it is declared, in float32 with its random initialisation, reads
its files, copies, and converts. "Encoders first" is what this package did before its encoders were built without
numbers: the language model as now, the other parts built in float32 and filled from mapped files. Seconds are of
loading alone, with all files in the page cache. Goal: a peak of at most 1.3 times the loaded model's size.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from common import circumstances, status, tell
from torch import Tensor, nn

LLAMA: dict[str, dict[str, int]] = {
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "1g": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4},
}
EVA: dict[str, dict[str, int]] = {
    "13b": {},
    "7b": {},
    "1g": {"depth": 10},
    "tiny": {"depth": 2, "width": 64, "heads": 4, "image_size": 28},
}
BEATS: dict[str, dict[str, int]] = {
    "13b": {},
    "7b": {},
    "1g": {},
    "tiny": {
        "encoder_layers": 2,
        "embed_dim": 32,
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 96,
        "encoder_attention_heads": 4,
    },
}
QFORMER: dict[str, dict[str, int]] = {
    "13b": {},
    "7b": {},
    "1g": {},
    "tiny": {"width": 48, "layers": 2, "heads": 4, "feed_forward": 96},
}
VOCABULARY = {"13b": 30_522, "7b": 30_522, "1g": 30_522, "tiny": 100}
ONE_LAYOUT = ("13b",)
"""Sizes whose language model is written as safetensors only, for want of room."""
SHARDS = 4
GOAL = 1.3
TOKENIZER = "package:assets/tiny/llm"
BRIDGE = "whole ChatBridge"
_MIB, _PAGE = 1 << 20, 4096


@dataclass(frozen=True)
class Row:
    """One line of the table; sizes in bytes, peaks above the process's imports.

    ``size`` is that of the loaded model: of a language model, its files' too.
    """

    way: str
    files: str
    size: int
    resident: int
    own: int
    seconds: float


def write_language_model(folder: Path, size: str) -> None:
    """The LLaMA in both layouts, tensor by tensor: this process needs memory for one shard."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(vocab_size=32000, **LLAMA[size])
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    parts = [names[part * len(names) // SHARDS : (part + 1) * len(names) // SHARDS] for part in range(SHARDS)]
    layouts = {"safetensors": ("model", "safetensors")}
    layouts |= {} if size in ONE_LAYOUT else {"bin": ("pytorch_model", "bin")}
    torch.manual_seed(0)
    for layout, (stem, suffix) in layouts.items():
        target = folder / layout
        target.mkdir()
        config.save_pretrained(target)
        places = {}
        for number, part in enumerate(parts, start=1):
            name = f"{stem}-{number:05d}-of-{SHARDS:05d}.{suffix}"
            tensors = {key: (torch.randn(shapes[key]) * 0.02 + (len(shapes[key]) == 1)).bfloat16() for key in part}
            places |= dict.fromkeys(part, name)
            if layout == "bin":
                torch.save(tensors, target / name)
            else:
                save_file(tensors, target / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def bridge_settings(folder: Path, size: str) -> Any:
    """A ChatBridge of the files in a folder, precisions as in the shipped configurations of the paper's scale."""
    from lavis_chatbridge.models.beats import BeatsConfig
    from lavis_chatbridge.models.settings import (
        AudioSettings,
        LanguageModelSettings,
        ModelSettings,
        PerceiverSettings,
        VisionSettings,
    )

    half: Any = {"dtype": "bfloat16"}
    audio = {"weights": str(folder / "BEATs_iter3_plus_AS2M.pt"), "config": BeatsConfig(**BEATS[size])}
    return ModelSettings(
        vision=VisionSettings(**EVA[size], weights=str(folder / "eva_vit_g.pth"), **half),
        audio=AudioSettings(**audio, **half),
        perceiver=PerceiverSettings(**QFORMER[size], weights=str(folder / "blip2_pretrained_flant5xxl.pth")),
        language_model=LanguageModelSettings(weights=str(folder / "safetensors"), tokenizer=TOKENIZER, **half),
    )


def write_encoders(folder: Path, size: str) -> None:
    """The files of EVA-ViT, BEATs and BLIP-2, with the parts of the published ones that ChatBridge leaves out."""
    from lavis_chatbridge.models import shapes

    settings = bridge_settings(folder, size)
    own = settings.perceiver
    eva = shapes.vision_shapes(replace(settings.vision, depth=settings.vision.depth + 1))
    eva |= {name: torch.empty(settings.vision.width, device="meta") for name in ("norm.weight", "norm.bias")}
    torch.save(drawn(eva, torch.float16), settings.vision.weights)
    beats = drawn(shapes.beats_shapes(settings.audio.config), torch.float32)
    beats["predictor.weight"] = torch.zeros(527, settings.audio.config.encoder_embed_dim)
    torch.save({"cfg": vars(settings.audio.config), "model": beats}, settings.audio.weights)
    blip2 = shapes.bridge_shapes(settings, 1, 1)
    blip2 = {name: t for name, t in blip2.items() if name.startswith(("Qformer.", "ln_vision."))}
    blip2["query_tokens"] = torch.empty(1, own.queries, own.width, device="meta")
    blip2["Qformer.bert.embeddings.word_embeddings.weight"] = torch.empty(VOCABULARY[size], own.width, device="meta")
    for i in range(own.layers):
        for name, shape in (("intermediate", (own.feed_forward, own.width)), ("output", (own.width, own.feed_forward))):
            blip2[f"Qformer.bert.encoder.layer.{i}.{name}.dense.weight"] = torch.empty(shape, device="meta")
    torch.save({"model": drawn(blip2, torch.float32)}, own.weights)


def drawn(shapes: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Random tensors of the shapes of others."""
    return {name: (torch.randn(tensor.shape) * 0.02).to(dtype) for name, tensor in shapes.items()}


def ours(folder: Path, size: str) -> Any:
    """The package's own path to a language model."""
    from lavis_chatbridge.models.language_model import load_language_model
    from lavis_chatbridge.models.settings import LanguageModelSettings

    return load_language_model(LanguageModelSettings(weights=str(folder), tokenizer=TOKENIZER, dtype="bfloat16"))[0]


def plain(folder: Path, size: str) -> Any:
    """Build in float32, read every shard, copy, convert."""
    from safetensors.torch import load_file

    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.float32
    )
    weights: dict[str, torch.Tensor] = {}
    for shard in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        weights |= load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard, weights_only=True)
    model.load_state_dict(weights)
    return model.bfloat16()


def our_bridge(folder: Path, size: str) -> Any:
    """The package's own path to a whole model."""
    from lavis_chatbridge.models.chatbridge import ChatBridge

    return ChatBridge(bridge_settings(folder, size))


def encoders_first(folder: Path, size: str) -> Any:
    """The language model as now, the other parts built in float32 and filled from mapped files."""
    return filled(ours(folder / "safetensors", size), folder, size, mapped=True)


def plain_bridge(folder: Path, size: str) -> Any:
    """Every part built in float32, its files read, copied and converted."""
    return filled(plain(folder / "safetensors", size), folder, size, mapped=False)


def filled(language_model: Any, folder: Path, size: str, mapped: bool) -> Any:
    """The parts of a ChatBridge around a language model, each built in float32 and then filled."""
    from lavis_chatbridge.models import checkpoint
    from lavis_chatbridge.models.beats import Beats
    from lavis_chatbridge.models.perceiver import build_perceiver
    from lavis_chatbridge.models.vision import build_vision

    settings = bridge_settings(folder, size)
    vision, audio, own = settings.vision, settings.audio, settings.perceiver
    model = nn.Module()
    model.llama_model = language_model
    model.visual_encoder, model.audio_encoder = build_vision(vision), Beats(audio.config)
    model.ln_vision, model.Qformer = nn.LayerNorm(vision.width), build_perceiver(own, vision.width)
    model.image_query_tokens = nn.Parameter(torch.randn(1, own.queries, own.width))

    def read(path: str) -> Any:
        return torch.load(path, weights_only=True, mmap=mapped)

    model.visual_encoder.load_state_dict(checkpoint.vision_tensors(read(vision.weights), vision.depth, vision.tokens))
    beats = checkpoint.beats_tensors(read(audio.weights)["model"], audio.config.encoder_layers)
    model.audio_encoder.load_state_dict(beats)
    model.load_state_dict(checkpoint.bridge_tensors(read(own.weights)["model"]), strict=False)
    model.visual_encoder.bfloat16()
    model.audio_encoder.bfloat16()
    return model


WAYS = {"plain": plain, "ours": ours}
BRIDGE_WAYS = {"plain": plain_bridge, "encoders first": encoders_first, "ours": our_bridge}


def measure(way: str, folder: Path, size: str) -> None:
    """In a process of its own: load, and print the peaks and seconds as JSON."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (lazy: imported before the baseline)

    import lavis_chatbridge.models.chatbridge  # noqa: F401

    load = WAYS[way] if (folder / "config.json").is_file() else BRIDGE_WAYS[way]
    before, own, peak, done = status("VmHWM"), status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    model = load(folder, size)
    seconds = time.perf_counter() - start
    for tensor in model.state_dict().values():  # a mapped file counts only where it has been read
        tensor.flatten()[:: _PAGE // tensor.element_size()].sum()
    done.set()
    watcher.join()
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(json.dumps({"resident": status("VmHWM") - before, "own": peak - own, "seconds": seconds, "held": held}))


def rows(size: str, ways: Sequence[str]) -> list[Row]:
    """Some ways on every layout, each in a fresh process."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_language_model(folder, size)
        write_encoders(folder, size)
        found = []
        for layout in ("safetensors",) if size in ONE_LAYOUT else ("safetensors", "bin"):
            files = sum(file.stat().st_size for file in (folder / layout).glob(f"*.{layout}"))
            found += [one_row(way, layout, folder / layout, size, files) for way in WAYS if way in ways]
        found += [one_row(way, BRIDGE, folder, size) for way in BRIDGE_WAYS if way in ways]
        return found


def one_row(way: str, files: str, folder: Path, size: str, expected: int | None = None) -> Row:
    """What one way needs, in a process of its own."""
    command = [sys.executable, __file__, "--measure", way, str(folder), "--size", size]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(result.stdout.splitlines()[-1])
    if expected is not None and not 0.99 * expected < told["held"] < 1.01 * expected:
        raise SystemExit(f"{way}, {files}: holds {told['held']} bytes, the files have {expected}")
    return Row(way, files, told["held"], told["resident"], told["own"], told["seconds"])


def table(found: Sequence[Row], size: str, ways: Sequence[str] = tuple(BRIDGE_WAYS)) -> str:
    """The tables in Markdown: the language model's two layouts, and the whole model."""
    chosen = [] if len(ways) == len(BRIDGE_WAYS) else ["--ways", *(repr(way) if " " in way else way for way in ways)]
    modules = (torch, transformers, safetensors)
    lines = [
        "# Host memory of loading\n",
        circumstances("loading.py", f"--size {size}", *chosen, modules=modules),
        "Peaks above the bare imports; what is counted, and what the ways are, stands at the head of the script.",
        f"Goal: at most {GOAL} of the loaded model's size.",
    ]
    alone = [row for row in found if row.files != BRIDGE]
    whole = [row for row in found if row.files == BRIDGE]
    for listed, told in ((alone, f"A LLaMA in bfloat16, in {SHARDS} files"), (whole, "A whole ChatBridge")):
        if listed:
            lines += ["", f"{told}: {listed[-1].size / _MIB:.0f} MiB.\n", *_lines(listed)]
    return "\n".join(lines) + "\n"


def _lines(found: Sequence[Row]) -> list[str]:
    titles = ["files", "way", "peak resident, MiB", "of its size", "peak own, MiB", "of its size", "to plain", "s"]
    lines = [f"| {' | '.join(titles)} |", "|---|---|---:|---:|---:|---:|---:|---:|"]
    base = {row.files: row for row in found if row.way == "plain"}
    for row in found:
        cells = [row.files, row.way, f"{row.resident / _MIB:.0f}", f"{row.resident / row.size:.2f}"]
        cells += [f"{row.own / _MIB:.0f}", f"{row.own / row.size:.2f}"]
        to_plain = f"{row.resident / base[row.files].resident:.2f}" if row.files in base else ""
        cells += [to_plain, f"{row.seconds:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=LLAMA, default="1g")
    parser.add_argument("--ways", nargs="+", choices=BRIDGE_WAYS, default=list(BRIDGE_WAYS))
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]), args.size)
        return
    tell(table(rows(args.size, args.ways), args.size, args.ways), args.write)


if __name__ == "__main__":
    main()
