"""``chatbridge ask``: one question from a script, or a file of them. It knows conversations and engines, no models."""

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
from lavis_chatbridge.files import hash_of, hash_of_file, read_objects
from lavis_chatbridge.models.sampling import Sampling

if TYPE_CHECKING:
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.engine import Answer, Engine, Reply
    from lavis_chatbridge.prompting.conversation import Modality

Question: TypeAlias = "tuple[Any, Conversation]"
"""The id of a line, and its conversation."""
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
    batch_size: Annotated[int, typer.Option(min=1, help="With --jsonl: answers at once on each device.")] = 8,
    devices: Annotated[list[str], typer.Option(help="With --jsonl: several devices; repeatable.")] = [],  # noqa: B006
) -> int:
    """Answer; the exit status is 1 if some lines of a file have no answer."""
    given: list[tuple[Modality | None, str]] = [("image", file) for file in image]
    given += [("video", file) for file in video]
    given += [("audio", file) for file in audio]
    if jsonl is not None:
        if words or given:
            raise ConfigError("with --jsonl, questions and media are in the lines of the file")
        places = [model.model_copy(update={"device": device}) for device in devices] or [model]
        return _answer_file(*jsonl, places, batch_size, talk, sampling)
    if devices:
        raise ConfigError("--devices is for --jsonl; one question is answered on one --device")
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
    source: Path,
    target: Path,
    places: Sequence[ModelOptions],
    batch_size: int,
    talk: TalkOptions,
    sampling: Sampling,
) -> int:
    """Answer every line of a file; an interrupted run leaves its answers in a file beside ``target``, and resumes."""
    questions = list(read_questions(source, talk))
    key = hash_of(
        hash_of_file(source), places[0].model_dump(exclude={"device"}), talk.model_dump(), sampling.model_dump()
    )
    part = target.with_name(f".{target.name}.{key[:12]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "a+b") as file:
            file.seek(0)
            done = [line for line in file if line.endswith(b"\n")]
            file.truncate(sum(map(len, done)))  # without a line that an interruption cut off
            if done:
                print(f"{len(done)} of {len(questions)} answers are there already", file=sys.stderr)
            faults = sum("error" in json.loads(line) for line in done)
            engines = [place.open(keep=0) for place in places]
            for record in _answers(questions[len(done) :], engines, batch_size, sampling):
                faults += "error" in record
                file.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
                file.flush()
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {len(questions) - faults} answers, {faults} lines without one", file=sys.stderr)
    return 1 if faults else 0


def _answers(
    questions: Sequence[Question], engines: Sequence[Engine], batch_size: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions; each engine generates ``batch_size`` of them at once."""
    running: deque[tuple[Any, Reply]] = deque()
    for number, (name, conversation) in enumerate(questions):
        running.append((name, engines[number % len(engines)].reply(conversation, sampling)))
        if len(running) >= batch_size * len(engines):
            yield _line(*running.popleft())
    while running:
        yield _line(*running.popleft())


def _line(name: Any, reply: Reply) -> dict[str, Any]:
    try:
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

    def check(self) -> Iterator[str]:
        if (self.text is None) == (self.messages is None):
            yield "expected either 'text' (a question) or 'messages' (a conversation)"


def read_questions(path: Path, talk: TalkOptions) -> Iterator[Question]:
    """The questions of a JSONL file with their ids; docs/chat.md has the form of a line.

    Raises:
        ChatBridgeError: With ``file:line`` and what is wrong.
    """
    from lavis_chatbridge.chat.attachments import media_of
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.messages import Access, read_messages

    folder = path.parent.absolute()
    for where, record in read_objects(path):
        try:
            line = parse(_Question, record, "question")
            if line.messages is not None:
                conversation = read_messages(line.messages, Access(own_folder=folder), talk.video_sound)
            else:
                listed = {key: [folder / file for file in getattr(line, key)] for key in ("images", "videos", "audios")}
                media = media_of(**listed, hear_videos=talk.video_sound)  # type: ignore[arg-type]
                conversation = Conversation(system=talk.system).asking(line.text or "", media)
        except ChatBridgeError as error:
            raise DataError(f"{where}: {error}") from error
        yield where.rpartition(":")[2] if line.id is None else line.id, conversation
