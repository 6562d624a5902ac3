"""Writes the embedded world to a folder: media files, their annotations, and ``world.json`` with settings and counts.

``build_world`` makes the folder whole or not at all, keeps a finished one of the same settings, and writes the same
bytes for the same seed. The rendering is shared out to other processes. Knows nothing of models or training.

Folder: ``images/``, ``videos/``, ``sounds/``, each with a sub-folder per split: ``train``; ``test``, new renderings of
seen combinations; ``heldout``, held-out combinations; ``joint``, a picture or clip and a sound together, for tests
only. In ``annotations/``: ``{image,video,audio}_{split}.jsonl`` (captions),
``instruct_{image,video,audio}_{split}.jsonl`` (conversations in training, questions in the others),
``joint_test.jsonl`` (questions about two media) and ``joint_words.jsonl`` (the same with both media in words).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality
from lavis_chatbridge.schema import Medium, Sample, write_jsonl
from lavis_chatbridge.toyworld import clips, language, pictures, sounds
from lavis_chatbridge.toyworld.world import ATTRIBUTES, TRIPLES, Scene, all_scenes, scenes

log = logging.getLogger(__name__)

VERSION = 2
"""Raised whenever the same seed would give other files; a world of another version is built anew."""

SPLITS = ("train", "test", "heldout")
CAPTIONS_PER_MEDIUM = 3
_FOLDERS: dict[Modality, str] = {"image": "images", "video": "videos", "audio": "sounds"}
_SUFFIXES: dict[Modality, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "image": (("png", "jpg"), (40, 60)),
    "video": (("mp4",), (1,)),
    "audio": (("wav", "flac", "mp3"), (79, 20, 1)),
}
_TRACK_SHARE = 0.25
_PARTNERS: dict[Modality, tuple[Modality, ...]] = {
    "image": ("audio",),
    "video": ("audio",),
    "audio": ("image", "video"),
}
_SEEN = {kind: [scene for scene in all_scenes(kind) if not scene.held_out] for kind in MODALITIES}
_QUESTIONS_ABOUT_TWO = 4
_INFO = "world.json"


@dataclass(frozen=True)
class Sizes:
    """How many media the world holds: per kind in training, and of each kind in each of the other splits."""

    images: int = 1500
    videos: int = 900
    sounds: int = 900
    test: int = 200
    heldout: int = 100
    joint: int = 200


@dataclass(frozen=True)
class Item:
    """One file to render: ``path`` under the world's folder; ``track`` is the sound that a joint clip carries."""

    path: str
    split: str
    number: int
    scene: Scene
    track: Scene | None = None


@dataclass(frozen=True)
class Pair:
    """Two media of the joint test, in the order in which they are shown; a clip's own track has its clip's path."""

    number: int
    scenes: tuple[Scene, Scene]
    paths: tuple[str, str]


def build_world(folder: str | Path, sizes: Sizes | None = None, seed: int = 0, processes: int = 2) -> Path:
    """Make sure that ``folder`` holds the embedded world of these settings.

    Args:
        folder: Where; made with its parents. A world of other settings there is replaced.
        sizes: How many media.
        seed: Another seed, another world.
        processes: How many processes render.

    Returns:
        The folder.

    Raises:
        DataError: If the folder holds something else, or rendering fails.
    """
    folder, sizes = Path(folder).absolute(), sizes or Sizes()
    wanted = {"version": VERSION, "seed": seed, "sizes": asdict(sizes)}
    if _holds(folder, wanted):
        log.info("the embedded world in %s is complete", folder)
        return folder
    _check_replaceable(folder)
    began = time.monotonic()
    log.info("building the embedded world in %s", folder)
    draft = folder.with_name(f".{folder.name}.draft-{os.getpid()}")
    try:
        items, pairs = plan(sizes, seed)
        _make_folders(draft, items)
        _render_all(draft, sizes, seed, processes)
        counts = _annotate(draft, items, pairs, seed)
        (draft / _INFO).write_text(json.dumps(wanted | {"counts": counts} | _vocabulary(), indent=1) + "\n")
        _put_in_place(draft, folder, wanted)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("built the embedded world in %.0f s", time.monotonic() - began)
    return folder


