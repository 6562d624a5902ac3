"""``chatbridge world build``: writes the embedded world to a folder, with settings and counts in ``world.json``.

The same seed gives the same bytes. ``images/``, ``videos/`` and ``sounds/`` have a sub-folder per split: ``train``;
``test`` (new renderings of the combinations in training); ``heldout`` (combinations that are not in training); and
``joint`` (pairs of a picture or clip and a sound, for tests only).

``annotations/`` has ``{image,video,audio}_{split}.jsonl`` (captions), ``instruct_{image,video,audio}_{split}.jsonl``
(conversations for training, questions for tests), ``joint_test.jsonl`` (questions about two media) and
``joint_words.jsonl`` (the same questions, with text descriptions instead of media). This module uses no model.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.files import locked, read_json, write_json
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from lavis_chatbridge.toyworld import clips, language, pictures, sounds
from lavis_chatbridge.toyworld.world import Scene, all_scenes, scenes

log = logging.getLogger(__name__)

VERSION = 2
"""Increase it whenever the same seed would give different files. A world of another version is replaced."""

INFO = "world.json"
SPLITS = ("train", "test", "heldout")
CAPTIONS_PER_MEDIUM = 3
_FOLDERS: dict[Modality, str] = {"image": "images", "video": "videos", "audio": "sounds"}
_SUFFIXES: dict[Modality, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "image": (("png", "jpg"), (40, 60)),
    "video": (("mp4",), (1,)),
    "audio": (("wav", "flac", "mp3"), (79, 20, 1)),
}
_TRACK_SHARE = 0.25
_QUESTIONS_ABOUT_TWO = 4
_SEEN = {modality: [scene for scene in all_scenes(modality) if not scene.held_out] for modality in MODALITIES}
_PARTNERS = {"image": _SEEN["audio"], "video": _SEEN["audio"], "audio": _SEEN["image"] + _SEEN["video"]}
"""Modality -> scenes of the second medium in a conversation."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of media: for training per modality, for every other split one number for all modalities."""

    images: int = 1500
    videos: int = 900
    sounds: int = 900
    test: int = 200
    heldout: int = 100
    joint: int = 200


@dataclass(frozen=True)
class Item:
    """A file to render to ``path`` in the world's folder; ``track`` is a clip's audio track in the joint test."""

    path: str
    split: str
    number: int
    scene: Scene
    track: Scene | None = None


Pair: TypeAlias = list[tuple[Scene, str]]
"""Two media of the joint test and their paths, in the order of the prompt; a clip's audio track has the clip's path."""


def build_world(folder: str | Path, sizes: Sizes | None = None, seed: int = 0, processes: int = 2) -> Path:
    """Build the embedded world in ``folder``, unless it is already there with these settings; returns the folder.

    A world with other settings is replaced as soon as the new one is complete. Other files in the folder are a
    `DataError`.
    """
    folder, sizes = Path(folder).absolute(), sizes or Sizes()
    wanted = {"version": VERSION, "seed": seed, "sizes": asdict(sizes)}
    if folder.is_file():
        raise DataError(f"{folder} is a file, expected a folder for the embedded world: choose another path")
    with locked(folder):
        found = read_json(folder / INFO) or {}
        if wanted.items() <= found.items():
            log.info("the embedded world in %s is complete", folder)
            return folder
        if not found and folder.is_dir() and any(folder.iterdir()):
            raise DataError(f"{folder} has other files than an embedded world: choose another folder, or empty it")
        began = time.monotonic()
        items, pairs = plan(sizes, seed)
        # a warning, because commands that do not set up logging show nothing else
        log.warning("building the embedded world in %s: %d files, about a minute by default", folder, len(items))
        draft = folder.with_name(f".{folder.name}.draft")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            for parent in {Path(item.path).parent for item in items}:
                (draft / parent).mkdir(parents=True)
            _render_all(draft, sizes, seed, processes)
            counts = _annotate(draft, items, pairs, seed)
            write_json(draft / INFO, wanted | {"counts": counts})
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        log.info("built the embedded world in %.0f s", time.monotonic() - began)
    return folder


app = typer.Typer(no_args_is_help=True)
_OF_ONE = typer.Option(min=0, metavar="N", help="number of media")
_OF_EACH = typer.Option(min=0, metavar="N", help="number of media of each modality")


@app.callback()
def _group() -> None:
    """The embedded world."""


