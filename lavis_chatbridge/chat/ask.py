"""``chatbridge ask``: one question from a script, or a file of them. It knows conversations and engines, no models."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from lavis_chatbridge.chat import loading
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.files import append_lines, hash_of, hash_of_file, read_objects

if TYPE_CHECKING:
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.engine import Engine, Reply
    from lavis_chatbridge.models.sampling import Sampling

Question: TypeAlias = "tuple[Any, Conversation]"
"""The id of a line, and what it asks."""
_KEYS = ("id", "text", "images", "videos", "audios", "media", "turns", "messages")
_IGNORED = ("source", "task", "style", "answers", "facts", "held_out", "meta", "captions")


def command(
    words: Annotated[list[str], typer.Argument(metavar="QUESTION [FILE]...", help="'-': from standard input.")] = [],  # noqa: B006
    image: Annotated[list[str], typer.Option(help="An image; repeatable.")] = [],  # noqa: B006
    video: Annotated[list[str], typer.Option(help="A video; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], typer.Option(help="A sound; repeatable.")] = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer and its details as JSON.")] = False,
    jsonl: Annotated[tuple[Path, Path] | None, typer.Option(metavar="IN OUT", help="Answer each line of IN.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --jsonl: answers at once on a device.")] = 8,
    devices: Annotated[list[str], typer.Option(help="With --jsonl: cuda:0 ..., or 'all'; repeatable.")] = [],  # noqa: B006
    model: loading.Model = "tiny",
    options: loading.Options = [],  # noqa: B006
    device: loading.Device = "auto",
    template: loading.TemplateName = None,
    engine: loading.EngineUrl = "",
    system: loading.System = "",
    no_video_sound: loading.NoVideoSound = False,
    max_context: loading.MaxContext = None,
    max_new_tokens: loading.MaxNewTokens = 256,
    temperature: loading.Temperature = 0.0,
    top_p: loading.TopP = 0.9,
    num_beams: loading.NumBeams = 1,
    seed: loading.Seed = None,
    stop: loading.Stop = [],  # noqa: B006
) -> int:
    """Answer; the exit status is 1 if some lines of a file have no answer."""
    sampling = loading.sampling_of(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams, seed=seed, stop=stop
    )
    if (not words and not (image or video or audio)) == (jsonl is None):
        raise ConfigError('ask needs either a question, ask "what is it?" a.png, or --jsonl IN OUT')
    given = [(name, file) for name, listed in (("image", image), ("video", video), ("audio", audio)) for file in listed]
    hear_videos = not no_video_sound

    def opened(place: str) -> Engine:
        return loading.open_engine(model, options, place, template, engine, max_context=max_context, keep=0)

    if jsonl is not None:
        if words or given:
            raise ConfigError("with --jsonl, questions and media are in the lines of the file")
        places = _devices(devices, device)
        settings = [model, options, template, max_context, sampling.model_dump(), system, hear_videos]
        questions = list(read_questions(jsonl[0], system, hear_videos))
        return _answer_file(
            *jsonl,
            questions,
            settings,
            lambda rest: _answers(rest, [opened(place) for place in places], batch_size, sampling),
        )
    if devices:
        raise ConfigError("--devices is for --jsonl: one question is answered on one --device")
    text, media = _question(words, given)
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.media import media_of

    asked = Conversation(system=system).asking(text, media_of(media=media, hear_videos=hear_videos))
    reply = opened(device).reply(asked, sampling)
    for piece in reply:
        if not as_json:
            print(piece, end="", flush=True)
    for warning in reply.answer.warnings:
        print(f"{'' if as_json else chr(10)}warning: {warning}", file=sys.stderr)
    print(json.dumps(reply.answer.to_record(), ensure_ascii=False) if as_json else "")
    return 0


def _question(words: Sequence[str], given: Sequence[tuple[str, str]]) -> tuple[str, list[tuple[Any, Any]]]:
    """The question, and its media as pairs of modality and source; "-" is read from standard input.

    Raises:
        ConfigError: If there is no question, or a file does not exist.
    """
    from lavis_chatbridge.chat.sources import check_modality, modality_of

    text, *files = words or [""]
    if text == "-":
        text = sys.stdin.read()
    elif "-" in files or any(file == "-" for _, file in given):
        piped = sys.stdin.buffer.read()
    missing = [file for file in (*files, *(file for _, file in given)) if file != "-" and not os.path.isfile(file)]
    if missing:
        raise ConfigError(f"there is no file {missing[0]}")
    for modality, file in given:
        if file != "-":
            check_modality(modality, file)  # type: ignore[arg-type]
    media: list[tuple[Any, Any]] = [(modality, piped if file == "-" else file) for modality, file in given]
    sources = [piped if file == "-" else file for file in files]
    media += [(modality_of(source), source) for source in sources]
    if not text.strip() and not media:
        raise ConfigError("the question is empty, and there is no medium to speak about")
    return text.strip(), media


def _answer_file(
    source: Path,
    target: Path,
    questions: Sequence[Question],
    settings: Sequence[Any],
    answers: Callable[[Sequence[Question]], Iterator[dict[str, Any]]],
) -> int:
    """Write ``target``, whose complete answers an interrupted run with these ``settings`` may have left."""
    try:
        part = target.with_name(f".{target.name}.{hash_of(hash_of_file(source), *settings)[:12]}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        done = [json.loads(line) for line in _complete_lines(part)]
        if done:
            print(f"{len(done)} of {len(questions)} answers are there already", file=sys.stderr)
        faults = sum("error" in record for record in done)
        for record in answers(questions[len(done) :]):
            faults += "error" in record
            append_lines(part, [json.dumps(record, ensure_ascii=False)])
        part.touch()
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {len(questions) - faults} answers, {faults} lines without one", file=sys.stderr)
    return 1 if faults else 0


def _answers(
    questions: Sequence[Question], engines: Sequence[Engine], batch_size: int, sampling: Sampling
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions; ``batch_size`` of them are under way on each device."""
    running: deque[tuple[Any, Reply]] = deque()
    for number, (name, conversation) in enumerate(questions):
        running.append((name, engines[number % len(engines)].reply(conversation, sampling)))
        if len(running) >= batch_size * len(engines):
            yield _record(*running.popleft())
    while running:
        yield _record(*running.popleft())


