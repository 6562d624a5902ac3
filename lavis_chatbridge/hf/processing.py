"""``ChatBridgeProcessor``: texts, images, videos and sounds to the model's inputs; ``ChatBridgeCollator`` for training.

Prompts are worded by ``models.templates``, so their ids equal those of evaluation, chat and server. A medium has one
placeholder id for each of its soft tokens. Placeholder ids are greater than the tokenizer's last id, so no text can
produce one.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin

from lavis_chatbridge import hub
from lavis_chatbridge.errors import ConfigError, MediaError, PromptError, one_line
from lavis_chatbridge.hf.configuration import CONFIG, ChatBridgeConfig
from lavis_chatbridge.hf.modeling import PIXELS
from lavis_chatbridge.media import has_audio_track
from lavis_chatbridge.models.decoding import TextStream
from lavis_chatbridge.models.layout import PADDING, SOFT, lay_out
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.models.templates import load_template
from lavis_chatbridge.models.tokenizer import Tokenizer, load_tokenizer
from lavis_chatbridge.processors import load_processors
from lavis_chatbridge.processors.audio import is_silent
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Modality, Piece, Slot

_SOURCES = ("url", "path", "base64", "image", "video", "audio")
Messages = Sequence[Mapping[str, Any]]
Loaded = tuple[Modality, Any]
"""A modality and a processed medium."""


class ChatBridgeProcessor(ProcessorMixin):
    """Tokenizer, chat template and the processors of images, videos and sounds.

    Build one with :meth:`from_pretrained`. With ``hear_videos`` the audio track of each video is used too.
    """

    attributes: ClassVar[list[str]] = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    chat_template = None

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        config: ChatBridgeConfig,
        folder: Path | None = None,
        hear_videos: bool = True,
    ) -> None:
        self.config, self.hear_videos = config, hear_videos
        self.settings: ModelSettings = config.settings(folder)
        named = self.settings.language_model.tokenizer or self.settings.language_model.weights
        path = hub.find(named or (), "model.language_model.tokenizer", "tokenizer")
        self.codec = load_tokenizer(path)
        super().__init__(tokenizer or _tokenizer(path, self.codec))
        self.processors = load_processors(config.sections(folder).preprocess)
        load = partial(load_template, self.settings.template, self.codec, reply_end=self.settings.reply_end)
        self.template = lru_cache(maxsize=8)(load)
        """The template with a system prompt."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name: str | Path, *, revision: str | None = None, hear_videos: bool = True, **unused: Any
    ) -> ChatBridgeProcessor:
        """Load the processor of a model; ``name`` as for the model's ``from_pretrained``."""
        config, folder = ChatBridgeConfig.find(name, revision)
        return cls(None, config, folder, hear_videos)

    def save_pretrained(self, save_directory: str | Path, **unused: Any) -> None:  # type: ignore[override]
        """Write the tokenizer's files, and the configuration unless the model has written it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CONFIG).is_file():
            self.config.with_references(folder, self.settings).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def placeholder_ids(self) -> dict[Modality, int]:
        """Modality -> the id that marks a soft token."""
        return {modality: len(self.codec) + i for i, modality in enumerate(MODALITIES)}

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        hear_videos: bool | None = None,
        **unused: Any,
    ) -> BatchFeature:
        """Prepare one question with its media per row; rows are padded on the left.

        Args:
            images: For one text, an image (path, URL, bytes, PIL image, array) or a list of them; for a list of texts,
                a list with one such entry for each.
            text: One or several questions; None: only media.
            videos: Videos, likewise. Their audio tracks are used too unless ``audio`` is given.
            audio: Sounds, likewise.
            hear_videos: Overrides the processor's own setting.
            **unused: Arguments of other processors, such as ``return_tensors="pt"``.
        """
        if wrong := next((name for name in ("image", "video", "audios") if name in unused), None):
            raise PromptError(f"the processor takes images=, videos= and audio=, not {wrong}=")
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        given = {"image": images, "video": videos, "audio": audio}
        rows = {m: _rows(media, text, m) for m, media in given.items() if media is not None}
        conversations: list[Messages] = []
        for number, question in enumerate(texts):
            parts = [{"type": modality, modality: medium} for modality in rows for medium in rows[modality][number]]
            conversations.append([{"role": "user", "content": [*parts, {"type": "text", "text": question}]}])
        return self.features(conversations, hear_videos if audio is None else False)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Messages | Sequence[Messages],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        hear_videos: bool | None = None,
        **unused: Any,
    ) -> Any:
        """Format one or several conversations with the model's template.

        Args:
            conversation: Messages ``{"role", "content"}``. A content is a text or a list of parts ``{"type": "text",
                "text"}`` and ``{"type": "image" | "video" | "audio", "url" | "path" | "image" | ...}``.
            chat_template: Must be None: ``model.template`` decides.
            tokenize: Return ids instead of text.
            return_dict: With ``tokenize``: return all inputs of the model, not only the ids.
            hear_videos: Overrides the processor's own setting.
            **unused: Arguments of other processors.
        """
        if chat_template is not None:
            raise ConfigError("ChatBridge formats conversations with model.template: omit chat_template")
        batched = bool(conversation) and not isinstance(conversation[0], Mapping)
        conversations: Any = conversation if batched else [conversation]
        if not tokenize:
            prompts = [self._read(messages, hear_videos)[0] for messages in conversations]
            texts = ["".join(f"<{p.modality}>" if isinstance(p, Slot) else p.text for p in own) for own in prompts]
            return texts if batched else texts[0]
        features = self.features(conversations, hear_videos)
        return features if return_dict else features["input_ids"]

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **unused: Any) -> list[str]:
        """The replies in generated ids, each up to its end marker."""
        return [self.decode(row, skip_special_tokens) for row in sequences]

    post_process_image_text_to_text = post_process_multimodal_output = batch_decode  # type: ignore[assignment]

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **unused: Any) -> str:
        """The text of ids without placeholders; with ``skip_special_tokens`` up to the end marker of the reply."""
        listed = token_ids.tolist() if isinstance(token_ids, Tensor) else list(token_ids)
        known = [token for token in listed if token < len(self.codec)]
        if not skip_special_tokens:
            return self.tokenizer.decode(known)
        template = self.template("")
        end = next((i for i, token in enumerate(known) if token in template.end_ids), len(known))
        return TextStream.of(self.codec, known[:end], template.stops).text

    def _read(self, messages: Messages, hear_videos: bool | None) -> tuple[list[Piece], list[Loaded]]:
        """A conversation as pieces, and its media in order."""
        said: list[Message] = []
        media: list[Loaded] = []
        system = ""
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            text = "\n".join(part["text"] for part in parts if part.get("type") == "text")
            if message["role"] == "system":
                system = text
                continue
            loaded = self._load([part for part in parts if part.get("type") != "text"], hear_videos)
            media += loaded
            said.append(Message(message["role"], text, tuple(modality for modality, _ in loaded)))
        return self.template(system).prompt(said, generate=bool(said) and said[-1].role == "user"), media

    def _load(self, parts: Sequence[Mapping[str, Any]], hear_videos: bool | None) -> list[Loaded]:
        """Open media, and download URLs; each video is followed by its audio track unless that is silent or absent."""
        import httpx

        hear = self.hear_videos if hear_videos is None else hear_videos
        loaded: list[Loaded] = []
        for part in parts:
            modality = part.get("type")
            if modality not in MODALITIES:
                raise PromptError(f"a part of type {modality!r}; expected text, {', '.join(MODALITIES)}")
            key = next((key for key in _SOURCES if part.get(key) is not None), None)
            if key is None:
                raise PromptError(f"a part of type {modality!r} has no medium: pass one of {', '.join(_SOURCES)}")
            source: Any = base64.b64decode(part[key]) if key == "base64" else part[key]
            if isinstance(source, str) and source.startswith(("http://", "https://")):
                try:
                    source = httpx.get(source, follow_redirects=True, timeout=60.0).raise_for_status().content
                except httpx.HTTPError as error:
                    raise MediaError(source, one_line(error)) from error
            loaded.append((modality, self.processors[modality]["eval"](source)))
            if modality == "video" and hear:
                with suppress(MediaError):
                    track = self.processors["audio"]["eval"](source) if has_audio_track(source) else None
                    loaded += [] if track is None or is_silent(track) else [("audio", track)]
        return loaded

    def features(
        self, conversations: Sequence[Messages], hear_videos: bool | None = None, generate: bool = True
    ) -> BatchFeature:
        """The model's inputs: ids with placeholders, masks and media; with ``labels`` unless ``generate``."""
        prompts, media = zip(*(self._read(messages, hear_videos) for messages in conversations), strict=True)
        by_modality: dict[Modality, list[Any]] = {modality: [] for modality in MODALITIES}
        ranges: list[dict[Slot, range]] = [{} for _ in prompts]
        queries, per_frame = self.settings.perceiver.queries, self.settings.perceiver.video_queries == "per_frame"
        start, bounds = 0, []
        for modality in MODALITIES:
            for row, loaded in enumerate(media):
                for index, medium in enumerate(one for own, one in loaded if own == modality):
                    first = start
                    start += queries * len(medium) if modality == "video" and per_frame else queries
                    ranges[row][Slot(modality, index)] = range(first, start)
                    by_modality[modality].append(medium)
            bounds.append(start)
        longest = 1 << 30 if generate else self.settings.max_text_length
        rows = lay_out(prompts, ranges, self.codec, "text" if generate else self.settings.prompt_layout, longest)
        soft = torch.full_like(rows.token_ids, -1).masked_scatter(rows.token_ids == SOFT, rows.soft)
        placeholders = torch.bucketize(soft, torch.tensor(bounds), right=True) + len(self.codec)
        ids = rows.token_ids.masked_fill(rows.token_ids == PADDING, self.codec.pad_id)
        ids = torch.where(soft >= 0, placeholders, ids)
        columns = {"input_ids": ids, "attention_mask": rows.attention_mask, "soft_index": soft}
        if generate:  # move the padding from the right to the left
            lengths = rows.attention_mask.sum(1).tolist()
            for name, padding in (("input_ids", self.codec.pad_id), ("attention_mask", 0), ("soft_index", -1)):
                cut = [row[:length] for row, length in zip(columns[name], lengths, strict=True)]
                columns[name] = pad_sequence(cut, True, padding, padding_side="left")
        else:
            columns |= {"position_ids": rows.position_ids, "labels": rows.labels}
        return BatchFeature({**columns, **_media_tensors(by_modality)})