@app.command("build")
def command(
    folder: Path,
    images: Annotated[int, _OF_ONE] = Sizes.images,
    videos: Annotated[int, _OF_ONE] = Sizes.videos,
    sounds: Annotated[int, _OF_ONE] = Sizes.sounds,
    test: Annotated[int, _OF_EACH] = Sizes.test,
    heldout: Annotated[int, _OF_EACH] = Sizes.heldout,
    joint: Annotated[int, typer.Option(min=0, metavar="N", help="number of pairs")] = Sizes.joint,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="another seed gives another world")] = 0,
    processes: Annotated[int, typer.Option(min=1, help="processes that render")] = 2,
) -> None:
    """Write the world to a folder."""
    build_world(folder, Sizes(images, videos, sounds, test, heldout, joint), seed, processes)
    counts = read_json(folder / INFO)["counts"]
    print(f"{folder}: {sum(counts.values())} samples in {len(counts)} annotation files")


def is_world(folder: str | Path) -> bool:
    """Whether a folder contains a complete world of the current version (any size and seed)."""
    return (read_json(Path(folder) / INFO) or {}).get("version") == VERSION


# --- The plan ---


def plan(sizes: Sizes, seed: int) -> tuple[list[Item], list[Pair]]:
    """All files of the world and the pairs of the joint test; depends only on the arguments."""
    items: list[Item] = []
    train: dict[Modality, int] = {"image": sizes.images, "video": sizes.videos, "audio": sizes.sounds}
    for modality in MODALITIES:
        for split, count in zip(SPLITS, (train[modality], sizes.test, sizes.heldout), strict=True):
            chosen = scenes(modality, split == "heldout", seed * len(SPLITS) + SPLITS.index(split))
            items += [Item(_path(modality, split, i, seed), split, i, next(chosen)) for i in range(count)]
    pairs: list[Pair] = []
    # Each of these scenes occurs in training, but never two together.
    trained = {m: scenes(m, False, seed * len(SPLITS) + len(SPLITS) + 1_000_003) for m in MODALITIES}
    for number in range(sizes.joint):
        seen, heard = next(trained["video" if number % 2 else "image"]), next(trained["audio"])
        path = other = _path(seen.modality, "joint", number, seed)
        if number % 4 == 1:  # every second clip has the sound as its audio track
            items.append(Item(path, "joint", number, seen, heard))
        else:
            other = _path("audio", "joint", number, seed)
            items += [Item(path, "joint", number, seen), Item(other, "joint", number, heard)]
        pair = [(seen, path), (heard, other)]
        pairs.append(pair[::-1] if number // 2 % 2 else pair)
    return items, pairs


def _path(modality: Modality, split: str, number: int, seed: int) -> str:
    suffixes, weights = _SUFFIXES[modality]
    suffix = random.Random(f"{seed}/{modality}/{split}/{number}/suffix").choices(suffixes, weights)[0]
    return f"{_FOLDERS[modality]}/{split}/{number:05d}.{suffix}"


# --- Rendering in several processes ---


def render(item: Item, seed: int) -> bytes:
    """The bytes of an item's file."""
    modality = item.scene.modality
    rng = np.random.default_rng([seed, MODALITIES.index(modality), (*SPLITS, "joint").index(item.split), item.number])
    suffix = item.path.rsplit(".", 1)[1]
    if modality == "image":
        return pictures.encode(pictures.render(item.scene, rng), suffix, rng)
    if modality == "audio":
        return sounds.encode(sounds.render(item.scene, rng), suffix)
    clip = clips.render(item.scene, rng)
    track = item.track
    if track is None and item.split != "joint" and rng.random() < _TRACK_SHARE:
        pool = all_scenes("audio")  # unrelated to the clip
        track = pool[int(rng.integers(len(pool)))]
    seconds = max(sounds.SECONDS[0], len(clip.frames) / clip.rate)
    return clips.encode(clip, rng, sounds.render(track, rng, seconds, rate=16_000) if track else None)


def _render_all(draft: Path, sizes: Sizes, seed: int, processes: int) -> None:
    """Render in new Python processes: fork is unsafe with threads, and spawn would run the user's script again."""
    if processes == 1:
        _render_share(str(draft), asdict(sizes), seed, 0, 1)
        return
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    program = f"import json, sys; from {__name__} import _render_share; _render_share(*json.loads(sys.argv[1]))"

    def work(first: int) -> None:
        command = [sys.executable, "-c", program, json.dumps([str(draft), asdict(sizes), seed, first, processes])]
        done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            last = [f"exit status {done.returncode}", *done.stderr.strip().splitlines()][-1]
            raise DataError(f"rendering the embedded world into {draft.parent} failed: {last}")

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, range(processes)))


