"""A conversation in Python: `Session` holds a `Conversation` and asks an `Engine`. It knows no user interface."""

from __future__ import annotations

import html
import io
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from lavis_chatbridge.chat.attachments import Images, Pairs, Sounds, media_of
from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, Medium
from lavis_chatbridge.chat.engine import Answer, Engine, Reply
from lavis_chatbridge.chat.loading import default_processors, load_model
from lavis_chatbridge.chat.reader import MediaReader
from lavis_chatbridge.chat.urls import Access, data_url
from lavis_chatbridge.config import parse, unknown_key
from lavis_chatbridge.errors import ConfigError, MediaError, PromptError
from lavis_chatbridge.media import open_image
from lavis_chatbridge.models.sampling import Sampling

if TYPE_CHECKING:
    from lavis_chatbridge.models.chatbridge import ChatBridge

_THUMBNAIL = (160, 160)  # pixels of an image in a notebook


class Session:
    """A conversation with a model.

    Sessions may share an engine, from several threads. A call waits for the answer that the session is generating;
    `cancel` ends it.

    Args:
        model: A ChatBridge; it is switched to evaluation.
        processors: As `processors.load_processors` gives them; by default those of the model's type.
        template: See `Engine`.
        system: System prompt; the paper's format has none.
        hear_videos: The model gets a video's own sound track with it.
        max_context: Positions that the model reads at most; by default its own limit.
        sampling: How replies are chosen, unless a call sets it.
        messages: The conversation so far.
        hosts: Host names from which ``http(s)`` URLs are fetched.
        engine: Shared with other sessions; by default a new one.

    Raises:
        ConfigError: If a setting does not fit.
    """

    def __init__(
        self,
        model: ChatBridge,
        processors: Any = None,
        template: str | None = None,
        *,
        system: str = "",
        hear_videos: bool = True,
        max_context: int | None = None,
        sampling: Sampling | None = None,
        messages: Sequence[ChatMessage] = (),
        hosts: Sequence[str] = (),
        engine: Engine | None = None,
    ) -> None:
        if engine is None:
            reader = MediaReader(model, processors or default_processors(model))
            engine = Engine(model, reader, template, max_context=max_context)
        self.model, self.engine, self.hear_videos = model, engine, hear_videos
        self.sampling = sampling or Sampling()
        self.access = Access(hosts=tuple(hosts))
        self._conversation = Conversation(list(messages), system)
        self._asked: Conversation | None = None
        self._reply: Reply | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls, model: str | Path = "tiny", template: str | None = None, *, device: str = "auto", **settings: Any
    ) -> Session:
        """A session with a model of its own.

        Args:
            model: See `load_model`, which also explains ``device`` and the errors.
            **settings: ``options`` override the model's configuration; the rest is for the class.
        """
        built, processors = load_model(model, settings.pop("options", ()), device)
        return cls(built, processors, template, **settings)

    def __repr__(self) -> str:
        media = sum(not medium.track for message in self.messages for medium in message.media)
        return f"<Session with {self.model.settings.model_type}: {len(self.messages)} messages, {media} media>"

    def _repr_html_(self) -> str | None:
        """The conversation in a notebook, with its pictures; a session without messages is shown by its repr."""
        rows = [
            f"<p><b>{message.role}</b>: {html.escape(message.text)}<br>{''.join(map(_shown, message.media))}</p>"
            for message in self.messages
        ]
        return "".join(rows) or None

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The conversation so far, without a question that has no answer yet."""
        with self._lock:
            if self._reply is not None and self._reply.done:
                self._take()
            return tuple(self._conversation.messages)

    @property
    def system(self) -> str:
        """The system prompt."""
        return self._conversation.system

    def ask(
        self, text: str, images: Images = (), videos: Images = (), audios: Sounds = (), media: Pairs = (), **fields: Any
    ) -> Answer:
        """Ask something.

        Args:
            text: The question.
            images: Images that belong to it, or one: paths, bytes, file objects, URLs, arrays, tensors, Pillow images.
            videos: Videos, or one; a list of still Pillow images is one video. Each is heard too, unless
                ``hear_videos`` is off.
            audios: Sounds, or one. An array is a sound at 16 kHz, ``(array, rate in Hz)`` one at another rate.
            media: Pairs of modality and medium, in an order of your own.
            **fields: Fields of `Sampling` for this answer (``max_new_tokens``, ``temperature``, ``seed``...).

        Raises:
            MediaError: If a medium cannot be opened.
            PromptError: If there are neither words nor media, the message alone exceeds the context, or the last
                question still has no answer.
            ConfigError: If a setting does not fit. After any error the conversation is as before.
        """
        return _whole(self.stream(text, images, videos, audios, media=media, **fields))

    def stream(
        self, text: str, images: Images = (), videos: Images = (), audios: Sounds = (), media: Pairs = (), **fields: Any
    ) -> Reply:
        """Ask something and get the answer as it comes: iterate over it for pieces of its text; see `ask`."""
        sampling = self._sampling(fields)
        _check_text(text)
        attached = media_of(images, videos, audios, media, self.hear_videos, self.access)
        with self._settled():
            if len(self._conversation.messages) % 2:
                raise PromptError("the last question has no answer yet: call regenerate() or undo()")
            return self._begin(self._conversation.asking(text, attached), sampling)

    def regenerate(self, **fields: Any) -> Answer:
        """Answer the last question again, or for the first time after `edit`; a greedy answer needs other ``fields``.

        Raises:
            PromptError: If nothing was asked yet.
        """
        return _whole(self.restream(**fields))

    def restream(self, **fields: Any) -> Reply:
        """`regenerate`, as it comes."""
        sampling = self._sampling(fields)
        with self._settled():
            messages = self._conversation.messages
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            return self._begin(replace(self._conversation, messages=messages), sampling)

    def cancel(self) -> None:
        """End the answer that is being generated at its next token; may be called from any thread."""
        reply = self._reply
        if reply is not None:
            reply.cancel()

    def edit(self, turn: int, text: str) -> None:
        """Change the text of a message, whose media stay; later messages are dropped. Then call `regenerate`.

        Args:
            turn: Its number in ``messages``, from 0; negative ones count from the end.
            text: The new text.

        Raises:
            PromptError: If there is no such message.
        """
        _check_text(text)
        with self._settled():
            messages = self._conversation.messages
            if not -len(messages) <= turn < len(messages):
                raise PromptError(f"there is no message {turn}: the conversation has {len(messages)}")
            number = turn % len(messages)
            self._conversation.messages = [*messages[:number], replace(messages[number], text=text, ids=None)]

    def undo(self) -> ChatMessage | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        with self._settled():
            messages = self._conversation.messages
            asked = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
            if asked is None:
                return None
            self._conversation.messages = messages[:asked]
            return messages[asked]

    def clear(self) -> None:
        """Begin a new conversation."""
        with self._settled():
            self._conversation.messages = []

    def save(self, path: str | Path) -> None:
        """Write the conversation to a JSON file of OpenAI's messages."""
        with self._settled():
            self._conversation.save(path)

    def load(self, path: str | Path) -> None:
        """Replace the conversation by a saved one. Its media are opened when they are needed.

        Raises:
            DataError: If the file cannot be read or holds no conversation.
        """
        loaded = Conversation.load(path)
        with self._settled():
            self._conversation = loaded

    def _begin(self, asked: Conversation, sampling: Sampling) -> Reply:
        self._asked, self._reply = asked, self.engine.reply(asked, sampling)
        return self._reply

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Hold the session once no answer is being generated."""
        with self._lock:
            self._take()
            yield

    def _take(self) -> None:
        """Wait for the reply, and add it to the conversation; a failed one, or an empty one, leaves no trace."""
        reply, asked = self._reply, self._asked
        self._reply = self._asked = None
        with suppress(Exception):  # the caller who asked gets it
            if reply is not None and asked is not None and (reply.answer.tokens or reply.answer.finish != "cancelled"):
                asked.messages.append(ChatMessage("assistant", reply.answer.text, (), reply.answer.ids))
                self._conversation = asked

    def _sampling(self, given: dict[str, Any]) -> Sampling:
        unknown = [name for name in given if name not in Sampling.model_fields]
        if unknown:
            known = [*Sampling.model_fields, "images", "videos", "audios", "media"]
            raise ConfigError(unknown_key(unknown[0], known, "ask"))
        return parse(Sampling, {**self.sampling.model_dump(), **given}, "sampling")


def _whole(reply: Reply) -> Answer:
    try:
        return reply.answer
    except KeyboardInterrupt:
        reply.cancel()
        raise


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise PromptError(f"a question is a text, found {text!r:.80}; media are given as images=, videos=, audios=")


def _shown(medium: Medium) -> str:
    """A medium in a notebook: a small picture, or its name."""
    name = html.escape(medium.name)
    if medium.modality == "image":
        with suppress(MediaError):
            picture = Image.fromarray(open_image(medium.content))  # type: ignore[arg-type]
            picture.thumbnail(_THUMBNAIL)
            file = io.BytesIO()
            picture.save(file, "PNG")
            return f'<img src="{data_url(file.getvalue(), "image/png")}" alt="{name}"> '
    return f"[{medium.modality}: {name}] "
