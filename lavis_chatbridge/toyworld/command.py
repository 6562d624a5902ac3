"""``chatbridge world``: build the embedded world, and report the results of a demo on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lavis_chatbridge.files import read_json
from lavis_chatbridge.toyworld.build import INFO, Sizes, build_world

app = typer.Typer(no_args_is_help=True)
_DEFAULT = Sizes()


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
    """``chatbridge world build``."""
    sizes = Sizes(images, videos, sounds, test, heldout, joint)
    written = build_world(folder, sizes, seed, processes)
    counts = read_json(written / INFO)["counts"]
    print(f"{written}: {sum(counts.values())} samples in {len(counts)} annotation files")


@app.command("report", help="Write report.html and report.json of a demo's runs.")
def report(
    folder: Annotated[Path, typer.Argument(help="the demo's folder, with the runs in it")],
    world: Annotated[Path, typer.Option("--world", help="the world that they used")] = Path("output/world"),
) -> None:
    """``chatbridge world report``."""
    from lavis_chatbridge.toyworld.report import summary, write_report

    scores = write_report(folder, world)
    print(summary(scores))
    if scores["seconds"] is not None:
        print(f"\n{scores['seconds']:.0f} seconds in all")
    print(f"report: {folder / 'report.html'}")