def is_world(folder: str | Path) -> bool:
    """Whether a folder holds a finished world of this version, of whatever size and seed."""
    found = _settings_in(Path(folder))
    return found is not None and found.get("version") == VERSION


def plan(sizes: Sizes, seed: int) -> tuple[list[Item], list[Pair]]:
    """Every file of the world and the pairs of the joint test; the same for the same arguments."""
    items: list[Item] = []
    train: dict[Modality, int] = {"image": sizes.images, "video": sizes.videos, "audio": sizes.sounds}
    for kind in MODALITIES:
        for split, count in zip(SPLITS, (train[kind], sizes.test, sizes.heldout), strict=True):
            drawn = scenes(kind, split == "heldout", seed * len(SPLITS) + SPLITS.index(split))
            items += [Item(_path(kind, split, i, seed), split, i, next(drawn)) for i in range(count)]
    pairs = []
    drawn_pairs = _joint_scenes(seed)
    for number in range(sizes.joint):
        pair, files = _joint_pair(number, next(drawn_pairs), seed)
        pairs.append(pair)
        items += files
    return items, pairs


def render(item: Item, seed: int) -> bytes:
    """The bytes of an item's file."""
    rng = np.random.default_rng(
        [seed, MODALITIES.index(item.scene.kind), (*SPLITS, "joint").index(item.split), item.number]
    )
    suffix = item.path.rsplit(".", 1)[1]
    if item.scene.kind == "image":
        return pictures.encode(pictures.render(item.scene, rng), suffix, rng)
    if item.scene.kind == "audio":
        return sounds.encode(sounds.render(item.scene, rng), suffix)
    clip = clips.render(item.scene, rng)
    track = item.track
    if track is None and item.split != "joint" and rng.random() < _TRACK_SHARE:
        pool = all_scenes("audio")  # a sound that has nothing to do with the clip: nothing is to be learnt from it
        track = pool[int(rng.integers(len(pool)))]
    seconds = max(sounds.SECONDS[0], len(clip.frames) / clip.rate)
    return clips.encode(clip, rng, sounds.render(track, rng, seconds, rate=16_000) if track else None)


