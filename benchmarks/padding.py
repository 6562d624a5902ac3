"""The share of positions that are padding, with and without batches of similar length, in stage 1 and stage 2.

Run from the repository's root::

    python benchmarks/padding.py [--steps 16] [--write benchmarks/padding.md]

Nothing is trained or decoded: the package's own plan, templates and layout make the batches of stage 1
(`vicuna13b/align.yaml`: 32 samples on each of eight processes) and of stage 2 (`vicuna13b/instruct.yaml`: about 4,096
tokens), and positions are counted. The data sets are not here, so their texts are drawn: for each source numbers of
words from a gamma distribution with about the mean and deviation that its paper or its published samples show, rounds
of a conversation likewise, words of the lengths that English words have, cut into pieces of at most six letters, which
makes some 1.3 tokens a word as LLaMA's tokenizer does. Sources take turns as those configurations say: by fixed shares
in stage 1, by published size in stage 2.

"Padding" is the share of all positions of the processes' batches that hold nothing. "Random" is the order without
`run.group_by_length`, with batches of as many samples. "Most to mean" holds the positions of the process that has the
most of them against the mean of all eight, which wait for it in every step.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from common import circumstances, tell

from lavis_chatbridge.datasets.dataset import SourceDataset, SourceSettings
from lavis_chatbridge.datasets.loader import LoaderSettings, MixtureLoader
from lavis_chatbridge.models.interleave import lay_out
from lavis_chatbridge.prompting import Message, Slot
from lavis_chatbridge.prompting.templates import Templates
from lavis_chatbridge.schema import Medium, Sample

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "projects" / "chatbridge" / "vicuna13b"
RANKS = 8
QUERIES = 32
SAMPLES = 20_000
LETTERS = np.array([3, 17, 20, 16, 11, 8.5, 8, 6, 4.5, 3, 1.5, 1, 0.5])
"""Per cent of English words of one letter, two, and so on (Google's corpus, Norvig 2012, rounded)."""


class Words(NamedTuple):
    """How many words: mean and standard deviation."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Texts:
    """What a source's samples hold.

    Args:
        share: Share of the steps, in any unit: in stage 2 the samples of the published data set.
        task: Its task in the package's templates; none of stage 1.
        media: Kinds of media of a sample.
        answer: Words of a caption or reply.
        question: Words of a question; none: a template asks.
        rounds: Questions and replies of a conversation; one without.
        templates: Whether a template stands around the question.
    """

    share: float
    task: str
    media: tuple[Any, ...]
    answer: Words
    question: Words | None = None
    rounds: Words | None = None
    templates: bool = True


CAPTION, TALK, DETAIL = Words(10.5, 2.4), Words(20, 14), Words(95, 30)
STAGE_1 = {
    "MS-COCO": Texts(0.5, "", ("image",), CAPTION),
    "SBU": Texts(0.5, "", ("image",), Words(13, 6)),
    "CC3M": Texts(1, "", ("image",), Words(10.3, 4.5)),
    "CC12M": Texts(2, "", ("image",), Words(20.2, 16.3)),
    "LAION-115M": Texts(2, "", ("image",), Words(9, 3)),
    "WebVid10M": Texts(6, "", ("video",), Words(12, 6)),
    "WavCaps": Texts(6, "", ("audio",), Words(7.8, 3.5)),
}
STAGE_2 = {
    "VQAv2": Texts(443_757, "image_qa", ("image",), Words(1.1, 0.4), Words(6.2, 2)),
    "VG-QA": Texts(1_445_322, "image_qa", ("image",), Words(1.8, 1.2), Words(5.7, 1.8)),
    "COCO Caption": Texts(113_287, "image_caption", ("image",), CAPTION),
    "MSRVTT-QA": Texts(158_581, "video_qa", ("video",), Words(1, 0), Words(7.4, 3.4)),
    "MSRVTT Caption": Texts(6_513, "video_caption", ("video",), Words(9.3, 3.5)),
    "AudioCaps": Texts(49_838, "audio_caption", ("audio",), Words(8.8, 4.2)),
    "LLaVA conversation": Texts(56_681, "image_conversation", ("image",), TALK, Words(9, 3), Words(4.4, 1.5), False),
    "LLaVA detail": Texts(23_240, "image_detail", ("image",), DETAIL, Words(9, 3), templates=False),
    "LLaVA reasoning": Texts(76_643, "image_reasoning", ("image",), Words(110, 30), Words(17, 6), templates=False),
    "video conversation": Texts(10_000, "video_conversation", ("video",), TALK, Words(9, 3), Words(4.4, 1.5), False),
    "sound detail": Texts(10_000, "audio_detail", ("audio",), Words(60, 20), Words(9, 3), templates=False),
    "video and sound reasoning": Texts(
        10_000, "video_audio_reasoning", ("video", "audio"), DETAIL, Words(15, 5), templates=False
    ),
}


@dataclass(frozen=True)
class Order:
    """A source's batches in one order: mean positions, those that are padding, and the most to the mean."""

    positions: float
    padding: float
    wait: float


@dataclass(frozen=True)
class Row:
    """A source: its share of the steps, samples of a process's batch, and both orders."""

    source: str
    share: float
    batch: int
    random: Order
    grouped: Order


class PiecesOfWords:
    """A tokenizer that cuts words into pieces of at most six letters; ids are of no account."""

    bos_id: int | None = 1
    eos_id: int | None = 2
    pad_id = 2

    def encode(self, text: str) -> list[int]:
        """An id for each piece of a word, and for each mark."""
        return [5] * len(re.findall(r"\w{1,6}|[^\w\s]+", text))

    def decode(self, ids: Any, **ignored: Any) -> str:
        """Nothing: no text is read back."""
        return ""

    def __len__(self) -> int:
        return 32_000


def text(words: int, rng: np.random.Generator) -> str:
    """So many words, of random letters."""
    lengths = rng.choice(len(LETTERS), size=words, p=LETTERS / LETTERS.sum()) + 1
    return " ".join("x" * length for length in lengths) + "."


def count(words: Words, rng: np.random.Generator) -> int:
    """A number of words or rounds, one at least."""
    if not words.deviation:
        return round(words.mean)
    shape = (words.mean / words.deviation) ** 2
    return max(1, round(rng.gamma(shape, words.mean / shape)))


def samples(texts: Texts, seed: int) -> list[Sample]:
    """The samples of a source; a larger one is stood for by its first ``SAMPLES``."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(min(int(texts.share), SAMPLES) if texts.task else SAMPLES):
        media = tuple(Medium(kind, f"{kind}.bin") for kind in texts.media)
        if texts.question is None:
            found.append(Sample(str(i), media, (text(count(texts.answer, rng), rng),)))
            continue
        turns: list[Message] = []
        for number in range(1 if texts.rounds is None else count(texts.rounds, rng)):
            asked = text(count(texts.question, rng), rng)
            turns.append(Message("user", asked, () if number else texts.media))
            turns.append(Message("assistant", text(count(texts.answer, rng), rng)))
        found.append(Sample(str(i), media, turns=tuple(turns)))
    return found


def source_of(name: str, texts: Texts, seed: int) -> SourceDataset:
    """A source as the package's builders make it."""
    settings = SourceSettings(
        stage="instruction" if texts.task else "alignment",
        task=texts.task,
        templates=Templates.default() if texts.task and texts.templates else None,
        reply_end="\n###",
    )
    return SourceDataset(name, samples(texts, seed), settings)


def order_of(source: SourceDataset, settings: LoaderSettings, steps: int, longest: int) -> tuple[int, Order]:
    """Samples of a batch, and what the plan's batches of some steps hold on all processes."""
    plan = MixtureLoader({source.name: source}, settings, world_size=RANKS).plan
    positions = np.zeros((steps, RANKS))
    filled = 0
    for step in range(steps):
        for rank in range(RANKS):
            prompts = [
                source.pieces(source.sample(index), source._rng(index, epoch, 0))
                for index, epoch in plan.batch(step, rank)[1]
            ]
            places = [{(p.kind, p.index): range(QUERIES) for p in pieces if isinstance(p, Slot)} for pieces in prompts]
            mask = lay_out(prompts, places, PiecesOfWords(), "original", longest).attention_mask
            positions[step, rank] = mask.numel()
            filled += int(mask.sum())
    wait = float((positions.max(1) / positions.mean(1)).mean())
    return plan.batch_sizes[source.name], Order(float(positions.mean()), 1 - filled / positions.sum(), wait)


def rows(mixture: Mapping[str, Texts], run: Mapping[str, Any], longest: int, steps: int) -> list[Row]:
    """Every source of a stage in both orders."""
    whole = sum(texts.share for texts in mixture.values())
    found = []
    for seed, (name, texts) in enumerate(mixture.items()):
        source = source_of(name, texts, seed)
        sizes = {"batch_size": run.get("batch_size_train", 1), "batch_tokens": run.get("batch_tokens")}
        _, random = order_of(source, LoaderSettings(**sizes), steps, longest)
        batch, grouped = order_of(source, LoaderSettings(**sizes, group_by_length=True), steps, longest)
        found.append(Row(name, texts.share / whole, batch, random, grouped))
    return found


def mixed(found: Sequence[Row], grouped: bool) -> float:
    """The share of padding of a whole stage."""
    orders = [(row.share, row.grouped if grouped else row.random) for row in found]
    positions = sum(share * order.positions for share, order in orders)
    return sum(share * order.positions * order.padding for share, order in orders) / positions


def table(stages: Mapping[str, Sequence[Row]], steps: int) -> str:
    """The tables in Markdown."""
    lines = [
        "# Padding\n",
        circumstances("padding.py", f"--steps {steps}", modules=(np,)),
        f"Drawn texts, {RANKS} processes; what is drawn and what the columns mean stands at the head of the script.",
    ]
    titles = ["source", "of the steps", "samples", "positions, grouped", "padding, random", "padding, grouped"]
    titles += ["most to mean, random", "most to mean, grouped"]
    for stage, found in stages.items():
        lines += [f"\n## {stage}\n", f"| {' | '.join(titles)} |", "|---|" + "---:|" * 7]
        for row in found:
            cells = [row.source, f"{row.share:.1%}", str(row.batch), f"{row.grouped.positions:.0f}"]
            cells += [f"{row.random.padding:.1%}", f"{row.grouped.padding:.1%}"]
            cells += [f"{row.random.wait:.2f}", f"{row.grouped.wait:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append(f"| all | | | | {mixed(found, False):.1%} | **{mixed(found, True):.1%}** | | |")
    return "\n".join(lines) + "\n"


def settings_of(name: str) -> tuple[dict[str, Any], int]:
    """The run section of a configuration at the paper's scale, and its longest text."""
    content = yaml.safe_load((PROJECT / name).read_text(encoding="utf-8"))
    return content["run"], content["model"].get("max_text_length", 150)


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16, help="steps of each source in each order")
    parser.add_argument("--write", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    stages = {
        "Stage 1": rows(STAGE_1, *settings_of("align.yaml"), args.steps),
        "Stage 2": rows(STAGE_2, *settings_of("instruct.yaml"), args.steps),
    }
    tell(table(stages, args.steps), args.write)


if __name__ == "__main__":
    main()
