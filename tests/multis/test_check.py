"""The third stage: samples, rejected answers, statistics, and the page of samples."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path

from lavis_chatbridge import cli
from lavis_chatbridge.multis.check import check, statistics, write_page
from lavis_chatbridge.multis.generate import ANSWERS
from lavis_chatbridge.multis.rules import Checker
from tests.multis.test_rules import answer, item, talk

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


def test_statistics_are_complete_and_repeatable(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_text("".join(item(name=n).model_dump_json() + "\n" for n in "ab"))
    texts = [talk("It is a brown dog.", "It runs."), talk("It is a cat.", "It runs."), "no form"]
    records = [
        answer(text, item=name) | {"id": f"{number}"}
        for number, (name, text) in enumerate(zip("abc", texts, strict=True))
    ]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ANSWERS).write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    for _ in range(2):
        counted = check(tmp_path / "run", tmp_path / "annotations.jsonl", tmp_path / "out", Checker())
        assert (counted["accepted"], counted["rejected"]) == (1, 2), "a doubled record counts once"
        assert counted["reasons"] == {"absent": 1, "no_annotation": 1}
        assert counted["kinds"]["conversation"] == {"accepted": 1, "rejected": 2, "paper": 24_000}
        assert counted["modalities"]["image"] == {"accepted": 1, "rejected": 2}
        rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
        assert rejected[0]["reasons"] == [{"rule": "absent", "detail": "cat"}]
        assert rejected[0]["text"] == texts[1]


def test_the_settings_of_a_check_come_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "annotations.jsonl").write_text(item().model_dump_json())
    (tmp_path / ANSWERS).write_text(json.dumps(answer(talk("It is a brown dog."))))
    limits = "pairs: [1, 9], question_words: [1, 60], answer_words: [2, 99]"
    run = ["multis", "check", str(tmp_path), "--annotations", str(tmp_path / "annotations.jsonl")]
    run += ["--out", str(tmp_path / "out"), "--config", str(tmp_path / "check.yaml")]
    (tmp_path / "check.yaml").write_text(f"limits: {{talk: {{{limits}}}}}")
    assert cli.main(run) == 2
    assert cli.main([*run[:2], str(tmp_path / "typo"), *run[3:-2]]) == 2
    (tmp_path / "check.yaml").write_text(f"limits: {{conversation: {{{limits}}}}}")
    assert cli.main(run) == 0
    assert len((tmp_path / "out" / "accepted.jsonl").read_text().splitlines()) == 1