def render_share(folder: Path, sizes: Sizes, seed: int, first: int, step: int) -> None:
    """Render every ``step``-th file of the plan, from the ``first`` on, into ``folder``."""
    for item in plan(sizes, seed)[0][first::step]:
        (folder / item.path).write_bytes(render(item, seed))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge world build``."""
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in asdict(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes that render")


def run(args: argparse.Namespace) -> int:
    """``chatbridge world build``: returns the exit status."""
    sizes = Sizes(**{name: getattr(args, name) for name in asdict(Sizes())})
    if min(asdict(sizes).values()) < 0 or args.processes < 1 or args.seed < 0:
        raise DataError("world build: counts and the seed must not be negative, and one process at least is needed")
    folder = build_world(args.folder, sizes, args.seed, args.processes)
    counts = json.loads((folder / _INFO).read_text())["counts"]
    print(f"{folder}: {sum(counts.values())} samples in {len(counts)} annotation files")
    return 0


# --- The plan ---


def _path(kind: Modality, split: str, number: int, seed: int) -> str:
    suffixes, weights = _SUFFIXES[kind]
    suffix = random.Random(f"{seed}/{kind}/{split}/{number}/suffix").choices(suffixes, weights)[0]
    return f"{_FOLDERS[kind]}/{split}/{number:05d}.{suffix}"


def _joint_scenes(seed: int) -> Iterator[tuple[Scene, Scene]]:
    """A picture or (every other time) a clip with a sound, all of combinations that training sees one by one."""
    drawn = {kind: scenes(kind, False, seed * len(SPLITS) + len(SPLITS) + 1_000_003) for kind in MODALITIES}
    while True:
        yield next(drawn["image"]), next(drawn["audio"])
        yield next(drawn["video"]), next(drawn["audio"])


def _joint_pair(number: int, pair: tuple[Scene, Scene], seed: int) -> tuple[Pair, list[Item]]:
    """The pair with its files: every second clip carries the sound itself."""
    seen, heard = pair
    path = _path(seen.kind, "joint", number, seed)
    if seen.kind == "video" and number % 4 == 1:
        return Pair(number, (seen, heard), (path, path)), [Item(path, "joint", number, seen, heard)]
    other = _path("audio", "joint", number, seed)
    files = [Item(path, "joint", number, seen), Item(other, "joint", number, heard)]
    if number // 2 % 2:
        return Pair(number, (heard, seen), (other, path)), files
    return Pair(number, (seen, heard), (path, other)), files


# --- Rendering by several processes ---


def _make_folders(draft: Path, items: Iterable[Item]) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    for parent in {Path(item.path).parent for item in items}:
        (draft / parent).mkdir(parents=True)


def _render_all(draft: Path, sizes: Sizes, seed: int, processes: int) -> None:
    """Share the rendering out to fresh interpreters: forking beside threads is unsafe, spawning runs the main."""
    if processes == 1:
        render_share(draft, sizes, seed, 0, 1)
        return
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", f"from {__name__} import _worker; _worker()"]
    workers = []
    for first in range(processes):
        order = {"folder": str(draft), "sizes": asdict(sizes), "seed": seed, "first": first, "step": processes}
        workers.append(subprocess.Popen([*command, json.dumps(order)], env=environment, stderr=subprocess.PIPE))
    faults = [worker.communicate()[1].decode(errors="replace").strip() for worker in workers]
    for worker, fault in zip(workers, faults, strict=True):
        if worker.returncode:
            last = fault.splitlines()[-1] if fault else f"exit status {worker.returncode}"
            raise DataError(f"rendering the embedded world into {draft.parent} failed: {last}")


def _worker() -> None:
    order = json.loads(sys.argv[1])
    render_share(Path(order["folder"]), Sizes(**order["sizes"]), order["seed"], order["first"], order["step"])


# --- Annotations ---


def _annotate(draft: Path, items: Iterable[Item], pairs: Iterable[Pair], seed: int) -> dict[str, int]:
    """Write all annotation files; returns how many samples each holds."""
    files: dict[str, list[Sample]] = {f"{kind}_{split}": [] for kind in MODALITIES for split in SPLITS}
    files |= {f"instruct_{name}": [] for name in files}
    files |= {"joint_test": [], "joint_words": []}
    for item in items:
        if item.split == "joint":
            continue
        rng = random.Random(f"{seed}/{item.path}")
        name = f"{item.scene.kind}_{item.split}"
        files[name].append(_captioned(draft, item, rng))
        instructions = _conversations if item.split == "train" else _questions
        files[f"instruct_{name}"] += instructions(draft, item, rng)
    for pair in pairs:
        files["joint_test"] += _joint_questions(draft, pair, random.Random(f"{seed}/joint/{pair.number}"))
        described = random.Random(f"{seed}/joint words/{pair.number}")
        words = tuple(Medium(scene.kind, words=(language.caption(scene, described),)) for scene in pair.scenes)
        files["joint_words"] += _asked_jointly(pair, words, random.Random(f"{seed}/joint/{pair.number}"))
    return {
        name: write_jsonl(draft / "annotations" / f"{name}.jsonl", samples, root=draft)
        for name, samples in files.items()
    }


def _base(draft: Path, item: Item, suffix: str = "") -> dict[str, Any]:
    kind = item.scene.kind
    return {
        "id": f"{kind}_{item.split}_{item.number:05d}{suffix}",
        "media": (Medium(kind, str(draft / item.path)),),
        "facts": item.scene.facts,
        "held_out": item.scene.held_out,
    }


def _captioned(draft: Path, item: Item, rng: random.Random) -> Sample:
    captions: dict[str, None] = {}
    while len(captions) < CAPTIONS_PER_MEDIUM:
        captions.setdefault(language.caption(item.scene, rng))
    return Sample(**_base(draft, item), captions=tuple(captions), source="toyworld")


def _conversations(draft: Path, item: Item, rng: random.Random) -> list[Sample]:
    """A conversation about the medium alone, and one about it and a second medium that is there in words only.

    No sample shows two media. It is text that stands in for the second one, and so carries over what is asked of two.
    """
    alone = Sample(**_base(draft, item), turns=tuple(language.chat(item.scene, rng)), source="toyworld_instruct")
    other = rng.choice([scene for kind in _PARTNERS[item.scene.kind] for scene in _SEEN[kind]])
    scenes = [item.scene, other]
    media = [Medium(item.scene.kind, str(draft / item.path)), Medium(other.kind, words=_described(other, rng))]
    if rng.random() < 0.5:
        scenes.reverse()
        media.reverse()
    kinds = rng.choices(language.QUESTION_KINDS, k=_QUESTIONS_ABOUT_TWO)
    asked = [language.joint(scenes[0], scenes[1], rng, kind) for kind in kinds]
    base = _base(draft, item, "_and_words") | {"media": tuple(media)}
    return [alone, Sample(**base, turns=tuple(language.conversation(scenes, asked)), source="toyworld_instruct")]


def _described(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    return tuple(language.describe(scene, rng) for _ in range(CAPTIONS_PER_MEDIUM))


def _questions(draft: Path, item: Item, rng: random.Random) -> list[Sample]:
    """One sample for each attribute's question."""
    samples = []
    for question in language.questions(item.scene, rng):
        fact = question.facts[0]
        samples.append(
            Sample(
                **_base(draft, item, f"_{fact.attribute}"),
                turns=tuple(language.conversation([item.scene], [question])),
                answers=(question.answer,),
                source="toyworld_instruct",
                meta={"asked": question.kind, "attribute": fact.attribute},
            )
        )
    return samples


