"""The page of samples: texts are escaped, media are linked, missing media are named."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

from lavis_chatbridge.multis.check import statistics
from lavis_chatbridge.multis.page import write_page

EVIL = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))


def checked(folder: Path) -> Path:
    sample = {
        "id": EVIL,
        "media": [{"type": "image", "path": "none.png"}],
        "turns": [{"role": "user", "text": EVIL, "media": [0]}, {"role": "assistant", "text": EVIL}],
        "meta": {"item": "a"},
    }
    (folder / "accepted.jsonl").write_text(json.dumps(sample) + "\n")
    turned_down = {"id": "r", "item": "r", "media": [], "reasons": [{"rule": EVIL, "detail": EVIL}], "text": EVIL}
    (folder / "rejected.jsonl").write_text(json.dumps(turned_down) + "\n")
    (folder / "statistics.json").write_text(json.dumps(statistics([], [])))
    return folder


def test_texts_are_escaped_and_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    assert write_page(checked(tmp_path), tmp_path, tmp_path / "page.html") == 2
    page = (tmp_path / "page.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert [tag for tag, _ in tags.seen].count("script") == 0
    assert not [1 for tag, values in tags.seen if tag == "img" or "onerror" in values]
    assert "http" not in page
    assert page.count("none.png does not exist") == 1


def test_media_are_linked_from_the_page(tmp_path: Path) -> None:
    (tmp_path / "none.png").write_bytes(b"picture")
    write_page(checked(tmp_path), tmp_path, tmp_path / "pages" / "a b.html")
    assert 'src="../none.png"' in (tmp_path / "pages" / "a b.html").read_text()
