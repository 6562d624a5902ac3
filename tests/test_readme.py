"""The README keeps its word: its commands are exercised, its files exist, its tree is the package's."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import pytest

EXERCISED_BY = {
    "make install": ".ci/run",
    "make demo": "Makefile",
    "make test": ".ci/run",
    "make check": ".ci/run",
    "make clean": "Makefile",
    "pip install --editable '.[test]'": "Makefile",
    "pip install --no-deps salesforce-lavis==1.0.2": "Makefile",
    "python -m lavis.train": "tests/test_guides.py",
    "torchrun -m lavis.train": "tests/test_guides.py",
    "python -m lavis.evaluate": "tests/test_guides.py",
    "chatbridge train": "tests/test_guides.py",
    "chatbridge evaluate": "tests/test_guides.py",
    "chatbridge world build": "tests/test_guides.py",
    "chatbridge check-data": "tests/test_guides.py",
    "chatbridge shard": "tests/test_guides.py",
    "chatbridge ask": "tests/test_guides.py",
    "chatbridge chat": "tests/test_guides.py",
}
"""Each command, without its arguments -> the file that runs it."""


@pytest.fixture(scope="module")
def text(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def commands(text: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def _name(command: str) -> str:
    """The command without its arguments: program, module or target, subcommands."""
    if command.startswith(("make", "pip")):
        return command
    words = shlex.split(command)
    if "-m" in words:
        return f"{words[0]} -m {words[words.index('-m') + 1]}"
    return " ".join(itertools.takewhile(lambda word: re.fullmatch("[a-z-]+", word) and word[0] != "-", words))


def test_every_command_is_exercised(commands: list[str], repository: Path):
    assert {_name(command) for command in commands} == set(EXERCISED_BY)
    assert [file for file in EXERCISED_BY.values() if not (repository / file).is_file()] == []


def test_make_has_the_targets(commands: list[str], repository: Path):
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        if command.startswith("make"):
            assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE), command


def test_every_named_file_exists(text: str, commands: list[str], repository: Path):
    configurations = {word for command in commands for word in command.split() if word.endswith(".yaml")}
    named = {name for name in re.findall(r"`([\w./]+)`", text) if "/" in name and not name.startswith("output/")}
    assert [name for name in sorted(configurations | named) if not (repository / name).exists()] == []


def test_python_examples_are_python(text: str):
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        compile(block, "README.md", "exec")


def test_the_tree_is_the_packages(text: str, repository: Path):
    tree = text.partition("## Folders")[2].partition("```\n")[2].partition("```")[0]
    shown = set(re.findall(r"^  (\w+)/ ", tree, flags=re.MULTILINE))
    package = repository / "lavis_chatbridge"
    assert shown == {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    top = re.findall(r"^([\w/]+)/ ", tree, flags=re.MULTILINE)
    assert [name for name in top if not (repository / name).is_dir()] == []
