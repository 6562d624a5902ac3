"""``chatbridge chat`` and ``chatbridge ask`` on a small model: attaching, editing, batches, going on, devices."""

from __future__ import annotations

import argparse
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from lavis_chatbridge import cli
from lavis_chatbridge.chat import Session, ask, terminal
from lavis_chatbridge.errors import DataError
from tests.chat import building
from tests.chat.building import picture, sound, video
from tests.test_docs import GUIDES, command_lines

SMALL: dict[str, Any] = {
    "model": {
        "arch": "chatbridge",
        "model_type": "tiny",
        "vision": {"weights": None, "image_size": 28, "width": 32, "depth": 1, "heads": 4},
        "audio": {"weights": None},
        "perceiver": {"width": 32, "layers": 2, "feed_forward": 48, "queries": 3},
        "language_model": {
            "weights": None,
            "tokenizer": str(building.TINY_TOKENIZER),
            "config": {
                "model_type": "llama",
                "vocab_size": 640,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
        },
        "checkpoint": None,
    },
    "preprocess": {
        "vis_processor": {"eval": {"image_size": 28}},
        "video_processor": {"eval": {"image_size": 28}},
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with media and the YAML of a small model."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    Image.fromarray(picture()).save(folder / "a b.png")
    (folder / "c.wav").write_bytes(sound())
    (folder / "d.mp4").write_bytes(video("nothing"))
    return folder


@pytest.fixture(scope="module")
def opened(files: Path) -> Session:
    return Session.open(files / "small.yaml", device="cpu")


def typed(opened: Session, *lines: str) -> str:
    session = Session(opened.model, reader=opened.reader)
    session.sampling = opened.sampling.__class__(max_new_tokens=8)
    out = io.StringIO()
    chat = terminal.Terminal(session, out)
    chat.talk(lines)
    return out.getvalue()


def test_a_conversation_with_files(opened: Session, files: Path):
    shown = typed(
        opened, f"/image '{files}/a b.png'", f"/audio {files}/*.wav", "/media", "what is it?", "/history", "/quit", "no"
    )
    assert shown.count(f"image {files}/a b.png") == 2
    assert "the model got: image a b.png, audio c.wav" in shown
    assert "1 you> [image a b.png] [audio c.wav] what is it?" in shown
    assert shown.count(terminal.ANSWER) == 1 + 1  # the answer and its line of the history


def test_warnings_and_mistakes_are_told_and_cost_nothing(opened: Session, files: Path):
    shown = typed(
        opened,
        f"/video {files}/d.mp4",
        "what is it?",
        "/image absent.png",
        "/image",
        "/imag 'open",
        "/fly",
        "/set temperature hot",
        "/set temperature -2",
        "/edit",
        "/edit 9",
        "/edit 7 what?",
        "/edit 0 what?",
        "/edit ² what?",
        "/save",
        "/load absent.json",
        "what is heard?",
    )
    assert "warning: d.mp4's sound track: the video has no audio track" in shown
    assert shown.count("error: ") == 12
    assert "/edit needs the new text: /edit TEXT" in shown
    assert "/edit needs the new text of question 9: /edit 9 TEXT" in shown
    assert "there is no question 7; they count from 1 to 1" in shown
    assert "there is no question 0; they count from 1 to 1" in shown
    assert shown.count(f"{terminal.ANSWER}") >= 2
    assert "there is no file absent.png" in shown
    assert "unknown command /fly" in shown


def test_retry_edit_undo_save_and_load(opened: Session, tmp_path: Path):
    file = tmp_path / "talk.json"
    shown = typed(
        opened,
        "one?",
        "two?",
        "/edit 1 uno?",
        "/retry",
        "dos?",
        "/undo",
        f"/save {file}",
        "/new",
        "/history",
        f"/load {file}",
    )
    assert "taken back: dos?" in shown
    assert shown.count("1 you> uno?") == 1  # shown by /load; /history after /new shows nothing
    assert json.loads(file.read_text())["turns"][0]["text"] == "uno?"
    assert "two?" not in file.read_text()


def test_a_question_may_become_a_number(opened: Session):
    shown = typed(opened, "one?", "/edit 1 9", "/history", f"/edit {'1' * 5000}", "/history")
    assert "1 you> 9\n" in shown
    assert f"1 you> {'1' * 5000}\n" in shown


def test_settings_and_help(opened: Session):
    shown = typed(opened, "/set temperature 0.5", "/set seed 3", "/set seed none", "/set", "/help")
    assert "  temperature 0.5" in shown
    assert "  seed None" in shown
    assert "/undo" in shown


def test_what_a_terminal_would_obey_is_not_written():
    assert terminal._harmless("a\x1b[2J\x07b\n\tc\x9bd") == "a[2Jb\n\tcd"


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "found.png").touch()
    monkeypatch.chdir(tmp_path)
    assert terminal.complete("/im", ["image", "video"]) == ["/image "]
    assert terminal.complete("/image fo", ["image"]) == ["folder/", "found.png"]
    assert terminal.complete("/image found.png x", ["image"]) == []


@pytest.mark.parametrize(
    ("line", "begins", "found"),
    [
        ("/ima", 0, ["/image "]),
        ("/image a", 7, ["a\\ b\\'s.png", "ab/"]),
        ("/image a\\ b", 10, ["b\\'s.png"]),
        ("/image x.png ab", 13, ["ab/"]),
        ("/image none", 7, []),
    ],
)
def test_the_tab_key_completes_what_can_be_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, begins: int, found: list[str]
):
    readline = pytest.importorskip("readline", reason="the system has no readline")
    (tmp_path / "ab").mkdir()
    (tmp_path / "a b's.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(readline, "get_line_buffer", lambda: line)
    monkeypatch.setattr(readline, "get_begidx", lambda: begins)
    monkeypatch.setattr(readline, "get_endidx", lambda: len(line))
    before = readline.get_completer()
    try:
        terminal._set_up_editing()
        completer = readline.get_completer()
        assert [completer(line[begins:], state) for state in range(len(found) + 1)] == [*found, None]
        whole = line[:begins] + found[0] if begins and found else ""
        assert all(Path(word).exists() for word in shlex.split(whole)[-1:])
    finally:
        readline.set_completer(before)


def test_the_terminal_reads_a_pipe(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\n"))
    command = ["chat", "--model", f"{files}/small.yaml", "--image", f"{files}/a b.png", "--max-new-tokens", "4"]
    assert cli.main(command) == 0
    assert "the model got: image a b.png" in capsys.readouterr().out


def test_files_that_there_are_not_are_refused_before_the_model_is_loaded(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Session, "open", lambda *a, **k: pytest.fail("the model is loaded"))
    assert cli.main(["chat", "--image", f"{files}/a b.png", f"{files}/nope.png"]) == 2
    assert f"--image: there is no file {files}/nope.png" in capsys.readouterr().err
    assert cli.main(["ask", " "]) == 2
    assert "the question is empty" in capsys.readouterr().err


def parsed(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("ask")
    ask.add_arguments(parser)
    return ask.sorted_words(parser.parse_args(words))


def test_the_guides_commands_ask_what_stands_there():
    """As they stand there, and with the question behind the options, as users of other programs write it."""
    asked = 0
    for guide in GUIDES:
        for words, _ in command_lines(guide.read_text(encoding="utf-8")):
            if words[:2] != ["chatbridge", "ask"] or "--jsonl" in words:
                continue
            question, *options = words[2:]
            assert " " in question
            for line in ([question, *options], [*options, question], [*options[:2], question, *options[2:]]):
                args = parsed(line)
                assert args.text == question, line
                assert [*args.image, *args.video, *args.audio] == options[1::2], line
                asked += 1
    assert asked >= 9


@pytest.mark.parametrize(
    "line",
    [
        "what? --image {0} {1} --audio c.wav --options model.a=1 preprocess.b=2",
        "--image {0} {1} what? --audio c.wav --options model.a=1 preprocess.b=2",
        "--image {0} --image {1} --audio c.wav what? --options model.a=1 --options preprocess.b=2",
        "--options model.a=1 preprocess.b=2 what? --image {0} {1} --audio c.wav",
        "--options model.a=1 --options preprocess.b=2 --image {0} {1} --audio c.wav --stop ### --json what?",
        "--image {0} {1} --audio c.wav --options model.a=1 preprocess.b=2 --stop ### what?",
    ],
)
def test_a_question_may_stand_anywhere(files: Path, line: str):
    args = parsed([part.format(files / "a b.png", "x.png") for part in line.split()])
    assert args.text == "what?"
    assert (args.image, args.audio, args.video) == ([f"{files}/a b.png", "x.png"], ["c.wav"], [])
    assert args.options == ["model.a=1", "preprocess.b=2"]


def test_ask_prints_the_answer(files: Path, capsys: pytest.CaptureFixture[str]):
    model = ["--model", f"{files}/small.yaml", "--max-new-tokens", "6", "--device", "cpu"]
    media = ["--image", f"{files}/a b.png", "--audio", f"{files}/c.wav", "--video", f"{files}/d.mp4"]
    assert cli.main(["ask", "what is it?", *model, *media, "--json", "--options", "model.max_text_length=99"]) == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out)
    assert [note["kind"] for note in record["media"]] == ["image", "video", "audio", "audio"]
    assert record["tokens"] == 6
    assert "warning: d.mp4's sound track" in printed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "either a question or --jsonl"),
        (["--image", "what is it?"], "either a question or --jsonl"),
        (["--image", "a.png", "nope.png"], "either a question or --jsonl"),
        (["--image", "a.png", "b?", "--audio", "c.wav", "d?"], "which of 'b?', 'd?' is the question"),
        (["hi", "--devices", "cpu"], "--devices is for --jsonl"),
        (["hi", "--jsonl", "in", "out"], "either a question or --jsonl"),
        (["hi", "--model", "absent.yaml"], "no configuration file at absent.yaml"),
        (["hi", "--model", "huge"], "no model_type 'huge'"),
        (["hi", "--options", "run.seed=1"], "expected model.KEY=VALUE"),
        (["hi", "--device", "abacus"], "abacus"),
        (["hi", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_mistakes_of_the_command_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ask", *words]) == 2
    assert message in capsys.readouterr().err


LINES = [
    {"id": "p", "text": "what is it?", "images": ["a b.png"]},
    {"text": "what is heard?", "audios": ["c.wav"]},
    {"id": 3, "text": "and this?", "images": ["absent.png"]},
    {
        "id": "talk",
        "media": [{"type": "image", "path": "a b.png"}, {"type": "audio", "path": "c.wav"}],
        "turns": [
            {"role": "user", "text": "what is seen?", "media": [0]},
            {"role": "assistant", "text": "a star"},
            {"role": "user", "text": "what is heard?", "media": [1]},
            {"role": "assistant", "text": "what the data say"},
        ],
    },
    {"id": "last", "text": "hello there, what do you know about it?"},
]


def answers(folder: Path, *more: str) -> tuple[int, list[dict[str, Any]]]:
    command = ["ask", "--jsonl", f"{folder}/in.jsonl", f"{folder}/out.jsonl", "--model", f"{folder}/small.yaml"]
    status = cli.main([*command, "--max-new-tokens", "6", "--batch-size", "2", *more])
    return status, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_a_batch(files: Path, opened: Session, monkeypatch: pytest.MonkeyPatch):
    (files / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    monkeypatch.setattr("lavis_chatbridge.chat.loading.load_model", lambda *a: (opened.model, opened.reader.processors))
    status, found = answers(files)
    assert status == 1
    assert [record["id"] for record in found] == ["p", "2", 3, "talk", "last"]
    assert "absent.png" in found[2]["error"]
    assert [m["type"] for m in found[3]["media"]] == ["image", "audio"]
    settings = {"max_new_tokens": 6}
    one = Session(opened.model, reader=opened.reader).ask("what is it?", images=[files / "a b.png"], **settings)
    assert found[0]["answer"] == one.text
    assert found[4]["answer"] == Session(opened.model, reader=opened.reader).ask(LINES[4]["text"], **settings).text


def test_an_interrupted_batch_goes_on(files: Path, opened: Session, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (files / "in.jsonl").write_text("\n".join(map(json.dumps, [LINES[4], LINES[0], LINES[1]])))
    monkeypatch.setattr("lavis_chatbridge.chat.loading.load_model", lambda *a: (opened.model, opened.reader.processors))
    (files / "out.jsonl").unlink(missing_ok=True)
    complete = ask.answer_lines

    def killed(*args: Any) -> Any:
        for number, record in complete(*args):
            yield number, record
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ask, "answer_lines", killed)
        assert cli.main(["ask", "--jsonl", f"{files}/in.jsonl", f"{files}/out.jsonl", "--batch-size", "1"]) == 130
    (part,) = files.glob(".out.jsonl.*.part")
    with open(part, "a") as file:
        file.write('{"id": "half')
    assert not (files / "out.jsonl").exists()
    assert cli.main(["ask", "--jsonl", f"{files}/in.jsonl", f"{files}/out.jsonl", "--batch-size", "1"]) == 0
    assert "1 of 3 answers are there already" in capsys.readouterr().err
    assert [json.loads(line)["id"] for line in (files / "out.jsonl").read_text().splitlines()] == ["last", "p", "3"]
    assert list(files.glob(".out*")) == []


def test_two_devices_answer_what_one_does(files: Path):
    """Two processes on the CPU stand for two GPUs; random weights differ between them, so only counts are compared."""
    (files / "in.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    status, found = answers(files, "--devices", "cpu", "cpu")
    assert status == 1
    assert [record["id"] for record in found] == ["p", "2", 3, "talk", "last"]
    assert sum("answer" in record for record in found) == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object"),
        ('{"text": "a", "pictures": []}', "unknown key 'pictures'"),
        ('{"images": []}', "either 'text'"),
        ('{"text": "a", "images": "a.png"}', "'images' is to be a list"),
        ('{"text": 3}', "'text' is to be a string"),
        ('{"turns": [{"role": "assistant", "text": "x"}]}', "user"),
    ],
)
def test_lines_that_are_no_questions(tmp_path: Path, line: str, message: str):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=message) as raised:
        ask.read_questions(tmp_path / "in.jsonl")
    assert "in.jsonl:2" in str(raised.value)


def test_all_devices_need_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in.jsonl").write_text('{"text": "fine"}\n')
    assert cli.main(["ask", "--jsonl", f"{tmp_path}/in.jsonl", f"{tmp_path}/out.jsonl", "--devices", "all"]) == 2
    assert "finds no CUDA device" in capsys.readouterr().err
