"""``chatbridge ask`` on a small model: questions, files, standard input, batches, resuming."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lavis_chatbridge import cli
from lavis_chatbridge.chat import Session, ask, load_model
from lavis_chatbridge.files import locked
from lavis_chatbridge.models import state_dicts


def run(files: Path, *words: str) -> int:
    model = ["--model", f"{files}/small.yaml", "--max-new-tokens", "6", "--device", "cpu"]
    return cli.main(["ask", *words, *model])


@pytest.fixture
def loaded(opened: Session, monkeypatch: pytest.MonkeyPatch) -> Session:
    """Commands use the opened model instead of a new one, whose random weights differ."""
    processors = {modality: {"eval": one} for modality, one in opened.engine.reader.processors.items()}
    monkeypatch.setattr("lavis_chatbridge.chat.session.load_model", lambda *given: (opened.model, processors))
    return opened


def test_a_question_and_its_files(files: Path, loaded: Session, capsys: pytest.CaptureFixture[str]):
    media = [f"{files}/a b.png", f"{files}/c.wav", f"{files}/d.mp4"]
    assert run(files, "what is it?", *media, "--json") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [note["type"] for note in record["media"]] == ["image", "audio", "video", "audio"]
    assert 1 <= record["tokens"] <= 6
    assert "warning: d.mp4's sound track" in printed.err
    named = ["--image", media[0], "--audio", media[1], "--video", media[2]]
    assert run(files, "what is it?", *named, "--no-video-sound") == 0
    talk = Session(loaded.model, engine=loaded.engine, hear_videos=False)
    expected = talk.ask("what is it?", media[0], media[2], media[1], max_new_tokens=6).text
    assert capsys.readouterr().out.strip() == expected


def test_standard_input(files: Path, loaded: Session, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "stdin", io.StringIO("what is it?\n"))
    assert run(files, "-", f"{files}/a b.png", "--json") == 0
    expected = json.loads(capsys.readouterr().out)
    for words in (["what is it?", "-"], ["what is it?", "--image", "-"]):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=open(files / "a b.png", "rb")))  # noqa: SIM115
        assert run(files, *words, "--json") == 0
        assert json.loads(capsys.readouterr().out)["answer"] == expected["answer"]


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_question_that_is_not_utf_8(errors: str, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9?"), "utf-8", errors))
    assert cli.main(["ask", "-"]) == 2
    assert "the question is not UTF-8" in capsys.readouterr().err


def test_mistakes_are_found_before_the_model_is_loaded(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("lavis_chatbridge.chat.session.load_model", lambda *a: pytest.fail("the model is loaded"))
    for words, message in (
        ([], "either a question"),
        ([" "], "the question is missing"),
        ([f"{files}/c.wav"], "c.wav is a file, and the question is missing"),
        (["what?", "."], "cannot read .: it is a folder"),
        (["what?", "nope.png"], "cannot read nope.png: there is no such file"),
        (["what?", "--image", f"{files}/c.wav"], "modality audio, but was given as image"),
        (["hi", "--jsonl", "in", "out"], "in the lines of the file"),
        (
            ["hi", "--top-p", "2", "--max-new-tokens", "0"],
            "error: --max-new-tokens is 0, expected more than 0; --top-p",
        ),
    ):
        assert cli.main(["ask", *words]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["chat", "nope.png"]) == 2
    assert "cannot read nope.png: there is no such file" in capsys.readouterr().err


def test_models_that_cannot_be_loaded(capsys: pytest.CaptureFixture[str]):
    for option, value, message in (
        ("--model", "absent.yaml", "no configuration file at absent.yaml"),
        ("--options", "run.seed=1", "expected model.KEY=VALUE"),
        ("--device", "abacus", "abacus"),
        ("--engine", "http://127.0.0.1:9/v1", "no engine answers at http://127.0.0.1:9/v1"),
    ):
        assert cli.main(["ask", "hi", option, value]) == 2
        assert message in capsys.readouterr().err


def test_a_runs_folder_is_a_model_with_its_own_weights(tmp_path: Path):
    trained, _ = load_model("tiny", device="cpu")
    with torch.no_grad():
        trained.llama_proj.bias += 1.0
    state_dicts.save(tmp_path / "model.safetensors", trained.trainable_state_dict())
    (tmp_path / "config.yaml").write_text("model: {model_type: tiny}\nrun: {seed: 1}\n")
    found, _ = load_model(tmp_path, device="cpu")
    assert torch.equal(found.llama_proj.bias, trained.llama_proj.bias)


GOOD = {
    "p": '{"id": "p", "text": "what is it?", "images": ["a b.png"]}',
    "2": '{"text": "what is\u2028heard?", "audios": ["c.wav"]}',
    "o": '{"id": "o", "messages": [{"role": "user", "content": ["what is it?", {"image_url": "file:a%20b.png"}]}]}',
}
FAULTY = {
    "4": ("{", "not JSON"),
    "5": ("[" * 9000, "not JSON"),
    "6": ("[]", "expected a mapping"),
    "7": ('{"text": "caf\udce9"}', "UTF-8"),
    "8": ('{"text": "a", "image": []}', "image, did you mean 'images'"),
    "i": ('{"id": "i", "images": []}', "line 9: needs either 'text'"),
    "10": ('{"text": "a", "images": "a.png"}', "images: expected a list"),
    "11": ('{"messages": [{"role": "nobody"}]}', "messages[0].role is 'nobody'"),
    "12": ('{"text": "and this?", "images": ["absent.png"]}', "absent.png"),
}


def batch(folder: Path, *lines: str) -> tuple[int, dict[str, dict[str, Any]]]:
    (folder / "in.jsonl").write_text("\n".join(lines) + "\n\n", errors="surrogateescape")
    status = run(folder, "--jsonl", f"{folder}/in.jsonl", f"{folder}/out.jsonl", "--batch-size", "2")
    found = [json.loads(line) for line in (folder / "out.jsonl").read_text().split("\n")[:-1]]
    return status, {record["id"]: record for record in found}


def test_a_faulty_line_of_a_batch_gets_an_error_and_the_others_are_answered(files: Path, loaded: Session, capsys: Any):
    status, found = batch(files, *GOOD.values(), *(line for line, _ in FAULTY.values()))
    assert (status, list(found)) == (1, [*GOOD, *FAULTY])
    assert "in.jsonl: 8 of 12 lines are not questions; line 4: not JSON" in capsys.readouterr().err
    for name, (_, message) in FAULTY.items():
        assert message in found[name]["error"]
    talk = Session(loaded.model, engine=loaded.engine)
    assert found["p"]["answer"] == talk.ask("what is it?", files / "a b.png", max_new_tokens=6).text
    assert found["o"]["answer"] == found["p"]["answer"]


def test_a_batch_that_cannot_be_written_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("lavis_chatbridge.chat.session.load_model", lambda *a: pytest.fail("the model is loaded"))
    (tmp_path / "q").write_text(f"{GOOD['2']}\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "faulty").write_text("{\n[]\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.chdir(tmp_path)
    for source, target, message in (
        ("q", "q", "q has the questions"),
        ("q", ".", "is a folder"),
        ("q", "empty/new/x", "empty is not a folder"),
        ("empty", "x", "empty has no question"),
        ("faulty", "x", "faulty: 2 of 2 lines are not questions; line 1: not JSON"),
    ):
        assert run(tmp_path, "--jsonl", source, target) == 2
        assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    with locked(tmp_path / "x"):
        assert run(tmp_path, "--jsonl", f"{tmp_path}/q", f"{tmp_path}/x") == 2
    assert "another process uses" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.part"))


def test_an_interrupted_batch_resumes(files: Path, loaded: Session, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (files / "out.jsonl").unlink(missing_ok=True)
    complete = ask._answers

    def killed(*args: Any) -> Any:
        yield next(complete(*args))
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ask, "_answers", killed)
        with pytest.raises(FileNotFoundError):
            batch(files, *GOOD.values())
    (part,) = files.glob(".out.jsonl.*.part")
    with open(part, "a") as file:
        file.write('{"id": "half')
    status, found = batch(files, *GOOD.values())
    assert (status, list(found)) == (0, [*GOOD])
    assert "1 of 3 answers are there already" in capsys.readouterr().err
    assert list(files.glob(".out*.part")) == []
