"""``chatbridge world build``: write the embedded world to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavis_chatbridge.files import read_json
from lavis_chatbridge.toyworld.build import INFO, Sizes, build_world

app = typer.Typer(no_args_is_help=True)
_DEFAULT = Sizes()


@app.callback()
def _group() -> None:
    """The embedded world."""


def _count(name: str, help: str = "number of media") -> typer.models.OptionInfo:
    return typer.Option(f"--{name}", min=0, metavar="N", help=help)


@app.command("build", help="Write the world to a folder.")
def build(
    folder: Path,
    images: Annotated[int, _count("images")] = _DEFAULT.images,
    videos: Annotated[int, _count("videos")] = _DEFAULT.videos,
    sounds: Annotated[int, _count("sounds")] = _DEFAULT.sounds,
    test: Annotated[int, _count("test", "number of media of each modality")] = _DEFAULT.test,
    heldout: Annotated[int, _count("heldout", "number of media of each modality")] = _DEFAULT.heldout,
    joint: Annotated[int, _count("joint", "number of pairs")] = _DEFAULT.joint,
    seed: Annotated[int, _count("seed", "another seed gives another world")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, help="processes that render")] = 2,
) -> None:
    written = build_world(folder, Sizes(images, videos, sounds, test, heldout, joint), seed, processes)
    counts = read_json(written / INFO)["counts"]
    print(f"{written}: {sum(counts.values())} samples in {len(counts)} annotation files")
