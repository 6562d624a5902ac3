"""HTML pages: one jinja2 environment for all reports; the templates are in this folder.

``page.html`` has the head and the style; a report's own template extends it. All values are escaped.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["file_uri"] = lambda path: Path(path).absolute().as_uri()
    return environment


def render(template: str | Path, **values: Any) -> str:
    """Fill a template: the name of a file in this folder, or a path. A missing value is an error."""
    environment = _environment()
    if isinstance(template, Path):
        return environment.from_string(template.read_text(encoding="utf-8")).render(**values)
    return environment.get_template(template).render(**values)
