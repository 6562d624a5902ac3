"""Write docs/api from the docstrings: `make docs`. Nothing of the package is imported; griffe reads the source."""

from __future__ import annotations

import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parent.parent
API = ROOT / "docs" / "api"
PAGES = {
    "chat": ("Conversations", ["chat.session", "chat.history", "chat.media", "chat.options", "chat.loading"]),
    "media": ("Opening media", ["media.image", "media.video", "media.audio", "media.source", "media.limits"]),
    "processors": ("Processors", [f"processors.{name}" for name in ("base", "image", "video", "audio", "text")]),
    "models": ("The model", [f"models.{name}" for name in ("chatbridge", "settings", "checkpoint", "perceiver")]),
    "datasets": ("Data", ["schema", "datasets.settings", "datasets.readers.common", "datasets.builders"]),
    "prompting": ("Prompts", ["prompting.pieces", "prompting.conversation", "prompting.templates"]),
    "multis": ("Annotators of the pipeline", ["multis.annotators.base", "multis.annotators.registry"]),
    "errors": ("Errors and settings", ["errors", "settings"]),
}
"""Page -> its heading, and the modules on it, in the order in which a reader needs them."""


def main(folder: Path = API) -> None:
    """Write a page for each group of modules, and the list of pages."""
    package = griffe.load("lavis_chatbridge", search_paths=[ROOT], allow_inspection=False)
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for name, (heading, modules) in PAGES.items():
        body = "\n".join(module_text(package[module]) for module in modules)
        _write(folder / f"{name}.md", f"# {heading}\n\n{body}")
        links.append(f"- [{heading}]({name}.md): " + ", ".join(f"`lavis_chatbridge.{module}`" for module in modules))
    _write(folder / "README.md", "# API\n\nMade from the docstrings by `make docs`.\n\n" + "\n".join(links) + "\n")


def module_text(module: griffe.Module) -> str:
    """A module: its docstring, and what it defines that is public."""
    parts = [f"## `{module.path}`\n", _docstring(module)]
    for member in module.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if member.is_class:
            parts += [f"### class `{member.name}{_bases(member)}`\n", _docstring(member)]
            parts += [
                f"#### `{member.name}.{_signature(method)}`\n\n{_docstring(method)}"
                for method in member.members.values()
                if method.is_function and not method.name.startswith("_") and method.docstring
            ]
        elif member.is_function:
            parts += [f"### `{_signature(member)}`\n", _docstring(member)]
        elif member.docstring:
            parts += [f"### `{member.name}`\n", _docstring(member)]
    return "\n".join(parts)


def _bases(owner: griffe.Class) -> str:
    return f"({', '.join(map(str, owner.bases))})" if owner.bases else ""


def _signature(function: griffe.Function) -> str:
    return function.signature(return_type=True)


def _docstring(owner: griffe.Object) -> str:
    """The docstring, its sections of Args and Raises as lists, its roles as plain code."""
    if owner.docstring is None:
        return ""
    parts = []
    for section in owner.docstring.parse("google"):
        value = section.value
        if isinstance(value, list):
            items = "\n".join(f"- {_item(item)}" for item in value)
            parts.append(f"**{section.kind.value.capitalize()}**\n\n{items}")
        else:
            parts.append(_plain(value if isinstance(value, str) else str(value.description)))
    return "\n\n".join(parts) + "\n"


def _item(item: griffe.DocstringElement) -> str:
    name = getattr(item, "name", "") or str(item.annotation or "")
    told = " ".join(_plain(item.description).split())
    return f"`{name}`: {told}" if name else told


def _plain(text: str) -> str:
    """reStructuredText's double backquotes and roles as Markdown's single ones."""
    for role in (":func:", ":class:", ":meth:", ":mod:", ":attr:", ":data:"):
        text = text.replace(role, "")
    return text.replace("``", "`")


def _write(path: Path, text: str) -> None:
    draft = path.with_suffix(".part")
    draft.write_text("\n".join(line.rstrip() for line in text.rstrip().splitlines()) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else API)
