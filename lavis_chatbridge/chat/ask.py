"""``chatbridge ask``: one question from a script, or a file of them. It knows conversations and engines, no models."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavis_chatbridge.chat import loading
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.files import append_lines, hash_of, hash_of_file, read_lines

if TYPE_CHECKING:
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.engine import Answer, Engine
    from lavis_chatbridge.models.sampling import Sampling

_KEYS = ("id", "text", "images", "videos", "audios", "media", "turns", "messages")
_IGNORED = ("source", "task", "style", "answers", "facts", "held_out", "meta", "captions")
_MEDIA = ("images", "videos", "audios")


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
    given = [("image", file) for file in image] + [("video", file) for file in video]
    given += [("audio", file) for file in audio]
    engines = _Engines(model, options, template, engine, max_context)
    if jsonl is not None:
        if words or given:
            raise ConfigError("with --jsonl, questions and media are in the lines of the file")
        return _answer_file(
            *jsonl, engines, _devices(devices, device), batch_size, sampling, system, not no_video_sound
        )
    if devices:
        raise ConfigError("--devices is for --jsonl: one question is answered on one --device")
    text, media = _question(words, given)
    _answer_one(engines, device, text, media, sampling, system, not no_video_sound, as_json)
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


class _Engines:
    """Opens engines for a command's options."""

    def __init__(
        self, model: str, options: Sequence[str], template: str | None, url: str, max_context: int | None
    ) -> None:
        self.identity = [model, list(options), template, max_context]
        self._model, self._options, self._template, self._url = model, options, template, url
        self._max_context = max_context

    def open(self, device: str) -> Engine:
        """An engine with a model of its own."""
        from lavis_chatbridge.chat.engine import Engine
        from lavis_chatbridge.chat.media import MediaReader

        model, processors = loading.load_model(self._model, self._options, device, self._url)
        return Engine(model, MediaReader(model, processors), self._template, max_context=self._max_context, keep=0)


def _answer_one(
    engines: _Engines,
    device: str,
    text: str,
    media: list[tuple[Any, Any]],
    sampling: Sampling,
    system: str,
    hear_videos: bool,
    as_json: bool,
) -> None:
    from lavis_chatbridge.chat.conversation import Conversation
    from lavis_chatbridge.chat.media import media_of

    asked = Conversation(system=system).asking(text, media_of(media=media, hear_videos=hear_videos))
    reply = engines.open(device).reply(asked, sampling)
    for piece in reply:
        if not as_json:
            print(piece, end="", flush=True)
    for warning in reply.answer.warnings:
        print(f"{'' if as_json else chr(10)}warning: {warning}", file=sys.stderr)
    print(json.dumps(reply.answer.to_record(), ensure_ascii=False) if as_json else "")


def _answer_file(
    source: Path,
    target: Path,
    engines: _Engines,
    devices: Sequence[str],
    batch_size: int,
    sampling: Sampling,
    system: str,
    hear_videos: bool,
) -> int:
    questions = list(read_questions(source, system, hear_videos))
    try:
        settings = [*engines.identity, sampling.model_dump(), system, hear_videos]
        part = target.with_name(f".{target.name}.{hash_of(hash_of_file(source), *settings)[:12]}.part")
        target.parent.mkdir(parents=True, exist_ok=True)
        done = [json.loads(line) for line in _complete_lines(part)]
        if done:
            print(f"{len(done)} of {len(questions)} answers are there already", file=sys.stderr)
        faults = sum("error" in record for record in done)
        for record in _answers(questions[len(done) :], engines, devices, batch_size, sampling):
            faults += "error" in record
            append_lines(part, [json.dumps(record, ensure_ascii=False)])
        part.touch()
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {len(questions) - faults} answers, {faults} lines without one", file=sys.stderr)
    return 1 if faults else 0


def _answers(
    questions: Sequence[tuple[Any, Conversation]],
    engines: _Engines,
    devices: Sequence[str],
    batch_size: int,
    sampling: Sampling,
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the questions; ``batch_size`` of them are under way on each device."""
    opened = [engines.open(device) for device in devices] if questions else []
    running: deque[tuple[Any, Any]] = deque()
    for number, (name, conversation) in enumerate(questions):
        running.append((name, opened[number % len(opened)].reply(conversation, sampling)))
        if len(running) >= batch_size * len(opened):
            yield _record(*running.popleft())
    while running:
        yield _record(*running.popleft())


def _record(name: Any, reply: Any) -> dict[str, Any]:
    try:
        answer: Answer = reply.answer
    except ChatBridgeError as error:
        return {"id": name, "error": " ".join(str(error).split())}
    record: dict[str, Any] = {"id": name, "answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
    media = [{"type": note.modality, "name": note.name, "reached": note.reached} for note in answer.media]
    return record | ({"media": media} if media else {}) | ({"warnings": answer.warnings} if answer.warnings else {})


def read_questions(path: Path, system: str = "", hear_videos: bool = True) -> Iterator[tuple[Any, Conversation]]:
    """The questions of a JSONL file with their ids; docs/chat.md has the form of a line.

    Raises:
        DataError: With ``file:line`` and what is wrong.
    """
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not JSON: {error}") from error
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected an object")
            yield record.get("id", str(number)), _conversation(record, where, path.parent, system, hear_videos)


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
        listed = {key: record.get(key, []) for key in _MEDIA}
        wrong = [
            key
            for key, paths in listed.items()
            if not isinstance(paths, list) or not all(isinstance(p, str) for p in paths)
        ]
        if wrong or not isinstance(record["text"], str):
            raise DataError(f"{where}: {wrong[0]!r} is not a list of paths" if wrong else f"{where}: 'text' is no text")
        images, videos, audios = ([root / path for path in listed[key]] for key in _MEDIA)
        media = media_of(images, videos, audios, hear_videos=hear)
        return Conversation(system=system).asking(record["text"], media)
    sample = parse_record({"id": where, **record}, where, str(root), allow_outside=True)
    files = iter(sample.media)
    result = Conversation(system=system)
    for turn in sample.turns:
        pairs: list[Any] = [(medium.kind, medium.path) for medium in (next(files) for _ in turn.media)]
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
