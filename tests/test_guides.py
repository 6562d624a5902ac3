"""The blocks of README and docs run, in order, page by page, in a folder such as a reader has.

A ``bash`` block's commands run in this process with small settings (`SMALL`), and end with status 0 or that of their
comment ``# status 1``. A block whose first line is a comment with a file name (``# my.yaml``) is written to that file;
other ``python`` blocks are executed. A block below ``<!-- not run: REASON -->`` is skipped, and so are the commands of
`ELSEWHERE`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.toyworld.build import Sizes, build_world
from tests.chat.building import picture, sound, video
from tests.tasks.eval import layouts

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINED = ROOT / "lavis_chatbridge" / "assets" / "tiny" / "chatbridge.safetensors"
LAVIS_MODULES = {"lavis.train": "train", "lavis.evaluate": "evaluate"}

STEP = "--options run.max_iters=1 run.warmup_steps=0 run.batch_size_train=2 run.num_workers=0 run.device=cpu"
SCORE = "--options run.max_len=2 run.min_len=1 run.num_beams=1 run.num_workers=0 run.device=cpu"
SUITE = f"{SCORE} model.checkpoint=null env.data_root=benchmarks"
SMALL = {
    "chatbridge train": f"{STEP} run.overwrite=true",
    "chatbridge cache-features": STEP,
    "chatbridge evaluate --suite": SUITE,
    "chatbridge evaluate --cfg-path": SCORE,
    "chatbridge world build": "--images 3 --videos 2 --sounds 2 --test 4 --heldout 1 --joint 1 --processes 1",
    "chatbridge ask": "--max-new-tokens 3 --device cpu",
    "chatbridge chat": "--max-new-tokens 3 --device cpu",
}
"""Beginning of a command -> options that make it small."""

ELSEWHERE = (
    *("make ", "pip ", ".venv/bin/", "source ", "export ", "apt-get ", "git ", "docker "),  # installation
    *("chatbridge serve", "chatbridge web", "curl ", "vllm "),  # run until they are stopped: tests/chat
    "chatbridge multis",  # needs a server: tests/multis/test_guide.py
    *("srun ", "sbatch ", "lmms-eval ", "python -m pytest", "python benchmarks/"),
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks of a page."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"(<!-- not run: [^>]+-->\n+)?^```(\w*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [(language, body) for skipped, language, body in found if not skipped]


def small(command: str) -> list[str]:
    words = shlex.split(re.sub(r"\s#\s.*", "", command))
    if words[:2] == ["python", "-m"] and words[2] in LAVIS_MODULES:
        words = ["chatbridge", LAVIS_MODULES[words[2]], *words[3:]]
    line = shlex.join(words)
    return [*words, *shlex.split(next((more for start, more in SMALL.items() if line.startswith(start)), ""))]


def run(command: str) -> tuple[int, str]:
    """Status and output of a command: torchrun runs in new processes, others in this one."""
    words = small(command)
    if words[0] == "torchrun":
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", *words[1:], *shlex.split(STEP)]
        done = subprocess.run(launcher, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout + done.stderr
    printed = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        patch.setattr(sys, "stdin", io.StringIO("what is it?\n/quit\n"))
        if words[0] == "chatbridge":
            return cli.main(words[1:]), printed.getvalue()
        assert words[0] == "python", f"add {words[0]!r} to ELSEWHERE, or mark the block: {command}"
        patch.setattr(sys, "argv", words[1:])
        patch.syspath_prepend(str(Path(words[1]).resolve().parent))
        try:
            runpy.run_path(words[1], run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0), printed.getvalue()
        return 0, printed.getvalue()


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith(("#", *ELSEWHERE))]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = Sizes(images=3, videos=2, sounds=2, test=4, heldout=1, joint=2)
    return build_world(tmp_path_factory.mktemp("guides") / "world", sizes, processes=1)


@pytest.fixture
def folder(tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page: the world, media, and a data set of one's own."""
    (tmp_path / "projects").symlink_to(ROOT / "projects")
    shutil.copytree(world, tmp_path / "output" / "world")
    layouts.build(tmp_path / "benchmarks")
    for name in ("a.jpg", "a.png", "picture.png", "picture.jpg", "photo.jpg"):
        Image.fromarray(picture()).save(tmp_path / name)
    for name in ("b.wav", "sound.wav"):
        (tmp_path / name).write_bytes(sound())
    (tmp_path / "c.mp4").write_bytes(video("tone"))
    (tmp_path / "answers.json").write_text('["red", "green"]')
    (tmp_path / "questions.jsonl").write_text('{"id": "1", "text": "what is it?", "images": ["a.jpg"]}\n')
    sample = {"id": "1", "media": [{"type": "image", "path": "a.jpg"}], "captions": ["a star"]}
    (tmp_path / "my_data").mkdir()
    shutil.copy(tmp_path / "a.jpg", tmp_path / "my_data")
    lines = "".join(json.dumps(sample | {"id": number}) + "\n" for number in ("1", "2"))  # CIDEr needs two
    for name in ("mine.jsonl", "train.jsonl", "my_data/train.jsonl", "my_data/test.jsonl"):
        (tmp_path / name).write_text(lines)
    table = {"photo": [{"bytes": (tmp_path / "a.jpg").read_bytes(), "path": "a.jpg"}] * 4, "text": ["a star"] * 4}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "my_data" / "photos.parquet")
    chat = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "a star"}]
    (tmp_path / "my_data/chat.jsonl").write_text(json.dumps({"conversations": chat, "images": ["a.jpg"]}) + "\n")
    shutil.copy(ROOT / "projects/chatbridge/align.yaml", tmp_path / "my.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CHATBRIDGE_DATA", str(tmp_path))
    monkeypatch.delenv("CHATBRIDGE_WEIGHTS", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page: Path, folder: Path) -> None:
    names: dict[str, object] = {"__name__": "guide"}
    for name in re.findall(r"checkpoint=output/(\w+)/model\.safetensors", page.read_text(encoding="utf-8")):
        (folder / "output" / name).mkdir(exist_ok=True)  # a reader has trained it before
        shutil.copy(TRAINED, folder / "output" / name / "model.safetensors")
    for language, text in blocks(page):
        head = re.match(r"# ([\w./-]+\.(?:yaml|json|py))\b", text)
        if head and language in ("yaml", "json", "python"):
            Path(head[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(head[1]).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, page.name, "exec"), names)
        elif language == "bash":
            for command in commands(text):
                expected = re.search(r"# status (\d)", command)
                status, printed = run(command)
                assert status == (int(expected[1]) if expected else 0), f"{command}\n{printed[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    lost = []
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if re.match(r"\w+:", target) or (path.is_file() and (not anchor or anchor in anchors(path))):
            continue
        lost += [] if path.is_dir() else [target]
    assert lost == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_make_has_the_targets_that_pages_name() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {name for page in PAGES for name in re.findall(r"^make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)}
    assert [name for name in named if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []
