"""``chatbridge chat``: a conversation in the terminal, files attached by commands. It knows sessions, no models."""

from __future__ import annotations

import argparse
import glob
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lavis_chatbridge.chat import options
from lavis_chatbridge.config import checked
from lavis_chatbridge.errors import ChatBridgeError, ConfigError

PROMPT, ANSWER = "you> ", "chatbridge> "
_KINDS = ("image", "video", "audio")
_LONGEST_NUMBER = 9
_SETTINGS = {"max_new_tokens": int, "temperature": float, "top_p": float, "num_beams": int, "seed": int}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``chatbridge chat``."""
    for kind in _KINDS:
        parser.add_argument(
            f"--{kind}", nargs="+", action="extend", default=[], metavar="FILE", help=f"{kind}s for the first message"
        )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on from a saved conversation")
    options.add_model_arguments(parser)
    options.add_conversation_arguments(parser)
    options.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """``chatbridge chat``: 0 when the user leaves."""
    settings = options.session_settings(args)
    given = [(kind, path) for kind in _KINDS for word in getattr(args, kind) for path in _found(f"--{kind}", word)]
    from lavis_chatbridge.chat.session import Session

    session = Session.open(args.model, device=args.device, options=args.options, **settings)
    if args.load is not None:
        session.load(args.load)
    terminal = Terminal(session, sys.stdout)
    for kind, path in given:
        terminal.attach(kind, path)
    _set_up_editing()
    terminal.say("Ask something; /image, /video and /audio FILE attach media; /help lists all commands; Ctrl-D ends.")
    terminal.talk(_lines(sys.stdin))
    return 0


class Terminal:
    """A conversation: takes lines, writes what comes of them.

    Args:
        session: The session.
        out: Where it writes.
    """

    def __init__(self, session: Any, out: IO[str]) -> None:
        self.session, self.out = session, out
        self.attached: list[tuple[Any, str]] = []
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "image": (lambda rest: self.attach_all("image", rest), "FILE...  attach pictures to the next message"),
            "video": (lambda rest: self.attach_all("video", rest), "FILE...  attach videos, heard with their sound"),
            "audio": (lambda rest: self.attach_all("audio", rest), "FILE...  attach sounds"),
            "media": (self._media, "  what is attached; '/media none' takes it off"),
            "retry": (self._retry, "  answer the last question anew"),
            "edit": (self._edit, "[N] TEXT  ask question N (the last one) in other words; later turns go"),
            "undo": (self._undo, "  take back the last question and its answer"),
            "history": (self._history, "  the conversation so far"),
            "set": (self._set, "NAME VALUE  change " + ", ".join(_SETTINGS) + "; alone: show them"),
            "save": (self._save, "FILE  save the conversation"),
            "load": (self._load, "FILE  go on from a saved conversation"),
            "new": (self._new, "  begin a new conversation"),
            "help": (self._help, "  this list"),
        }

    def talk(self, lines: Iterable[str]) -> None:
        """Work through lines until they end or one says ``/quit``; mistakes are told and cost nothing."""
        for line in lines:
            words = line.strip()
            if words in ("/quit", "/exit"):
                return
            try:
                if words.startswith("/"):
                    self._command(words[1:])
                elif words:
                    self._ask(words)
            except ChatBridgeError as error:
                self.say(f"error: {' '.join(str(error).split())}")

    def say(self, text: str) -> None:
        """Write a line."""
        print(_harmless(text), file=self.out, flush=True)

    def attach_all(self, kind: Any, rest: str) -> None:
        """Attach the files that a line names; quotes and wildcards work as in a shell."""
        try:
            words = shlex.split(rest)
        except ValueError as error:
            raise ConfigError(f"/{kind}: {error}") from error
        if not words:
            raise ConfigError(f"/{kind} needs a file")
        for word in words:
            for path in _found(f"/{kind}", word):
                self.attach(kind, path)

    def attach(self, kind: Any, path: str) -> None:
        """Attach a file to the next message."""
        self.attached.append((kind, path))
        self.say(f"  + {kind} {path}")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self._commands:
            near = [known for known in self._commands if name and known.startswith(name)]
            if len(near) != 1:
                raise ConfigError(f"unknown command /{name}; /help lists them")
            name = near[0]
        self._commands[name][0](rest.strip())

    def _ask(self, text: str) -> None:
        self._show(self.session.ask(text, media=self.attached, stream=True))
        self.attached = []

    def _show(self, stream: Any) -> None:
        """Write an answer as it comes; Ctrl-C ends it."""
        print(ANSWER, end="", file=self.out, flush=True)
        try:
            for text in stream:
                print(_harmless(text), end="", file=self.out, flush=True)
        except KeyboardInterrupt:
            stream.close()
        answer = stream.answer
        self.say({"cancelled": " (stopped)", "length": " (cut off: /set max_new_tokens)"}.get(answer.finish, ""))
        new = [note for note in answer.media if note.turn == answer.turn]
        if new:
            reached = ", ".join(f"{note.kind} {note.name}" for note in new if note.reached) or "none of the media"
            self.say(f"  the model got: {reached}")
        for warning in answer.warnings:
            self.say(f"  warning: {warning}")

    def _media(self, rest: str) -> None:
        if rest == "none":
            self.attached = []
        self.say("\n".join(f"  {kind} {path}" for kind, path in self.attached) or "  nothing is attached")

    def _retry(self, rest: str) -> None:
        self._show(self.session.regenerate(stream=True))

    def _edit(self, rest: str) -> None:
        number, _, text = rest.partition(" ")
        asked = count = (len(self.session.turns) + 1) // 2
        if number.isdecimal() and len(number) <= _LONGEST_NUMBER:
            asked, rest = int(number), text.strip()
        if not rest:
            which = f" of question {asked}: /edit {asked} TEXT" if number else ": /edit TEXT"
            raise ConfigError(f"/edit needs the new text{which}")
        if not count:
            raise ConfigError("there is no question to edit")
        if not 1 <= asked <= count:
            raise ConfigError(f"there is no question {asked}; they count from 1 to {count}")
        self.session.edit(2 * (asked - 1), rest)
        self._retry("")

    def _undo(self, rest: str) -> None:
        taken = self.session.undo()
        self.say("  nothing to take back" if taken is None else f"  taken back: {taken.text}")

    def _history(self, rest: str) -> None:
        for i, turn in enumerate(self.session.turns):
            media = "".join(f" [{medium.kind} {medium.name}]" for medium in turn.media)
            self.say(f"  {i // 2 + 1} {'you' if turn.role == 'user' else 'chatbridge'}>{media} {turn.text}")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            if name not in _SETTINGS:
                raise ConfigError(f"no setting {name!r}; they are {', '.join(_SETTINGS)}")
            try:
                given = None if name == "seed" and value.strip() == "none" else _SETTINGS[name](value)
            except ValueError:
                raise ConfigError(f"{name}: {value!r} is no number") from None
            self.session.sampling = checked(replace(self.session.sampling, **{name: given}))
        self.say("\n".join(f"  {known} {getattr(self.session.sampling, known)}" for known in _SETTINGS))

    def _save(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/save needs a file")
        self.session.save(os.path.expanduser(rest))
        self.say(f"  saved to {rest}")

    def _load(self, rest: str) -> None:
        if not rest:
            raise ConfigError("/load needs a file")
        self.session.load(os.path.expanduser(rest))
        self._history("")

    def _new(self, rest: str) -> None:
        self.session.clear()
        self.attached = []

    def _help(self, rest: str) -> None:
        for name, (_, words) in self._commands.items():
            self.say(f"  /{name} {words}".rstrip())
        self.say("  /quit  leave (or Ctrl-D); Ctrl-C stops an answer")


def _found(command: str, word: str) -> list[str]:
    """The files that a word names, which may hold wildcards.

    Raises:
        ConfigError: If there is none.
    """
    path = os.path.expanduser(word)
    found = [path] if os.path.exists(path) else sorted(glob.glob(path))
    if not found:
        raise ConfigError(f"{command}: there is no file {word}")
    return found


def complete(line: str, commands: Iterable[str]) -> list[str]:
    """What the last word of a line may become: a command at its start, a file behind it."""
    if line.startswith("/") and " " not in line:
        return sorted(f"/{name} " for name in commands if name.startswith(line[1:]))
    typed = re.sub(r"\\(.)", r"\1", _last_word(line))
    found = sorted(glob.glob(glob.escape(os.path.expanduser(typed)) + "*"))
    return [re.sub(r"([\s'\"\\])", r"\\\1", path) + ("/" if os.path.isdir(path) else "") for path in found]


def _last_word(line: str) -> str:
    """What stands behind the last space that no backslash escapes."""
    return re.split(r"(?<!\\) ", line)[-1]


def _harmless(text: str) -> str:
    """``text`` without what a terminal would take for commands."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))


def _lines(source: IO[str]) -> Iterator[str]:
    """Lines as they are typed, with a prompt; from a pipe, as they come."""
    if not source.isatty():
        yield from source
        return
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


def _set_up_editing() -> None:
    """Editing of lines, their history, and completion, where the system has readline."""
    with suppress(ImportError):
        import readline

        names = [*_KINDS, "media", "retry", "edit", "undo", "history", "set", "save", "load", "new", "help", "quit"]

        def completer(word: str, state: int) -> str | None:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            found = complete(line, names)
            # For readline a word begins behind an escaped space too: what stands before is there already.
            there = readline.get_begidx() - (len(line) - len(_last_word(line)))
            return found[state][there:] if state < len(found) else None

        readline.set_completer_delims(" ")
        readline.set_completer(completer)
        binding = "bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete"
        readline.parse_and_bind(binding)
