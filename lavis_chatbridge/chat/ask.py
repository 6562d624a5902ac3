"""``chatbridge ask``: one question from a script, or a file of them on one or several devices.

A batch writes its answers in the order of the questions; interrupted, the same command goes on where it was. It knows
sessions and the decoder, no models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavis_chatbridge.chat import options
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError

_KINDS = ("image", "video", "audio")
_SETTING = re.compile(r"[\w.]+=")  # how KEY=VALUE begins
_KEYS = {"id", "text", "images", "videos", "audios", "media", "turns"}
_IGNORED = {"source", "task", "style", "answers", "facts", "held_out", "meta", "captions"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge ask``."""
    parser.add_argument("text", nargs="?", help="the question")
    for kind in _KINDS:
        parser.add_argument(
            f"--{kind}", nargs="+", action="append", default=[], metavar="FILE", help=f"{kind}s to ask about"
        )
    parser.add_argument("--json", action="store_true", help="print the answer with all that is known about it as JSON")
    parser.add_argument(
        "--jsonl",
        nargs=2,
        type=Path,
        metavar=("IN", "OUT"),
        help="answer every line of IN (docs/chat.md has the form) into OUT",
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="answers at once on a device (default 8)"
    )
    parser.add_argument("--devices", nargs="+", metavar="DEVICE", help="with --jsonl: cuda:0 cuda:1 ..., or 'all'")
    options.add_model_arguments(parser)
    options.add_conversation_arguments(parser)
    options.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``chatbridge ask``: 0; 1 if some lines of a batch have no answer."""
    args = sorted_words(args)
    if (args.text is None) == (args.jsonl is None):
        raise ConfigError(
            "ask needs either a question or --jsonl IN OUT; a question is the first word, or stands behind the files"
        )
    if args.text is not None and not args.text.strip() and not any(getattr(args, kind) for kind in _KINDS):
        raise ConfigError("the question is empty, and there is no medium to speak about")
    if args.text is not None and args.devices:
        raise ConfigError("--devices is for --jsonl: one question is answered on one --device")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size is {args.batch_size}, expected at least 1")
    settings = options.session_settings(args)
    if args.jsonl is None:
        return _ask_one(args, settings)
    if any(getattr(args, kind) for kind in _KINDS):
        raise ConfigError("with --jsonl, media are named in the lines of the file")
    return _ask_all(args, settings)


def sorted_words(args: argparse.Namespace) -> argparse.Namespace:
    """The parsed arguments with the question in its own place, and each kind's files in one list.

    Where a question stands behind ``--image *.jpg`` or ``--options KEY=VALUE``, argparse takes it for one word more of
    theirs. It is the last word behind files and looks like none of them, or a word that is no ``KEY=VALUE``.

    Raises:
        ConfigError: If several words may be the question.
    """
    files = {kind: [list(words) for words in getattr(args, kind)] for kind in _KINDS}
    options, text = list(args.options), args.text
    if text is None and args.jsonl is None:
        groups = [words for listed in files.values() for words in listed]
        found = [(words, len(words) - 1) for words in groups if len(words) > 1 and not _names_file(words[-1])]
        found += [(options, i) for i, word in enumerate(options) if not _SETTING.match(word)]
        if len(found) > 1:
            either = ", ".join(repr(words[i]) for words, i in found)
            raise ConfigError(f"which of {either} is the question? Write it as the first word, before all options")
        if found:
            words, place = found[0]
            text = words.pop(place)
    flat = {kind: [word for words in listed for word in words] for kind, listed in files.items()}
    return argparse.Namespace(**{**vars(args), **flat, "text": text, "options": options})


def _names_file(word: str) -> bool:
    """Whether there is such a file, or it is a name such as files have, and then a wrong one."""
    return os.path.exists(word) or bool(re.fullmatch(r"\S*(/\S*|\.\w+)", word))


def _ask_one(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    from lavis_chatbridge.chat.session import Session

    session = Session.open(args.model, device=args.device, options=args.options, **settings)
    answer = session.ask(args.text, args.image, args.video, args.audio)
    for warning in answer.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(json.dumps(answer.to_record(), ensure_ascii=False) if args.json else answer.text)
    return 0


def _ask_all(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    source, target = args.jsonl
    questions = read_questions(source)
    devices = _devices(args)
    work = {"model": args.model, "options": args.options, "settings": settings, "batch_size": args.batch_size}
    part = target.with_name(f".{target.name}.{_fingerprint(source, args, settings)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        faults = 0
        with open(part, "a+", encoding="utf-8") as out:
            done = _complete_lines(out)
            if done:
                print(f"{len(done)} of {len(questions)} answers are there already", file=sys.stderr)
            faults += sum("error" in json.loads(line) for line in done)
            for record in _in_order(_answers(questions[len(done) :], len(done), devices, work), len(done)):
                faults += "error" in record
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
        os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error.strerror or error}") from error
    print(f"{target}: {len(questions) - faults} answers, {faults} lines without one", file=sys.stderr)
    return 1 if faults else 0


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of questions, checked, with the paths of media made absolute.

    Raises:
        DataError: With ``file:line`` and what is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    folder = os.path.dirname(os.path.abspath(path))
    return [_question(line, f"{path}:{number}", folder) for number, line in enumerate(lines, 1) if line.strip()]


def answer_lines(
    model: Any, processors: Any, questions: Sequence[dict[str, Any]], work: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answer questions, several at once.

    Args:
        model: The ChatBridge.
        processors: Its processors.
        questions: As `read_questions` gives them.
        work: ``settings`` of the sessions, and ``batch_size``.

    Yields:
        A question's position and its record, in the order in which answers are complete.
    """
    from lavis_chatbridge.chat.media import MediaReader
    from lavis_chatbridge.chat.session import Session
    from lavis_chatbridge.models.decoding import Decoder

    reader = MediaReader(model, processors)
    decoder = Decoder(model.llama_model)
    running: dict[int, tuple[Any, Any]] = {}
    waiting = iter(enumerate(questions))
    while True:
        while len(decoder) < work["batch_size"] and (entry := next(waiting, None)) is not None:
            number, question = entry
            try:
                turns = _turns(question, work["settings"]["hear_videos"])
                session = Session(model, processors, reader=reader, turns=turns, **work["settings"])
                generation = session.begin()
            except ChatBridgeError as error:
                yield number, {"id": question["id"], "error": " ".join(str(error).split())}
                continue
            decoder.add(generation)
            running[number] = session, generation
        complete = [number for number, (_, generation) in running.items() if generation.done]
        for number in complete:
            session, generation = running.pop(number)
            yield number, _record(questions[number]["id"], session.finish(generation))
        if not running and not complete:
            return
        decoder.step()


