"""A conversation with ChatBridge: media in any turn, answers whole or as they come, and nothing read twice.

A `Session` holds the turns, the soft tokens of their media, and the keys and values of what the language model has
read: a new turn computes its new positions only. It knows templates and generation by their interfaces, no files but
its own, and no user interface.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from lavis_chatbridge.chat import history
from lavis_chatbridge.chat.history import ChatTurn
from lavis_chatbridge.chat.loading import load_model
from lavis_chatbridge.chat.media import Images, KindsAndSources, MediaNote, MediaReader, Medium, Sounds, media_of_turn
from lavis_chatbridge.config import parse, unknown_key
from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.models import families
from lavis_chatbridge.models.decoding import Decoder, Element, Finish, Generation, Prefix, Sampling, TextStream
from lavis_chatbridge.models.layout import elements_of
from lavis_chatbridge.models.templates import load_template
from lavis_chatbridge.models.text import text_of
from lavis_chatbridge.prompting import Modality, Slot, slots_of

_USUAL_CONTEXT = 2048


@dataclass(frozen=True)
class Answer:
    """A reply, and how it came about.

    Attributes:
        text: The reply.
        finish: ``"stop"`` if the model ended it, ``"length"`` if its limit did, ``"cancelled"`` if somebody did.
        tokens: Tokens of the reply.
        prompt_tokens: Positions of the conversation that the model was given.
        reused_tokens: How many of those it had read before.
        media: What became of the media of all turns that the model was given.
        turn: The number of the user's turn that it answers.
        dropped: Turns at the start of the conversation that did not fit into the context.
        first_token_seconds: From the call to the first token, the opening of media included.
    """

    text: str
    finish: Finish
    tokens: int
    prompt_tokens: int
    reused_tokens: int
    media: tuple[MediaNote, ...]
    turn: int
    dropped: int
    first_token_seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should know: about this turn's media, and about turns that the model was not given."""
        about = [f"{note.name}: {w}" for note in self.media if note.turn == self.turn for w in note.warnings]
        if self.dropped:
            about.append(f"the conversation is longer than the context: its first {self.dropped} turns were left out")
        return tuple(about)

    def to_record(self) -> dict[str, Any]:
        """The answer as plain data for JSON."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}


class Stream(Iterator[str]):
    """An answer as it comes: pieces of its text. The session waits until it is read to its end, or closed.

    Closing early ends the reply; what had come stays in the conversation.
    """

    def __init__(self, session: Session, generation: Generation) -> None:
        self._session, self._generation = session, generation
        self._texts = iter(Decoder(session.model.llama_model).run(generation))
        self._answer: Answer | None = None
        self._over = False
        self._step = threading.Lock()
        self._reader = threading.get_ident()

    @property
    def answer(self) -> Answer:
        """The whole answer; what has not been read of it is read now.

        Raises:
            PromptError: If it could not be generated.
        """
        for _ in self:
            pass
        if self._answer is None:
            raise PromptError("there is no answer: its generation failed")
        return self._answer

    @property
    def read_here(self) -> bool:
        """Whether it was this thread that last read from it."""
        return self._reader == threading.get_ident()

    def __next__(self) -> str:
        self._reader = threading.get_ident()
        with self._step:
            while not self._over:
                try:
                    text = next(self._texts, None)
                except BaseException:
                    self._over = True
                    self._session.abandon(self._generation)
                    raise
                if text is None:
                    self._over = True
                    self._answer = self._session.finish(self._generation)
                elif text:
                    return text
            raise StopIteration

    def cancel(self) -> None:
        """End the reply at its next token; may be called from any thread."""
        self._generation.cancel()

    def close(self) -> None:
        """End the reply, unless it is complete."""
        self.cancel()
        for _ in self:  # one step, which computes nothing and leaves what was read with the session
            pass

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *fault: object) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_over", True):
            self.close()


class Session:
    """A conversation.

    Sessions may share a model, from several threads; calls of one session wait for one another.

    Args:
        model: A ChatBridge; it is switched to evaluation.
        processors: As `processors.load_processors` gives them; those of the model's type without.
        template: ``"human_assistant"`` (the paper's), ``"vicuna_v1"``, or ``"tokenizer"`` (the language model's own).
        system: Words in front of the conversation.
        hear_videos: The model hears a video's own sound track with it.
        max_context: Positions that the model can read; its own limit without. The oldest turns that do not fit are left
            out, always whole.
        sampling: How replies are chosen, where a call does not say otherwise.
        turns: A conversation to go on from.
        reader: Shared with other sessions, a medium that several of them bring is perceived once.
        keep: Keep keys and values between turns; without, every turn reads the whole conversation again.

    Raises:
        ConfigError: If a setting does not fit.
        PromptError: If the turns do not alternate.
    """

    def __init__(
        self,
        model: Any,
        processors: Any = None,
        template: str = "human_assistant",
        *,
        system: str = "",
        hear_videos: bool = True,
        max_context: int | None = None,
        sampling: Sampling | None = None,
        turns: Sequence[ChatTurn] = (),
        reader: MediaReader | None = None,
        keep: bool = True,
    ) -> None:
        self.model = model.eval()
        self.template_name, self.system, self.hear_videos = template, system, hear_videos
        self.sampling = sampling or Sampling()
        self.max_context = max_context or _context_of(model)
        self.reader = reader or MediaReader(model, processors or _processors_of(model))
        self._codec = model.llama_tokenizer
        self._template = load_template(template, self._codec, system, model.settings.reply_end)
        self._keep = keep
        self._prefix = Prefix()
        self._busy = threading.Lock()
        self._running: _Running | None = None
        self._stream: weakref.ref[Stream] | None = None
        self._turns = _checked(turns)

    @classmethod
    def open(
        cls, model: str | Path = "tiny", template: str = "human_assistant", *, device: str = "auto", **settings: Any
    ) -> Session:
        """A session with a model of its own.

        Args:
            model: A model type or a configuration file, see `chat.loading.load_model`.
            template: See the class.
            device: Where the model runs.
            **settings: ``options`` override the model's configuration; the rest is for the class.

        Raises:
            ConfigError: If a setting does not fit.
            CheckpointError: If a weight file is missing or does not fit.
        """
        built, processors = load_model(model, settings.pop("options", ()), device)
        return cls(built, processors, template, **settings)

    @property
    def turns(self) -> tuple[ChatTurn, ...]:
        """The conversation so far."""
        return tuple(self._turns)

    @overload
    def ask(
        self,
        text: str,
        images: Images = ...,
        videos: Images = ...,
        audios: Sounds = ...,
        *,
        media: KindsAndSources = ...,
        stream: Literal[False] = ...,
        **sampling: Any,
    ) -> Answer: ...

    @overload
    def ask(
        self,
        text: str,
        images: Images = ...,
        videos: Images = ...,
        audios: Sounds = ...,
        *,
        media: KindsAndSources = ...,
        stream: Literal[True],
        **sampling: Any,
    ) -> Stream: ...

    def ask(
        self,
        text: str,
        images: Images = (),
        videos: Images = (),
        audios: Sounds = (),
        *,
        media: KindsAndSources = (),
        stream: bool = False,
        **sampling: Any,
    ) -> Answer | Stream:
        """Say something and get the model's answer.

        Args:
            text: What is said.
            images: Pictures that come with it, or a single one.
            videos: Videos, or a single one; each is heard too, unless ``hear_videos`` is off.
            audios: Sounds, or a single one. An array without a rate, ``(array, rate in Hz)``, is taken for 16 kHz.
            media: Kinds and sources, to give media in an order of one's own.
            stream: Give the answer as it comes.
            **sampling: Fields of `Sampling` for this answer (``max_new_tokens``, ``temperature``, ``seed``...).

        Raises:
            MediaError: If a medium cannot be opened; the conversation is then as before.
            PromptError: If there are neither words nor media, the turn alone exceeds the context, or the last turn
                still waits for its answer.
            ConfigError: If a setting does not fit.
        """
        _check_text(text)
        brought = media_of_turn(images, videos, audios, media, self.hear_videos)
        generation = self._begin([ChatTurn("user", text, tuple(brought))], sampling)
        return self._answered(generation, stream)

    @overload
    def regenerate(self, *, stream: Literal[False] = ..., **sampling: Any) -> Answer: ...

    @overload
    def regenerate(self, *, stream: Literal[True], **sampling: Any) -> Stream: ...

    def regenerate(self, *, stream: bool = False, **sampling: Any) -> Answer | Stream:
        """Answer the last user's turn anew, or for the first time.

        Args:
            stream: Give the answer as it comes.
            **sampling: Fields of `Sampling`; a greedy answer only differs with other ones.

        Raises:
            PromptError: If nothing was asked yet.
        """
        return self._answered(self.begin(**sampling), stream)

    def begin(self, **sampling: Any) -> Generation:
        """Prepare an answer to the last user's turn, for a `Decoder` that moves several answers forward together.

        The session waits for `finish` or `abandon`. Media are opened and encoded here.

        Args:
            **sampling: Fields of `Sampling`.

        Raises:
            ChatBridgeError: As `ask` does.
        """
        return self._begin([], sampling)

    def finish(self, generation: Generation) -> Answer:
        """Take a generated answer into the conversation; one that is not complete counts as cancelled."""
        running = self._running
        if running is None or running.generation is not generation:
            raise PromptError("this answer is not the one that the session waits for")
        generation.end("cancelled")
        assert generation.finish is not None
        text = generation.stream.text
        self._turns = [*running.turns, ChatTurn("assistant", text, (), self._kept_ids(generation))]
        self._running = None
        self._busy.release()
        return Answer(
            text=text,
            finish=generation.finish,
            tokens=len(generation.ids),
            prompt_tokens=len(generation.elements),
            reused_tokens=generation.reused,
            media=running.notes,
            turn=len(running.turns) - 1,
            dropped=running.dropped,
            first_token_seconds=generation.first_token or 0.0,
        )

    def abandon(self, generation: Generation) -> None:
        """Forget an answer that could not be generated; the conversation is as before the question."""
        if self._running is not None and self._running.generation is generation:
            self._running = None
            self._busy.release()

    def cancel(self) -> None:
        """End the answer that is being generated, if one is, at its next token; may be called from any thread."""
        running = self._running
        if running is not None:
            running.generation.cancel()

    def edit(self, turn: int, text: str) -> None:
        """Change what was said in a turn; later turns are dropped. A user's turn is then answered by `regenerate`.

        Args:
            turn: Its number in ``turns``, from 0; negative ones count from the end.
            text: What is to stand there; the turn's media stay.

        Raises:
            PromptError: If there is no such turn.
        """
        _check_text(text)
        with self._alone():
            if not -len(self._turns) <= turn < len(self._turns):
                raise PromptError(f"there is no turn {turn}: the conversation has {len(self._turns)}")
            place = turn % len(self._turns)
            self._turns = [*self._turns[:place], replace(self._turns[place], text=text, ids=None)]

    def undo(self) -> ChatTurn | None:
        """Take back the last question and its answer; returns the question, none if there was none."""
        with self._alone():
            asked = next((i for i in reversed(range(len(self._turns))) if self._turns[i].role == "user"), None)
            if asked is None:
                return None
            taken, self._turns = self._turns[asked], self._turns[:asked]
            return taken

    def clear(self) -> None:
        """Begin anew."""
        with self._alone():
            self._turns, self._prefix = [], Prefix()

    def release(self) -> None:
        """Give back the memory of keys and values; the next turn reads the conversation again."""
        with self._alone():
            self._prefix = Prefix()

    def save(self, path: str | Path) -> None:
        """Write the conversation to a JSON file, whole or not at all.

        Raises:
            DataError: If it cannot be written.
        """
        with self._alone():
            settings = {"template": self.template_name, "system": self.system}
            history.write(path, self._turns, settings)

    def load(self, path: str | Path) -> None:
        """Go on from a saved conversation, which replaces this one. Its media are opened when they are needed.

        Raises:
            DataError: If the file cannot be read, or is no conversation.
        """
        turns, settings = history.read(path)
        template = load_template(
            str(settings.get("template", self.template_name)),
            self._codec,
            str(settings.get("system", "")),
            self.model.settings.reply_end,
        )
        known = [_known_ids(turn, self._codec, template.stops) for turn in turns]
        with self._alone():
            self._turns, self._template, self._prefix = _checked(known), template, Prefix()
            self.template_name = str(settings.get("template", self.template_name))
            self.system = str(settings.get("system", ""))

    def _begin(self, new: Sequence[ChatTurn], sampling: dict[str, Any]) -> Generation:
        """Wait for the session, and prepare an answer after ``new`` turns, or (none) to the last user's turn anew."""
        chosen = self._sampling(sampling)
        self._wait()
        started = time.monotonic()
        try:
            turns = [*self._turns, *new]
            if not new and turns and turns[-1].role == "assistant":
                turns = turns[:-1]
            if not turns or len(turns) % 2 == 0:
                waits = "the last question waits for its answer: call regenerate() or undo()" if new else ""
                raise PromptError(waits or "there is no question to answer")
            if not turns[-1].text.strip() and not turns[-1].media:
                raise PromptError("the question is empty, and there is no medium to speak about")
            elements, start, media = self._prompt(turns, chosen.max_new_tokens)
            room = self.max_context - len(elements)
            generation = Generation(
                elements,
                {m.perceived.key: m.perceived.soft for m in media if m.perceived and m.perceived.soft is not None},
                self._prefix if self._keep else Prefix(),
                TextStream(self._codec, (*self._template.stops, *chosen.stop)),
                self._template.end_ids,
                chosen.model_copy(update={"max_new_tokens": min(chosen.max_new_tokens, room)}),
            )
            generation.started = started
            notes = tuple(m.note(i) for i in range(start, len(turns)) for m in turns[i].media)
            self._running = _Running(generation, turns, notes, start)
            return generation
        except BaseException:
            self._busy.release()
            raise

    def _prompt(self, turns: Sequence[ChatTurn], room: int) -> tuple[list[Element], int, list[Medium]]:
        """The elements of as many of the last turns as fit, the number of the first of them, and their media."""
        start = 0
        self.reader.read([medium for turn in turns for medium in turn.media])
        while True:
            window = turns[start:]
            media = [medium for turn in window for medium in turn.media if medium.reached]
            elements = self._elements(window, media)
            last = start == len(turns) - 1
            if len(elements) + (1 if last else room) <= self.max_context:
                return elements, start, media
            if last:
                raise PromptError(
                    f"this turn alone has {len(elements)} tokens, but the context holds {self.max_context} with the "
                    "answer: shorten the text or give fewer media"
                )
            start += 2

    def _elements(self, window: Sequence[ChatTurn], media: Sequence[Medium]) -> list[Element]:
        by_kind: dict[Modality, list[Medium]] = {}
        for medium in media:
            by_kind.setdefault(medium.kind, []).append(medium)
        pieces = self._template.prompt([turn.message for turn in window], generate=True)
        found: dict[Slot, tuple[str, int]] = {}
        for slot in slots_of(pieces):
            seen = by_kind[slot.kind][slot.index].perceived
            assert seen is not None
            assert seen.soft is not None
            found[slot] = (seen.key, len(seen.soft))
        return elements_of(pieces, found, self._codec)

    def _answered(self, generation: Generation, stream: bool) -> Answer | Stream:
        streamed = Stream(self, generation)
        if not stream:
            return streamed.answer
        self._stream = weakref.ref(streamed)
        return streamed

    def _wait(self) -> None:
        """Wait until no other call is under way; a stream that this very thread has left half read is closed."""
        left = self._stream() if self._stream is not None else None
        if left is not None and left.read_here:
            left.close()
        self._busy.acquire()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        self._wait()
        try:
            yield
        finally:
            self._busy.release()

    def _kept_ids(self, generation: Generation) -> tuple[int, ...] | None:
        """The reply's own tokens, unless they hold more than its text and the end that the template knows."""
        stopped = generation.stream.stopped
        if stopped is None:
            return tuple(generation.ids)
        whole = self._codec.decode(generation.ids)
        return tuple(generation.ids) if stopped in self._template.stops and whole.endswith(stopped) else None

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        fields = set(Sampling.model_fields)
        unknown = [name for name in given if name not in fields]
        if unknown:
            raise ConfigError(unknown_key(unknown[0], fields, "sampling"))
        if isinstance(given.get("stop"), str):
            raise ConfigError("stop is a list of texts")
        return parse(Sampling, {**self.sampling.model_dump(), **given}, "sampling")


