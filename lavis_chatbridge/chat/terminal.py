"""``chatbridge chat``: a conversation in the terminal. It uses a `Session`, never a model."""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from lavis_chatbridge.chat.options import SAMPLED, ModelOptions, TalkOptions, with_options
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError, MediaError
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from rich.console import Console

    from lavis_chatbridge.chat.engine import Answer, Reply
    from lavis_chatbridge.chat.session import Session
    from lavis_chatbridge.media import Sound

PROMPT = "you> "
_SETTINGS = [name for name in SAMPLED if name != "stop"]
_COMMANDS = {
    "image": "FILE...  attach images to the next question (a path inside a question is attached too)",
    "video": "FILE...  attach videos, which are heard with their sound",
    "audio": "FILE...  attach sounds",
    "media": "  list what is attached; '/media none' detaches it",
    "retry": "  answer the last question again",
    "edit": "TEXT  replace the text of the last question and answer it",
    "undo": "  remove the last question and its answer; its media are attached again",
    "history": "  show the conversation",
    "set": "NAME VALUE  change a setting (none: its default); alone: show all",
    "save": "FILE  save the conversation",
    "load": "FILE  resume a saved conversation",
    "new": "  begin a new conversation",
    "help": "  this list",
    "quit": "  leave (or Ctrl-D); Ctrl-C stops an answer",
}


@with_options
def command(
    model: ModelOptions,
    talk: TalkOptions,
    sampling: Sampling,
    files: Annotated[list[str], typer.Argument(metavar="[FILE]...", help="Media for the first question.")] = [],  # noqa: B006
    load: Annotated[Path | None, typer.Option(help="Resume a saved conversation.")] = None,
) -> None:
    """Talk until the user leaves."""
    model.announce()
    from rich.console import Console

    from lavis_chatbridge.chat.attachments import check_file
    from lavis_chatbridge.chat.session import Session

    for file in files:
        check_file(file)
    engine = model.open()
    session = Session(engine.model, system=talk.system, hear_videos=talk.video_sound, sampling=sampling, engine=engine)
    if load is not None:
        session.load(load)
    terminal = Terminal(session, Console(highlight=False))
    for file in files:
        terminal.attach(file)
    terminal.say("Ask something. A path in a question attaches the file; /help lists commands; Ctrl-D ends.")
    terminal.talk(_lines(sys.stdin))