class ChatBridgeCollator:
    """Makes batches for transformers' ``Trainer`` of samples ``{"messages": [...]}``; every reply is a target."""

    def __init__(self, processor: ChatBridgeProcessor) -> None:
        self.processor = processor

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The inputs and labels of a batch."""
        return dict(self.processor.features([sample["messages"] for sample in samples], generate=False))


def _tokenizer(folder: Path, codec: Tokenizer) -> PreTrainedTokenizerBase:
    """transformers' tokenizer of a folder, from ``tokenizer.json`` alone if that file exists."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    fast = PreTrainedTokenizerFast(tokenizer_file=str(file))
    for name, token in (("bos_token", codec.bos_id), ("eos_token", codec.eos_id), ("pad_token", codec.pad_id)):
        if token is not None:
            setattr(fast, name, fast.convert_ids_to_tokens(token))
    return fast


def _rows(media: Any, text: str | Sequence[str] | None, modality: str) -> list[list[Any]]:
    """The media of each text."""
    if text is None or isinstance(text, str):
        media, text = [media], [""]
    found = len(media) if isinstance(media, list) else 1
    if not isinstance(media, list) or found != len(text):
        raise PromptError(f"{len(text)} texts, but {modality}s for {found} rows: pass a list with one entry per text")
    return [own if isinstance(own, list) else [own] for own in media]


def _media_tensors(by_modality: Mapping[Modality, Sequence[Any]]) -> dict[str, Tensor]:
    tensors = {name: torch.stack(list(by_modality[m])) for m, name in PIXELS.items() if by_modality[m]}
    if sounds := by_modality["audio"]:
        tensors["input_features"] = torch.cat([sound.fbank for sound in sounds])
        tensors["feature_frames"] = torch.cat([torch.as_tensor(sound.frames) for sound in sounds])
        tensors["clips"] = torch.tensor([len(sound.fbank) for sound in sounds])
    return tensors
