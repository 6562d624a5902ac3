"""The guides keep their word: links lead somewhere, commands and files exist, tables agree with the settings.

Nothing is run here: commands are parsed by the parsers that would read them. tests/test_guides.py runs them.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from lavis_chatbridge.cli import COMMANDS
from lavis_chatbridge.datasets.readers import READERS
from lavis_chatbridge.runners.settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
GUIDES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in GUIDES]
MODULES = {command.name: command.module for command in COMMANDS}
LAVIS_MODULES = {"lavis.train": "lavis_chatbridge.plugin.train", "lavis.evaluate": "lavis_chatbridge.plugin.evaluate"}

each_guide = pytest.mark.parametrize("guide", GUIDES, ids=NAMES)


class Command(NamedTuple):
    """A command line of a guide, and the words of its section."""

    words: list[str]
    section: str


def prose(text: str) -> str:
    """A guide without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks in one of the languages; an empty name stands for blocks that name none."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in found if language in languages]


def slugs(text: str) -> set[str]:
    """The anchors of a guide's headings, made as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def command_lines(text: str) -> Iterator[Command]:
    """Every command of ours in a shell block, fenced or indented, with what stands around it."""
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        lines = [line for block in blocks(section, "bash", "sh", "shell", "") for line in block.splitlines()]
        lines += re.findall(r"^    (\S.*)$", prose(section), flags=re.MULTILINE)
        for line in lines:
            if re.match(r"(chatbridge|torchrun|srun|make|([A-Z_]+=\S+ )?(\S*/)?python3?)\s", line):
                words = shlex.split(line, comments=True)
                yield Command([word for word in words if not re.match(r"[A-Z_]+=", word)], prose(section))


@each_guide
def test_no_shell_line_goes_unread(guide: Path) -> None:
    """What is not a command of ours is a setting, or one of a few programs of others."""
    lines = [
        line
        for block in blocks(guide.read_text(encoding="utf-8"), "bash", "sh", "shell")
        for line in block.splitlines()
    ]
    ours = r"(chatbridge|torchrun|srun|make|([A-Z_]+=\S+ )?(\S*/)?python3?)\s"
    others = r"(lmms-eval |export [A-Z_]+=|(\S*/)?pip install |apt-get install |curl |#|\s|$)"
    assert [line for line in lines if not re.match(f"{ours}|{others}", line)] == []


def parse(module: str, arguments: list[str]) -> argparse.Namespace:
    """Arguments as the module that gets them would read them."""
    parser = argparse.ArgumentParser(module)
    import_module(module).add_arguments(parser)
    return parser.parse_args(arguments)


def read(words: list[str]) -> argparse.Namespace | None:
    """A command parsed; None where it is one of other programs.

    Raises:
        AssertionError: If it names something that there is not.
        SystemExit: If its arguments are not understood.
    """
    program = Path(words[0]).name
    if program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE), words
        return None
    if program == "chatbridge":
        rest = words[1:]
    elif "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        if module in LAVIS_MODULES:
            return parse(LAVIS_MODULES[module], rest)
        if module == "pytest":
            assert all((ROOT / path).exists() for path in rest if not path.startswith("-")), words
            return None
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), words
        if module != "lavis_chatbridge.cli":
            return None
    else:
        assert (ROOT / words[1]).is_file(), words
        return None
    if rest[0].startswith("-"):
        return None
    assert rest[0] in MODULES, f"chatbridge has no subcommand {rest[0]!r}"
    return parse(MODULES[rest[0]], rest[1:])


@each_guide
def test_links_lead_somewhere(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = guide.parent / name if name else guide
        whole = path.exists() and (not anchor or anchor in slugs(path.read_text(encoding="utf-8")))
        lost += [] if whole else [target]
    assert lost == []


@each_guide
def test_files_named_in_the_text_exist(guide: Path) -> None:
    named = re.findall(
        r"`((?:lavis_chatbridge|projects|tests|benchmarks|docs)/[\w./-]*)`", guide.read_text(encoding="utf-8")
    )
    scripts = re.findall(r"`python (benchmarks/\S+?\.py)[ `]", guide.read_text(encoding="utf-8"))
    assert [name for name in {*named, *scripts} if not (ROOT / name).exists()] == []


@each_guide
def test_commands_exist_and_are_understood(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    suites = {path.stem for path in (ROOT / "projects/chatbridge/eval").glob("*.yaml")} | {"all", "zero-shot"}
    keys = {field.name for field in dataclasses.fields(RunSettings)}
    for command in command_lines(text):
        try:
            arguments = vars(read(command.words) or argparse.Namespace())
        except SystemExit:
            pytest.fail(f"not understood: {shlex.join(command.words)}")
        config = arguments.get("cfg_path")
        # a guide may have its reader write a configuration, which it then names in the text
        assert config is None or (ROOT / config).is_file() or f"`{config}`" in prose(text), config
        assert not set((arguments.get("suite") or "all").split(",")) - suites, command.words
        options = [option.partition("=")[0].split(".") for option in arguments.get("options") or []]
        assert [key for key in options if key[0] == "run" and key[1] not in keys] == [], command.words


@each_guide
def test_examples_are_python_and_yaml(guide: Path) -> None:
    text = guide.read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        compile(block, guide.name, "exec")
    for block in blocks(text, "yaml"):
        assert isinstance(yaml.safe_load(block), dict), block


def test_the_training_guide_has_every_key_with_its_default() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (`[^|]*`|required) \|", text, flags=re.MULTILINE))
    told: dict[str, Any] = {
        key: value if value == "required" else yaml.safe_load(value[1:-1]) for key, value in rows.items()
    }
    defaults = dataclasses.asdict(RunSettings()) | {"task": "required"}
    assert told == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


def test_the_data_guide_has_every_reader() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    missing = [name for name in READERS if f"`{name}`" not in text]
    assert missing == []


FIGURES = [
    ("docs/chat.md", r"([\d.]+) times less computation", "chat.md", r"reached, ([\d.]+) times in CPU"),
    ("docs/server.md", r"answers ([\d.]+) times as many", "chat_server.md", r"reached, ([\d.]+) times"),
    (
        "docs/training.md",
        r"a step is ([\d.]+) \(image\), ([\d.]+) \(video\) and ([\d.]+) \(audio\)",
        "step.md",
        r"\| \w+ \| fp32 \| [\d.]+ \| ([\d.]+)",
    ),
    (
        "docs/training.md",
        r"and ([\d.]+), ([\d.]+) and ([\d.]+) times with cached",
        "step.md",
        r"\| \w+ \| fp32, cached \| [\d.]+ \| ([\d.]+)",
    ),
    (
        "docs/troubleshooting.md",
        r"AVX2: ([\d.]+) s for the image, ([\d.]+) s to the first token, ([\d.]+) s for each",
        "half.md",
        r"\| (?:image|first token|each more) \| [\d.]+ \| ([\d.]+)",
    ),
    (
        "docs/multis.md",
        r"measured ([\d.]+) s, ([\d.]+) times the ideal, with ([\d.]+) ms",
        "multis_throughput.md",
        r"multis generate \| \d+ \| ([\d.]+) \| ([\d.]+)x \| [\d.]+x \| ([\d.]+)",
    ),
    (
        "docs/data.md",
        r"([\d.]+) % are padding in random order and ([\d.]+) % with .*, of stage 2's ([\d.]+) %\nand ([\d.]+) %",
        "padding.md",
        r"\| all \| \| \| \| ([\d.]+)% \| \*\*([\d.]+)%",
    ),
    ("docs/weights.md", r"peaks at ([\d.]+) times its size", "loading.md", r"ChatBridge \| ours \| \d+ \| ([\d.]+)"),
]
"""A guide, where its figures stand, the table that they are from, where they stand there."""


@pytest.mark.parametrize(("guide", "here", "table", "there"), FIGURES, ids=[f"{f[0]}-{f[2]}" for f in FIGURES])
def test_figures_are_those_of_the_measured_tables(guide: str, here: str, table: str, there: str) -> None:
    told = [
        figure for found in re.findall(here, (ROOT / guide).read_text(encoding="utf-8")) for figure in _listed(found)
    ]
    text = (ROOT / "benchmarks" / table).read_text(encoding="utf-8")
    measured = [figure for found in re.findall(there, text) for figure in _listed(found)][: len(told)]
    assert told, f"{guide} has no {here}"
    assert told == [f"{float(m):.{len(t.partition('.')[2])}f}" for t, m in zip(told, measured, strict=True)]


def _listed(found: str | tuple[str, ...]) -> list[str]:
    return [found] if isinstance(found, str) else list(found)


def test_every_guide_is_reached_from_another() -> None:
    texts = {guide: guide.read_text(encoding="utf-8") for guide in GUIDES}
    for guide in GUIDES[2:]:
        others = "".join(text for other, text in texts.items() if other != guide)
        assert guide.name in others, f"no guide and not the README names docs/{guide.name}"