class Terminal:
    """A session whose questions and commands are lines; it prints the answers."""

    def __init__(self, session: Session, console: Console) -> None:
        self.session, self.console = session, console
        self.attached: list[tuple[Modality, Sound]] = []

    def talk(self, lines: Iterable[str]) -> None:
        """Answer lines until they end or one is ``/quit``; a mistake prints one line and costs nothing."""
        for line in lines:
            words = line.strip()
            try:
                head, _, rest = words.partition(" ")
                if head == "/quit":
                    return
                if re.fullmatch("/[^/]*", head) and (head[1:] in _COMMANDS or not os.path.exists(head)):
                    self._command(head[1:], rest.strip())
                elif words:
                    self._ask(words)
            except ChatBridgeError as error:
                self.say(f"error: {' '.join(str(error).split())}", "red")
            except KeyboardInterrupt:
                self.say("(stopped)")

    def say(self, text: str, style: str = "dim") -> None:
        self.console.print(_harmless(text), style=style, markup=False, soft_wrap=True)

    def attach(self, word: str, modality: Modality | None = None) -> None:
        """Attach the files that a word names, which may have wildcards."""
        from lavis_chatbridge.chat.attachments import check_file, modality_of

        for path in _found(word) or [_path(word)]:
            check_file(path, modality)
            self.attached.append((modality or modality_of(path), path))
            self.say(f"  + {self.attached[-1][0]} {path}")

    def _command(self, name: str, rest: str) -> None:
        if name not in _COMMANDS:
            raise ConfigError(f"unknown command /{name}; /help lists them")
        needed = _COMMANDS[name].partition(" ")[0]
        if needed in ("FILE", "FILE...", "TEXT") and not rest:
            raise ConfigError(f"/{name} needs {needed}")
        if name in ("retry", "edit") and not self.session.messages:
            raise ConfigError("there is no question yet")
        if name not in MODALITIES:
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
            try:
                self._show(lambda: self.session.stream(text, media=self.attached))
            except MediaError as error:
                if not self.attached:  # it is in an earlier message
                    raise
                raise ConfigError(f"{error}; '/media none' detaches what is attached") from error
            self.attached = []

    def _show(self, begin: Callable[[], Reply]) -> None:
        """Print an answer as it comes; Ctrl-C ends it and keeps its text."""
        from rich.live import Live
        from rich.markdown import Markdown

        try:
            with self.console.status("reading the media..." if self.attached else "reading the question..."):
                reply = begin()
                text = next(reply, "")
        except KeyboardInterrupt:
            self.session.cancel()
            raise ConfigError("stopped before the answer began; the question was not asked") from None
        try:
            if self.console.is_terminal:
                with Live(Markdown(_harmless(text)), console=self.console, refresh_per_second=12) as live:
                    for piece in reply:
                        text += piece
                        live.update(Markdown(_harmless(text)))
            else:
                self.say(text + "".join(reply), "")
        except KeyboardInterrupt:
            reply.cancel()
        self._report(reply.answer)

    def _report(self, answer: Answer) -> None:
        ended = {"cancelled": "(stopped)", "length": "(cut off: raise it with /set max_new_tokens)"}
        if answer.finish in ended:
            self.say(ended[answer.finish])
        if own := [note for note in answer.media if note.new]:
            reached = ", ".join(f"{note.modality} {note.name}" for note in own if note.reached) or "none of the media"
            self.say(f"  the model got: {reached}")
        for warning in answer.warnings:
            self.say(f"  warning: {warning}", "yellow")

    def _media(self, rest: str) -> None:
        if rest == "none":
            self.attached = []
        for modality, content in self.attached:
            path = content if isinstance(content, (str, os.PathLike)) else "of the saved conversation"
            self.say(f"  {modality} {path}")
        if not self.attached:
            self.say("  nothing is attached")

    def _retry(self, rest: str) -> None:
        self._show(self.session.restream)

    def _edit(self, rest: str) -> None:
        self.session.edit((len(self.session.messages) - 1) // 2 * 2, rest)
        self._retry("")

    def _undo(self, rest: str) -> None:
        taken = self.session.undo()
        if taken is None:
            self.say("  there is no question")
            return
        self.attached = [(m.modality, m.content) for m in taken.media if not m.track] + self.attached
        again = f" (attached again: {len(self.attached)})" if self.attached else ""
        self.say(f"  taken back: {taken.text}{again}")

    def _history(self, rest: str) -> None:
        for message in self.session.messages:
            media = "".join(f" [{medium.modality} {medium.name}]" for medium in message.media if not medium.track)
            self.say(f"  {'you' if message.role == 'user' else 'chatbridge'}>{media} {message.text}", "")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            if name not in _SETTINGS:
                raise ConfigError(f"there is no setting {name!r}; they are {', '.join(_SETTINGS)}")
            value = value.strip()
            changed = self.session.sampling.model_dump() | {name: value}
            if value in ("", "none"):
                del changed[name]  # back to the default
            self.session.sampling = parse(Sampling, changed, "set")
        self.say("\n".join(f"  {known} {getattr(self.session.sampling, known)}" for known in _SETTINGS))

    def _save(self, rest: str) -> None:
        from lavis_chatbridge.chat import messages

        path = os.path.expanduser(rest)
        if os.path.exists(path):
            try:
                messages.load(path)
            except DataError as error:
                raise ConfigError(f"{rest} is not replaced: {error}; save to another file") from error
        self.session.save(path)
        self.say(f"  saved to {rest}")

    def _load(self, rest: str) -> None:
        self.session.load(os.path.expanduser(rest))
        self._history("")

    def _new(self, rest: str) -> None:
        self.session.clear()
        self.attached = []

    def _help(self, rest: str) -> None:
        self.say("\n".join(f"  /{name} {words}".rstrip() for name, words in _COMMANDS.items()))


def _path(word: str) -> str:
    return os.path.expanduser(urllib.parse.unquote(word[7:]) if word.startswith("file://") else word)


def _found(word: str) -> list[str]:
    """The files that a word names: a path, a ``file:`` URL, or a pattern."""
    path = _path(word)
    return [path] if os.path.isfile(path) else sorted(filter(os.path.isfile, glob.glob(path)))


def _split(line: str) -> tuple[str, list[str]]:
    """A question, and the files whose paths were typed or dropped into it (with quotes or backslashes, as a shell).

    A line that is only a folder's path (with a slash) counts as a file: attaching it raises a clear error.
    """
    files, text = [], line
    whole = re.sub(r"\\(.)", r"\1", line.strip("'\""))
    if "/" in whole and os.path.isdir(_path(whole)):
        return "", [whole]
    for match in re.finditer(r"'[^'\n]+'|\"[^\"\n]+\"|(?:\\.|[^\s'\"\\])+", line):
        word = match.group()
        path = word[1:-1] if word[0] in "'\"" else re.sub(r"\\(.)", r"\1", word)
        if ("/" in path or re.search(r"\.\w{2,4}$", path)) and _found(path):
            files.append(path)
            text = text.replace(word, "", 1)
    return " ".join(text.split()) if files else line, files


def _harmless(text: str) -> str:
    """``text`` without characters that a terminal takes for commands."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def _lines(stdin: TextIO) -> Iterator[str]:
    """Lines as they are typed, with a prompt, history and completion; from a pipe, as they come."""
    if not stdin.isatty():
        yield from stdin
        return
    prompt = editor()
    while True:
        try:
            yield prompt.prompt(PROMPT)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


def editor() -> PromptSession[str]:
    """The line editor: its history is ``~/.chatbridge_history``; a pasted text of several lines is one question."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import Completer, Completion, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document
    from prompt_toolkit.history import FileHistory

    names = WordCompleter([f"/{name}" for name in _COMMANDS], sentence=True)

    class Words(Completer):
        def get_completions(self, document: Document, event: Any) -> Iterator[Completion]:
            line = document.text_before_cursor
            last = re.split(r"(?<!\\) ", line)[-1]
            if " " not in line:
                yield from names.get_completions(document, event)
            elif "/" in last or line.startswith("/"):
                yield from PathCompleter(expanduser=True).get_completions(Document(last), event)

    history = FileHistory(os.path.expanduser("~/.chatbridge_history"))
    return PromptSession(history=history, completer=Words(), complete_while_typing=False)
