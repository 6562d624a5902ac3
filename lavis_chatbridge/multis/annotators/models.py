"""Annotators that run a model: BLIP-2 (frame captions), Florence-2 (region captions), a segmentation model (which
class covers how much of a frame) and an audio classifier (sound tags). Weights are loaded from a folder, never fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lavis_chatbridge.multis.annotation import Region, Semantic, Tag
from lavis_chatbridge.multis.annotators.base import Findings, View, ViewKind, WeightsError

if TYPE_CHECKING:
    import torch

RATE = 16_000
_DENSE_CAPTIONS = "<DENSE_REGION_CAPTION>"


def _folder(path: str | Path, what: str, example: str) -> Path:
    """The folder of a Hugging Face model.

    Raises:
        WeightsError: If there is none.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"no weights of {what} at {folder}: expected a Hugging Face folder with config.json and the weights, e.g. "
            f"of {example}; fetch it where there is a network: hf download {example} --local-dir DIR"
        )
    return folder


def _load(loader: Any, folder: Path, device: str, dtype: str) -> Any:
    import torch

    try:
        model = loader.from_pretrained(folder, dtype=getattr(torch, dtype), local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise WeightsError(f"cannot load the weights in {folder}: {' '.join(str(error).split())[:300]}") from error
    return model.to(device).eval()


def _processor(loader: Any, folder: Path) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise WeightsError(f"cannot load the processor in {folder}: {' '.join(str(error).split())[:300]}") from error


def _moved(batch: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
        for name, value in batch.items()
        if hasattr(value, "to")
    }


class Blip2Captioner:
    """Frame captions by BLIP-2 through transformers.

    Args:
        path: A Hugging Face folder, e.g. of ``Salesforce/blip2-opt-2.7b-coco``.
        device: Where it runs.
        dtype: Its precision.
        prompt: What the caption goes on from; BLIP-2 needs none.
        max_tokens: The longest caption.
        beams: Beams of the search.

    Raises:
        WeightsError: If the folder is not that of a BLIP-2.
    """

    kind: ViewKind = "frame"

    def __init__(
        self, path: str | Path, device: str = "cpu", dtype: str = "float32", prompt: str = "", max_tokens: int = 40,
        beams: int = 3,
    ) -> None:  # fmt: skip
        folder = _folder(path, "BLIP-2", "Salesforce/blip2-opt-2.7b-coco")
        from transformers import AutoProcessor, Blip2ForConditionalGeneration

        self.name = f"blip2 {folder.name}"
        self._processor = _processor(AutoProcessor, folder)
        self._model = _load(Blip2ForConditionalGeneration, folder, device, dtype)
        self._prompt, self._limits = prompt, {"max_new_tokens": max_tokens, "num_beams": beams}

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """A caption per frame."""
        import torch

        prompts = {"text": [self._prompt] * len(views)} if self._prompt else {}
        batch = self._processor(images=[view.content for view in views], return_tensors="pt", **prompts)
        with torch.inference_mode():
            tokens = self._model.generate(**_moved(batch, self._model.device, self._model.dtype), **self._limits)
        texts = self._processor.batch_decode(tokens, skip_special_tokens=True)
        return [Findings(caption=text.removeprefix(self._prompt).strip()) for text in texts]


class LavisCaptioner:
    """Frame captions by any captioning model of LAVIS, e.g. BLIP-2: ``blip2_opt/caption_coco_opt2.7b``.

    Args:
        path: ``name/model_type`` in LAVIS's model zoo. Where LAVIS has to fetch its weights, it needs a network.
        device: Where it runs.
        max_tokens: The longest caption.
        beams: Beams of the search.

    Raises:
        WeightsError: If LAVIS cannot load it.
    """

    kind: ViewKind = "frame"

    def __init__(self, path: str, device: str = "cpu", max_tokens: int = 40, beams: int = 3) -> None:
        from lavis.models import load_model_and_preprocess

        name, _, model_type = str(path).partition("/")
        try:
            self._model, processors, _ = load_model_and_preprocess(
                name, model_type or None, is_eval=True, device=device
            )
        except (
            Exception
        ) as error:  # LAVIS raises whatever its model's loader meets: OSError, AssertionError, KeyError ...
            raise WeightsError(f"LAVIS cannot load {path!r}: {type(error).__name__}: {str(error)[:300]}") from error
        self.name = f"lavis {path}"
        self._processor = processors["eval"]
        self._limits = {"max_length": max_tokens, "num_beams": beams}

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """A caption per frame."""
        import torch
        from PIL import Image

        images = torch.stack([self._processor(Image.fromarray(view.content)) for view in views])
        device = next(self._model.parameters()).device
        with torch.inference_mode():
            texts = self._model.generate({"image": images.to(device)}, **self._limits)
        return [Findings(caption=text.strip()) for text in texts]


class Florence2Regions:
    """Region captions with boxes by Florence-2 (dense region captioning) through transformers; stands in for GRIT.

    Args:
        path: A Hugging Face folder, e.g. of ``florence-community/Florence-2-base``.
        device: Where it runs.
        dtype: Its precision.
        largest: Regions kept per frame.
        max_tokens: The longest output.
        beams: Beams of the search.

    Raises:
        WeightsError: If the folder is not that of a Florence-2.
    """

    kind: ViewKind = "frame"

    def __init__(
        self, path: str | Path, device: str = "cpu", dtype: str = "float32", largest: int = 12, max_tokens: int = 512,
        beams: int = 3,
    ) -> None:  # fmt: skip
        folder = _folder(path, "Florence-2", "florence-community/Florence-2-base")
        from transformers import AutoProcessor, Florence2ForConditionalGeneration

        self.name = f"florence2 {folder.name}"
        self._processor = _processor(AutoProcessor, folder)
        self._model = _load(Florence2ForConditionalGeneration, folder, device, dtype)
        self._largest, self._limits = largest, {"max_new_tokens": max_tokens, "num_beams": beams}

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Captions of regions per frame."""
        import torch

        found = []
        for view in views:
            batch = self._processor(text=_DENSE_CAPTIONS, images=view.content, return_tensors="pt")
            with torch.inference_mode():
                tokens = self._model.generate(**_moved(batch, self._model.device, self._model.dtype), **self._limits)
            text = self._processor.batch_decode(tokens, skip_special_tokens=False)[0]
            height, width = view.content.shape[:2]
            parsed = self._processor.post_process_generation(text, task=_DENSE_CAPTIONS, image_size=(width, height))
            found.append(Findings(regions=self._regions(parsed[_DENSE_CAPTIONS], width, height)))
        return found

    def _regions(self, parsed: dict[str, Any], width: int, height: int) -> tuple[Region, ...]:
        scale = (width, height, width, height)
        regions = []
        for box, label in zip(parsed.get("bboxes", ()), parsed.get("labels", ()), strict=False):
            if label.strip():
                shares = tuple(round(min(1.0, max(0.0, v / s)), 4) for v, s in zip(box, scale, strict=True))
                regions.append(Region(label.strip(), shares))
        return tuple(regions[: self._largest])


class Segmenter:
    """Classes and the share of the frame that each covers, by a segmentation model; stands in for Semantic-SAM.

    Args:
        path: A Hugging Face folder of a semantic or universal segmentation model, e.g. of
            ``nvidia/segformer-b0-finetuned-ade-512-512`` or ``facebook/mask2former-swin-base-ade-semantic``.
        device: Where it runs.
        dtype: Its precision.
        largest: Classes kept per frame.
        least_share: Classes that cover less are dropped.

    Raises:
        WeightsError: If the folder is not that of a segmentation model.
    """

    kind: ViewKind = "frame"

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        largest: int = 12,
        least_share: float = 0.01,
    ) -> None:
        folder = _folder(path, "a segmentation model", "nvidia/segformer-b0-finetuned-ade-512-512")
        import transformers

        config = _processor(transformers.AutoConfig, folder)
        universal = config.model_type in ("maskformer", "mask2former", "oneformer", "detr")
        loader = (
            transformers.AutoModelForUniversalSegmentation
            if universal
            else transformers.AutoModelForSemanticSegmentation
        )
        self.name = f"{config.model_type} {folder.name}"
        self._processor = _processor(transformers.AutoImageProcessor, folder)
        self._model = _load(loader, folder, device, dtype)
        self._labels: dict[int, str] = config.id2label
        self._largest, self._least = largest, least_share

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Classes per frame, the largest first."""
        import torch

        batch = self._processor(images=[view.content for view in views], return_tensors="pt")
        with torch.inference_mode():
            outputs = self._model(**_moved(batch, self._model.device, self._model.dtype))
        sizes = [view.content.shape[:2] for view in views]
        maps = self._processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)
        return [Findings(semantics=self._semantics(classes.cpu().numpy())) for classes in maps]

    def _semantics(self, classes: np.ndarray) -> tuple[Semantic, ...]:
        numbers, counts = np.unique(classes, return_counts=True)
        shares = sorted(zip(counts / classes.size, numbers.tolist(), strict=True), reverse=True)
        kept = [(share, number) for share, number in shares if share >= self._least and number in self._labels]
        return tuple(Semantic(self._labels[n].split(",")[0], round(float(s), 4)) for s, n in kept[: self._largest])


