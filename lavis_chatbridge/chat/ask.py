"""``chatbridge ask``: one question from a script, or a file of them. It uses an `Engine`, never a model."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from lavis_chatbridge.chat.options import ModelOptions, TalkOptions, with_options
from lavis_chatbridge.config import Settings, parse
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.files import hash_of, hash_of_file, locked, read_lines
from lavis_chatbridge.models.sampling import Sampling

if TYPE_CHECKING:
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply
    from lavis_chatbridge.prompting.conversation import Modality

Question: TypeAlias = "tuple[Any, Conversation | ChatBridgeError]"
"""The id of a line, and its conversation, or what is wrong with the line."""
_USAGE = 'ask "what is it?" a.png'


@with_options
def command(
    model: ModelOptions,
    talk: TalkOptions,
    sampling: Sampling,
    words: Annotated[list[str], typer.Argument(metavar="QUESTION [FILE]...", help="'-': from standard input.")] = [],  # noqa: B006
    image: Annotated[list[str], typer.Option(help="An image; repeatable.")] = [],  # noqa: B006
    video: Annotated[list[str], typer.Option(help="A video; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], typer.Option(help="A sound; repeatable.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its details as JSON.")] = False,
    jsonl: Annotated[tuple[Path, Path] | None, typer.Option(metavar="IN OUT", help="Answer each line of IN.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --jsonl: answers at once.")] = 8,
) -> int:
    """Answer; the exit status is 1 if some lines of a file have no answer."""
    named: dict[Modality, list[str]] = {"image": image, "video": video, "audio": audio}
    given: list[tuple[Modality | None, str]] = [(modality, file) for modality in named for file in named[modality]]
    if jsonl is not None:
        if words or given:
            raise ConfigError("with --jsonl, questions and media are in the lines of the file")
        return _answer_file(*jsonl, model, batch_size, talk, sampling)
    if not words and not given:
        raise ConfigError(f"ask needs either a question, {_USAGE}, or --jsonl IN OUT")
    text, *files = words or [""]
    asked = _question(text, [*given, *((None, file) for file in files)], talk)
    reply = model.open(keep=0).reply(asked, sampling)
    begun = next(reply, "")
    for warning in reply.prompt.warnings if reply.prompt else ():
        print(f"warning: {warning}", file=sys.stderr)
    if as_json:
        print(json.dumps(_record(reply.answer), ensure_ascii=False))
        return 0
    for piece in chain([begun], reply):
        print(piece, end="", flush=True)
    print()
    return 0


def _question(text: str, given: Sequence[tuple[Modality | None, str]], talk: TalkOptions) -> Conversation:
    """The question with its media; "-" is read from standard input."""
    from lavis_chatbridge.chat.attachments import check_file, media_of, modality_of
    from lavis_chatbridge.chat.conversation import Conversation

    if os.path.isfile(text):
        raise ConfigError(f'{text} is a file, and the question is missing: ask "what is it?" {text}')
    try:
        text = sys.stdin.read() if text == "-" else text
        text.encode()  # in some locales Python keeps bytes that are not UTF-8 as surrogates
    except UnicodeError as error:
        raise ConfigError("the question is not UTF-8 text") from error
    if not text.strip():
        raise ConfigError(f"the question is missing: {_USAGE}")
    for modality, file in given:
        if file != "-":
            check_file(file, modality)
    piped = sys.stdin.buffer.read() if any(file == "-" for _, file in given) else b""
    opened = [(modality, piped if file == "-" else file) for modality, file in given]
    media = media_of(media=[(m or modality_of(file), file) for m, file in opened], hear_videos=talk.video_sound)
    return Conversation(system=talk.system).asking(text.strip(), media)


def _answer_file(
    source: Path, target: Path, model: ModelOptions, batch_size: int, talk: TalkOptions, sampling: Sampling
) -> int:
    """Answer every line of a file; an interrupted run leaves its answers in a file beside ``target``, and resumes."""
    questions = list(read_questions(source, talk))
    if faulty := [str(asked) for _, asked in questions if isinstance(asked, ChatBridgeError)]:
        print(f"{source}: {len(faulty)} of {len(questions)} lines are not questions; {faulty[0]}", file=sys.stderr)
    if len(faulty) == len(questions):
        raise DataError(f"{source} has no question")
    settings = [part.model_dump(exclude={"device"}) for part in (model, talk, sampling)]
    try:
        _check_target(source, target)
        part = target.with_name(f".{target.name}.{hash_of(hash_of_file(source), *settings)[:12]}.part")
        with locked(target.absolute(), wait_seconds=0):
            with open(part, "a+b") as file:
                file.seek(0)
                done = [line for line in file if line.endswith(b"\n")]
                file.truncate(sum(map(len, done)))  # without a line that an interruption cut off
                if done:
                    print(f"{len(done)} of {len(questions)} answers are there already", file=sys.stderr)
                faults = sum("error" in json.loads(line) for line in done)
                engine = model.open(batch=batch_size, keep=0)
                for record in _answers(questions[len(done) :], engine, batch_size, sampling):
                    faults += "error" in record
                    file.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
                    file.flush()
            os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {len(questions) - faults} answers, {faults} lines without one", file=sys.stderr)
    return 1 if faults else 0


def _check_target(source: Path, target: Path) -> None:
    """Raise, before the model is loaded, if ``target`` cannot be the file of the answers to ``source``."""
    if target.is_dir():
        raise DataError(f"{target} is a folder: give the name of a file")
    if target.exists() and target.samefile(source):
        raise DataError(f"{target} has the questions: give the answers a file of their own")
    for folder in target.parents:
        if folder.exists() and not folder.is_dir():
            raise DataError(f"{target}: {folder} is not a folder")


def _answers(
    questions: Sequence[Question], engine: Engine, batch_size: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions; ``batch_size`` of them are generated at once."""
    running: deque[tuple[Any, Reply | ChatBridgeError]] = deque()
    for name, asked in questions:
        running.append((name, asked if isinstance(asked, ChatBridgeError) else engine.reply(asked, sampling)))
        if len(running) >= batch_size:
            yield _line(*running.popleft())
    while running:
        yield _line(*running.popleft())