def _joint_questions(draft: Path, pair: Pair, rng: random.Random) -> list[Sample]:
    """One question of each kind about both media of a pair."""
    media = tuple(Medium(scene.kind, str(draft / path)) for scene, path in zip(pair.scenes, pair.paths, strict=True))
    return _asked_jointly(pair, media, rng)


def _asked_jointly(pair: Pair, media: tuple[Medium, ...], rng: random.Random) -> list[Sample]:
    samples = []
    facts = {name: value for scene in pair.scenes for name, value in scene.facts.items()}
    for kind in language.QUESTION_KINDS:
        question = language.joint(*pair.scenes, rng, kind)
        samples.append(
            Sample(
                id=f"joint_{pair.number:05d}_{kind}",
                media=media,
                turns=tuple(language.conversation(pair.scenes, [question])),
                answers=(question.answer,),
                source="toyworld_joint",
                facts=facts,
                meta={"asked": kind, "rests_on": [[fact.medium, fact.attribute] for fact in question.facts]},
            )
        )
    return samples


def _vocabulary() -> dict[str, Any]:
    held_out = {
        kind: sorted(
            {tuple(scene.facts[name] for name in TRIPLES[kind]) for scene in all_scenes(kind) if scene.held_out}
        )
        for kind in MODALITIES
    }
    return {"attributes": ATTRIBUTES, "held_out": held_out}


# --- The folder ---


def _settings_in(folder: Path) -> dict[str, Any] | None:
    """The settings of the world in ``folder``; none if there is no finished world."""
    try:
        info = json.loads((folder / _INFO).read_text())
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) else None


def _holds(folder: Path, wanted: dict[str, Any]) -> bool:
    found = _settings_in(folder)
    return found is not None and all(found.get(key) == value for key, value in wanted.items())


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file; the embedded world needs a folder")
    if folder.is_dir() and any(folder.iterdir()) and _settings_in(folder) is None:
        raise DataError(f"{folder} holds something else than an embedded world; name another folder, or empty it")
    folder.parent.mkdir(parents=True, exist_ok=True)


def _put_in_place(draft: Path, folder: Path, wanted: dict[str, Any]) -> None:
    """Rename the draft to the folder; what was there goes. Another process may have finished the same world first."""
    old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    if _settings_in(folder) is not None and not _holds(folder, wanted):
        folder.rename(old)
    try:
        draft.rename(folder)
    except OSError as error:
        if not _holds(folder, wanted):
            raise DataError(f"{folder}: the finished world cannot be put there: {error.strerror or error}") from error
    shutil.rmtree(old, ignore_errors=True)
