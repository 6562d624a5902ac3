"""``ChatBridgeForConditionalGeneration``: the LAVIS model behind transformers' interface.

Shapes: ``B`` rows, ``L`` positions, ``I`` images, ``V`` videos of ``T`` frames, ``C`` clips of all sounds with ``F``
frames of ``M`` mel bins, ``S`` soft tokens of the batch, ``D`` width.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, ConfigError, PromptError
from lavis_chatbridge.hf import card
from lavis_chatbridge.hf.configuration import CONFIG, FROZEN, RUN_CONFIG, ChatBridgeConfig
from lavis_chatbridge.media.types import AudioClips
from lavis_chatbridge.models import state_dicts, weights
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.decoding import StopTexts
from lavis_chatbridge.models.families import own_precision
from lavis_chatbridge.models.layout import IGNORED, SOFT, Batch, embed
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.models.text import TextStream
from lavis_chatbridge.prompting.pieces import MODALITIES, Modality

log = logging.getLogger(__name__)

PRECISIONS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_FROZEN_FOLDER = "frozen"


class ChatBridgeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """ChatBridge with the interface of transformers' image-text-to-text models.

    Build one with :meth:`from_pretrained`.

    Args:
        config: Its configuration.
        chatbridge: The model to wrap; by default one is built from the configuration.
    """

    config_class = ChatBridgeConfig
    base_model_prefix = "chatbridge"
    main_input_name = "input_ids"
    input_modalities: Any = ("text", "image", "video", "audio")
    output_modalities = ("text",)
    _supports_sdpa = True
    accepts_loss_kwargs = True

    def __init__(self, config: ChatBridgeConfig, chatbridge: ChatBridge | None = None) -> None:
        super().__init__(config)
        self.chatbridge = _built(config.settings()) if chatbridge is None else chatbridge
        codec, template = self.chatbridge.llama_tokenizer, self.chatbridge.template
        self.generation_config = GenerationConfig(
            max_new_tokens=256, eos_token_id=sorted(template.end_ids) or None, pad_token_id=codec.pad_id
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | dict[str, Any] | torch.device | None = None,
        quantization_config: Any = None,
        config: ChatBridgeConfig | None = None,
        **unused: Any,
    ) -> ChatBridgeForConditionalGeneration:
        """Load a model.

        Args:
            name: A model type of the package (``"tiny"``), a folder that :meth:`save_pretrained` or training wrote, or
                a hub id.
            revision: Branch, tag or commit of a hub id.
            dtype: Precision of the frozen parts; the bridge stays in fp32.
            device_map: A device for everything, or accelerate's placement of the language model (``"auto"``).
            quantization_config: transformers' ``BitsAndBytesConfig`` for the language model.
            config: Replaces the folder's configuration.
            **unused: Arguments of transformers' own loader that do not apply.

        Raises:
            CheckpointError: If weights are missing, damaged or of other shapes, or a frozen part differs from training.
            ConfigError: If the configuration is invalid.
        """
        folder = folder_of(name, revision)
        config = config or config_of(name, folder)
        changes = _changes(dtype, device_map, quantization_config)
        settings = config.settings(folder, **changes)
        if folder is not None and (folder / CONFIG).is_file():
            config.check_frozen(settings)
            settings = settings.model_copy(update={"checkpoint": str(folder)})
        model = cls(config, _built(settings))
        if unused:
            log.info("from_pretrained ignores %s", ", ".join(sorted(unused)))
        device = device_map.get("", None) if isinstance(device_map, dict) else device_map
        if device is not None and "language_model__device_map" not in changes:
            cast(Any, model).to(device)
        return model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        save_frozen: bool = False,
        max_shard_size: int | str = "5GB",
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **unused: Any,
    ) -> None:
        """Write the bridge, its configuration and a model card.

        Args:
            save_directory: The folder.
            save_frozen: Also copy the files of the frozen parts, which makes the folder self-contained.
            max_shard_size: Largest size of a safetensors shard.
            push_to_hub: Upload the folder afterwards.
            repo_id: Repository of the upload; by default the folder's name.
            **unused: Arguments of transformers' own writer that do not apply.
        """
        from huggingface_hub import HfApi, save_torch_state_dict

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = self.chatbridge.settings
        if save_frozen:
            settings = _with_copies(settings, folder)
        config = self.config.with_references(folder, settings)
        config.architectures = [type(self).__name__]
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)
        tensors = {**self.chatbridge.trainable_state_dict(), **self._unnamed_frozen()}
        save_torch_state_dict(tensors, folder, max_shard_size=max_shard_size)
        card.write(folder, config)
        if push_to_hub:
            api, name = HfApi(), repo_id or folder.name
            api.upload_folder(repo_id=api.create_repo(name, exist_ok=True).repo_id, folder_path=folder)

    def push_to_hub(self, repo_id: str, **more: Any) -> None:  # type: ignore[override]
        """Upload the model with its card to a repository of the hub; arguments as those of :meth:`save_pretrained`."""
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **more)

    def _unnamed_frozen(self) -> dict[str, Tensor]:
        """Tensors that are neither trained nor in a weight file: layer norms, randomly initialised parts."""
        own = self.chatbridge.settings
        named: dict[str, Any] = {
            "visual_encoder": own.vision,
            "audio_encoder": own.audio,
            "llama_model": own.language_model,
        }
        inside = tuple(f"{part}." for part, settings in named.items() if settings.weights is not None)
        trained = {name for name, p in self.chatbridge.named_parameters() if p.requires_grad}
        state = state_dicts.bridge_tensors(self.chatbridge.state_dict())
        return {n: t.cpu().clone() for n, t in state.items() if n not in trained and not n.startswith(inside or ("$",))}

    def get_input_embeddings(self) -> Any:
        """The language model's embedding layer."""
        return self.chatbridge.llama_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The language model's output layer."""
        return self.chatbridge.llama_model.get_output_embeddings()

    def tie_weights(self, *args: Any, **more: Any) -> None:
        """Do nothing: the language model ties its own weights."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        input_features: Tensor | None = None,
        feature_frames: Tensor | None = None,
        clips: Tensor | None = None,
        soft_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """The loss; without ``labels``, the logits.

        Args:
            input_ids: ``[B, L]``; positions of soft tokens have the processor's placeholder ids.
            attention_mask: ``[B, L]``, one where attention may look.
            pixel_values: ``[I, 3, H, W]``, in the order of their placeholders.
            pixel_values_videos: ``[V, T, 3, H, W]``.
            input_features: ``[C, F, M]`` log-mel filterbanks of all sounds.
            feature_frames: ``[C]`` frames of each clip that are sound.
            clips: ``[A]`` clips of each sound.
            soft_index: ``[B, L]`` index of each position's soft token among those of all images, then videos, then
                sounds; by default in the order of the placeholders.
            position_ids: ``[B, L]``.
            labels: ``[B, L]``, -100 where the loss ignores a position.
            num_items_in_batch: Target tokens of all micro-batches of a step; the loss is then their share of the mean.
            **unused: Further arguments of transformers' Trainer.

        Raises:
            PromptError: If the placeholders do not match the media.
        """
        media = (pixel_values, pixel_values_videos, input_features, feature_frames, clips)
        soft = self._soft_tokens(*media)
        batch = self._batch(input_ids, attention_mask, position_ids, labels, soft_index, soft)
        if labels is None:
            return CausalLMOutputWithPast(logits=self._logits(batch, soft))
        nll, targets = self.chatbridge.token_losses(batch, soft)
        if num_items_in_batch is None:
            num_items_in_batch = max(1, len(targets))
        return CausalLMOutputWithPast(loss=nll.sum() / num_items_in_batch)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:  # type: ignore[override]
        """Generate replies by the language model's own ``generate``.

        Args:
            input_ids: ``[B, L]``, padded on the left.
            attention_mask: ``[B, L]``.
            **more: Media as in :meth:`forward`; all others are arguments of transformers' ``generate`` (``num_beams``,
                ``do_sample``, ``num_return_sequences``, ``streamer``, ...).

        Returns:
            ``[B * num_return_sequences, N]`` new ids; the processor's ``batch_decode`` cuts them at the reply's end.
        """
        names = ("pixel_values", "pixel_values_videos", "input_features", "feature_frames", "clips")
        soft = self._soft_tokens(*(more.pop(name, None) for name in names))
        batch = self._batch(input_ids, attention_mask, None, None, more.pop("soft_index", None), soft)
        llm, codec = self.chatbridge.llama_model, self.chatbridge.llama_tokenizer
        embeds = embed(batch, soft, llm.get_input_embeddings(), llm.embedding_scale)
        stops = self.chatbridge.template.stops
        criteria = StoppingCriteriaList([*(more.pop("stopping_criteria", None) or [])])
        if stops:
            criteria.append(StopTexts(codec, [stops] * len(input_ids), 0))
        if more.get("streamer") is not None:
            more["streamer"] = _StopsStreaming(more["streamer"], codec, stops)
        config = more.pop("generation_config", None) or self.generation_config
        with own_precision(llm):
            return llm.generate(
                inputs_embeds=embeds,
                attention_mask=batch.attention_mask.to(embeds.device),
                generation_config=config,
                stopping_criteria=criteria,
                **more,
            )

    def _logits(self, batch: Batch, soft: Tensor | None) -> Tensor:
        llm = self.chatbridge.llama_model
        embeds = embed(batch, soft, llm.get_input_embeddings(), llm.embedding_scale)
        mask, positions = batch.attention_mask.to(embeds.device), batch.position_ids.to(embeds.device)
        with own_precision(llm):
            return llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, return_dict=True).logits

    def _soft_tokens(
        self,
        images: Tensor | None,
        videos: Tensor | None,
        features: Tensor | None,
        frames: Tensor | None,
        clips: Tensor | None,
    ) -> Tensor | None:
        """``[S, D]`` soft tokens of all images, then videos, then sounds; None without media."""
        given: dict[Modality, list[Any]] = {}
        if images is not None and len(images):
            given["image"] = list(images)
        if videos is not None and len(videos):
            given["video"] = list(videos)
        if features is not None and len(features):
            counts = clips.tolist() if clips is not None else [1] * len(features)
            lengths = frames if frames is not None else torch.full((len(features),), features.shape[1])
            banks = zip(features.split(counts), lengths.split(counts), strict=True)
            given["audio"] = [AudioClips(bank, length) for bank, length in banks]
        encoded = ((modality, self.chatbridge.encode_media(modality, listed)) for modality, listed in given.items())
        parts = [part for modality, listed in encoded for part in self.chatbridge.perceive_media(modality, listed)]
        return torch.cat(parts) if parts else None

    def _batch(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        positions: Tensor | None,
        labels: Tensor | None,
        soft_index: Tensor | None,
        soft: Tensor | None,
    ) -> Batch:
        """The rows as a `Batch` of :mod:`models.layout`, on the CPU."""
        ids = input_ids.cpu()
        first = len(self.chatbridge.llama_tokenizer)
        is_soft = (ids >= first) & (ids < first + len(MODALITIES))
        if soft_index is None:
            order = torch.cat(
                [((ids == first + i) & is_soft).flatten().nonzero()[:, 0] for i in range(len(MODALITIES))]
            )
            flat = torch.full((ids.numel(),), -1)
            flat[order] = torch.arange(len(order))
            soft_index = flat.view(ids.shape)
        count = 0 if soft is None else len(soft)
        chosen = soft_index.cpu()[is_soft]
        if len(chosen) and int(chosen.max()) >= count:
            raise PromptError(f"the prompts have {len(chosen)} placeholders, but the media give {count} soft tokens")
        mask = torch.ones_like(ids) if mask is None else mask.cpu()
        if positions is None:
            left = bool((mask[:, :1] == 0).any())
            positions = (mask.cumsum(1) - 1).clamp(min=0) if left else torch.arange(ids.shape[1]).expand_as(ids)
        labels = torch.full_like(ids, IGNORED) if labels is None else labels.cpu()
        return Batch(torch.where(is_soft, SOFT, ids), chosen, mask, positions.cpu(), labels)


class _StopsStreaming:
    """Passes tokens to a streamer, without those of a stop text."""

    def __init__(self, streamer: Any, codec: Any, stops: Sequence[str]) -> None:
        self._streamer, self._stream, self._codec = streamer, TextStream(codec, stops), codec
        self._held: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """Add new ids; ids that may begin a stop text are buffered."""
        if value.dim() > 1 or value.numel() != 1:  # the prompt
            self._streamer.put(value)
            return
        self._held.append(value)
        before = len(self._stream.text)
        self._stream.push(int(value))
        if self._stream.stopped is None and len(self._stream.text) > before:
            for held in self._held:
                self._streamer.put(held)
            self._held = []

    def end(self) -> None:
        """Flush buffered ids that are not part of a stop text, and end the stream."""
        for held in self._held if self._stream.stopped is None else []:
            self._streamer.put(held)
        self._streamer.end()


def _built(settings: ModelSettings) -> ChatBridge:
    model = ChatBridge(settings)
    if settings.trained is not None:
        model.load_checkpoint(settings.trained)
    return model


def folder_of(name: str | Path, revision: str | None = None) -> Path | None:
    """The local folder of a name, downloaded from the hub if needed; None for a model type of the package.

    Raises:
        CheckpointError: If there is no such folder or repository.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name) in weights.model_types():
        return None
    return hub.snapshot(str(name), revision)


