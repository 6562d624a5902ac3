"""``chatbridge chat``: a conversation in the terminal. It knows sessions, no models."""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lavis_chatbridge.chat import loading
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, PromptError

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

    from lavis_chatbridge.chat.engine import Reply
    from lavis_chatbridge.chat.session import Session

PROMPT = "you> "
_SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "seed")
_ATTACHING = ("image", "video", "audio")
_COMMANDS = {
    "image": "FILE...  attach images to the next question (a path inside a question is attached too)",
    "video": "FILE...  attach videos, which are heard with their sound",
    "audio": "FILE...  attach sounds",
    "media": "  list what is attached; '/media none' detaches it",
    "retry": "  answer the last question again",
    "edit": "[N] TEXT  replace the text of question N (the last one) and answer it; later questions go",
    "undo": "  take back the last question and its answer; its media are attached again",
    "history": "  show the conversation",
    "set": "NAME VALUE  change a setting; alone: show all",
    "save": "FILE  save the conversation",
    "load": "FILE  resume a saved conversation",
    "new": "  begin a new conversation",
    "help": "  this list",
    "quit": "  leave (or Ctrl-D); Ctrl-C stops an answer",
}


def command(
    files: Annotated[list[str], typer.Argument(metavar="[FILE]...", help="Media for the first question.")] = [],  # noqa: B006
    image: Annotated[list[str], typer.Option(help="An image for the first question; repeatable.")] = [],  # noqa: B006
    video: Annotated[list[str], typer.Option(help="A video; repeatable.")] = [],  # noqa: B006
    audio: Annotated[list[str], typer.Option(help="A sound; repeatable.")] = [],  # noqa: B006
    load: Annotated[Path | None, typer.Option(help="Resume a saved conversation.")] = None,
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
) -> None:
    """Talk until the user leaves."""
    sampling = loading.sampling_of(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, num_beams=num_beams, seed=seed, stop=stop
    )
    listed = (("image", image), ("video", video), ("audio", audio), ("", files))
    given = [(modality, file) for modality, of_it in listed for file in of_it]
    for _, file in given:
        _found(file)
    from rich.console import Console

    from lavis_chatbridge.chat.session import Session

    own = loading.open_engine(model, options, device, template, engine, max_context=max_context)
    session = Session(own.model, system=system, hear_videos=not no_video_sound, sampling=sampling, engine=own)
    if load is not None:
        session.load(load)
    terminal = Terminal(session, Console(highlight=False))
    for name, file in given:
        terminal.attach(file, name)
    terminal.say("Ask something. A path in a question attaches the file; /help lists commands; Ctrl-D ends.")
    terminal.talk(_lines(sys.stdin))


