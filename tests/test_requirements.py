"""Requirements: the lock that CI installs, none without use, and messages that name the extra of an absent package."""

from __future__ import annotations

import ast
import configparser
import json
import subprocess
import sys
from pathlib import Path

import lavis
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKAGE = Path(__file__).resolve().parent.parent / "lavis_chatbridge"
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "opencv-python-headless": "cv2", "protobuf": "google"}
"""Distribution -> what is imported, where the two differ."""
OF_OTHERS = {"protobuf": "transformers reads tokenizer.model files with it"}
"""Requirements that neither this package nor LAVIS imports, and who does."""
LED = {"starlette", "lavis", "lmms_eval", "lavis_chatbridge"}
"""Imported without being listed: it comes with a listed one, or the user installs it beside this package."""

WITHOUT_EXTRAS = """
import importlib, json, pkgutil, sys
from pathlib import Path

sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))  # None there: not found, by import and by find_spec
import lavis_chatbridge, lavis.models
from lavis_chatbridge.errors import ChatBridgeError

broken = {}
for module in pkgutil.walk_packages(lavis_chatbridge.__path__, "lavis_chatbridge."):
    try:
        importlib.import_module(module.name)
    except (ImportError, ChatBridgeError) as error:
        absent = error if isinstance(error, ImportError) else error.__cause__
        broken[module.name] = (getattr(absent, "name", None) or str(error)).partition(".")[0]

from lavis_chatbridge.chat import web
from lavis_chatbridge.chat.server import command
from lavis_chatbridge.models import language_model
from lavis_chatbridge.models.settings import LanguageModelSettings

def said(act):
    try:
        act()
    except ChatBridgeError as error:
        return f"{type(error).__name__}: {error}"


entries = {
    "serve": command.command,
    "web": web.command,
    "lora": lambda: language_model.check_available(LanguageModelSettings(weights="w", lora={})),
    "device-map": lambda: language_model.check_available(LanguageModelSettings(weights="w", device_map="auto")),
}
print(json.dumps({"broken": broken, "said": {name: said(act) for name, act in entries.items()}}))
"""


@pytest.fixture(scope="module")
def setup(repository: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(comment_prefixes=("#",))
    parser.read(repository / "setup.cfg", encoding="utf-8")
    return parser


def listed(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def import_name(requirement: Requirement) -> str:
    return IMPORT_NAMES.get(requirement.name, requirement.name.replace("-", "_"))


def imported_by(folder: Path) -> set[str]:
    """The top-level names that the modules of a folder import anywhere, the standard library's left out."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names


def test_the_lock_satisfies_every_requirement(setup: configparser.ConfigParser, repository: Path) -> None:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    lock = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = listed(setup["options"]["install_requires"]) + listed(setup["options.extras_require"]["test"])
    unmet = [str(r) for r in wanted if not r.specifier.contains(lock.get(canonicalize_name(r.name), "0"))]
    assert unmet == [], "run `make lock`"


def test_every_import_is_a_requirement_and_every_core_requirement_is_imported(setup: configparser.ConfigParser) -> None:
    core, own = listed(setup["options"]["install_requires"]), imported_by(PACKAGE)
    extras = "\n".join(text for name, text in setup["options.extras_require"].items() if name != "test")
    assert own - {import_name(r) for r in [*core, *listed(extras)]} - LED == set()
    imported = own | imported_by(Path(lavis.__file__).parent)
    assert [r.name for r in core if import_name(r) not in imported and r.name not in OF_OTHERS] == []


def test_without_the_extras_all_modules_load_and_each_use_names_its_extra(
    setup: configparser.ConfigParser, repository: Path
) -> None:
    extras = {name: listed(text) for name, text in setup["options.extras_require"].items() if name != "test"}
    core = {import_name(r) for r in listed(setup["options"]["install_requires"])}
    names = {import_name(r) for requirements in extras.values() for r in requirements} - core | {"starlette"}
    command = [sys.executable, "-c", WITHOUT_EXTRAS, ",".join(sorted(names | {"lmms_eval"}))]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads(run.stdout.splitlines()[-1])
    # Reached only through a guarded import of the command.
    behind = {
        "lavis_chatbridge.chat.server.app": "fastapi",
        "lavis_chatbridge.chat.page": "gradio",
        "lavis_chatbridge.plugin.lmms_eval.model": "lmms_eval",
    }
    assert {name: absent for name, absent in told["broken"].items() if behind.get(name) != absent} == {}
    for extra, said in told["said"].items():
        assert said, f"{extra}: nothing said that a package is absent"
        assert said.startswith("MissingExtraError: "), said
        assert said.endswith(f"pip install 'lavis-chatbridge[{extra}]'"), said
