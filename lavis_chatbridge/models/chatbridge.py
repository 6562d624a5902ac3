"""ChatBridge (arXiv 2305.16103): frozen encoders, one shared perceiver, a projection, a frozen language model.

Parameter names are those of the original's checkpoints. The model reads batches of LAVIS's tasks
(:mod:`lavis_chatbridge.models.layout`). It knows no data sets and no processes, and reads no files except weights.

Shapes: ``B`` samples or media, ``T`` frames or clips, ``N`` tokens, ``Q`` query tokens, ``D`` width, ``L`` positions.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lavis_chatbridge import hub
from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import CheckpointError
from lavis_chatbridge.media.source import EncodedMedium
from lavis_chatbridge.models import encoding, lora, state_dicts, weights
from lavis_chatbridge.models.answering import Answering
from lavis_chatbridge.models.encoders import build_audio, build_vision
from lavis_chatbridge.models.families import LanguageModel
from lavis_chatbridge.models.language_model import load_language_model
from lavis_chatbridge.models.layout import Media, MediaRanges, Medium, Rows, embed, lay_out, media_of, training_prompts
from lavis_chatbridge.models.settings import ModelSettings, Weights
from lavis_chatbridge.models.templates import load_template
from lavis_chatbridge.prompting.conversation import MODALITIES, Modality, Piece, Slot, slots_of

log = logging.getLogger(__name__)

FROZEN = ("visual_encoder", "ln_vision", "audio_encoder", "ln_audio", "llama_model")
_BLIP2 = ("image_query_tokens", "Qformer.", "ln_vision.")
_PARTS = {
    "perceiver": ("Qformer.",),
    "projection": ("llama_proj.",),
    "vision_queries": ("image_query_tokens", "video_query_tokens"),
    "audio_queries": ("audio_query_tokens",),
    "audio_trans": ("audio_trans.",),
    "time": ("visual_temporal_pos_embeds", "audio_temporal_pos_embeds"),
}
"""Part in ``run.train`` (``lora`` is another one) -> prefixes of its parameters' names."""

MAX_LOGITS = 1 << 24
"""The most logits in memory at once, 64 MB in fp32: they and their gradients are the largest tensors of a batch."""
PLAIN_HEADS = frozenset(("llama", "mistral", "qwen2", "qwen3"))
"""Model types in transformers that return the output layer's results as logits; others may scale or cap them."""