class AudioTagger:
    """Sound tags by an audio classifier, e.g. the audio spectrogram transformer trained on AudioSet.

    Args:
        path: A Hugging Face folder, e.g. of ``MIT/ast-finetuned-audioset-10-10-0.4593``.
        device: Where it runs.
        dtype: Its precision.
        largest: Tags kept per sound.
        least_score: Tags below are dropped.

    Raises:
        WeightsError: If the folder is not that of an audio classifier.
    """

    kind: ViewKind = "sound"

    def __init__(
        self, path: str | Path, device: str = "cpu", dtype: str = "float32", largest: int = 5, least_score: float = 0.1
    ) -> None:
        folder = _folder(path, "an audio classifier", "MIT/ast-finetuned-audioset-10-10-0.4593")
        from transformers import AutoFeatureExtractor, AutoModelForAudioClassification

        self.name = f"audio tags {folder.name}"
        self._processor = _processor(AutoFeatureExtractor, folder)
        self._model = _load(AutoModelForAudioClassification, folder, device, dtype)
        self._largest, self._least = largest, least_score

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Tags per sound, the surest first."""
        import torch

        found = []
        for view in views:
            batch = self._processor(view.content, sampling_rate=RATE, return_tensors="pt")
            with torch.inference_mode():
                logits = self._model(**_moved(batch, self._model.device, self._model.dtype)).logits[0]
            scores, numbers = logits.float().sigmoid().sort(descending=True)
            pairs = zip(scores.tolist()[: self._largest], numbers.tolist(), strict=False)
            labels = self._model.config.id2label
            found.append(Findings(tags=tuple(Tag(labels[n], round(s, 4)) for s, n in pairs if s >= self._least)))
        return found
