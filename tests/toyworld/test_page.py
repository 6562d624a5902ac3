"""The report page: complete in itself, media inside, words escaped."""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from lavis_chatbridge.toyworld.page import Curve, Example, Page, render


def test_the_page_needs_no_network_and_escapes_words(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    example = Example((("image", picture),), "<b>red</b>", "red", right=False, asked="What colour?")
    page = Page(
        "Demo", "lead", [("Scores", ["kind", "accuracy"], [["image", "0.97"]])], [Curve("Loss", ((0, 4.0), (9, 1.0)))]
    )
    page.galleries.append(("Pictures", [example]))
    text = render(page)
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", text)
    assert "data:image/png;base64," in text
    assert "&lt;b&gt;red&lt;/b&gt;" in text
    assert "<b>red</b>" not in text
    assert "from 4.000 to 1.000" in text
    assert "0.97" in text