@registry.register_model("chatbridge")
class ChatBridge(Answering, BaseModel):
    """The model, with LAVIS's methods: ``forward``, ``generate`` and ``predict_answers``.

    Parts whose weights path is null are randomly initialised.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {name: str(weights.config_path(name)) for name in weights.model_types()}
    DEFAULT_MODEL_TYPE = "tiny"
    PART_NAMES = (*_PARTS, "lora")
    """The names in ``run.train``; a model has those that its settings include."""

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        weights.find_all(settings)  # download all files, or name all missing ones, before building the model
        self.settings = settings
        self.prompt_layout = settings.prompt_layout
        self.max_text_length = settings.max_text_length
        self.video_queries = settings.perceiver.video_queries
        self.samples_without_targets = 0
        """Number of training samples so far whose targets were all cut off by ``max_text_length``."""
        self._hashes: dict[str, str] = {}

        with _bars_on_terminals_only():
            self.llama_model, self.llama_tokenizer = load_language_model(settings.language_model)
            self.visual_encoder = build_vision(settings.vision)
            self.audio_encoder = build_audio(settings.audio)
        self.template = load_template(settings.template, self.llama_tokenizer, reply_end=settings.reply_end)
        width = self.visual_encoder.width
        self.ln_vision = nn.LayerNorm(width)
        self.ln_audio = nn.LayerNorm(self.audio_encoder.width)
        self.audio_trans = nn.Linear(self.audio_encoder.width, width)
        own = settings.perceiver
        with nullcontext() if own.weights is None else state_dicts.on_meta():
            self.Qformer = encoding.build_perceiver(own, width)
        self.image_query_tokens = _random(own.initializer_range, 1, own.queries, own.width)
        self.audio_query_tokens = _random(own.initializer_range, 1, own.queries, own.width)
        self.llama_proj = nn.Linear(own.width, self.llama_model.get_input_embeddings().embedding_dim)
        if (times := settings.temporal_positions) is not None:
            self.visual_temporal_pos_embeds = _random(times.initializer_range, 1, times.frames, 1, width)
            self.audio_temporal_pos_embeds = _random(times.initializer_range, 1, times.clips, 1, width)
        if own.weights is not None:
            self._load_blip2(own.weights)
        for name in FROZEN:
            getattr(self, name).requires_grad_(False)
        lora.thaw(self.llama_model)
        self.train()

    @classmethod
    def from_config(cls, cfg: Any) -> ChatBridge:
        """Build the model of a configuration's ``model`` section (a mapping or OmegaConf's)."""
        settings = cls.check_config(cfg)
        if settings.model_type == "tiny":
            log.warning("'tiny' is the small model of the embedded world: it knows nothing outside that world")
        model = cls(settings)
        if settings.checkpoint is not None:
            model.load_checkpoint(settings.checkpoint)
        return model

    @classmethod
    def check_config(cls, cfg: Any, where: str = "model") -> ModelSettings:
        values: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        return parse(ModelSettings, values, where)

    @classmethod
    def default_config_path(cls, model_type: str | None = None) -> str:
        return str(weights.config_path(model_type or cls.DEFAULT_MODEL_TYPE))

    @property
    def device(self) -> torch.device:
        return self.llama_proj.weight.device

    def train(self, mode: bool = True) -> ChatBridge:
        """Switch the trained parts; frozen ones stay in evaluation mode."""
        super().train(mode)
        for name in FROZEN:
            getattr(self, name).eval()
        lora.set_training(self.llama_model, mode)
        return self

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Name of a part, as in ``run.train`` -> its parameters."""
        named = list(self.named_parameters())
        parts = {part: [p for name, p in named if name.startswith(prefix)] for part, prefix in _PARTS.items()}
        parts["lora"] = [p for name, p in named if lora.is_adapter(name)]
        return {part: parameters for part, parameters in parts.items() if parameters}

    def blocks(self) -> list[nn.Module]:
        """The language model's transformer blocks; each runs once per forward."""
        stacks: list[Any] = [stack for stack in self.llama_model.modules() if isinstance(stack, nn.ModuleList)]
        largest: Any = max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()))
        return list(largest)

    def forward(self, samples: Mapping[str, Any], **ignored: Any) -> dict[str, Tensor]:
        """The loss of a batch with targets, see :mod:`lavis_chatbridge.models.layout`.

        ``loss`` is the mean cross-entropy over the ``target_tokens`` in fp32, zero without targets.
        """
        media = media_of(samples)
        prompts = training_prompts(samples, media, self.template)
        soft, ranges = self.soft_tokens(prompts, media)
        rows = lay_out(prompts, ranges, self.llama_tokenizer, self.prompt_layout, self.max_text_length)
        if rows.without_targets and not self.samples_without_targets:
            cut = "max_text_length %d cut off all targets of a sample; samples_without_targets counts such samples"
            log.warning(cut, self.max_text_length)
        self.samples_without_targets += rows.without_targets
        nll, targets = self.token_losses(rows, soft)
        loss = nll.mean() if len(targets) else nll.sum()
        return {"loss": loss, "target_tokens": torch.tensor(len(targets), device=loss.device)}

    def token_losses(self, rows: Rows, soft: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[K]`` negative log-likelihoods in fp32 of the rows' targets, row by row, and the targets."""
        numbers, columns, targets = (index.to(self.device) for index in rows.supervised())
        end = int(columns.max()) + 1 if len(columns) else 1  # tokens after the last target cannot affect the loss
        table = self.llama_model.get_input_embeddings()
        embeds = embed(rows, soft, table, self.llama_model.embedding_scale)[:, :end]
        if torch.is_grad_enabled() and not embeds.requires_grad:
            # batch without media: backward must still run through the language model, which may be sharded over ranks
            embeds = embeds + 0.0 * self.llama_proj.bias.sum().to(embeds.dtype)
        inputs = {"inputs_embeds": embeds}
        if rows.needs_mask:
            inputs["attention_mask"] = rows.attention_mask[:, :end].to(self.device)
            inputs["position_ids"] = rows.position_ids[:, :end].to(self.device)
        with encoding.own_precision(self.llama_model):
            losses = losses_at(self.llama_model, numbers, columns, targets, **inputs)
        return losses.to(self.device), targets

    def encode_media(self, modality: Modality, media: Sequence[Medium]) -> list[EncodedMedium]:
        """Encode processed media with their frozen encoder and its layer norm; encoded media are returned unchanged."""
        raw: list[Any] = [medium for medium in media if not isinstance(medium, EncodedMedium)]
        chunk = self.settings.encoder_batch
        if raw and modality == "audio":
            hide = self.settings.audio.mask_padding
            raw = encoding.encode_clips(self.audio_encoder, self.ln_audio, raw, chunk, hide)
        elif raw:
            raw = encoding.encode_frames(self.visual_encoder, self.ln_vision, raw, chunk)
        encoded = iter(raw)
        return [medium if isinstance(medium, EncodedMedium) else next(encoded) for medium in media]

    def perceive_media(self, modality: Modality, media: Sequence[EncodedMedium]) -> list[Tensor]:
        """The ``[Q, D]`` soft tokens of each medium; ``[T * Q, D]`` of a video with ``video_queries`` ``per_frame``."""
        if not media:
            return []
        features, mask, counts = encoding.stack(media, self.device)
        audio = modality == "audio"
        if audio:
            features = self.audio_trans(features)
        if self.settings.temporal_positions is not None:
            table = self.audio_temporal_pos_embeds if audio else self.visual_temporal_pos_embeds
            features = features + encoding.positions_in_time(table, counts)
        if modality == "video" and self.video_queries == "per_frame":
            frames = torch.arange(features.shape[1], device=self.device)
            present = frames < torch.tensor(counts, device=self.device)[:, None]
            features, mask = features[present], None if mask is None else mask[present]
        else:
            features, mask = features.flatten(1, 2), None if mask is None else mask.flatten(1)
            counts = [1] * len(media)
        queries = self.audio_query_tokens if audio else self.image_query_tokens
        soft = self.llama_proj(encoding.perceive(self.Qformer, queries, features, mask))
        return [part.flatten(0, 1) for part in soft.split(counts)]

    def soft_tokens(self, prompts: Sequence[Sequence[Piece]], media: Media) -> tuple[Tensor | None, list[MediaRanges]]:
        """``[S, D]`` soft tokens of all media in a batch's prompts (None without), and the ranges of each sample's."""
        named: dict[Modality, dict[tuple[int, Slot], Medium]] = {modality: {} for modality in MODALITIES}
        for i, pieces in enumerate(prompts):
            for slot in slots_of(pieces):
                own = media[slot.modality][i] if slot.modality in media else []
                if slot.index < len(own):
                    named[slot.modality][i, slot] = own[slot.index]
        count = len(named["image"])
        frames = self.encode_media("video", [*named["image"].values(), *named["video"].values()])  # in one batch
        sounds = self.encode_media("audio", list(named["audio"].values()))
        ranges: list[dict[Slot, range]] = [{} for _ in prompts]
        parts: list[Tensor] = []
        start = 0
        for modality, encoded in zip(MODALITIES, (frames[:count], frames[count:], sounds), strict=True):
            for (i, slot), part in zip(named[modality], self.perceive_media(modality, encoded), strict=True):
                ranges[i][slot] = range(start, start := start + len(part))
                parts.append(part)
        return (torch.cat(parts) if parts else None), list(ranges)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The trained tensors by name, on the CPU, as a checkpoint holds them."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if p.requires_grad}

    def load_checkpoint(self, url_or_filename: Weights) -> None:
        """Load a trained ChatBridge: its trained tensors or its full state dict, from safetensors or a torch file.

        The model is unchanged if this raises a `CheckpointError`: the file is missing, unsafe or does not fit.
        """
        file = state_dicts.read(hub.find(url_or_filename, "model.checkpoint"))
        expected = state_dicts.bridge_tensors(self.state_dict())
        own = {lora.without_base(name): name for name in expected}
        found = {own.get(name, name): t for name, t in state_dicts.bridge_tensors(file.tensors).items()}
        new = not any(lora.is_adapter(name) for name in found)  # this model's adapters stay as initialised
        saved = (file.cfg or {}).get("lora")
        if not new and saved is not None and (difference := lora.difference(saved, self.llama_model)):
            raise CheckpointError(f"{file.path} does not fit this model: {difference}")
        required = [n for n, p in self.named_parameters() if p.requires_grad and not (new and lora.is_adapter(n))]
        plain = [name for name in found if not lora.is_adapter(name)]
        held = tuple(f"{part}." for part in FROZEN if any(name.startswith(f"{part}.") for name in plain))
        required += [n for n in expected if n.startswith(held) and not lora.is_adapter(n)]
        if "llama_model." in held and (how := self.settings.language_model.quantization) is not None:
            raise CheckpointError(
                f"{file.path} contains a language model, but this model's is quantised to {how}: set "
                "model.language_model.quantization to null, or keep only the trained tensors in the file"
            )
        state_dicts.check_fit(expected, found, required, file.path, "this model")
        self.load_state_dict(found, strict=False)
        self._hashes.clear()
        log.info("loaded %d tensors from %s", len(found), file.path)

    def _load_blip2(self, names: Weights) -> None:
        """Load query tokens, perceiver and ``ln_vision`` of BLIP-2."""
        prefixes = state_dicts.BLIP2_BRIDGE
        file = state_dicts.read(hub.find(names, "model.perceiver.weights", prefixes=prefixes), prefixes)
        tensors = state_dicts.bridge_tensors(file.tensors)
        found = {name: tensor for name, tensor in tensors.items() if name.startswith(_BLIP2)}
        expected = state_dicts.bridge_tensors(self.state_dict())
        required = [name for name in expected if name.startswith(_BLIP2)]
        state_dicts.check_fit(expected, found, required, file.path, "model.perceiver")
        own = {name: t.to(torch.float32, copy=True).contiguous() for name, t in found.items()}  # trained: not mapped
        self.load_state_dict(own, strict=False, assign=True)

    def frozen_hash(self, modality: Modality) -> str:
        """A hash that changes with this modality's encoded media: the key of a feature cache."""
        part = "audio" if modality == "audio" else "vision"
        if part not in self._hashes:
            names = ("audio_encoder", "ln_audio") if part == "audio" else ("visual_encoder", "ln_vision")
            encoder, norm = (getattr(self, name) for name in names)
            hide = self.settings.audio.mask_padding if part == "audio" else None
            tensors = {**encoder.state_dict(), **{f"norm.{name}": t for name, t in norm.state_dict().items()}}
            self._hashes[part] = state_dicts.hash_of(tensors, part, hide, encoder.description)
        return self._hashes[part]


def _random(deviation: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * deviation)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Switch off transformers' progress bars if stderr is a file or a pipe."""
    from transformers.utils import logging as bars

    off = not (sys.stderr and sys.stderr.isatty()) and bars.is_progress_bar_enabled()
    if off:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if off:  # other models of the process are not ours
            bars.enable_progress_bar()


def losses_at(model: LanguageModel, rows: Tensor, columns: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
    """``[K]`` negative log-likelihoods in fp32 of ``targets`` at positions (row, column) of the model's ``inputs``.

    The output layer runs on these positions only. Many are computed in chunks, and again in backward.
    """
    head = model.get_output_embeddings()
    plain = model.config.model_type in PLAIN_HEADS
    chosen: list[Tensor] = []

    def choose(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        chosen.append(arguments[0][rows, columns])
        return (arguments[0][:0],) if plain else (chosen[0],)

    handle = head.register_forward_pre_hook(choose)
    try:
        logits = model(**inputs, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    if not plain:
        return _cross_entropy(nn.Identity(), logits, targets)
    chunk = max(1, MAX_LOGITS // model.config.vocab_size)
    if len(targets) <= chunk:
        return _cross_entropy(head, chosen[0], targets)
    parts = zip(chosen[0].split(chunk), targets.split(chunk), strict=True)
    each = [checkpoint(_cross_entropy, head, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat(each)


def _cross_entropy(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden).float()
    return functional.cross_entropy(logits, targets.to(logits.device), reduction="none")
