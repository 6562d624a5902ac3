"""``ChatBridgeForConditionalGeneration``: the LAVIS model behind transformers' interface.

Shapes: ``B`` rows, ``L`` positions, ``I`` images, ``V`` videos of ``T`` frames, ``A`` sounds, ``C`` clips of all sounds
with ``F`` frames of ``M`` mel bins, ``S`` soft tokens of the batch, ``D`` width.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast

from lavis_chatbridge import hub
from lavis_chatbridge.errors import PromptError
from lavis_chatbridge.hf.configuration import CONFIG, FROZEN, ChatBridgeConfig
from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.models import state_dicts, weights
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.decoding import StopTexts, TextStream
from lavis_chatbridge.models.encoding import own_precision
from lavis_chatbridge.models.layout import IGNORED, SOFT, Rows, embed
from lavis_chatbridge.models.tokenizer import Tokenizer
from lavis_chatbridge.prompting.conversation import Modality

PIXELS: dict[Modality, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
"""Modality -> the model's input."""
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
INPUTS = ("attention_mask", "soft_index", *PIXELS.values(), "input_features", "feature_frames", "clips")


class ChatBridgeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """ChatBridge with the interface of transformers' image-text-to-text models.

    Build one with :meth:`from_pretrained`. The constructor wraps ``chatbridge``, or builds one from the configuration.
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
        self.chatbridge = ChatBridge.from_config(config.sections().model) if chatbridge is None else chatbridge
        tokenizer, template = self.chatbridge.llama_tokenizer, self.chatbridge.template
        self.generation_config = GenerationConfig(
            max_new_tokens=256, eos_token_id=sorted(template.end_ids) or None, pad_token_id=tokenizer.pad_id
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
        """
        found, folder = ChatBridgeConfig.find(name, revision)
        config = config or found
        changes: dict[str, Any] = {"vision": {}, "audio": {}, "language_model": {}}  # of the section `model`
        if dtype is not None and dtype != "auto":
            changes = {part: {"dtype": str(dtype).removeprefix("torch.")} for part in changes}
        if quantization_config is not None:
            changes["language_model"]["quantization"] = "4bit" if quantization_config.load_in_4bit else "8bit"
        if device_map in PLACEMENTS:
            changes["language_model"]["device_map"] = device_map
        if folder is not None and (folder / CONFIG).is_file():
            config.check_frozen(config.settings(folder, changes))
            changes["checkpoint"] = str(folder)
        model = cls(config, ChatBridge.from_config(config.sections(folder, changes).model))
        device = device_map.get("") if isinstance(device_map, dict) else device_map
        if device is not None and device not in PLACEMENTS:
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
        """Write the bridge, its configuration and a model card; ``unused`` arguments of transformers do not apply.

        With ``save_frozen`` the files of the frozen parts are copied too, which makes the folder self-contained.
        """
        from huggingface_hub import HfApi

        folder = Path(save_directory)
        settings = self.chatbridge.settings
        for need in weights.needs(settings) if save_frozen else ():
            part, _, key = need.setting.removeprefix("model.").partition(".")
            if (part, key) not in FROZEN:
                continue
            path, target = hub.find(*need), folder / "frozen" / f"{part}_{key}"
            target.mkdir(parents=True, exist_ok=True)
            files = [path] if path.is_file() else hub.require_files(path, need.content, need.prefixes)
            copies = [shutil.copyfile(file, target / file.name) for file in files]
            own = getattr(settings, part).model_copy(update={key: str(copies[0] if path.is_file() else target)})
            settings = settings.model_copy(update={part: own})
        config = self.config.with_references(folder, settings)
        config.write(folder, self._unreferenced(), max_shard_size)
        self.generation_config.save_pretrained(folder)
        if push_to_hub:
            created = HfApi().create_repo(repo_id or folder.name, exist_ok=True)
            HfApi().upload_folder(repo_id=created.repo_id, folder_path=folder)

    def push_to_hub(self, repo_id: str, **more: Any) -> None:  # type: ignore[override]
        """Upload the model with its card to a repository of the hub; arguments as those of :meth:`save_pretrained`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **more)

    def _unreferenced(self) -> dict[str, Tensor]:
        """The tensors that are in no weight file of a frozen part: trained ones, layer norms, random parts."""
        own = self.chatbridge.settings
        named = {"visual_encoder.": own.vision.weights, "audio_encoder.": own.audio.weights}
        named["llama_model."] = own.language_model.weights
        referenced = tuple(prefix for prefix, names in named.items() if names is not None)
        trained = {name for name, parameter in self.chatbridge.named_parameters() if parameter.requires_grad}
        state = state_dicts.bridge_tensors(self.chatbridge.state_dict())
        return {name: t for name, t in state.items() if name in trained or not name.startswith(referenced)}

    def get_input_embeddings(self) -> Any:
        """The language model's embedding layer."""
        return self.chatbridge.llama_model.get_input_embeddings()

    def tie_weights(self, *args: Any, **more: Any) -> None:
        """Do nothing: the language model ties its own weights."""

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Tensor,
    ) -> CausalLMOutputWithPast:
        """The loss; without ``labels``, the logits. :class:`ChatBridgeProcessor` makes all arguments.

        Args:
            input_ids: ``[B, L]``.
            labels: ``[B, L]``, -100 where the loss ignores a position.
            num_items_in_batch: Target tokens of all micro-batches of a step; the loss is then their share of the mean.
            **inputs: ``attention_mask`` and ``position_ids`` ``[B, L]``; ``soft_index`` ``[B, L]``, the index of each
                position's soft token among those of all images, then videos, then sounds, or -1 for text;
                ``pixel_values`` ``[I, 3, H, W]``, ``pixel_values_videos`` ``[V, T, 3, H, W]``, and of sounds
                ``input_features`` ``[C, F, M]``, ``feature_frames`` ``[C]`` (how many frames are sound) and ``clips``
                ``[A]`` (the clips of each).

        Raises:
            PromptError: If the prompts need more soft tokens than the media give.
        """
        rows, soft = self._prepared(input_ids, labels, **inputs)
        if labels is None:
            embeds, llm = self._embeds(rows, soft), self.chatbridge.llama_model
            mask, positions = rows.attention_mask.to(embeds.device), rows.position_ids.to(embeds.device)
            with own_precision(llm):
                output = llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
            return CausalLMOutputWithPast(logits=output.logits)
        nll, targets = self.chatbridge.token_losses(rows, soft)
        return CausalLMOutputWithPast(loss=nll.sum() / (num_items_in_batch or max(1, len(targets))))

    @torch.no_grad()
    def generate(self, input_ids: Tensor, **more: Any) -> Tensor:  # type: ignore[override]
        """Generate replies by the language model's own ``generate``.

        Args:
            input_ids: ``[B, L]``, padded on the left.
            **more: The processor's further inputs, see :meth:`forward`, and arguments of transformers' ``generate``.

        Returns:
            ``[B * num_return_sequences, N]`` new ids; the processor's ``batch_decode`` cuts them at the reply's end.
        """
        rows, soft = self._prepared(input_ids, **{name: more.pop(name) for name in INPUTS if name in more})
        embeds = self._embeds(rows, soft)
        tokenizer, stops = self.chatbridge.llama_tokenizer, self.chatbridge.template.stops
        criteria = StoppingCriteriaList(more.pop("stopping_criteria", None) or [])
        if stops:
            criteria.append(StopTexts(tokenizer, [stops] * len(input_ids), 0))
        if more.get("streamer") is not None:
            more["streamer"] = _StopsStreaming(more["streamer"], tokenizer, stops)
        more["generation_config"] = more.get("generation_config") or self.generation_config
        mask, llm = rows.attention_mask.to(embeds.device), self.chatbridge.llama_model
        with own_precision(llm):
            return llm.generate(inputs_embeds=embeds, attention_mask=mask, stopping_criteria=criteria, **more)

    def _prepared(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        soft_index: Tensor | None = None,
        position_ids: Tensor | None = None,
        **media: Tensor,
    ) -> tuple[Rows, Tensor | None]:
        """The `Rows` of :mod:`models.layout`, on the CPU, and ``[S, D]`` soft tokens; None without media.

        The soft tokens are those of all images, then videos, then sounds.
        """
        given: dict[Modality, list[Any]] = {
            m: list(media[name]) for m, name in PIXELS.items() if media.get(name) is not None
        }
        if (fbanks := media.get("input_features")) is not None:
            counts = media["clips"].tolist()
            sounds = zip(fbanks.split(counts), media["feature_frames"].split(counts), strict=True)
            given["audio"] = [AudioClips(*sound) for sound in sounds]
        parts: list[Tensor] = []
        for modality, own in given.items():
            parts += self.chatbridge.perceive_media(modality, self.chatbridge.encode_media(modality, own))
        soft = torch.cat(parts) if parts else None
        ids = input_ids.cpu()
        index = torch.full_like(ids, -1) if soft_index is None else soft_index.cpu()
        present = 0 if soft is None else len(soft)
        if (needed := int(index.max()) + 1) > present:
            raise PromptError(f"the prompts need {needed} soft tokens, but the media give {present}")
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.cpu()
        positions = (mask.cumsum(1) - 1).clamp(min=0) if position_ids is None else position_ids.cpu()
        labels = torch.full_like(ids, IGNORED) if labels is None else labels.cpu()
        is_soft = index >= 0
        return Rows(ids.masked_fill(is_soft, SOFT), index[is_soft], mask, positions, labels), soft

    def _embeds(self, rows: Rows, soft: Tensor | None) -> Tensor:
        llm = self.chatbridge.llama_model
        return embed(rows, soft, llm.get_input_embeddings(), llm.embedding_scale)


class _StopsStreaming:
    """Passes tokens to a streamer, without those of a stop text."""

    def __init__(self, streamer: Any, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._streamer, self._stream = streamer, TextStream(tokenizer, stops)
        self._held: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        """Add new ids; ids that may begin a stop text are held back."""
        if value.numel() != 1:  # the prompt
            self._streamer.put(value)
            return
        self._held.append(value)
        if self._stream.push(int(value)):
            self._pass_on()

    def end(self) -> None:
        """Pass on held ids that are not part of a stop text, and end the stream."""
        self._pass_on()
        self._streamer.end()

    def _pass_on(self) -> None:
        while self._held and self._stream.stopped is None:
            self._streamer.put(self._held.pop(0))