def _record(name: Any, reply: Reply) -> dict[str, Any]:
    try:
        answer = reply.answer
    except ChatBridgeError as error:
        return {"id": name, "error": " ".join(str(error).split())}
    record: dict[str, Any] = {"id": name, "answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
    media = [{"type": note.modality, "name": note.name, "reached": note.reached} for note in answer.media]
    return record | ({"media": media} if media else {}) | ({"warnings": answer.warnings} if answer.warnings else {})


def read_questions(path: Path, system: str = "", hear_videos: bool = True) -> Iterator[Question]:
    """The questions of a JSONL file with their ids; docs/chat.md has the form of a line.

    Raises:
        DataError: With ``file:line`` and what is wrong.
    """
    for where, record in read_objects(path):
        line = where.rpartition(":")[2]
        yield record.get("id", line), _conversation(record, where, path.parent, system, hear_videos)


def _conversation(record: Mapping[str, Any], where: str, folder: Path, system: str, hear: bool) -> Conversation:
    from lavis_chatbridge.chat.conversation import ChatMessage, Conversation
    from lavis_chatbridge.chat.media import media_of
    from lavis_chatbridge.chat.sources import ANY_FILE, Access
    from lavis_chatbridge.schema import parse_record

    unknown = [key for key in record if key not in (*_KEYS, *_IGNORED)]
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
    if sum(key in record for key in ("text", "turns", "messages")) != 1:
        raise DataError(f"{where}: expected one of 'text' (a question), 'turns' or 'messages' (a conversation)")
    root = Path(os.path.abspath(folder))
    if "messages" in record:
        access = Access(folders=ANY_FILE)
        try:
            return Conversation.from_openai(record["messages"], access=access, folder=root, hear_videos=hear)
        except (DataError, TypeError) as error:
            raise DataError(f"{where}: {error}") from error
    if "text" in record:
        if not isinstance(record["text"], str):
            raise DataError(f"{where}: 'text' is no text")
        listed: dict[str, Any] = {}
        for key in ("images", "videos", "audios"):
            paths = record.get(key, [])
            if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
                raise DataError(f"{where}: {key!r} is not a list of paths")
            listed[key] = [root / path for path in paths]
        return Conversation(system=system).asking(record["text"], media_of(**listed, hear_videos=hear))
    sample = parse_record({"id": where, **record}, where, str(root), allow_outside=True)
    files = iter(sample.media)
    result = Conversation(system=system)
    for turn in sample.turns:
        pairs: list[Any] = [(medium.modality, medium.path) for medium in (next(files) for _ in turn.media)]
        result.messages.append(ChatMessage(turn.role, turn.text, tuple(media_of(media=pairs, hear_videos=hear))))
    if result.messages and result.messages[-1].role == "assistant":
        result.messages.pop()  # data sets have the expected answer here
    if not result.messages:
        raise DataError(f"{where}: 'turns' holds no question")
    return result


def _devices(given: Sequence[str], device: str) -> list[str]:
    if list(given) != ["all"]:
        return list(given) or [device]
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("--devices all: torch finds no CUDA device here")
    return [f"cuda:{i}" for i in range(count)]


def _complete_lines(path: Path) -> list[str]:
    """The complete lines of an unfinished file, whose half line at the end is cut off."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    return whole.decode("utf-8").split("\n")[:-1]