class Terminal:
    """A conversation: takes lines, prints what comes of them.

    Args:
        session: The session.
        console: Where it prints.
    """

    def __init__(self, session: Session, console: Console) -> None:
        self.session, self.console = session, console
        self.attached: list[tuple[Any, Any]] = []

    def talk(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one is ``/quit``; a mistake prints one line and costs nothing."""
        for line in lines:
            words = line.strip()
            if words in ("/quit", "/exit"):
                return
            try:
                head, _, rest = words.partition(" ")
                if head.startswith("/") and "/" not in head[1:] and not os.path.isfile(head):
                    self._command(head[1:], rest.strip())
                elif words:
                    self._ask(words)
            except ChatBridgeError as error:
                self.say(f"error: {' '.join(str(error).split())}", "red")
            except KeyboardInterrupt:
                self.say("(stopped)")

    def say(self, text: str, style: str = "dim") -> None:
        """Print a line."""
        self.console.print(_harmless(text), style=style, markup=False, soft_wrap=True)

    def attach(self, word: str, modality: str = "") -> None:
        """Attach the files that a word names, which may hold wildcards.

        Raises:
            ConfigError: If there is none.
            MediaError: If a file is of another modality than the command.
        """
        from lavis_chatbridge.chat.sources import check_modality, modality_of

        for path in _found(word):
            if modality:
                check_modality(modality, path)  # type: ignore[arg-type]
            self.attached.append((modality or modality_of(path), path))
            self.say(f"  + {self.attached[-1][0]} {path}")

    def _command(self, name: str, rest: str) -> None:
        near = [known for known in _COMMANDS if name and known.startswith(name)]
        if name not in _COMMANDS and len(near) != 1:
            raise ConfigError(f"unknown command /{name}; /help lists them")
        name = name if name in _COMMANDS else near[0]
        if name in (*_ATTACHING, "save", "load") and not rest:
            raise ConfigError(f"/{name} needs a file")
        if name not in _ATTACHING:
            getattr(self, f"_{name}")(rest)
            return
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"/{name}: {error}") from error
        for word in words:
            self.attach(word, name)

    def _ask(self, line: str) -> None:
        text, files = _split(line)
        for file in files:
            self.attach(file)
        if text or not files:  # files alone wait for their question
            self._show(lambda: self.session.stream(text, media=self.attached))
            self.attached = []

    def _show(self, begin: Any) -> None:
        """Print an answer as it comes; Ctrl-C ends it and keeps its text."""
        from rich.live import Live
        from rich.markdown import Markdown

        before = len(self.session.messages)
        try:
            with self.console.status("reading the media..." if self.attached else "reading the question..."):
                stream: Reply = begin()
                text = next(stream, "")
        except KeyboardInterrupt:
            self.session.cancel()
            raise PromptError("stopped before the answer began; the question is not part of the conversation") from None
        try:
            if not self.console.is_terminal:
                self.console.print(_harmless(text + "".join(stream)), markup=False, soft_wrap=True)
            else:
                with Live(Markdown(_harmless(text)), console=self.console, refresh_per_second=12) as live:
                    for piece in stream:
                        text += piece
                        live.update(Markdown(_harmless(text)))
        except KeyboardInterrupt:
            stream.cancel()
        self._report(stream, before)

    def _report(self, stream: Reply, before: int) -> None:
        answer = stream.answer
        ended = {"cancelled": "(stopped)", "length": "(cut off: raise it with /set max_new_tokens)"}
        if answer.finish in ended:
            self.say(ended[answer.finish])
        new = [note for note in answer.media if note.turn == answer.turn]
        if new and len(self.session.messages) > before:
            reached = ", ".join(f"{note.modality} {note.name}" for note in new if note.reached) or "none of the media"
            self.say(f"  the model got: {reached}")
        for warning in answer.warnings:
            self.say(f"  warning: {warning}", "yellow")

    def _media(self, rest: str) -> None:
        if rest == "none":
            self.attached = []
        self.say("\n".join(f"  {modality} {path}" for modality, path in self.attached) or "  nothing is attached")

    def _retry(self, rest: str) -> None:
        self._show(lambda: self.session.restream())

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        asked = count = (len(self.session.messages) + 1) // 2
        if number.isdecimal() and text.strip():
            asked, rest = int(number[:9]), text.strip()
        if not rest:
            raise ConfigError("/edit needs the new text: /edit TEXT, or /edit N TEXT for question N")
        if not 1 <= asked <= count:
            raise ConfigError(f"there is no question {asked}; there are {count}")
        self.session.edit(2 * (asked - 1), rest)
        self._retry("")

    def _undo(self, rest: str) -> None:
        taken = self.session.undo()
        if taken is not None:
            self.attached = [(m.modality, m.source) for m in taken.media if not m.track] + self.attached
        again = "" if not self.attached else f" ({len(self.attached)} media are attached again)"
        self.say("  nothing to take back" if taken is None else f"  taken back: {taken.text}{again}")

    def _history(self, rest: str) -> None:
        for i, message in enumerate(self.session.messages):
            media = "".join(f" [{medium.modality} {medium.name}]" for medium in message.media if not medium.track)
            who = "you" if message.role == "user" else "chatbridge"
            self.say(f"  {i // 2 + 1} {who}>{media} {message.text}", "")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        sampling = self.session.sampling
        if name:
            if name not in _SETTINGS:
                raise ConfigError(f"there is no setting {name!r}; they are {', '.join(_SETTINGS)}")
            changed: Any = None if value.strip() in ("", "none") else value.strip()
            self.session.sampling = parse(type(sampling), {**sampling.model_dump(), name: changed}, "set")
        self.say("\n".join(f"  {known} {getattr(self.session.sampling, known)}" for known in _SETTINGS))

    def _save(self, rest: str) -> None:
        self.session.save(os.path.expanduser(rest))
        self.say(f"  saved to {rest}")

    def _load(self, rest: str) -> None:
        self.session.load(os.path.expanduser(rest))
        self._history("")

    def _new(self, rest: str) -> None:
        self.session.clear()
        self.attached = []

    def _help(self, rest: str) -> None:
        self.say("\n".join(f"  /{name} {words}".rstrip() for name, words in _COMMANDS.items()))


def _found(word: str) -> list[str]:
    """The files that a word names: a path, a ``file:`` URL, or a pattern.

    Raises:
        ConfigError: If there is none.
    """
    plain = urllib.parse.unquote(word.removeprefix("file://")) if word.startswith("file://") else word
    path = os.path.expanduser(plain)
    found = [path] if os.path.isfile(path) else sorted(glob.glob(path))
    if not found:
        raise ConfigError(f"there is no file {word}")
    return found


def _split(line: str) -> tuple[str, list[str]]:
    """A question, and the files whose paths were typed or dropped into it (with quotes or backslashes, as a shell)."""
    files = []
    for match in re.finditer(r"'[^'\n]+'|\"[^\"\n]+\"|(?:\\.|[^\s'\"\\])+", line):
        word = match.group()
        path = word[1:-1] if word[0] in "'\"" else re.sub(r"\\(.)", r"\1", word)
        looks = "/" in path or re.search(r"\.\w{2,4}$", path)
        try:
            if looks and _found(path):
                files.append((word, path))
        except (ConfigError, ValueError):
            continue
    for word, _ in files:
        line = line.replace(word, "", 1)
    return " ".join(line.split()) if files else line, [path for _, path in files]


def _harmless(text: str) -> str:
    """``text`` without characters that a terminal takes for commands."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def _lines(source: TextIO) -> Iterator[str]:
    """Lines as they are typed, with a prompt, history and completion; from a pipe, as they come."""
    if not source.isatty():
        yield from source
        return
    prompt = editor()
    while True:
        try:
            yield prompt.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def editor(**settings: Any) -> PromptSession[str]:
    """The line editor: its history is ``~/.chatbridge_history``; a pasted text of several lines is one question."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory

    class Words(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            line = document.text_before_cursor
            if line.startswith("/") and " " not in line:
                for name in _COMMANDS:
                    if name.startswith(line[1:]):
                        yield Completion(f"/{name}", start_position=-len(line))
                return
            word = re.split(r"(?<!\\) ", line)[-1]
            if (word and "/" in word) or line.startswith("/"):
                yield from PathCompleter(expanduser=True).get_completions(Document(word), event)

    history = FileHistory(os.path.expanduser("~/.chatbridge_history"))
    return PromptSession(history=history, completer=Words(), complete_while_typing=False, **settings)
