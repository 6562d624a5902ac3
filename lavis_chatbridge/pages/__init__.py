"""HTML pages: one jinja2 environment for every report; the templates lie in this folder.

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


def render(template: str, **values: Any) -> str:
    """Fill a template of this folder.

    Args:
        template: Its file name, such as ``"scores.html"``.
        **values: What the template names. A missing one is an error.
    """
    return _environment().get_template(template).render(**values)