def _render_share(folder: str, sizes: dict[str, int], seed: int, first: int, step: int) -> None:
    for item in plan(Sizes(**sizes), seed)[0][first::step]:
        Path(folder, item.path).write_bytes(render(item, seed))


# --- Annotations ---


def _annotate(draft: Path, items: Iterable[Item], pairs: Iterable[Pair], seed: int) -> dict[str, int]:
    """Write all annotation files and return the number of samples in each."""
    files: dict[str, list[Sample]] = {f"{modality}_{split}": [] for modality in MODALITIES for split in SPLITS}
    files |= {f"instruct_{name}": [] for name in files}
    files |= {"joint_test": [], "joint_words": []}
    for item in items:
        if item.split == "joint":
            continue
        rng = random.Random(f"{seed}/{item.path}")
        name = f"{item.scene.modality}_{item.split}"
        captions: dict[str, None] = {}
        while len(captions) < CAPTIONS_PER_MEDIUM:
            captions.setdefault(language.caption(item.scene, rng))
        files[name].append(Sample(**_base(draft, item), captions=tuple(captions), source="toyworld"))
        instructions = _conversations if item.split == "train" else _questions
        files[f"instruct_{name}"] += instructions(draft, item, rng)
    for number, pair in enumerate(pairs):
        media = [Medium(scene.modality, str(draft / path)) for scene, path in pair]
        rng = random.Random(f"{seed}/joint words/{number}")
        words = [Medium(scene.modality, words=(language.caption(scene, rng),)) for scene, _ in pair]
        for name, shown in (("joint_test", media), ("joint_words", words)):
            rng = random.Random(f"{seed}/joint/{number}")
            files[name] += _joint_questions(f"joint_{number:05d}", [scene for scene, _ in pair], tuple(shown), rng)
    folder = draft / "annotations"
    return {name: write_jsonl(folder / f"{name}.jsonl", samples, root=draft) for name, samples in files.items()}


def _base(draft: Path, item: Item, suffix: str = "") -> dict[str, Any]:
    modality = item.scene.modality
    return {
        "id": f"{modality}_{item.split}_{item.number:05d}{suffix}",
        "media": (Medium(modality, str(draft / item.path)),),
        "facts": item.scene.facts,
        "held_out": item.scene.held_out,
    }


def _conversations(draft: Path, item: Item, rng: random.Random) -> Iterator[Sample]:
    """One conversation about the medium, and one about it and a text description of a second medium.

    No training sample has two media; the model must generalise from descriptions to a second medium.
    """
    yield Sample(**_base(draft, item), turns=tuple(language.chat(item.scene, rng)), source="toyworld_instruct")
    other = rng.choice(_PARTNERS[item.scene.modality])
    described = tuple(language.describe(other, rng) for _ in range(CAPTIONS_PER_MEDIUM))
    shown = [item.scene, other]
    media = [Medium(item.scene.modality, str(draft / item.path)), Medium(other.modality, words=described)]
    if rng.random() < 0.5:
        shown.reverse()
        media.reverse()
    kinds = rng.choices(language.QUESTION_KINDS, k=_QUESTIONS_ABOUT_TWO)
    asked = [language.Asker(shown, rng).ask(kind) for kind in kinds]
    base = _base(draft, item, "_and_words") | {"media": tuple(media)}
    yield Sample(**base, turns=tuple(language.conversation(shown, asked)), source="toyworld_instruct")


def _questions(draft: Path, item: Item, rng: random.Random) -> Iterator[Sample]:
    """One sample for each attribute's question."""
    for question in language.questions(item.scene, rng):
        attribute = question.facts[0].attribute
        yield Sample(
            **_base(draft, item, f"_{attribute}"),
            turns=tuple(language.conversation([item.scene], [question])),
            answers=(question.answer,),
            source="toyworld_instruct",
            meta={"asked": question.kind, "attribute": attribute},
        )


def _joint_questions(
    name: str, scenes: Sequence[Scene], media: tuple[Medium, ...], rng: random.Random
) -> Iterator[Sample]:
    """One question of each kind about both media of a pair."""
    facts = {attribute: value for scene in scenes for attribute, value in scene.facts.items()}
    for kind in language.QUESTION_KINDS:
        question = language.Asker(scenes, rng).ask(kind)
        yield Sample(
            id=f"{name}_{kind}",
            media=media,
            turns=tuple(language.conversation(scenes, [question])),
            answers=(question.answer,),
            source="toyworld_joint",
            facts=facts,
            meta={"asked": kind, "rests_on": [[fact.medium, fact.attribute] for fact in question.facts]},
        )
