"""Pages escape what they are given, and a missing value is an error."""

from __future__ import annotations

import pytest
from jinja2 import UndefinedError

from lavis_chatbridge import pages


def test_values_are_escaped_and_a_missing_one_is_an_error() -> None:
    assert "<title>a &lt;b&gt;</title>" in pages.render("page.html", title="a <b>")
    with pytest.raises(UndefinedError, match="title"):
        pages.render("page.html")
