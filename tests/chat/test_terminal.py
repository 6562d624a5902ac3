"""``chatbridge chat`` on a small model: attaching, editing, Ctrl-C, pasting, pipes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from lavis_chatbridge import cli
from lavis_chatbridge.chat import Session, terminal
from lavis_chatbridge.chat.sources import modality_of


def chat(opened: Session, tokens: int = 8) -> tuple[terminal.Terminal, io.StringIO]:
    out = io.StringIO()
    session = Session(
        opened.model, engine=opened.engine, sampling=opened.sampling.model_copy(update={"max_new_tokens": tokens})
    )
    return terminal.Terminal(session, Console(file=out, width=200)), out


def typed(opened: Session, *lines: str) -> str:
    talk, out = chat(opened)
    talk.talk(lines)
    return out.getvalue()


def test_a_conversation_with_files(opened: Session, files: Path):
    shown = typed(
        opened, f"/image '{files}/a b.png'", f"/audio {files}/*.wav", "/media", "what is it?", "/history", "/quit", "no"
    )
    assert shown.count(f"image {files}/a b.png") == 2
    assert "the model got: image a b.png, audio c.wav" in shown
    assert "1 you> [image a b.png] [audio c.wav] what is it?" in shown
    assert "no" not in shown.splitlines()


@pytest.mark.parametrize("form", ["'{}'", '"{}"', "escaped", "file://{}"], ids=["quotes", "double", "backslash", "url"])
def test_paths_in_a_question_are_attached(opened: Session, files: Path, form: str):
    path = str(files / "a b.png")
    escaped = path.replace(" ", "%20" if "file" in form else "\\ ")
    word = escaped if form == "escaped" else form.format(escaped if "file" in form else path)
    shown = typed(opened, f"what is in {word} please?", "/history")
    assert "the model got: image a b.png" in shown
    assert "1 you> [image a b.png] what is in please?" in shown
    alone = typed(opened, word, "what is it?", "/history")  # dropped on its own: it waits for the question
    assert "1 you> [image a b.png] what is it?" in alone


def test_warnings_and_mistakes_cost_nothing(opened: Session, files: Path):
    mistakes = {
        "/image absent.png": "there is no file absent.png",
        f"/image {files}/c.wav": "modality audio, but was given as image",
        "/image": "/image needs a file",
        "/imag 'open": "No closing quotation",
        "/fly": "unknown command /fly",
        "/set temperature hot": "temperature",
        "/set temperature -2": "temperature is -2",
        "/set colour red": "there is no setting 'colour'",
        "/edit": "/edit needs the new text",
        "/edit 7 what?": "there is no question 7; there are 1",
        "/edit 0 what?": "there is no question 0",
        "/save": "/save needs a file",
        "/load absent.json": "absent.json: cannot be read",
    }
    shown = typed(opened, f"/video {files}/d.mp4", "what is it?", *mistakes, "what is heard?", "/history")
    assert "warning: d.mp4's sound track: the video has no audio track" in shown
    assert shown.count("error: ") == len(mistakes)
    for message in mistakes.values():
        assert message in shown
    assert "2 you> what is heard?" in shown


def test_retry_edit_undo_save_and_load(opened: Session, files: Path, tmp_path: Path):
    file = tmp_path / "talk.json"
    shown = typed(
        opened, "one?", "two?", "/edit 1 uno?", "/retry", f"dos {files}/c.wav ?", "/undo", "/media", f"/save {file}",
        "/new", "/history", f"/load {file}",
    )  # fmt: skip
    assert "taken back: dos ? (1 media are attached again)" in shown
    assert f"audio {files}/c.wav" in shown.partition("taken back")[2]
    assert shown.count("1 you> uno?") == 1  # shown by /load; /history after /new shows nothing
    assert json.loads(file.read_text())["messages"][0]["content"] == "uno?"


def test_settings_and_help(opened: Session):
    shown = typed(
        opened, "/set temperature 0.5", "/set seed 3", "/set seed none", "/set", "/help", "/unknown/path is it?"
    )
    assert "  temperature 0.5" in shown
    assert "  seed None" in shown
    assert "/undo" in shown
    assert "error" not in shown


def interrupted(opened: Session, monkeypatch: pytest.MonkeyPatch, place: str) -> tuple[terminal.Terminal, str]:
    """Ctrl-C while the media are read, or in the middle of an answer."""
    talk, out = chat(opened, tokens=200)
    ask = talk.session.stream

    def asked(*args: Any, **settings: Any) -> Any:
        if place == "media":
            raise KeyboardInterrupt
        stream = ask(*args, **settings)
        first = iter([next(stream)])

        class Pressed:
            answer = property(lambda self: stream.answer)
            cancel = stream.cancel

            def __iter__(self) -> Any:
                return self

            def __next__(self) -> str:
                for text in first:
                    return text
                raise KeyboardInterrupt

        return Pressed()

    monkeypatch.setattr(talk.session, "stream", asked)
    talk.talk(["tell me everything", "/history"])
    return talk, out.getvalue()


def test_ctrl_c_keeps_what_came(opened: Session, monkeypatch: pytest.MonkeyPatch):
    talk, shown = interrupted(opened, monkeypatch, "answer")
    assert "(stopped)" in shown
    assert "1 you> tell me everything" in shown
    assert talk.session.messages[1].text != ""


def test_ctrl_c_while_media_are_read_ends_nothing(opened: Session, files: Path, monkeypatch: pytest.MonkeyPatch):
    talk, shown = interrupted(opened, monkeypatch, "media")
    assert "stopped before the answer began" in shown
    assert talk.session.messages == ()
    monkeypatch.undo()
    talk.attach(f"{files}/c.wav")
    talk.talk(["and now?"])
    assert len(talk.session.messages) == 2


def test_what_a_terminal_would_obey_is_not_written():
    assert terminal._harmless("a\x1b[2J\x07b\n\tc\x9bd") == "a[2Jb\n\tcd"


def test_a_pasted_text_of_several_lines_is_one_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "found.png").touch()
    monkeypatch.chdir(tmp_path)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        editor = terminal.editor()
        keys.send_text("\x1b[200~one\ntwo\nthree\x1b[201~\r")
        assert editor.prompt(terminal.PROMPT) == "one\ntwo\nthree"
        keys.send_text("/image ./found.png\r")
        assert editor.prompt(terminal.PROMPT) == "/image ./found.png"
        for line, expected in (("/im", ["/image"]), ("/image ./fou", ["nd.png"]), ("look at ./fou", ["nd.png"])):
            assert [found.text for found in editor.completer.get_completions(Document(line), None)] == expected
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("\x1b[A\r")  # arrow up: the history of the session before
        assert terminal.editor().prompt(terminal.PROMPT) == "/image ./found.png"


def test_the_terminal_reads_a_pipe(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    command = ["chat", "--model", f"{files}/small.yaml", "--image", f"{files}/a b.png", "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    assert "the model got: image a b.png" in capsys.readouterr().out


def test_missing_files_are_refused_before_the_model_is_loaded(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("lavis_chatbridge.chat.loading.load_model", lambda *a: pytest.fail("the model is loaded"))
    assert cli.main(["chat", f"{files}/nope.png"]) == 2
    assert f"there is no file {files}/nope.png" in capsys.readouterr().err
    assert modality_of(files / "a b.png") == "image"
