"""The annotators that run models, each with a tiny randomly initialised model from a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lavis_chatbridge.multis.annotators import AudioTagger, Captioner, Florence2, Options, Segmenter, View

SIDE = 32
BART = {
    "model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 600,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


FRAME = View("clip", "image", "clip.mp4", np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    """A byte tokenizer: no training, no file."""
    tokens = ["<pad>", "<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def image_processor(cls: type):
    size = {"height": SIDE, "width": SIDE}
    return cls(size=size, crop_size=size)


def test_blip2_captions_a_frame(tmp_path: Path) -> None:
    words = tokenizer("<image>")
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    queries = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    text = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    config = transformers.Blip2Config(
        vision_config={**vision, "image_size": SIDE, "patch_size": 16},
        qformer_config={**queries, "encoder_hidden_size": 16, "vocab_size": len(words)},
        text_config={**text, "num_attention_heads": 2, "vocab_size": len(words), "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    pictures = image_processor(transformers.BlipImageProcessor)
    transformers.Blip2Processor(pictures, words, num_query_tokens=4).save_pretrained(tmp_path)
    captioner = Captioner(str(tmp_path), Options())
    captioner.max_tokens = 5
    assert "<s>" not in captioner.annotate(FRAME).caption
    assert captioner.annotate(FRAME) == captioner.annotate(FRAME)
    assert captioner.name == f"captioner {tmp_path.name}"


def test_florence2_gives_regions_with_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer("<image>", *(f"<loc_{n}>" for n in range(1000)), image_token="<image>")
    config = transformers.Florence2Config(
        vision_config={
            "embed_dim": (8, 8, 8, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2), "num_groups": (1, 1, 1, 2),
            "window_size": 2, "projection_dim": 16,
        },
        text_config={**BART, "vocab_size": len(words)},
        image_token_id=words.image_token_id,
    )  # fmt: skip
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(tmp_path)
    pictures = image_processor(transformers.CLIPImageProcessor)
    pictures.image_seq_length = 2
    forms = {"description_with_bboxes": {}}
    transformers.Florence2Processor(pictures, words, post_processor_config=forms).save_pretrained(tmp_path)
    annotator = Florence2(str(tmp_path), Options())
    annotator.max_tokens = 8
    annotator.annotate(FRAME)  # random weights run through the whole path
    written = "</s><s>a red ball<loc_0><loc_250><loc_500><loc_999>the sky<loc_100><loc_0><loc_900><loc_300></s>"
    tokens = annotator.run.processor.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(annotator.run.model, "generate", lambda **_: tokens)
    ball, sky = annotator.annotate(FRAME).regions
    assert ball.text == "a red ball"
    assert ball.box == pytest.approx((0.0, 0.25, 0.5, 1.0), abs=0.03)  # whole pixels of a small frame
    assert sky.text == "the sky"


def test_a_segmentation_gives_the_share_of_a_class(tmp_path: Path) -> None:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 1], mlp_ratios=[1, 1], decoder_hidden_size=8, num_labels=3,
        id2label={0: "wall, plain", 1: "floor", 2: "dog"},
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.weight.zero_()
        model.decode_head.classifier.bias.copy_(torch.tensor([0.0, -1.0, -1.0]))
    model.save_pretrained(tmp_path)
    image_processor(transformers.SegformerImageProcessor).save_pretrained(tmp_path)
    assert Segmenter(str(tmp_path), Options()).annotate(FRAME).semantics == {"wall": 1.0}


def test_an_audio_classifier_gives_tags(tmp_path: Path) -> None:
    config = transformers.ASTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_length=64,
        num_mel_bins=32, id2label={0: "Dog", 1: "Rain", 2: "Speech"},
    )  # fmt: skip
    model = transformers.ASTForAudioClassification(config)
    with torch.no_grad():
        model.classifier.dense.weight.zero_()
        model.classifier.dense.bias.copy_(torch.tensor([0.0, 3.0, -9.0]))
    model.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path)
    sound = View("s", "audio", "s.wav", np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32))
    assert AudioTagger(str(tmp_path), Options()).annotate(sound).tags == (
        "Rain",
        "Dog",
    )  # 0.95 and 0.5; speech is below 0.1
