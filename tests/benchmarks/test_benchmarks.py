"""Every benchmark opens with its command, whose options its parser has; the GPU's runs on a CPU; the hook is quick."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "common"]


@pytest.fixture(scope="module")
def benchmark():
    """A benchmark by its name; its folder is on the path meanwhile, as it is for the script itself."""

    def load(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(str(FOLDER))
            return importlib.import_module(name)

    return load


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_opens_with_its_command_and_has_its_options(script):
    text = script.read_text(encoding="utf-8")
    opening = ast.get_docstring(ast.parse(text)) or ""
    commands = re.findall(rf"^    .*python benchmarks/{script.name}(?:.|\n {{5,}})*", opening, flags=re.MULTILINE)
    assert commands
    shown = {option for command in commands for option in re.findall(r"--[a-z][a-z-]*", command)}
    assert shown <= {"--write", *re.findall(r'add_argument\(\s*"(--[a-z-]+)"', text)}


@pytest.mark.parametrize("table", sorted(FOLDER.glob("*.md")), ids=lambda path: path.stem)
def test_a_table_names_an_existing_script(table):
    pattern = r"`(?:OMP_NUM_THREADS=\d+ )?python benchmarks/(\w+\.py)[^`]*`"
    named = re.findall(pattern, table.read_text(encoding="utf-8"))
    assert named
    assert all((FOLDER / name).is_file() for name in named)


def test_the_gpu_benchmark_runs_through(benchmark, tmp_path, capsys):
    gpu, written = benchmark("gpu"), tmp_path / "gpu.md"
    gpu.main(["--size", "tiny", "--device", "cpu", "--rounds", "1", "--write", str(written)])
    table = written.read_text(encoding="utf-8")
    assert capsys.readouterr().out == table
    assert re.search(r"\d{4}-\d\d-\d\d.*`(OMP_NUM_THREADS=1 )?python benchmarks/gpu.py --size tiny", table)
    rows = [re.split(r" *\| *", line.strip("| ")) for line in table.splitlines() if re.match(r"\| \w", line)]
    steps = [row for row in rows if row[0] in gpu.MODALITIES]
    assert [row[:2] for row in steps] == [[m, b] for m in gpu.MODALITIES for b in ("2", "4")]
    for row in steps:
        assert float(row[2]) > 0
        assert float(row[4]) > 0
        assert 5 < float(row[-2]) < 8  # near the logarithm of a vocabulary of 640
        assert float(row[-1]) < 1e-3
    assert [row[0] for row in rows if row not in steps][-1] == "2"


def test_a_batch_that_does_not_fit_ends_the_search(benchmark, monkeypatch, capsys):
    gpu = benchmark("gpu")
    step = gpu.Trainer.step

    def limited(self, batch):
        if len(batch["pieces"]) > 2:
            raise torch.OutOfMemoryError
        return step(self, batch)

    monkeypatch.setattr(gpu.Trainer, "step", limited)
    gpu.main(["--size", "tiny", "--device", "cpu", "--modalities", "image", "--rounds", "1"])
    assert re.findall(r"\| image \| (\d+)", capsys.readouterr().out) == ["2"]


def test_import_torch_costs_at_most_three_milliseconds_more(benchmark):
    script = benchmark("start")
    # The minimum: other processes of a busy machine only add to it.
    assert min(script.hook_cost() for _ in range(3)) <= script.LIMIT_MS
