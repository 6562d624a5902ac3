"""Two evaluations compared: differences, flipped samples, seeds, files of every form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.plugin.compare import compare

SAMPLES = 60


def evaluation(folder: Path, right: set[int], missing: int = -1, source: str = "toy") -> Path:
    """What an evaluation leaves: questions about pictures, three to a picture, of which some are right."""
    result = folder / "gqa" / "result"
    result.mkdir(parents=True)
    records = [
        {"sample_id": f"s{n}", "source": source, "index": n, "prompt": "[image 0]colour?", "answers": ["red"],
         "prediction": "red" if n in right else "<b>blue</b>", "media": [["image", str(folder / f"{n // 3}.png")]]}
        for n in range(SAMPLES) if n != missing
    ]  # fmt: skip
    Image.new("RGB", (4, 4)).save(folder / "0.png")
    (result / "test_step0.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (result / "test_step0_metrics.json").write_text(json.dumps({"metrics": ["exact_match"]}))
    return folder


def test_a_better_model_is_better_by_an_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = evaluation(tmp_path / "a", set(range(0, SAMPLES, 2)))
    b = evaluation(tmp_path / "b", set(range(0, SAMPLES, 2)) | set(range(15)) - {0}, missing=59)
    status = cli.main(["compare", str(a), str(b), "--output", str(tmp_path / "out")])
    assert status == 0
    printed = capsys.readouterr().out
    assert "gqa test toy: 1 samples only in A and 0 only in B are not compared" in printed
    assert "gqa test toy: 7 samples better in B, 0 worse (exact_match)" in printed
    [one] = json.loads((tmp_path / "out/comparison.json").read_text())["comparisons"]
    assert (one["a"], one["difference"]["samples"]) == (pytest.approx(3000 / 59), 59)
    assert one["difference"]["value"] == pytest.approx(one["b"] - one["a"]) == pytest.approx(700 / 59)
    assert 0 < one["difference"]["low"] < one["difference"]["value"] < one["difference"]["high"]
    assert one["difference"]["p"] < 0.1
    assert [flip["sample_id"] for flip in one["flips"]] == [f"s{n}" for n in range(1, 15, 2)]
    page = (tmp_path / "out/comparison.html").read_text()
    assert (tmp_path / "a/0.png").as_uri() in page
    assert "&lt;b&gt;blue&lt;/b&gt;" in page
    assert "+11.9" in (tmp_path / "out/comparison.txt").read_text()
    capsys.readouterr()
    assert cli.main(["compare", "none", "none", "--output", str(tmp_path / "out/comparison.txt")]) == 2
    assert "comparison.txt: File exists" in capsys.readouterr().err


def test_seeds_have_a_mean_and_a_deviation(tmp_path: Path) -> None:
    runs = [evaluation(tmp_path / f"seed{n}", set(range(10 * n))) for n in (1, 2, 3)]
    other = evaluation(tmp_path / "other", set(range(20)))
    [one] = compare([str(run) for run in runs], [str(other)])
    assert (one.a, one.a_deviation) == (pytest.approx(100 / 3), pytest.approx(100 / 6))
    assert one.b_deviation is None
    assert one.difference is not None
    assert one.difference.value == pytest.approx(0.0)
    assert f"{one.a:.1f} ± 16.7" in one.cells()


def test_one_medium_has_a_dash_for_interval_and_p(tmp_path: Path) -> None:
    files = [evaluation(tmp_path / f"{n}", set(range(n))) / "gqa/result/test_step0.jsonl" for n in (1, 2)]
    for file in files:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    assert cli.main(["compare", *map(str, files), "--output", str(tmp_path / "out")]) == 0
    [one] = json.loads((tmp_path / "out/comparison.json").read_text())["comparisons"]
    assert (one["name"], [one["difference"][key] for key in ("low", "high", "p")]) == ("test toy", [None] * 3)
    assert (tmp_path / "out/comparison.html").read_text().count('<td class="n">-</td>') == 2
    assert (tmp_path / "out/comparison.txt").read_text().splitlines()[2].split()[-3:] == ["+33.3", "-", "-"]


def test_runs_without_a_common_data_set_are_an_error(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", set()), evaluation(tmp_path / "b", set(), source="other")
    with pytest.raises(DataError, match="no data set in common: A has gqa test toy; B has gqa test other"):
        compare([str(a)], [str(b)])
    with pytest.raises(DataError, match="is neither a predictions file nor a folder of them"):
        compare([str(a)], [str(tmp_path / "nowhere")])
