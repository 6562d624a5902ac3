"""The Python interface: `load_model` builds a ChatBridge, and a `Session` holds one conversation with it.

A session keeps the messages; an `Engine` computes the replies.
"""

from __future__ import annotations

import html
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from PIL import Image

from lavis_chatbridge.chat import messages as files
from lavis_chatbridge.chat.attachments import Images, Pairs, Sounds, media_of
from lavis_chatbridge.chat.conversation import ChatMessage, Conversation, MediaReader, Medium
from lavis_chatbridge.chat.engine import Answer, Engine, Reply
from lavis_chatbridge.chat.messages import Access, png_url
from lavis_chatbridge.config import merged, parse, read_options, read_yaml, unknown_key
from lavis_chatbridge.errors import ConfigError, MediaError, PromptError
from lavis_chatbridge.media import open_image
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.processors.base import Processor, load_processors


class Session:
    """A conversation with a model.

    Sessions may share an engine, from several threads. A call waits for the answer that the session is generating;
    `cancel` ends it. A call that fails does not change the conversation.

    Args:
        model: A ChatBridge; it is switched to evaluation.
        processors: As `processors.load_processors` returns them; by default those of the model's type.
        template: See `Engine`.
        system: System prompt; the paper's format has none.
        hear_videos: The model gets a video's own sound track with it.
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
        processors: Mapping[str, Mapping[str, Processor]] | None = None,
        template: str | None = None,
        *,
        system: str = "",
        hear_videos: bool = True,
        sampling: Sampling | None = None,
        messages: Sequence[ChatMessage] = (),
        hosts: Sequence[str] = (),
        engine: Engine | None = None,
    ) -> None:
        if engine is None:
            if processors is None:
                config = read_yaml(model.default_config_path(model.settings.model_type))
                processors = load_processors(config.get("preprocess"))
            engine = Engine(model, MediaReader(model, processors), template)
        self.engine = engine
        self.model, self.hear_videos = model, hear_videos
        self.sampling = sampling or Sampling()
        self.access = Access(hosts=tuple(hosts))
        self._conversation = Conversation(list(messages), system)
        self._asked: tuple[Conversation, Reply] | None = None
        self._lock = threading.RLock()

    @classmethod
    def open(
        cls,
        model: str | Path = "tiny",
        template: str | None = None,
        *,
        options: Sequence[str] = (),
        device: str = "auto",
        **settings: Any,
    ) -> Session:
        """A session with a model of its own; see `load_model` for its arguments, the rest is for the class."""
        return cls(*load_model(model, options, device), template, **settings)

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
            if self._asked is not None and self._asked[1].done:
                self._take()
            return tuple(self._conversation.messages)

    @property
    def system(self) -> str:
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
            ConfigError: If a setting does not fit.
        """
        return _whole(self.stream(text, images, videos, audios, media, **fields))

    def stream(
        self, text: str, images: Images = (), videos: Images = (), audios: Sounds = (), media: Pairs = (), **fields: Any
    ) -> Reply:
        """`ask`, and iterate over the reply for pieces of its text as they come."""
        sampling = self._sampling(fields)
        attached = media_of(images, videos, audios, media, self.hear_videos, self.access)
        with self._settled() as conversation:
            if len(conversation.messages) % 2:
                raise PromptError("the last question has no answer yet: call regenerate() or undo()")
            return self._begin(conversation.asking(text, attached), sampling)

    def regenerate(self, **fields: Any) -> Answer:
        """Answer the last question, again or after `edit`; only other ``fields`` change a greedy answer."""
        return _whole(self.restream(**fields))

    def restream(self, **fields: Any) -> Reply:
        """`regenerate`, as it comes."""
        sampling = self._sampling(fields)
        with self._settled() as conversation:
            messages = conversation.messages
            if messages and messages[-1].role == "assistant":
                messages = messages[:-1]
            return self._begin(replace(conversation, messages=messages), sampling)

    def cancel(self) -> None:
        """End the answer that is being generated at its next token; may be called from any thread."""
        if (asked := self._asked) is not None:
            asked[1].cancel()

    def edit(self, number: int, text: str) -> None:
        """Change the text of message ``number``; its media stay, later messages are dropped. Then call `regenerate`.

        Messages count from 0, negative numbers from the end.
        """
        with self._settled() as conversation:
            messages = conversation.messages
            if not -len(messages) <= number < len(messages):
                raise PromptError(f"there is no message {number}: the conversation has {len(messages)}")
            number %= len(messages)
            conversation.messages = [*messages[:number], replace(messages[number], text=text)]

    def undo(self) -> ChatMessage | None:
        """Remove the last question and its answer; returns the question, or None if there is none."""
        with self._settled() as conversation:
            messages = conversation.messages
            asked = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
            if asked is None:
                return None
            conversation.messages = messages[:asked]
            return messages[asked]

    def clear(self) -> None:
        """Begin a new conversation."""
        with self._settled() as conversation:
            conversation.messages = []

    def save(self, path: str | Path) -> None:
        """Write the conversation to a JSON file of OpenAI's messages."""
        with self._settled() as conversation:
            files.save(conversation, path)

    def load(self, path: str | Path) -> None:
        """Replace the conversation by a saved one. Its media are opened when they are needed."""
        loaded = files.load(path)
        with self._settled():
            self._conversation = loaded

    def _begin(self, conversation: Conversation, sampling: Sampling) -> Reply:
        reply = self.engine.reply(conversation, sampling)
        self._asked = conversation, reply
        return reply

    @contextmanager
    def _settled(self) -> Iterator[Conversation]:
        """The conversation, locked, once no answer is being generated."""
        with self._lock:
            self._take()
            yield self._conversation

    def _take(self) -> None:
        """Wait for the reply and add it to the conversation, unless it failed, or was cancelled without a token."""
        asked, self._asked = self._asked, None
        if asked is None:
            return
        conversation, reply = asked
        with suppress(Exception):  # the caller who asked gets it
            answer = reply.answer
            if answer.tokens or answer.finish != "cancelled":
                conversation.messages.append(ChatMessage("assistant", answer.text))
                self._conversation = conversation

    def _sampling(self, fields: dict[str, Any]) -> Sampling:
        for name in fields:
            if name not in Sampling.model_fields:
                known = [*Sampling.model_fields, "images", "videos", "audios", "media"]
                raise ConfigError(unknown_key(name, known, "ask"))
        return parse(Sampling, {**self.sampling.model_dump(), **fields}, "sampling")