def config_of(name: str | Path, folder: Path | None) -> ChatBridgeConfig:
    """The configuration of a model type, a Hugging Face folder or a run's folder.

    Raises:
        CheckpointError: If the folder is neither.
    """
    if folder is None:
        return ChatBridgeConfig.of_type(str(name))
    if (folder / CONFIG).is_file():
        return ChatBridgeConfig.from_json_file(folder / CONFIG)
    if (folder / RUN_CONFIG).is_file():
        return ChatBridgeConfig.of_run(folder)
    raise CheckpointError(
        f"{folder} is not a ChatBridge: expected {CONFIG} (Hugging Face) or {RUN_CONFIG} (a training run)"
    )


def _changes(dtype: Any, device_map: Any, quantization: Any) -> dict[str, Any]:
    """transformers' loading arguments as settings of the ``model`` section."""
    changes: dict[str, Any] = {}
    if dtype is not None and dtype != "auto":
        chosen = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        if chosen not in PRECISIONS:
            raise ConfigError(f"dtype {dtype} is none of {', '.join(PRECISIONS.values())}")
        changes |= {f"{part}__dtype": PRECISIONS[chosen] for part in ("vision", "audio", "language_model")}
    if quantization is not None:
        changes["language_model__quantization"] = "4bit" if getattr(quantization, "load_in_4bit", False) else "8bit"
    if isinstance(device_map, str) and device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        changes["language_model__device_map"] = device_map
    return changes


def _with_copies(settings: Any, folder: Path) -> Any:
    """Copy the frozen parts into ``folder`` and return settings that use the copies."""
    for need in weights.needs(settings):
        _, part, key = (need.setting + "..").split(".")[:3]
        if (part, key) not in FROZEN:
            continue
        source, target = need.find(), folder / _FROZEN_FOLDER / f"{part}_{key}"
        if source.is_file():
            target = target.with_suffix(source.suffix)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(source, target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            for file in hub.needed_files(source, need.content, need.prefixes):
                shutil.copyfile(file, target / file.name)
        own = getattr(settings, part).model_copy(update={key: str(target)})
        settings = settings.model_copy(update={part: own})
    return settings
