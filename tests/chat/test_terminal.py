"""``chatbridge chat`` on a small model: attaching, editing, Ctrl-C, pasting, pipes."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
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
from tests.chat.building import asked, image_part


def typed(opened: Session, *lines: str) -> str:
    out = io.StringIO()
    sampling = opened.sampling.model_copy(update={"max_new_tokens": 8})
    session = Session(opened.model, engine=opened.engine, sampling=sampling)
    terminal.Terminal(session, Console(file=out, width=200)).talk(lines)
    return out.getvalue()


def test_a_conversation_with_files(opened: Session, files: Path):
    lines = [f"/image '{files}/a b.png'", f"/audio {files}/*.wav", "/media", "what is it?", "/history", "/quit", "no"]
    shown = typed(opened, *lines)
    assert shown.count(f"image {files}/a b.png") == 2
    assert "the model got: image a b.png, audio c.wav" in shown
    assert "you> [image a b.png] [audio c.wav] what is it?" in shown
    assert "no" not in shown.splitlines()


def test_paths_in_a_question_are_attached(opened: Session, files: Path):
    path = f"{files}/a b.png"
    for word in (f"'{path}'", f'"{path}"', path.replace(" ", "\\ "), f"file://{path}".replace(" ", "%20")):
        shown = typed(opened, f"what is in {word} please?", word, "what is it?", "/history")
        assert shown.count("the model got: image a b.png") == 2
        assert "you> [image a b.png] what is in please?" in shown
        assert "you> [image a b.png] what is it?" in shown  # dropped on its own: it waits for the question


def test_warnings_and_mistakes_cost_nothing(opened: Session, files: Path):
    mistakes = {
        "/edit what?": "there is no question yet",
        "/retry": "there is no question yet",
        f"/save {files}/small.yaml": "small.yaml is not replaced",
        "/image absent.png": "cannot read absent.png: there is no such file",
        "/image /": "cannot read /: it is a folder",
        "/tmp": "cannot read /tmp: it is a folder",
        f"'{files}'": f"cannot read {files}: it is a folder",
        f"/image {files}/c.wav": "modality audio, but was given as image",
        "/image": "/image needs FILE",
        "/image 'open": "No closing quotation",
        "/fly": "unknown command /fly",
        "/set temperature hot": "temperature",
        "/set seed 9223372036854775808": "seed is 9223372036854775808, expected at most 9223372036854775807",
        "/set colour red": "there is no setting 'colour'",
        "/edit": "/edit needs TEXT",
        "/load absent.json": "absent.json: cannot be read",
    }
    shown = typed(opened, *mistakes, f"/video {files}/d.mp4", "what is it?", ".", "what is heard?", "/history")
    assert "warning: d.mp4's sound track: the video has no audio track" in shown
    assert shown.count("error: ") == len(mistakes)
    assert "tiny" in (files / "small.yaml").read_text()
    broken = typed(opened, f"/image {files}/broken.png", "what is it?", "/media none", "what is it?")
    assert broken.count("error: ") == broken.count("; '/media none' detaches") == 1
    for message in mistakes.values():
        assert message in shown
    assert "you> . " in shown.replace("\n", " ")  # the name of a folder may be a question
    assert "you> what is heard?" in shown
    assert str(files) not in shown.rpartition("you>")[2]


def test_retry_edit_undo_save_and_load(opened: Session, files: Path, tmp_path: Path):
    file = tmp_path / "talk.json"
    lines = ["one?", "two?", "/edit deux?", "/retry", f"dos {files}/c.wav ?", "/undo", "/media", *[f"/save {file}"] * 2]
    shown = typed(opened, *lines, "/new", "/history", f"/load {file}", "/unknown/path is it?")
    assert "taken back: dos ? (attached again: 1)" in shown
    assert f"audio {files}/c.wav" in shown.partition("taken back")[2]
    assert shown.count("you> deux?") == 1  # shown by /load; /history after /new shows nothing
    assert [message["content"] for message in json.loads(file.read_text())["messages"][::2]] == ["one?", "deux?"]
    assert "error" not in shown
    talk = [*asked(image_part(), "what?"), {"role": "assistant", "content": "a star"}]
    file.write_text(json.dumps({"messages": talk}))
    assert typed(opened, f"/load {file}", "/undo", "/media").endswith("  image of the saved conversation\n")


def test_settings_and_help(opened: Session):
    assert terminal._harmless("a\x1b[2J\x07b\n\tc\x9bd") == "a[2Jb\n\tcd"  # no character that a terminal obeys
    shown = typed(opened, "/set temperature 0.5", "/set seed 3", "/set seed none", "/set temperature none", "/help")
    assert "  temperature 0.5" in shown
    last = shown.rpartition("  max_new_tokens")[2]
    assert all(line in last for line in ("  seed None", "  temperature 0.0", "/undo"))


SLOW = """
import itertools, os, sys, time
from lavis_chatbridge import cli
from lavis_chatbridge.models.decoding import Decoder, Generation
Generation.end_ids = property(lambda self: frozenset(), lambda self, ids: None)  # the answer does not end by chance
step, count = Decoder.step, itertools.count()
Decoder.step = lambda self: (time.sleep(0.05), next(count) == 10 and os.write(2, b"tenth"), step(self))[-1]
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_keeps_the_text_and_the_program(files: Path, tmp_path: Path):
    """A real SIGINT in a pseudo-terminal, in the middle of an answer."""
    import pty

    master, slave = pty.openpty()
    words = ["chat", "--model", f"{files}/small.yaml", "--device", "cpu", "--max-new-tokens", "400"]
    words += ["--temperature", "5", "--top-p", "1", "--seed", "2"]
    environment = {**os.environ, "HOME": str(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    program = [sys.executable, "-c", SLOW, *words]
    with subprocess.Popen(program, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:

        def wait_for(mark: bytes) -> None:
            shown, deadline = b"", time.monotonic() + 60
            while mark not in shown:
                assert time.monotonic() < deadline, shown[-2000:]
                shown += os.read(master, 1 << 16) if select.select([master], [], [], 1)[0] else b""

        try:
            wait_for(b"you>")
            os.write(master, b"tell me everything\r")
            wait_for(b"tenth")
            process.send_signal(signal.SIGINT)
            wait_for(b"(stopped)")
            os.write(master, b"/history\r")
            wait_for(b"chatbridge> ")
            os.write(master, b"/quit\r")
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(master)
            os.close(slave)


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


def test_the_terminal_reads_a_pipe(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    command = ["chat", f"{files}/a b.png", "--model", f"{files}/small.yaml", "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    assert "the model got: image a b.png" in capsys.readouterr().out