def load_model(
    model: str | Path = "tiny", options: Sequence[str] = (), device: str = "auto", engine: str = ""
) -> tuple[ChatBridge, dict[str, dict[str, Processor]]]:
    """Build a ChatBridge for answering, and its processors.

    Args:
        model: A model type (``tiny``, ``vicuna7b``, ``vicuna13b``), a run's folder, or a YAML with ``model``
            and ``preprocess``; keys that it leaves out come from its ``model.model_type``.
        options: Settings that override the YAML's, ``model.checkpoint=file`` for example.
        device: ``"auto"`` takes CUDA if there is a device; else torch's name of one.
        engine: The address of a vLLM server that runs the language model; empty for a local one.

    Raises:
        ConfigError: If there is no such type, file or device, or a setting does not fit.
        CheckpointError: If a weight file is missing or does not fit.
        EngineError: If the server does not answer or serves another model.
    """
    folder = Path(model)
    if (folder / "config.yaml").is_file():
        options = [f"model.checkpoint={folder}/model.safetensors", *options]
        model = folder / "config.yaml"
    elif (folder / "config.json").is_file():
        raise ConfigError(f"--model {model} is a Hugging Face folder: first chatbridge convert {model} OUT --to run")
    if engine:
        options = [*options, f"model.language_model.engine={engine}"]
    if wrong := [option for option in options if "=" not in option or not option.startswith(("model.", "preprocess."))]:
        raise ConfigError(f"option {wrong[0]!r}: expected model.KEY=VALUE or preprocess.KEY=VALUE")
    own: Any = read_yaml(model) if str(model).endswith((".yaml", ".yml")) else OmegaConf.create({})
    base = read_yaml(ChatBridge.default_config_path(OmegaConf.select(own, "model.model_type") if own else str(model)))
    parts = [OmegaConf.masked_copy(part, ["model", "preprocess"]) for part in (base, own, read_options(options))]
    config, found = merged(*parts), _device(device)
    processors = load_processors(config.get("preprocess"))
    return ChatBridge.from_config(config.model).to(found).eval(), processors


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"torch has no device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name}: torch finds {torch.cuda.device_count()} CUDA devices here")
    return device


def _whole(reply: Reply) -> Answer:
    try:
        return reply.answer
    except KeyboardInterrupt:
        reply.cancel()
        raise


def _shown(medium: Medium) -> str:
    """A medium in a notebook: a small picture, or its name."""
    name = html.escape(medium.name)
    if medium.modality == "image":
        with suppress(MediaError):
            picture = Image.fromarray(open_image(medium.content))  # type: ignore[arg-type]
            picture.thumbnail((160, 160))
            return f'<img src="{png_url(picture)}" alt="{name}"> '
    return f"[{medium.modality}: {name}] "
