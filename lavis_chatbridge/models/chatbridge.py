"""ChatBridge (arXiv 2305.16103): frozen encoders, one shared perceiver, a projection, a frozen language model.

Parameter names are those of the original's checkpoints. The model takes batches as LAVIS's tasks hand them over
(:mod:`lavis_chatbridge.models.samples`) and knows no data sets and no files but its own weights.

Shapes: ``B`` samples or media, ``T`` frames or clips, ``N`` tokens, ``Q`` query tokens, ``D`` width, ``L`` positions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.base_model import BaseModel
from torch import Tensor, nn

from lavis_chatbridge import config as settings_reader
from lavis_chatbridge import hub
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.media.types import EncodedMedium
from lavis_chatbridge.models import checkpoint, encoding, lora, weights
from lavis_chatbridge.models import samples as sample_reader
from lavis_chatbridge.models.answering import Answering
from lavis_chatbridge.models.encoders import build_audio, build_vision
from lavis_chatbridge.models.families import own_precision
from lavis_chatbridge.models.language_model import check_available, load_language_model
from lavis_chatbridge.models.layout import Batch, Places, embed, lay_out
from lavis_chatbridge.models.losses import losses_at
from lavis_chatbridge.models.perceiver import build_perceiver, perceive
from lavis_chatbridge.models.settings import ModelSettings, Weights
from lavis_chatbridge.models.templates import load_template
from lavis_chatbridge.prompting import Modality, Piece, Slot

log = logging.getLogger(__name__)

FROZEN = ("visual_encoder", "ln_vision", "audio_encoder", "ln_audio", "llama_model")


@registry.register_model("chatbridge")
class ChatBridge(Answering, BaseModel):
    """The model, in LAVIS's contracts: ``forward``, ``generate`` and ``predict_answers``.

    Args:
        settings: What to build it from. Weights that are none are random.

    Raises:
        CheckpointError: If a weight file is missing or does not fit.
    """

    PRETRAINED_MODEL_CONFIG_DICT = {name: str(weights.config_path(name)) for name in weights.model_types()}
    DEFAULT_MODEL_TYPE = "tiny"

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        weights.find_all(settings)  # fetch everything, or name everything that is missing, before anything is built
        check_available(settings.language_model)
        self.settings = settings
        self.prompt_layout = settings.prompt_layout
        self.max_text_length = settings.max_text_length
        self.video_queries = settings.perceiver.video_queries
        self.lost_answers = 0
        """Training samples so far whose whole answer was cut off by ``max_text_length``."""
        self._fingerprints: dict[str, str] = {}

        self.llama_model: Any
        self.llama_model, self.llama_tokenizer = load_language_model(settings.language_model)
        self.template = load_template(settings.template, self.llama_tokenizer, reply_end=settings.reply_end)
        self.visual_encoder = build_vision(settings.vision)
        self.audio_encoder = build_audio(settings.audio)
        width = self.visual_encoder.width
        self.ln_vision = nn.LayerNorm(width)
        self.ln_audio = nn.LayerNorm(self.audio_encoder.width)
        self.audio_trans = nn.Linear(self.audio_encoder.width, width)
        own = settings.perceiver
        with nullcontext() if own.weights is None else checkpoint.on_meta():
            self.Qformer = build_perceiver(own, width)
        self.image_query_tokens = _drawn(own.initializer_range, 1, own.queries, own.width)
        self.audio_query_tokens = _drawn(own.initializer_range, 1, own.queries, own.width)
        self.llama_proj = nn.Linear(settings.perceiver.width, self.llama_model.get_input_embeddings().embedding_dim)
        if (times := settings.temporal_positions) is not None:
            self.visual_temporal_pos_embeds = _drawn(times.initializer_range, 1, times.frames, 1, width)
            self.audio_temporal_pos_embeds = _drawn(times.initializer_range, 1, times.clips, 1, width)
        if own.weights is not None:
            self._load_blip2(own.weights)
        self._freeze()

    @classmethod
    def from_config(cls, cfg: Any) -> ChatBridge:
        """Build the model of a configuration's ``model`` section (a mapping or OmegaConf's).

        Raises:
            ConfigError: With all faults of the section.
            CheckpointError: If a weight file is missing or does not fit.
        """
        settings = cls.check_config(cfg)
        if settings.model_type == "tiny":
            _tell_of_the_small_model()
        model = cls(settings)
        if settings.trained is not None:
            model.load_checkpoint(settings.trained)
        return model

    @classmethod
    def check_config(cls, cfg: Any, where: str = "model") -> ModelSettings:
        """The settings of a ``model`` section.

        Raises:
            ConfigError: With all faults of the section.
        """
        from omegaconf import OmegaConf

        values: Any = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else cfg
        return settings_reader.parse(ModelSettings, values, where)

    @classmethod
    def default_config_path(cls, model_type: str | None = None) -> str:
        """The YAML of a model type, of the default one without it.

        Raises:
            ConfigError: If there is no such type.
        """
        chosen = model_type or cls.DEFAULT_MODEL_TYPE
        if chosen not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise ConfigError(f"chatbridge has no model_type {chosen!r}; it has {known}")
        return cls.PRETRAINED_MODEL_CONFIG_DICT[chosen]

    @property
    def device(self) -> torch.device:
        """Where the trained parameters are."""
        return self.llama_proj.weight.device

    def train(self, mode: bool = True) -> ChatBridge:
        """Switch the trained parts; what is frozen stays in evaluation mode."""
        super().train(mode)
        for name in FROZEN:
            getattr(self, name).eval()
        lora.set_training(self.llama_model, mode)
        if self.settings.perceiver.frozen:
            self.Qformer.eval()
        return self

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parts of the bridge that ``run.train`` names -> their parameters."""
        prefixes = {
            "perceiver": ("Qformer.",),
            "projection": ("llama_proj.",),
            "vision_queries": ("image_query_tokens", "video_query_tokens"),
            "audio_queries": ("audio_query_tokens",),
            "audio_trans": ("audio_trans.",),
            "time": ("visual_temporal_pos_embeds", "audio_temporal_pos_embeds"),
        }
        named = list(self.named_parameters())
        parts = {part: [p for name, p in named if name.startswith(prefix)] for part, prefix in prefixes.items()}
        parts["lora"] = [p for name, p in named if lora.is_adapter(name)]
        return {part: parameters for part, parameters in parts.items() if parameters}

    def blocks(self) -> list[nn.Module]:
        """The language model's blocks, which every batch passes once."""
        stacks: list[Any] = [stack for stack in self.llama_model.modules() if isinstance(stack, nn.ModuleList)]
        return list(max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())))

    def forward(self, samples: Mapping[str, Any], **ignored: Any) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            samples: A batch with targets, see :mod:`lavis_chatbridge.models.samples`.

        Returns:
            ``loss``: mean cross-entropy over the target tokens, in fp32, zero where there is none;
            ``target_tokens``: their number.

        Raises:
            PromptError: If prompts and media do not fit together.
        """
        media = sample_reader.media_of(samples)
        prompts = sample_reader.training_prompts(samples, media, self.template)
        soft, places = self.soft_tokens(prompts, media)
        batch = lay_out(prompts, places, self.llama_tokenizer, self.prompt_layout, self.max_text_length)
        if batch.lost and not self.lost_answers:
            log.warning("max_text_length %d has cut off a whole answer; lost_answers counts on", self.max_text_length)
        self.lost_answers += batch.lost
        nll, targets = self.token_losses(batch, soft)
        loss = nll.mean() if len(targets) else nll.sum()
        return {"loss": loss, "target_tokens": torch.tensor(len(targets), device=loss.device)}

    def token_losses(self, batch: Batch, soft: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[K]`` negative log-likelihoods in fp32 of the batch's targets, row by row, and the targets."""
        rows, columns, targets = (index.to(self.device) for index in batch.supervised())
        end = batch.last_supervised + 1 or 1  # tokens after the last target cannot affect the loss
        table = self.llama_model.get_input_embeddings()
        embeds = embed(batch, soft, table, self.llama_model.embedding_scale)[:, :end]
        if torch.is_grad_enabled() and not embeds.requires_grad:
            # text alone: backward must still pass the language model, whose blocks may be sharded over ranks
            embeds = embeds + 0.0 * self.llama_proj.bias.sum().to(embeds.dtype)
        seen = {"attention_mask": batch.attention_mask, "position_ids": batch.position_ids} if batch.needs_mask else {}
        places = {name: values[:, :end].to(self.device) for name, values in seen.items()}
        with own_precision(self.llama_model):
            losses = losses_at(self.llama_model, rows, columns, targets, inputs_embeds=embeds, **places)
        return losses.to(self.device), targets

    def encode_media(self, kind: Modality, media: Sequence[Any]) -> list[EncodedMedium]:
        """Media through their frozen encoder and its layer norm, all in one batch.

        Args:
            kind: ``"image"``, ``"video"`` or ``"audio"``.
            media: Processed media; encoded ones are returned as they are.
        """
        results = list(media)
        todo = [i for i, medium in enumerate(results) if not isinstance(medium, EncodedMedium)]
        raw = [results[i] for i in todo]
        chunk = self.settings.encoder_batch
        if raw and kind == "audio":
            hide = self.settings.audio.mask_padding
            raw = encoding.encode_clips(self.audio_encoder, self.ln_audio, raw, chunk, hide)
        elif raw:
            raw = encoding.encode_frames(self.visual_encoder, self.ln_vision, raw, chunk)
        for i, encoded in zip(todo, raw, strict=True):
            results[i] = encoded
        return results

    def perceive_media(self, kind: Modality, media: Sequence[EncodedMedium]) -> list[Tensor]:
        """Encoded media of one kind to soft tokens of the language model.

        Returns:
            For each medium ``[Q, D]``, or ``[T * Q, D]`` for a video with queries for each frame.
        """
        features, mask, counts = encoding.stack(media, self.device)
        audio = kind == "audio"
        if audio:
            features = self.audio_trans(features)
        if self.settings.temporal_positions is not None:
            table = self.audio_temporal_pos_embeds if audio else self.visual_temporal_pos_embeds
            features = features + encoding.positions_in_time(table, counts)
        if kind == "video" and self.video_queries == "per_frame":
            present = (
                torch.arange(features.shape[1], device=self.device) < torch.tensor(counts, device=self.device)[:, None]
            )
            features, mask = features[present], None if mask is None else mask[present]
        else:
            features, mask = features.flatten(1, 2), None if mask is None else mask.flatten(1)
            counts = [1] * len(media)
        queries = self.audio_query_tokens if audio else self.image_query_tokens
        soft = self.llama_proj(perceive(self.Qformer, queries, features, mask))
        return [part.flatten(0, 1) for part in soft.split(counts)]

    def soft_tokens(
        self, prompts: Sequence[Sequence[Piece]], media: sample_reader.Media
    ) -> tuple[Tensor | None, list[Places]]:
        """The soft tokens of all media that the prompts of a batch name.

        Returns:
            ``[S, D]`` (none if no medium is named), and where each sample's media lie among them.
        """
        wanted: dict[Modality, list[tuple[int, Slot]]] = {}
        for i, pieces in enumerate(prompts):
            for piece in dict.fromkeys(piece for piece in pieces if isinstance(piece, Slot)):
                if piece.kind in media and 0 <= piece.index < len(media[piece.kind][i]):
                    wanted.setdefault(piece.kind, []).append((i, piece))
        places: list[dict[tuple[Modality, int], range]] = [{} for _ in prompts]
        parts: list[Tensor] = []
        start = 0
        for kind, named in self._encoded(wanted, media).items():
            for (i, slot), part in zip(wanted[kind], self.perceive_media(kind, named), strict=True):
                places[i][slot.kind, slot.index] = range(start, start + len(part))
                start += len(part)
                parts.append(part)
        return (torch.cat(parts) if parts else None), list(places)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The trained tensors by name, on the CPU: what a checkpoint holds."""
        return {name: p.detach().cpu().clone() for name, p in self.named_parameters() if p.requires_grad}

    def load_checkpoint(self, url_or_filename: Weights) -> None:
        """Load a trained ChatBridge: trained tensors only, or a whole state dict, from safetensors or a torch file.

        Raises:
            CheckpointError: If it is missing, unsafe or does not fit; the model is then as before.
        """
        file = checkpoint.read(hub.find(url_or_filename, "model.checkpoint"))
        expected = checkpoint.bridge_tensors(self.state_dict())
        own = {lora.without_base(name): name for name in expected}
        found = {own.get(name, name): t for name, t in checkpoint.bridge_tensors(file.tensors).items()}
        fresh = self._check_adapters(file, found)
        required = [n for n, p in self.named_parameters() if p.requires_grad and not (fresh and lora.is_adapter(n))]
        frozen = [name for name in found if not lora.is_adapter(name)]
        held = tuple(f"{part}." for part in FROZEN if any(name.startswith(f"{part}.") for name in frozen))
        required += [n for n in expected if held and n.startswith(held) and not lora.is_adapter(n)]
        if "llama_model." in held and (how := self.settings.language_model.quantization) is not None:
            raise CheckpointError(
                f"{file.path} holds a whole language model, but this one's is quantised to {how}: set "
                "model.language_model.quantization to null, or keep the trained tensors alone in the file"
            )
        checkpoint.check_fit(expected, found, required, file.path, "this model")
        checkpoint.check_finite({name: tensor.to(expected[name].dtype) for name, tensor in found.items()}, file.path)
        self.load_state_dict(found, strict=False)
        self._fingerprints.clear()
        log.info("loaded %d tensors from %s", len(found), file.path)

    def _check_adapters(self, file: checkpoint.WeightFile, found: Mapping[str, Tensor]) -> bool:
        """Refuse a file's adapters that are not this model's; whether this model's stay fresh."""
        own = lora.describe(self.llama_model)
        held = lora.described_by(found)
        if held is not None and file.cfg is not None:
            held |= dict(file.cfg["lora"]) if isinstance(file.cfg.get("lora"), Mapping) else {}
        fault = lora.misfit(held, own, fresh_is_fine=True)
        if fault is not None:
            raise CheckpointError(f"{file.path} does not fit this model: {fault}")
        if held is None and own is not None:
            log.info("%s has no LoRA adapters: this model's are fresh and change nothing yet", file.path)
        return held is None

    def frozen_fingerprint(self, kind: Modality) -> str:
        """A short string that changes when encoded media of this kind would: the key of a feature cache."""
        modality = "audio" if kind == "audio" else "vision"
        if modality not in self._fingerprints:
            encoder, norm = (getattr(self, name) for name in _ENCODERS[modality])
            hide = self.settings.audio.mask_padding if modality == "audio" else None
            tensors = {**encoder.state_dict(), **{f"norm.{name}": t for name, t in norm.state_dict().items()}}
            self._fingerprints[modality] = checkpoint.fingerprint(tensors, modality, hide, encoder.description)
        return self._fingerprints[modality]

    def _load_blip2(self, names: Weights) -> None:
        prefixes = checkpoint.BLIP2_BRIDGE
        file = checkpoint.read(hub.find(names, "model.perceiver.weights", prefixes=prefixes), prefixes)
        mine = ("image_query_tokens", "Qformer.", "ln_vision.")
        found = {n: t for n, t in checkpoint.bridge_tensors(file.tensors, file.path).items() if n.startswith(mine)}
        expected = checkpoint.bridge_tensors(self.state_dict())
        checkpoint.check_fit(
            expected, found, [name for name in expected if name.startswith(mine)], file.path, "model.perceiver"
        )
        checkpoint.check_finite(found, file.path)
        read = {name: t.to(torch.float32, copy=True).contiguous() for name, t in found.items()}  # training writes to it
        self.load_state_dict(read, strict=False, assign=True)

    def _freeze(self) -> None:
        for name in FROZEN:
            getattr(self, name).requires_grad_(False)
        lora.thaw(self.llama_model)
        if self.settings.perceiver.frozen:
            for trained in (self.Qformer, self.audio_trans, self.image_query_tokens, self.audio_query_tokens):
                trained.requires_grad_(False)
        self.train(self.training)

    def _encoded(
        self, wanted: Mapping[Modality, list[tuple[int, Slot]]], media: sample_reader.Media
    ) -> dict[Modality, list[EncodedMedium]]:
        """The named media encoded, images and videos in the same batch of frames."""
        named: dict[Modality, list[Any]] = {k: [media[k][i][slot.index] for i, slot in wanted[k]] for k in wanted}
        images, videos, sounds = (named.get(kind, []) for kind in ("image", "video", "audio"))
        frames = self.encode_media("video", [*images, *videos])
        heard = self.encode_media("audio", sounds)
        found: dict[Modality, list[EncodedMedium]] = {"image": frames[: len(images)], "video": frames[len(images) :]}
        return {kind: listed for kind, listed in {**found, "audio": heard}.items() if listed}


_ENCODERS = {"vision": ("visual_encoder", "ln_vision"), "audio": ("audio_encoder", "ln_audio")}


@functools.cache
def _tell_of_the_small_model() -> None:
    """Once, as a warning: Python shows no less to a program that has set up no logging."""
    log.warning("chatbridge 'tiny' is the small model of the embedded world: it knows nothing outside that world")


def _drawn(deviation: float, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * deviation)
