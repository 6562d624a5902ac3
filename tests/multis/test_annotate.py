"""Annotation: imported files, tiny randomly initialised models, merging, sharding, resuming, unreadable media."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lavis_chatbridge.errors import ChatBridgeError, DataError
from lavis_chatbridge.multis.annotate import annotate
from lavis_chatbridge.multis.annotation import Region, read_annotations
from lavis_chatbridge.multis.annotators import Findings, View, build_annotator
from lavis_chatbridge.prompting.conversation import Modality
from tests.media.making import tone, video_file

BOTH = ["video", "audio"]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
ITEMS = {"picture": ["image"], "clip": ["video"], "sound": ["audio"], "x": BOTH, "y": BOTH}


def view(item: str = "clip", path: str = "videos/clip.mp4", number: int = 0) -> View:
    pixels = np.random.default_rng(0).integers(0, 255, (100, 200, 3), dtype=np.uint8)
    return View(item, "image", path, pixels, number)


BALL = Findings(regions=(Region(text="a red ball", box=(0.1, 0.1, 0.5, 0.5)),))
STAR = Findings(caption="a star")
THINGS = {"clip": [{"box": [0, 0, 9, 9], "text": f"thing {n}", "score": n / 10} for n in range(10)]}
AREAS = [("grass", 8000), ("sky", 5000), ("grass", 2000), ("sun", 200)]
MASKS = {"clip": [{"class_name": name, "area": area} for name, area in AREAS]}
LISTED = [{"image_id": "videos/clip.mp4", "bbox": [20, 10, 80, 40], "object_descriptions": ["a red ball"]}]


@pytest.mark.parametrize(
    ("form", "content", "found"),
    [
        ("grit", {"clip/0": [{"box": [20, 10, 100, 50], "description": "a red ball", "score": 0.5}]}, BALL),
        ("grit", {"clip": {"bbox": [20, 10, 80, 40], "caption": "a red ball", "score": 0.5}}, BALL),
        ("grit", LISTED, BALL),
        ("grit", THINGS, ["thing 9", "thing 8"]),
        ("semantic_sam", MASKS, {"grass": 0.5, "sky": 0.25}),
        ("captions", {"clip": ["a star", {"caption": "a ball"}]}, STAR),
        ("captions", [{"file_name": "clip.mp4", "text": "a star"}, {"id": "another", "text": "a ball"}], STAR),
    ],
)
def test_the_best_two_findings_of_another_tool_are_imported(
    tmp_path: Path, form: str, content: Any, found: Any
) -> None:
    (tmp_path / "made.json").write_text(json.dumps(content))
    importer = build_annotator(f"{form}={tmp_path}/made.json,largest=2")
    got = importer.annotate(view())
    assert found in (got, got.semantics, [region.text for region in got.regions])
    assert importer.annotate(view("other", "o.mp4")) == importer.annotate(view(number=1)) == Findings()


@pytest.mark.parametrize(
    ("text", "content", "message"),
    [
        ("florence=x", {}, "did you mean 'florence2'"),
        ("grit", {}, "needs a path"),
        ("grit=x.json,larges=3", {}, "unknown key annotators.grit.larges, did you mean 'largest'"),
        ("captioner=/nowhere", {}, "/nowhere cannot be loaded for image-text-to-text"),
        ("grit=/nowhere.json", {}, "/nowhere.json: cannot be read"),
        ("grit=made.json", [{"box": [1, 2, 3, 4]}], "image_id or file_name or id is None"),
        ("grit=made.json", {"clip": [{"text": "x", "box": [1, 2]}]}, "entry of 'clip' is not of the form 'grit'"),
        ("captions=made.json", {"clip": [7]}, "entry of 'clip' is not of the form 'captions'"),
    ],
)
def test_a_wrong_annotator_or_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("made.json").write_text(json.dumps(content))
    with pytest.raises(ChatBridgeError, match=message):
        build_annotator(text).annotate(view())


@pytest.fixture(scope="module")
def items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``items.jsonl``: an image, a video, a sound, and two videos (``x``, ``y``) with their sounds."""
    folder = tmp_path_factory.mktemp("items")
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "a.mp4").write_bytes(video_file(sound=tone(1.2, 48_000)))
    lines = []
    for name, modalities in ITEMS.items():
        media = [{"type": m, "path": "a.png" if m == "image" else "a.mp4"} for m in modalities]
        heard = {"sound_captions": ["A tone."]} if len(media) == 2 else {}
        lines.append(json.dumps({"id": name, "media": media, "captions": ["A caption."], "licence": "CC0", **heard}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "items.jsonl"


class Counting:
    """An annotator of a user's own."""

    name = "counting 1"

    def __init__(self, modality: Modality = "image") -> None:
        self.modality: Modality = modality
        self.seen: list[str] = []

    def annotate(self, view: View) -> Findings:
        self.seen.append(view.item)
        if self.modality == "audio":
            return Findings(sound_captions=(f"{len(view.content)} values",))
        return Findings(caption=f"frame {view.number}")


def test_findings_are_added_and_signed(items: Path, tmp_path: Path) -> None:
    (tmp_path / "seen.json").write_text(json.dumps({"x/1": "a square"}))
    annotators = [build_annotator(f"captions={tmp_path}/seen.json"), Counting("audio")]
    annotate(items, tmp_path / "out", annotators)
    done = {one.id: one for one in read_annotations(tmp_path / "out")}
    both, sound = done["x"], done["sound"]
    assert [frame.caption for frame in both.frames] == ["", "a square", ""]
    assert both.sound_captions[0] == "A tone."
    assert both.sound_captions[1].endswith(" values")
    assert both.written_by["sound_captions"] == "human, counting 1"
    assert (sound.captions, sound.sound_captions[0], sound.licence) == ((), "A caption.", "CC0")


def test_ranks_cover_every_item_once_and_resume(items: Path, tmp_path: Path) -> None:
    reports = [annotate(items, tmp_path, [Counting()], rank=rank, world=3) for rank in range(3)]
    assert sum(report.annotated for report in reports) == 5
    done = {one.id: one for one in read_annotations(tmp_path)}
    assert done.keys() == ITEMS.keys()
    both = done["y"]
    assert [frame.position for frame in both.frames] == [0.1667, 0.5, 0.8333]
    assert [frame.caption for frame in both.frames] == ["frame 0", "frame 1", "frame 2"]
    assert both.written_by == {"captions": "human", "sound_captions": "human", "frames.caption": "counting 1"}
    again = Counting()
    assert annotate(items, tmp_path, [again]).known == 5, "another number of processes finds the same items finished"
    assert again.seen == []


def test_a_folder_of_other_annotators_or_captions_is_refused(items: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "items.jsonl", tmp_path / "out"
    mine.write_text(items.read_text())
    annotate(mine, out, [], items.parent)
    before = [file.read_bytes() for file in out.iterdir()]
    with pytest.raises(DataError, match=r"'picture' was made from item hash \w+; now it .* \w+, counting 1: choose"):
        annotate(mine, out, [Counting()], items.parent)
    mine.write_text(items.read_text().replace("A caption", "A better caption"))
    with pytest.raises(DataError, match="choose another --out, or delete"):
        annotate(mine, out, [], items.parent)
    assert [file.read_bytes() for file in out.iterdir()] == before


def test_views_of_no_item_are_counted(items: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    views = ["foo/0", "clip/2", "clip/3", "picture/1", "a.png", "sound/0", "x"]
    (tmp_path / "seen.json").write_text(json.dumps(dict.fromkeys(views, "a square")))
    annotate(items, tmp_path / "out", [build_annotator(f"captions={tmp_path}/seen.json")])
    [warning] = caplog.messages
    assert warning.endswith("views that belong to no item: 4, the first is 'foo/0'")
    (tmp_path / "seen.json").write_text("{}")
    edited = f"captions={tmp_path}/seen.json"
    annotate(items, tmp_path / "new", [build_annotator(edited)])
    for folder, changed in (("out", edited), ("new", f"{edited},largest=2")):
        with pytest.raises(DataError, match=r"captions import seen\.json"):
            annotate(items, tmp_path / folder, [build_annotator(changed)])


def test_an_item_whose_line_was_cut_off_is_annotated_again(items: Path, tmp_path: Path) -> None:
    annotate(items, tmp_path, [Counting()])
    [file] = tmp_path.glob("annotations-*.jsonl")
    file.write_bytes(file.read_bytes()[:-20] + "é".encode()[:1])
    again = Counting()
    assert annotate(items, tmp_path, [again])[:2] == (1, 4)
    assert set(again.seen) == {"y"}
    assert [one.id for one in read_annotations(tmp_path)] == list(ITEMS)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["../a.png"], "items.jsonl:1.* leaves the media root"),
        (["a.png", "a.png"], "items.jsonl:2: the id 'a' occurs twice"),
    ],
)
def test_faulty_items_are_refused(tmp_path: Path, paths: list[str], message: str) -> None:
    lines = [json.dumps({"id": "a", "media": [{"type": "image", "path": path}]}) for path in paths]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        annotate(tmp_path / "items.jsonl", tmp_path / "out", [])


def test_unreadable_media_are_named_and_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["bad.jpg", "none.jpg", "link.png"]
    items = [{"id": name, "media": [{"type": "image", "path": name}]} for name in names]
    (root / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    assert annotate(root / "items.jsonl", tmp_path / "out", [Counting()]) == (0, 0, 3)
    failures = [json.loads(line) for file in (tmp_path / "out").glob("failures*") for line in file.open()]
    assert [failure["id"] for failure in failures] == names
    assert "none.jpg" in failures[1]["reason"]
    assert "leads out of the media root" in failures[2]["reason"]


def tokenizer(*special: str, **named: str) -> transformers.PreTrainedTokenizerFast:
    """A byte tokenizer: no training, no file."""
    tokens = ["<pad>", "<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    fast = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<pad>", "<s>", "</s>", *special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", extra_special_tokens=named
    )


def pictures(cls: type) -> Any:
    size = {"height": 32, "width": 32}
    return cls(size=size, crop_size=size)


def test_blip2_captions_a_frame(tmp_path: Path) -> None:
    words = tokenizer("<image>")
    text = {**SMALL, "model_type": "opt", "word_embed_proj_dim": 16, "ffn_dim": 16, "max_position_embeddings": 64}
    config = transformers.Blip2Config(
        vision_config={**SMALL, "image_size": 32, "patch_size": 16},
        qformer_config={**SMALL, "encoder_hidden_size": 16, "vocab_size": len(words)},
        text_config={**text, "vocab_size": len(words)},
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    transformers.Blip2ForConditionalGeneration(config).save_pretrained(tmp_path)
    processor = transformers.Blip2Processor(pictures(transformers.BlipImageProcessor), words, num_query_tokens=4)
    processor.save_pretrained(tmp_path)
    captioner: Any = build_annotator(f"captioner={tmp_path}")
    captioner.max_tokens = 5
    assert "<s>" not in captioner.annotate(view()).caption
    assert captioner.name == f"captioner {tmp_path.name}"


def test_florence2_gives_regions_with_boxes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = tokenizer("<image>", *(f"<loc_{n}>" for n in range(1000)), image_token="<image>")
    bart = {"model_type": "bart", "d_model": 16, "max_position_embeddings": 600, "vocab_size": len(words)}
    for part in ("encoder", "decoder"):
        bart |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 16}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    stages = {"embed_dim": (8, 8, 8, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 2), "num_groups": (1, 1, 1, 2)}
    config = transformers.Florence2Config(
        vision_config={**stages, "window_size": 2, "projection_dim": 16},
        text_config={**bart, **ends, "forced_eos_token_id": 2},
        image_token_id=words.image_token_id,
    )
    transformers.Florence2ForConditionalGeneration(config).save_pretrained(tmp_path)
    images = pictures(transformers.CLIPImageProcessor)
    images.image_seq_length = 2
    forms = {"description_with_bboxes": {}}
    transformers.Florence2Processor(images, words, post_processor_config=forms).save_pretrained(tmp_path)
    annotator: Any = build_annotator(f"florence2={tmp_path}")
    annotator.max_tokens = 8
    annotator.annotate(view())  # random weights run through the whole path
    written = "</s><s>a red ball<loc_0><loc_250><loc_500><loc_999>the sky<loc_100><loc_0><loc_900><loc_300></s>"
    tokens = annotator.run.processor.tokenizer(written, return_tensors="pt", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(annotator.run.model, "generate", lambda **_: tokens)
    ball, sky = annotator.annotate(view()).regions
    assert ball.text == "a red ball"
    assert ball.box == pytest.approx((0.0, 0.25, 0.5, 1.0), abs=0.03)  # whole pixels of a small frame
    assert sky.text == "the sky"


def test_a_segmentation_gives_the_share_of_a_class(tmp_path: Path) -> None:
    pairs = {"depths": [1, 1], "sr_ratios": [1, 1], "num_attention_heads": [1, 1], "mlp_ratios": [1, 1]}
    sizes = {"hidden_sizes": [8, 16], "patch_sizes": [7, 3], "strides": [4, 2], "decoder_hidden_size": 8}
    labels = {0: "wall, plain", 1: "floor", 2: "dog"}
    config = transformers.SegformerConfig(num_encoder_blocks=2, **pairs, **sizes, num_labels=3, id2label=labels)
    model = transformers.SegformerForSemanticSegmentation(config)
    with torch.no_grad():
        model.decode_head.classifier.weight.zero_()
        model.decode_head.classifier.bias.copy_(torch.tensor([0.0, -1.0, -1.0]))
    model.save_pretrained(tmp_path)
    pictures(transformers.SegformerImageProcessor).save_pretrained(tmp_path)
    assert build_annotator(f"segmenter={tmp_path}").annotate(view()).semantics == {"wall": 1.0}


def test_an_audio_classifier_gives_tags(tmp_path: Path) -> None:
    labels = {0: "Dog", 1: "Rain", 2: "Speech"}
    config = transformers.ASTConfig(**SMALL, max_length=64, num_mel_bins=32, id2label=labels)
    model = transformers.ASTForAudioClassification(config)
    with torch.no_grad():
        model.classifier.dense.weight.zero_()
        model.classifier.dense.bias.copy_(torch.tensor([0.0, 3.0, -9.0]))
    model.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path)
    sound = View("s", "audio", "s.wav", tone(1.0, 16_000))
    found = build_annotator(f"audio_tagger={tmp_path}").annotate(sound)
    assert found.tags == ("Rain", "Dog")  # scores 0.95 and 0.5; speech is below 0.1
