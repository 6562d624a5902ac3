"""HTML pages: one jinja2 environment for all reports; the templates are in this folder.

``page.html`` has the head and the style; a report's own template extends it. All values are escaped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["file_uri"] = lambda path: Path(path).absolute().as_uri()


def render(template: str | Path, **values: Any) -> str:
    """Fill a template: the name of a file in this folder, or a path. A missing value is an error."""
    if isinstance(template, Path):
        return _ENVIRONMENT.from_string(template.read_text(encoding="utf-8")).render(**values)
    return _ENVIRONMENT.get_template(template).render(**values)