@dataclass
class _Running:
    """The answer that a session waits for: to the last of ``turns``, the first ``dropped`` of which were left out."""

    generation: Generation
    turns: list[ChatTurn]
    notes: tuple[MediaNote, ...]
    dropped: int


def _checked(turns: Sequence[ChatTurn]) -> list[ChatTurn]:
    for i, turn in enumerate(turns):
        expected = "assistant" if i % 2 else "user"
        if turn.role != expected:
            raise PromptError(f"turn {i} is of role {turn.role!r}, expected {expected!r}: turns alternate, user first")
        _check_text(turn.text)
    return list(turns)


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise PromptError(f"what is said is a text, found {text!r:.80}; media are given as images=, videos=, audios=")


def _known_ids(turn: ChatTurn, codec: Any, stops: Sequence[str]) -> ChatTurn:
    """A turn whose tokens are forgotten if another tokenizer made them."""
    if turn.ids is None:
        return turn
    valid = all(0 <= token < len(codec) for token in turn.ids) and text_of(codec, turn.ids, stops) == turn.text
    return turn if valid else replace(turn, ids=None)


def _context_of(model: Any) -> int:
    most = families.positions_of(model.llama_model.config)
    return int(most) if math.isfinite(most) else _USUAL_CONTEXT


def _processors_of(model: Any) -> Any:
    from omegaconf import OmegaConf

    from lavis_chatbridge.processors import load_processors

    described: Any = OmegaConf.load(model.default_config_path(model.settings.model_type))
    return load_processors(described.get("preprocess"))