def _answers(
    questions: Sequence[dict[str, Any]], start: int, devices: Sequence[str], work: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers from one device in this process, or from a process for each of several devices."""
    if not questions:
        return
    if len(devices) == 1:
        from lavis_chatbridge.chat.loading import load_model

        model, processors = load_model(work["model"], work["options"], devices[0])
        for number, record in answer_lines(model, processors, questions, work):
            yield start + number, record
        return
    import torch.multiprocessing as multiprocessing

    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    shares = [range(i, len(questions), len(devices)) for i in range(len(devices))]
    processes = [
        context.Process(
            target=_worker, args=([questions[i] for i in share], device, dict(work), w, results), daemon=True
        )
        for w, (share, device) in enumerate(zip(shares, devices, strict=True))
        if len(share)
    ]
    for process in processes:
        process.start()
    try:
        yield from _collected(results, processes, shares, start, len(questions))
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collected(
    results: Any, processes: Sequence[Any], shares: Sequence[range], start: int, count: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    import queue

    while count:
        try:
            worker, number, record = results.get(timeout=1.0)
        except queue.Empty:
            lost = [process for process in processes if process.exitcode not in (None, 0)]
            if lost:
                raise DataError(
                    f"a process of the batch ended with status {lost[0].exitcode}; the same command goes on"
                ) from None
            continue
        if number is None:
            raise ConfigError(record)
        count -= 1
        yield start + shares[worker][number], record


def _worker(questions: Sequence[dict[str, Any]], device: str, work: dict[str, Any], worker: int, results: Any) -> None:
    """One process of a batch: its share of the questions on its device."""
    from lavis_chatbridge.chat.loading import load_model

    try:
        model, processors = load_model(work["model"], work["options"], device)
        for number, record in answer_lines(model, processors, questions, work):
            results.put((worker, number, record))
    except ChatBridgeError as error:
        results.put((worker, None, str(error)))


def _in_order(records: Iterator[tuple[int, dict[str, Any]]], first: int) -> Iterator[dict[str, Any]]:
    """Records in the order of their numbers, from ``first`` on."""
    early: dict[int, dict[str, Any]] = {}
    for number, record in records:
        early[number] = record
        while first in early:
            yield early.pop(first)
            first += 1


def _question(line: str, where: str, folder: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object")
    unknown = [key for key in record if key not in _KEYS | _IGNORED]
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if ("text" in record) == ("turns" in record):
        raise DataError(f"{where}: expected either 'text', a question, or 'turns', a conversation")
    if "turns" in record:
        return _conversation(record, where, folder)
    media = []
    for kind in _KINDS:
        listed = record.get(f"{kind}s", [])
        if not isinstance(listed, list) or not all(isinstance(path, str) for path in listed):
            raise DataError(f"{where}: '{kind}s' is to be a list of paths")
        media += [(kind, os.path.join(folder, path)) for path in listed]
    if not isinstance(record["text"], str):
        raise DataError(f"{where}: 'text' is to be a string")
    return {"id": record.get("id", where.rpartition(":")[2]), "turns": [("user", record["text"], media)]}


def _conversation(record: dict[str, Any], where: str, folder: str) -> dict[str, Any]:
    """A line in the schema of data sets; an answer at the end of its turns is what the model is to give instead."""
    from lavis_chatbridge.schema import parse_record

    given = {"id": where.rpartition(":")[2], **record}
    given.pop("text", None)
    sample = parse_record(given, where, folder, allow_outside=True)
    media = iter(sample.media)
    turns = [
        (turn.role, turn.text, [(m.kind, m.path) for m in (next(media) for _ in turn.media)]) for turn in sample.turns
    ]
    if turns and turns[-1][0] == "assistant":
        turns.pop()
    if not turns:
        raise DataError(f"{where}: 'turns' holds no question")
    return {"id": given["id"], "turns": turns}


def _turns(question: Mapping[str, Any], hear_videos: bool) -> list[Any]:
    from lavis_chatbridge.chat.history import ChatTurn
    from lavis_chatbridge.chat.media import media_of_turn

    return [
        ChatTurn(role, text, tuple(media_of_turn(media=media, hear_videos=hear_videos)))
        for role, text, media in question["turns"]
    ]


def _record(name: Any, answer: Any) -> dict[str, Any]:
    record: dict[str, Any] = {"id": name, "answer": answer.text, "finish": answer.finish, "tokens": answer.tokens}
    media = [{"type": note.kind, "name": note.name, "reached": note.reached} for note in answer.media]
    return record | ({"media": media} if media else {}) | ({"warnings": answer.warnings} if answer.warnings else {})


def _devices(args: argparse.Namespace) -> list[str]:
    if not args.devices:
        return [args.device]
    if args.devices != ["all"]:
        return list(args.devices)
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError("--devices all: torch finds no CUDA device here")
    return [f"cuda:{i}" for i in range(count)]


def _fingerprint(source: Path, args: argparse.Namespace, settings: Mapping[str, Any]) -> str:
    """Short and the same for the same batch: unfinished answers of another one are not taken for this one's."""
    said = {**settings, "sampling": asdict(settings["sampling"]), "model": args.model, "options": args.options}
    content = source.read_bytes() + json.dumps(said, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:12]


def _complete_lines(file: Any) -> list[str]:
    """The whole lines of an unfinished file, whose half line at the end is cut off."""
    file.seek(0)
    text = file.read()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.truncate(len(whole.encode("utf-8")))
    file.seek(0, os.SEEK_END)
    return whole.splitlines()
