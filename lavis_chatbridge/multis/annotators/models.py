"""Annotators that run a model. Weights are loaded from a folder, never downloaded.

Segmentation and audio classification are pipelines of transformers, which has none for the captioners.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lavis_chatbridge.errors import ChatBridgeError
from lavis_chatbridge.multis.annotation import Region, Semantic, Tag
from lavis_chatbridge.multis.annotators import RATE, Findings, View

_DENSE_CAPTIONS = "<DENSE_REGION_CAPTION>"


class WeightsError(ChatBridgeError):
    """An annotator's weights are absent, or are weights of another model."""


def _folder(path: str | Path, what: str, example: str) -> Path:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise WeightsError(
            f"no weights of {what} at {folder}: expected a Hugging Face folder with config.json and the weights, e.g. "
            f"of {example}; download them with: hf download {example} --local-dir DIR"
        )
    return folder


def _loaded(build: Any, folder: Path, **options: Any) -> Any:
    """``build(folder)``, whose many exceptions for unfit folders become a `WeightsError`."""
    try:
        return build(folder, **options)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise WeightsError(f"cannot load the weights in {folder}: {' '.join(str(error).split())[:300]}") from error


def _pipeline(task: str, folder: Path, device: str, dtype: str) -> Any:
    import transformers

    build: Any = transformers.pipeline
    return _loaded(lambda path: build(task, model=str(path), device=device, dtype=dtype), folder)


class _Generator:
    """A processor and a model of transformers that generates text."""

    views: Literal["frame", "sound"] = "frame"

    def __init__(self, name: str, architecture: str, folder: Path, device: str, dtype: str, **limits: int) -> None:
        import torch
        import transformers

        self.name = f"{name} {folder.name}"
        self.processor = _loaded(transformers.AutoProcessor.from_pretrained, folder, local_files_only=True)
        loader = getattr(transformers, architecture).from_pretrained
        self.model = _loaded(loader, folder, dtype=getattr(torch, dtype), local_files_only=True).to(device).eval()
        self.limits = limits

    def texts(self, keep_special: bool = False, **inputs: Any) -> list[str]:
        """The texts that the model generates for a batch."""
        import torch

        batch = self.processor(return_tensors="pt", **inputs).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**batch, **self.limits)
        return self.processor.batch_decode(tokens, skip_special_tokens=not keep_special)


class Blip2Captioner(_Generator):
    """Frame captions by BLIP-2.

    Args:
        path: A Hugging Face folder, e.g. of ``Salesforce/blip2-opt-2.7b-coco``.
        device: Where it runs.
        dtype: Its precision.
        prompt: The caption continues it; BLIP-2 needs none.
        max_tokens: The longest caption.
        beams: Of the beam search.

    Raises:
        WeightsError: If the folder is not one of BLIP-2.
    """

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", prompt: str = "", max_tokens: int = 40,
        beams: int = 3,
    ) -> None:  # fmt: skip
        folder = _folder(path, "BLIP-2", "Salesforce/blip2-opt-2.7b-coco")
        limits = {"max_new_tokens": max_tokens, "num_beams": beams}
        super().__init__("blip2", "Blip2ForConditionalGeneration", folder, device, dtype, **limits)
        self._prompt = prompt

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """A caption per frame."""
        prompts: dict[str, Any] = {"text": [self._prompt] * len(views)} if self._prompt else {}
        texts = self.texts(images=[view.content for view in views], **prompts)
        return [Findings(caption=text.removeprefix(self._prompt).strip()) for text in texts]


