"""``benchmarks/soak.py``: each kind of request once, and that it would see what it looks for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("httpx", reason="the soak needs the extra 'test'")
pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")
pytest.importorskip("fastapi", reason="the server needs the extra 'serve'")


@pytest.fixture
def soak(benchmark: Callable[[str], Any]) -> Any:
    return benchmark("soak")


def test_each_kind_of_request_gets_its_answer(
    soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table = tmp_path / "soak.md"
    words = ["soak.py", "--minutes", "0", "--clients", "4", "--write", str(table)]
    monkeypatch.setattr("sys.argv", words)
    status = soak.main()
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == "pass"
    assert status == 0
    assert table.read_text(encoding="utf-8") == printed
    rows = re.findall(r"^\| ([^|*]+) \| (\d+|it leaves) \| 1 \| 1 \|", printed, flags=re.MULTILINE)
    assert [name for name, _ in rows] == [case.name for case in soak.all_cases()]
    assert {status for _, status in rows} == {"200", "400", "401", "404", "413", "415", "it leaves"}
    assert re.search(r"^\| 1 \| [1-9]\d* \| [1-9]\d* \| [1-9]", printed, flags=re.MULTILINE)  # what the server held


def samples(soak: Any, **held: list[float]) -> list[Any]:
    """Twenty minutes, a sample a minute."""
    usual = {"memory": [1000.0] * 20, "threads": [9.0] * 20, "files": [20.0] * 20} | held
    rows = zip(usual["memory"], usual["threads"], usual["files"], strict=True)
    return [soak.Sample(60.0 * minute, *row, 1) for minute, row in enumerate(rows)]


def test_growth_after_the_warm_up_is_seen(soak: Any):
    warmed = [500.0] * 4 + [1000.0] * 16
    peaks = [3000.0 if minute == 18 else 1000.0 for minute in range(20)]
    allowed = [1000.0] * 15 + [1066.0] * 5
    for memory in (warmed, peaks, allowed):
        assert soak.growth_faults(samples(soak, memory=memory)) == []
    climbing = [1000.0 + 10 * minute for minute in range(20)]
    assert soak.growth_faults(samples(soak, memory=climbing)) == ["memory grew from 1070 to 1170"]
    leaked = [20.0 + 3 * minute for minute in range(20)]
    (told,) = soak.growth_faults(samples(soak, files=leaked))
    assert told.startswith("files grew")


def test_wrong_answers_are_told(soak: Any):
    good = soak.Case("good", lambda rng: None, reached=("image",))
    bad = soak.Case("bad", lambda rng: None, 400)
    report = {"media": [{"type": "image", "reached": True}]}
    whole = {"choices": [{"finish_reason": "stop"}], "chatbridge": report}
    deaf = {**whole, "chatbridge": {"media": [{"type": "image", "reached": False}]}}
    event, error = f"data: {json.dumps(whole)}", 'data: {"error": {"message": "lost"}}'
    answers = [
        (good, 200, [json.dumps(whole)], False, ""),
        (good, 200, [event, "", "data: [DONE]"], True, ""),
        (bad, 400, ['{"error": {"message": "no"}}'], False, ""),
        (good, 500, ["{}"], False, "status 500, expected 200"),
        (bad, 200, [json.dumps(whole)], False, "status 200, expected 400"),
        (bad, 400, ["{}"], False, "without a message"),
        (good, 200, [json.dumps(deaf)], False, "expected ('image',)"),
        (good, 200, [event], True, "a stream without an end"),
        (good, 200, [error, "data: [DONE]"], True, "lost"),
    ]
    for case, status, lines, streamed, told in answers:
        found = soak.fault_of(case, status, lines, streamed)
        assert told in found
        assert bool(found) == bool(told)
