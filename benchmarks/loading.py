"""Host memory of loading a language model, against the size of its files and against the plain way.

Run from the repository's root::

    python benchmarks/loading.py [--size 1g] [--write benchmarks/loading.md]

A LLaMA of random weights in bfloat16 is written in the two layouts that Vicuna is published in, sharded safetensors and
sharded ``.bin``. Each row loads it in a fresh process, reads every weight once, and gives the peaks above what that
process has after its imports: "resident" is what the kernel counts (VmHWM), pages of mapped files among them, which it
takes back when memory is short; "own" leaves those out (RssAnon, looked at every 5 ms). The plain way, the named
baseline, builds the model as it is declared, in float32, reads every shard, copies, and converts. Seconds are of
loading alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

SIZES: dict[str, dict[str, int]] = {
    "1g": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 32, "num_attention_heads": 16},
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4},
}
SHARDS = 4
GOAL = 1.3
TOKENIZER = "package:assets/tiny/llm"
_MIB, _PAGE = 1 << 20, 4096


@dataclass(frozen=True)
class Row:
    """One line of the table; sizes in bytes above the process's imports."""

    way: str
    layout: str
    files: int
    resident: int
    own: int
    seconds: float


def write_model(folder: Path, size: str) -> None:
    """The model in both layouts, tensor by tensor: this process needs memory for one shard."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(vocab_size=32000, **SIZES[size])
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    parts = [names[part * len(names) // SHARDS : (part + 1) * len(names) // SHARDS] for part in range(SHARDS)]
    layouts = {"safetensors": ("model", "safetensors"), "bin": ("pytorch_model", "bin")}
    torch.manual_seed(0)
    for layout, (stem, suffix) in layouts.items():
        target = folder / layout
        target.mkdir()
        config.save_pretrained(target)
        places = {}
        for number, part in enumerate(parts, start=1):
            name = f"{stem}-{number:05d}-of-{SHARDS:05d}.{suffix}"
            tensors = {key: (torch.randn(shapes[key]) * 0.02).bfloat16() for key in part}
            places |= dict.fromkeys(part, name)
            if layout == "bin":
                torch.save(tensors, target / name)
            else:
                save_file(tensors, target / name, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 0}, "weight_map": places}
        (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), encoding="utf-8")


def ours(folder: Path) -> Any:
    """The package's own path."""
    from lavis_chatbridge.models.language_model import load_language_model
    from lavis_chatbridge.models.settings import LanguageModelSettings

    return load_language_model(LanguageModelSettings(weights=str(folder), tokenizer=TOKENIZER, dtype="bfloat16"))[0]


def plain(folder: Path) -> Any:
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


WAYS = {"plain": plain, "ours": ours}


def status(key: str) -> int:
    """A line of this process's /proc status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"/proc/self/status has no {key}: this needs Linux")


def measure(way: str, folder: Path) -> None:
    """In a process of its own: load, and print the peaks and seconds as JSON."""
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (lazy: imported before the baseline)

    import lavis_chatbridge.models.language_model  # noqa: F401

    before, own, peak, done = status("VmHWM"), status("RssAnon"), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = WAYS[way](folder)
    seconds = time.perf_counter() - start
    for tensor in model.state_dict().values():  # a mapped file counts only where it has been read
        tensor.flatten()[:: _PAGE // tensor.element_size()].sum()
    done.set()
    watcher.join()
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    print(json.dumps({"resident": status("VmHWM") - before, "own": peak - own, "seconds": seconds, "held": held}))


def rows(size: str) -> list[Row]:
    """Every way on every layout, each in a fresh process."""
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        write_model(Path(temporary), size)
        for layout in ("safetensors", "bin"):
            folder = Path(temporary, layout)
            files = sum(file.stat().st_size for file in folder.glob(f"*.{layout}"))
            for way in WAYS:
                command = [sys.executable, __file__, "--measure", way, str(folder)]
                result = subprocess.run(command, check=True, capture_output=True, text=True)
                told = json.loads(result.stdout.splitlines()[-1])
                if told["held"] < 0.99 * files or told["held"] > 1.01 * files:
                    raise SystemExit(f"{way}, {layout}: holds {told['held']} bytes, the files have {files}")
                found.append(Row(way, layout, files, told["resident"], told["own"], told["seconds"]))
    return found


def table(found: Sequence[Row], size: str) -> str:
    """The table in Markdown."""
    modules = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    versions = "  ".join(f"{name} {module.__version__}" for name, module in modules.items())
    told = f"A LLaMA in bfloat16, {found[0].files / _MIB:.0f} MiB in {SHARDS} files. Peaks above the bare imports;"
    titles = ["files", "way", "peak resident, MiB", "of the files", "peak own, MiB", "of the files", "to plain", "s"]
    lines = [
        "# Host memory of loading a language model\n",
        f"`python benchmarks/loading.py --size {size}`, {datetime.date.today()}, CPU.",
        f"Python {platform.python_version()}  {versions}\n",
        f"{told} what is counted, and the plain way, stand at the head of the script.",
        f"Goal: at most {GOAL} of the files' size.\n",
        f"| {' | '.join(titles)} |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    base = {row.layout: row for row in found if row.way == "plain"}
    for row in found:
        cells = [row.layout, row.way, f"{row.resident / _MIB:.0f}", f"{row.resident / row.files:.2f}"]
        cells += [f"{row.own / _MIB:.0f}", f"{row.own / row.files:.2f}"]
        cells += [f"{row.resident / base[row.layout].resident:.2f}", f"{row.seconds:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1g")
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(args.measure[0], Path(args.measure[1]))
        return
    text = table(rows(args.size), args.size)
    print(text, end="")
    if args.write:
        temporary = args.write.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(args.write)


if __name__ == "__main__":
    main()
