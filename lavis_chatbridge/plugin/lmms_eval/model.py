"""The classes that lmms-eval runs. They need lmms-eval, which no other part of the package does."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from lavis_chatbridge.chat.conversation import ChatMessage, Medium
from lavis_chatbridge.chat.session import load_model
from lavis_chatbridge.errors import ConfigError, MediaError
from lavis_chatbridge.media import has_audio_track
from lavis_chatbridge.plugin.lmms_eval.requests import batches, conversation, decoding, question
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality

_log = logging.getLogger(__name__)

Read = tuple[list[Any], dict[Modality, list[Any]]]
"""A request's prompt, and its prepared media by modality."""


class Score(GenerationResult):
    """A continuation's mean loss, and whether greedy decoding gives it; lmms-eval 0.7 makes text of other classes."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.text)


class ChatBridge(lmms):
    """Answers lmms-eval's plain tasks: a question, and media of any modality before it.

    A request whose medium cannot be read is answered with an empty text, and the log names the file.

    Args:
        pretrained: A model type (``tiny``, ``vicuna7b``, ``vicuna13b``) or a YAML with ``model`` and ``preprocess``.
        batch_size: Requests answered at once.
        device: By default this process's CUDA device, or the CPU.
        max_batch_size: Ignored: lmms-eval passes it to every model.
        hear_videos: The model hears a video's own sound track, if a task brings no sound of its own.
        **options: Settings that override the model's, under their full names: ``model.checkpoint=file``.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str = "tiny",
        batch_size: int | str | None = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        hear_videos: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size or 1).isdigit():
            raise ConfigError(f"batch_size {batch_size!r}: expected a whole number from 1")
        self.batch_size, self.hear_videos = int(batch_size or 1), hear_videos
        changes = [f"{key}={value}" for key, value in options.items()]
        own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        self.model, processors = load_model(str(pretrained), changes, device or own)
        self.device = self.model.device
        self._processors = {modality: processors[modality]["eval"] for modality in MODALITIES}

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        kwargs = [self._kwargs(request) for request in requests]
        answers = [""] * len(requests)
        keys = [json.dumps(given, sort_keys=True, default=str) for given in kwargs]
        for numbers in batches(keys, [len(str(request.args[0])) for request in requests], self.batch_size):
            read = {number: one for number in numbers if (one := self._read(requests[number])) is not None}
            if read:
                found = self.model.generate(_samples(list(read.values())), sampling=decoding(kwargs[numbers[0]]))
                for number, answer in zip(read, found, strict=True):
                    answers[number] = answer.strip()
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[Score]:
        """The mean loss of each continuation's tokens, the smallest of which lmms-eval takes for the choice.

        The media and the question of several continuations are read once.
        """
        results = [Score((math.inf, False))] * len(requests)
        together: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(repr((request.args[0], *request.args[3:])), []).append(number)
        for numbers in together.values():
            read = self._read(requests[numbers[0]])
            if read is None:
                continue
            targets = [requests[number].args[1] for number in numbers]
            texts = [target(self._doc(requests[numbers[0]])) if callable(target) else target for target in targets]
            answers = [str(text).strip() for text in texts]  # other models' prompts need a leading space
            scores, lengths = self.model.answer_scores(_samples([read]), answers)
            said = self.model.generate(_samples([read]), max_length=int(lengths.max()))[0]
            for number, answer, loss in zip(numbers, answers, (-scores[0] / lengths).tolist(), strict=True):
                results[number] = Score((loss, said.split() == answer.split()))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("ChatBridge answers lmms-eval's tasks of one round: generate_until and loglikelihood")

    def _messages(self, request: Any) -> list[ChatMessage]:
        visuals = request.args[2](self._doc(request)) if len(request.args) > 2 else None
        return question(str(request.args[0]), visuals, self.hear_videos)

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[1])

    def _doc(self, request: Any) -> Any:
        number, task, split = request.args[3:6]
        return self.task_dict[task][split][number]

    def _read(self, request: Any) -> Read | None:
        """None if a medium cannot be read."""
        media: dict[Modality, list[Any]] = {modality: [] for modality in MODALITIES}
        messages = []
        try:
            for said in self._messages(request):
                read = [(given.modality, medium) for given in said.media if (medium := self._open(given)) is not None]
                messages.append(Message(said.role, said.text, tuple(modality for modality, _ in read)))
                for modality, medium in read:
                    media[modality].append(medium)
        except MediaError as error:
            _log.warning("a request of task %s is answered with an empty text: %s", request.task_name, error)
            return None
        return self.model.template.prompt(messages, generate=True), media

    def _open(self, given: Medium) -> Any:
        processor = self._processors[given.modality]
        if given.track and not has_audio_track(given.content, limits=processor.limits):  # type: ignore[arg-type]
            return None
        return processor(given.content)


class ChatBridgeChat(ChatBridge):
    """Answers lmms-eval's chat tasks: messages whose media stand in any of them."""

    is_simple = False

    def _messages(self, request: Any) -> list[ChatMessage]:
        return conversation(request.args[1](self._doc(request)), self.hear_videos)

    def _kwargs(self, request: Any) -> dict[str, Any]:
        return dict(request.args[2])


def _samples(read: Sequence[Read]) -> dict[str, Any]:
    media: dict[str, Any] = {modality: [own[modality] for _, own in read] for modality in MODALITIES}
    return {"pieces": [pieces for pieces, _ in read], **media}