class Florence2Regions(_Generator):
    """Region captions with boxes by Florence-2 (dense region captioning); replaces GRIT.

    Args:
        path: A Hugging Face folder, e.g. of ``florence-community/Florence-2-base``.
        device: Where it runs.
        dtype: Its precision.
        largest: Regions kept per frame.
        max_tokens: The longest output.
        beams: Of the beam search.

    Raises:
        WeightsError: If the folder is not one of Florence-2.
    """

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 12, max_tokens: int = 512,
        beams: int = 3,
    ) -> None:  # fmt: skip
        folder = _folder(path, "Florence-2", "florence-community/Florence-2-base")
        limits = {"max_new_tokens": max_tokens, "num_beams": beams}
        super().__init__("florence2", "Florence2ForConditionalGeneration", folder, device, dtype, **limits)
        self._largest = largest

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Captions of regions per frame."""
        return [Findings(regions=self._regions(view)) for view in views]

    def _regions(self, view: View) -> tuple[Region, ...]:
        height, width = view.content.shape[:2]
        text = self.texts(keep_special=True, text=_DENSE_CAPTIONS, images=view.content)[0]
        parsed = self.processor.post_process_generation(text, task=_DENSE_CAPTIONS, image_size=(width, height))
        found = parsed[_DENSE_CAPTIONS]
        scale = np.array([width, height, width, height], float)
        regions = [
            Region(text=label.strip(), box=tuple((np.array(box) / scale).clip(0, 1).round(4).tolist()))
            for box, label in zip(found.get("bboxes", ()), found.get("labels", ()), strict=False)
            if label.strip()
        ]
        return tuple(regions[: self._largest])


class LavisCaptioner:
    """Frame captions by any captioning model of LAVIS, e.g. BLIP-2: ``blip2_opt/caption_coco_opt2.7b``.

    Args:
        path: ``name/model_type`` in LAVIS's model zoo, which may download the weights.
        device: Where it runs.
        max_tokens: The longest caption.
        beams: Of the beam search.

    Raises:
        WeightsError: If LAVIS cannot load it.
    """

    views: Literal["frame", "sound"] = "frame"

    def __init__(self, path: str, device: str = "cpu", max_tokens: int = 40, beams: int = 3) -> None:
        from lavis.models import load_model_and_preprocess

        name, _, model_type = path.partition("/")
        try:
            self._model, processors, _ = load_model_and_preprocess(
                name, model_type or None, is_eval=True, device=device
            )
        except Exception as error:  # LAVIS passes on any exception of its models' loaders
            raise WeightsError(f"LAVIS cannot load {path!r}: {type(error).__name__}: {str(error)[:300]}") from error
        self.name = f"lavis {path}"
        self._device, self._processor = device, processors["eval"]
        self._limits = {"max_length": max_tokens, "num_beams": beams}

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """A caption per frame."""
        import torch
        from PIL import Image

        images = torch.stack([self._processor(Image.fromarray(view.content)) for view in views])
        with torch.inference_mode():
            texts = self._model.generate({"image": images.to(self._device)}, **self._limits)
        return [Findings(caption=text.strip()) for text in texts]


class Segmenter:
    """Classes and the share of the frame that each covers, by a segmentation model; replaces Semantic-SAM.

    Args:
        path: A Hugging Face folder of a semantic or universal segmentation model, e.g. of
            ``nvidia/segformer-b0-finetuned-ade-512-512`` or ``facebook/mask2former-swin-base-ade-semantic``.
        device: Where it runs.
        dtype: Its precision.
        largest: Classes kept per frame.
        least_share: Classes that cover less are dropped.

    Raises:
        WeightsError: If the folder is not one of a segmentation model.
    """

    views: Literal["frame", "sound"] = "frame"

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 12, least_share: float = 0.01
    ) -> None:
        folder = _folder(path, "a segmentation model", "nvidia/segformer-b0-finetuned-ade-512-512")
        self._pipeline = _pipeline("image-segmentation", folder, device, dtype)
        self.name = f"{self._pipeline.model.config.model_type} {folder.name}"
        self._largest, self._least = largest, least_share

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Classes per frame, the largest first."""
        from PIL import Image

        images = [Image.fromarray(view.content) for view in views]
        return [Findings(semantics=self._semantics(masks)) for masks in self._pipeline(images, subtask="semantic")]

    def _semantics(self, masks: list[dict[str, Any]]) -> tuple[Semantic, ...]:
        shares = {mask["label"].split(",")[0]: float(np.mean(np.asarray(mask["mask"]) > 0)) for mask in masks}
        order = sorted(shares.items(), key=lambda entry: -entry[1])[: self._largest]
        return tuple(Semantic(label=name, share=round(share, 4)) for name, share in order if share >= self._least)


class AudioTagger:
    """Sound tags by an audio classifier, e.g. the audio spectrogram transformer trained on AudioSet.

    Args:
        path: A Hugging Face folder, e.g. of ``MIT/ast-finetuned-audioset-10-10-0.4593``.
        device: Where it runs.
        dtype: Its precision.
        largest: Tags kept per sound.
        least_score: Tags below are dropped.

    Raises:
        WeightsError: If the folder is not one of an audio classifier.
    """

    views: Literal["frame", "sound"] = "sound"

    def __init__(
        self, path: str, device: str = "cpu", dtype: str = "float32", largest: int = 5, least_score: float = 0.1
    ) -> None:
        folder = _folder(path, "an audio classifier", "MIT/ast-finetuned-audioset-10-10-0.4593")
        self._pipeline = _pipeline("audio-classification", folder, device, dtype)
        self.name = f"audio tags {folder.name}"
        self._largest, self._least = largest, least_score

    def annotate(self, views: Sequence[View]) -> list[Findings]:
        """Tags per sound, the most certain first."""
        sounds = [{"raw": view.content, "sampling_rate": RATE} for view in views]
        found = self._pipeline(sounds, top_k=self._largest, function_to_apply="sigmoid")
        return [
            Findings(
                tags=tuple(Tag(label=t["label"], score=round(t["score"], 4)) for t in tags if t["score"] >= self._least)
            )
            for tags in found
        ]