def _line(name: Any, reply: Reply | ChatBridgeError) -> dict[str, Any]:
    try:
        if isinstance(reply, ChatBridgeError):
            raise reply
        return {"id": name, **_record(reply.answer)}
    except ChatBridgeError as error:
        return {"id": name, "error": " ".join(str(error).split())}


def _record(answer: Answer) -> dict[str, Any]:
    """An answer as JSON."""
    media = [{"type": n.modality, "name": n.name, "reached": n.reached, "tokens": n.tokens} for n in answer.media]
    numbers = {"tokens": answer.tokens, "prompt_tokens": answer.prompt_tokens}
    return {"answer": answer.text, "finish": answer.finish, **numbers, "media": media, "warnings": answer.warnings}


class _Question(Settings):
    """A line of a file of questions: a text with media, or a conversation in OpenAI's messages."""

    id: Any = None
    text: str | None = None
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    audios: tuple[str, ...] = ()
    messages: tuple[Any, ...] | None = None


def read_questions(path: Path, talk: TalkOptions) -> Iterator[Question]:
    """The lines of a JSONL file, each with its id or number; docs/chat.md has the form of a line."""
    for number, text in read_lines(path, "surrogateescape"):
        if not text.strip():
            continue
        name: Any = str(number)
        asked: Conversation | ChatBridgeError
        try:
            record = json.loads(text.encode())
            if isinstance(record, dict) and record.get("id") is not None:
                name = record["id"]
            asked = _conversation(parse(_Question, record, "question"), path.parent.absolute(), talk)
        except ChatBridgeError as error:
            asked = DataError(f"line {number}: {error}")
        except (ValueError, RecursionError) as error:
            asked = DataError(f"line {number}: not JSON in UTF-8: {error}")
        yield name, asked


def _conversation(line: _Question, folder: Path, talk: TalkOptions) -> Conversation:
    from lavis_chatbridge.chat.attachments import media_of
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.messages import Access, read_messages

    if (line.text is None) == (line.messages is None):
        raise DataError("needs either 'text' (a question) or 'messages' (a conversation)")
    if line.messages is not None:
        return read_messages(line.messages, Access(own_folder=folder), talk.video_sound)
    listed = {key: [folder / file for file in getattr(line, key)] for key in ("images", "videos", "audios")}
    media = media_of(**listed, hear_videos=talk.video_sound)  # type: ignore[arg-type]
    return Conversation(system=talk.system).asking(line.text or "", media)
