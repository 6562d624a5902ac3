"""Weight files in each known layout, right and wrong ones."""

from __future__ import annotations

import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import checkpoint
from lavis_chatbridge.models.beats import Beats, BeatsConfig
from lavis_chatbridge.models.vision import VisionConfig, build_vision
from tests.models.building import SMALL_BEATS, small_model, small_settings


@pytest.fixture
def tokenizer(golden_dir: Path) -> Path:
    return golden_dir / "tokenizer"


@pytest.fixture(scope="module")
def model(golden_dir: Path) -> Any:
    return small_model(golden_dir / "tokenizer")


def changed(model: Any) -> dict[str, torch.Tensor]:
    return {name: t + 1.0 for name, t in model.trainable_state_dict().items()}


def same(model: Any, tensors: dict[str, torch.Tensor]) -> bool:
    own = model.state_dict()
    return all(torch.equal(own[name], t) for name, t in tensors.items())


@pytest.mark.parametrize("layout", ["safetensors", "torch", "under model", "whole", "ddp"])
def test_a_trained_bridge_in_every_layout(tokenizer: Path, tmp_path: Path, layout: str) -> None:
    model = small_model(tokenizer)
    tensors = changed(model)
    path = tmp_path / ("a.safetensors" if layout == "safetensors" else "a.pth")
    if layout == "safetensors":
        checkpoint.save(path, tensors)
    elif layout == "torch":
        torch.save(tensors, path)
    elif layout == "ddp":
        torch.save({"model": {f"module.{name}": t for name, t in tensors.items()}}, path)
    else:
        extra: dict[str, Any] = {"optimizer": {"state": {}, "lr": 1.0}, "epoch": 3, "config": {"a": [1]}}
        if layout == "whole":
            constants = {
                "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "Qformer.cls.predictions.bias": torch.ones(4),
                "Qformer.bert.embeddings.word_embeddings.weight": torch.ones(4, 4),
                "Qformer.bert.encoder.layer.0.output.dense.weight": torch.ones(4, 4),
            }
            tensors = {**{name: t + 1 for name, t in model.state_dict().items()}, **tensors}
            torch.save({"model": tensors | constants, **extra}, path)
            tensors.pop("Qformer.bert.embeddings.position_ids")
        else:
            torch.save({"model": tensors, **extra}, path)
    assert not same(model, tensors)
    model.load_checkpoint(str(path))
    assert same(model, tensors)


def test_a_misfit_is_named_in_one_line_and_loads_nothing(model: Any, tmp_path: Path) -> None:
    tensors = changed(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    tensors["llama_proj.weight"] = torch.ones(3, 3)
    tensors["other.weight"] = torch.ones(1)
    del tensors["audio_trans.bias"]
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as caught:
        model.load_checkpoint(str(tmp_path / "a.pth"))
    assert "missing: audio_trans.bias; unexpected: other.weight; llama_proj.weight is [3, 3], expected [32, 32]" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert same(model, before)


def test_half_of_a_frozen_part_is_refused(model: Any, tmp_path: Path) -> None:
    torch.save(changed(model) | {"ln_vision.weight": torch.ones(32)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"missing: ln_vision\.bias$"):
        model.load_checkpoint(str(tmp_path / "a.pth"))


def test_blip2_gives_queries_perceiver_and_norm(tokenizer: Path, tmp_path: Path) -> None:
    source = small_model(tokenizer, seed=1)
    wanted = {n: t + 1 for n, t in source.state_dict().items() if n.startswith(("Qformer.", "ln_vision."))}
    queries = source.image_query_tokens.detach()
    text = {"Qformer.bert.encoder.layer.0.intermediate.dense.weight": torch.ones(2), "t5_proj.weight": torch.ones(2)}
    torch.save({"model": {**wanted, "query_tokens": queries, **text}}, tmp_path / "blip2.pth")
    perceiver = small_settings(tokenizer).perceiver
    changes = {**vars(perceiver), "weights": str(tmp_path / "blip2.pth")}
    model = small_model(tokenizer, perceiver=type(perceiver)(**changes))
    wanted.pop("Qformer.bert.embeddings.position_ids")
    assert same(model, {**wanted, "image_query_tokens": queries})
    torch.save({"model": {**wanted, "query_tokens": queries[:, :2]}}, tmp_path / "blip2.pth")
    with pytest.raises(CheckpointError, match=r"image_query_tokens is \[1, 2, 32\], expected \[1, 3, 32\]"):
        small_model(tokenizer, perceiver=type(perceiver)(**changes))


def test_eva_drops_the_last_block_and_fits_positions(tmp_path: Path) -> None:
    large = build_vision(VisionConfig(image_size=56, patch_size=14, width=32, depth=3, heads=4))
    torch.save({**large.state_dict(), "norm.weight": torch.ones(32)}, tmp_path / "eva.pth")
    small = VisionConfig(image_size=28, patch_size=14, width=32, depth=2, heads=4)
    vision = build_vision(small)
    file = checkpoint.read(tmp_path / "eva.pth")
    checkpoint.load_exactly(vision, checkpoint.vision_tensors(file.tensors, 2, small.tokens), file.path, "model.vision")
    assert torch.equal(vision.blocks[1].mlp.fc1.weight, large.blocks[1].mlp.fc1.weight)
    assert torch.equal(vision.pos_embed[:, 0], large.pos_embed[:, 0])
    shallow = build_vision(VisionConfig(image_size=28, patch_size=14, width=32, depth=1, heads=4))
    tensors = checkpoint.vision_tensors(file.tensors, 1, small.tokens)
    with pytest.raises(CheckpointError, match=r"unexpected: blocks\.2\."):
        checkpoint.load_exactly(shallow, tensors, file.path, "model.vision")


def test_beats_brings_its_own_sizes(tokenizer: Path, tmp_path: Path) -> None:
    cfg = {**vars(SMALL_BEATS), "encoder_layers": 3, "dropout": 0.1, "predictor_class": 527, "layer_norm_first": False}
    held = Beats(type(SMALL_BEATS).from_dict(cfg))
    torch.save({"cfg": cfg, "model": {**held.state_dict(), "predictor.weight": torch.ones(2)}}, tmp_path / "b.pt")
    audio = small_settings(tokenizer).audio
    model = small_model(tokenizer, audio=type(audio)(weights=str(tmp_path / "b.pt")))
    assert len(model.audio_encoder.encoder.layers) == 3
    assert torch.equal(model.audio_encoder.layer_norm.weight, held.layer_norm.weight)
    with pytest.raises(CheckpointError, match=r"encoder_layers=3.*encoder_layers=2"):
        small_model(tokenizer, audio=type(audio)(weights=str(tmp_path / "b.pt"), config=SMALL_BEATS))
    once = {n: t for n, t in held.state_dict().items() if "relative" not in n or ".layers.0." in n}
    assert set(checkpoint.beats_tensors(once, 3)) == set(held.state_dict())


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("old", [False, True])
def test_no_code_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """Not in the format of before torch 1.6 either, which is read another way."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=r"refused.*never code"):
        checkpoint.read(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


def test_views_that_repeat_their_numbers_are_no_plain_tensors() -> None:
    checkpoint.check_plain({"a": torch.ones(3, 3).t(), "b": torch.ones(0), "c": torch.tensor(1.0)}, "file")
    with pytest.raises(CheckpointError, match=r"file holds other than plain tensors .*: a$"):
        checkpoint.check_plain({"a": torch.ones(4).as_strided((3, 3), (1, 0)), "b": torch.ones(2)}, "file")


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + b"0" * 100])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(tmp_path / name)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: get it anew"),
        (POINTER, "is a Git LFS pointer, .*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page, not weights"),
    ],
)
def test_what_a_failed_download_leaves(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} {message}"):
        checkpoint.read(tmp_path / name)


@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_is_cut_off_anywhere(tmp_path: Path, old: bool) -> None:
    tensors = {f"a{i}": torch.randn(40, 7) for i in range(5)}
    torch.save({"model": tensors}, tmp_path / "whole.pth", _use_new_zipfile_serialization=not old)
    checkpoint.save(tmp_path / "whole.safetensors", tensors)
    for suffix in (".pth", ".safetensors"):
        data = (tmp_path / f"whole{suffix}").read_bytes()
        assert set(checkpoint.read(tmp_path / f"whole{suffix}").tensors) == set(tensors)
        for size in (0, 1, 7, 8, 9, 60, len(data) // 3, len(data) // 2, len(data) - 1):
            (tmp_path / f"cut{suffix}").write_bytes(data[:size])
            with pytest.raises(CheckpointError, match=f"cut{suffix} "):
                checkpoint.read(tmp_path / f"cut{suffix}")


def test_the_content_of_a_file_tells_its_format(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a.safetensors", {"a": torch.ones(2)}, cfg={"b": 1})
    for name in ("a.pth", "A.SAFETENSORS", "a"):
        shutil.copy(tmp_path / "a.safetensors", tmp_path / name)
        assert checkpoint.read(tmp_path / name).cfg == {"b": 1}
    for old in (True, False):
        torch.save({"a": torch.ones(2)}, tmp_path / "b.bin", _use_new_zipfile_serialization=not old)
        assert set(checkpoint.read(tmp_path / "b.bin").tensors) == {"a"}
        shutil.copy(tmp_path / "b.bin", tmp_path / "b.safetensors")
        with pytest.raises(CheckpointError, match=r"is a file of torch\.save, despite its name: rename it"):
            checkpoint.read(tmp_path / "b.safetensors")


def test_places_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.symlink("gone", tmp_path / "link")
    for name, message in (
        ("folder", "is a folder without model.safetensors"),
        ("pipe", "is no file that can be read"),
        ("link", "does not exist"),
        ("a" * 300, "cannot be read: .*too long"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read(tmp_path / name)
    (tmp_path / "folder" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is a language model's folder, expected a weight file"):
        checkpoint.read(tmp_path / "folder")


def test_a_folder_that_training_wrote_loads(model: Any, tmp_path: Path) -> None:
    tensors = changed(model)
    before = {name: tensor.clone() for name, tensor in model.trainable_state_dict().items()}
    checkpoint.save(tmp_path / "step_00000001" / "model.safetensors", tensors)
    model.load_checkpoint(str(tmp_path / "step_00000001"))
    assert same(model, tensors)
    model.load_state_dict(before, strict=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "neither at its top nor under 'model'; it holds nothing"),
        ({"state_dict": {"a": torch.ones(1)}}, "nor under 'model'; it holds state_dict"),
        ({"a": torch.ones(1), "module.a": torch.zeros(1)}, "holds tensors twice, with 'module.' .* without: a$"),
    ],
)
def test_tensors_are_found_once_or_the_file_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.read(tmp_path / "a.pth")


def test_queries_under_both_names_are_not_mixed_up(model: Any, tmp_path: Path) -> None:
    tensors = changed(model)
    torch.save({**tensors, "query_tokens": tensors["image_query_tokens"] + 1}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: query_tokens$"):
        model.load_checkpoint(str(tmp_path / "a.pth"))


def test_names_in_a_message_do_not_steer_the_terminal(model: Any, tmp_path: Path) -> None:
    torch.save({**changed(model), "a\x1b[31m\nb\ud800": torch.ones(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: a\\x1b\[31m b\\ud800$"):
        model.load_checkpoint(str(tmp_path / "a.pth"))


def test_a_bit_that_has_changed_differs_from_its_checksum(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    checkpoint.check_sums(tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(bytes(3000)) + 1500] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth is damaged: .*data/0 in it differs from its checksum"):
        checkpoint.check_sums(tmp_path / "a.pth")
    torch.save({"a": torch.zeros(9)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    checkpoint.check_sums(tmp_path / "old.pth")


@pytest.mark.parametrize("held", [torch.float32, torch.float16])
def test_numbers_that_the_precision_cannot_hold_are_refused(held: torch.dtype) -> None:
    layer = torch.nn.Linear(2, 2)
    tensors = {"weight": torch.full((2, 2), 60_000.0).to(held), "bias": torch.ones(2)}
    checkpoint.load_exactly(layer, tensors, "file", "layer", torch.float16)
    assert layer.weight.dtype == torch.float16
    large = {**tensors, "bias": torch.full((2,), 70_000.0)}
    with pytest.raises(CheckpointError, match="file holds numbers too large for float16 in bias: choose bfloat16"):
        checkpoint.load_exactly(layer, large, "file", "layer", torch.float16)
    assert layer.bias.tolist() == [1, 1]
    checkpoint.load_exactly(layer, large, "file", "layer", torch.bfloat16)


def test_encoders_are_found_in_a_whole_model_too() -> None:
    tensors = {f"{part}.{name}": torch.ones(1) for part in ("visual_encoder", "audio_encoder") for name in ("a", "b")}
    whole = {**tensors, "ln_vision.a": torch.ones(1), "c": torch.ones(1)}
    heads = dict.fromkeys(("head.weight", "fc_norm.bias", "norm.bias", "blocks.1.a"), torch.ones(1))
    assert set(checkpoint.vision_tensors(whole, 1, 5)) == {"a", "b"}
    assert set(checkpoint.vision_tensors({**heads, "a": torch.ones(1)}, 1, 5)) == {"a"}
    assert set(checkpoint.beats_tensors({**whole, "audio_encoder.predictor.weight": torch.ones(1)}, 1)) == {"a", "b"}


def test_a_fingerprint_follows_names_shapes_types_and_numbers_but_no_order() -> None:
    a, b = torch.arange(4.0), torch.ones(2)
    first = checkpoint.fingerprint({"a": a, "b": b})
    assert first == checkpoint.fingerprint({"b": b, "a": a.clone()})
    others = (
        {"a": a},
        {"a": a, "c": b},
        {"a": a.view(2, 2), "b": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a, "b": a},
    )
    assert len({first, *(checkpoint.fingerprint(other) for other in others)}) == 6


def test_tables_of_every_layer_are_kept_where_a_file_holds_them() -> None:
    name = "encoder.layers.{}.self_attn.relative_attention_bias.weight"
    own = {name.format(i): torch.full((1,), float(i)) for i in (0, 2)}
    tables = checkpoint.beats_tensors(own, 3)
    assert [tables[name.format(i)].item() for i in range(3)] == [0, 0, 2]


def test_an_empty_position_table_is_a_misfit() -> None:
    tensors = checkpoint.vision_tensors({"pos_embed": torch.ones(1, 17, 0)}, 1, 5)
    assert list(tensors["pos_embed"].shape) == [1, 17, 0]


@pytest.mark.parametrize(
    ("path", "message"),
    [("", "what is empty: name a file"), ("~no_such_user/a", "cannot be looked for"), ("a" * 300, "too long")],
)
def test_paths_that_cannot_be_looked_for(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.find(path, "what")


def test_missing_files_say_where_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATBRIDGE_WEIGHTS", raising=False)
    with pytest.raises(CheckpointError, match=r"variable CHATBRIDGE_WEIGHTS is not set \(there\)"):
        checkpoint.find("$CHATBRIDGE_WEIGHTS/a.pth", "what", "there")
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    with pytest.raises(CheckpointError, match=rf"^what: {tmp_path}/a.pth does not exist \(there\)$"):
        checkpoint.find("$CHATBRIDGE_WEIGHTS/a.pth", "what", "there")
    (tmp_path / "a.pth").touch()
    assert checkpoint.find("$CHATBRIDGE_WEIGHTS/a.pth", "what") == tmp_path / "a.pth"
    assert checkpoint.find("package:configs/models", "what").is_dir()


def test_saving_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.safetensors"
    shared = torch.ones(2)
    checkpoint.save(path, {"a": shared, "b": shared}, cfg={"layers": 3})
    file = checkpoint.read(path)
    assert file.cfg == {"layers": 3}
    assert torch.equal(file.tensors["b"], shared)
    with pytest.raises(TypeError):
        checkpoint.save(path, {"a": shared}, cfg={"layers": object()})
    assert set(checkpoint.read(path).tensors) == {"a", "b"}
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_whole_model_in_float16_refuses_what_it_cannot_hold(tokenizer: Path, tmp_path: Path) -> None:
    settings = small_settings(tokenizer)
    half = small_model(tokenizer, vision=replace(settings.vision, dtype="float16"))
    tensors = {name: t.float() for name, t in half.state_dict().items() if not name.startswith("llama_model.")}
    tensors["visual_encoder.patch_embed.proj.bias"] += 1e6
    torch.save(tensors, tmp_path / "whole.pth")
    before = half.visual_encoder.patch_embed.proj.bias.clone()
    with pytest.raises(CheckpointError, match=r"too large for float16 in visual_encoder\.patch_embed\.proj\.bias"):
        half.load_checkpoint(str(tmp_path / "whole.pth"))
    assert torch.equal(half.visual_encoder.patch_embed.proj.bias, before)


def test_fingerprints_follow_weights_and_settings(tokenizer: Path) -> None:
    model = small_model(tokenizer)
    before = {kind: model.frozen_fingerprint(kind) for kind in ("image", "video", "audio")}
    assert before["image"] == before["video"] != before["audio"]
    assert small_model(tokenizer).frozen_fingerprint("audio") == before["audio"]
    assert small_model(tokenizer, seed=1).frozen_fingerprint("audio") != before["audio"]
    settings = small_settings(tokenizer)
    other = small_model(
        tokenizer,
        vision=replace(settings.vision, heads=2),  # the same tensors
        audio=replace(settings.audio, config=replace(SMALL_BEATS, max_distance=20)),
    )
    assert other.frozen_fingerprint("image") != before["image"]
    assert other.frozen_fingerprint("audio") != before["audio"]
    tensors = {"a": torch.ones(2, dtype=torch.bfloat16)}
    assert checkpoint.fingerprint(tensors) != checkpoint.fingerprint({"a": torch.ones(2)})


def hostile(tensor: torch.Tensor) -> dict[str, tuple[Any, str]]:
    """What may stand in the place of a tensor, and what is said of it."""
    nan = tensor.clone()
    nan.view(-1)[-1] = float("nan")
    return {
        "NaN": (nan, "holds NaN or infinity in"),
        "infinity": (tensor * float("inf"), "holds NaN or infinity in"),
        "beyond fp32": (tensor.double() * 0 + 1e300, "holds NaN or infinity in"),
        "meta": (tensor.to("meta"), "other than plain tensors"),
        "sparse": (tensor.to_sparse(), "other than plain tensors"),
        "complex": (tensor.to(torch.complex64), "other than plain tensors"),
        "quantised": (torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "other than plain tensors"),
        "more numbers than bytes": (torch.zeros(()).expand(tensor.shape), "other than plain tensors"),
        "eight bits": (tensor.to(torch.float8_e4m3fn), "other than plain tensors"),
        "whole numbers": (tensor.to(torch.int32), "is int32, expected real numbers"),
        "truth values": (tensor > 0, "is bool, expected real numbers"),
        "another shape": (tensor.unsqueeze(0), "expected"),
        "nothing": ("words", "missing"),
    }


@pytest.mark.parametrize("what", hostile(torch.ones(2, 2)))
def test_hostile_tensors_are_refused_and_nothing_is_loaded(model: Any, tmp_path: Path, what: str) -> None:
    tensors = changed(model)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    last = list(tensors)[-1]
    tensors[last], message = hostile(tensors[last])[what]
    torch.save({"model": tensors}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=message):
        model.load_checkpoint(str(tmp_path / "a.pth"))
    assert same(model, before)


def load(module: Any, layout: str, path: Path, settings: Any) -> None:
    """Load a file as the model does with each of its parts."""
    if layout == "blip2":
        module._load_blip2(str(path))
        return
    tensors = checkpoint.read(path).tensors
    if layout == "eva":
        fitted = checkpoint.vision_tensors(tensors, settings.vision.depth, settings.vision.tokens)
    else:
        fitted = checkpoint.beats_tensors(tensors, SMALL_BEATS.encoder_layers)
    checkpoint.load_exactly(module, fitted, path, layout)


@pytest.mark.parametrize("layout", ["eva", "beats", "blip2"])
def test_hostile_tensors_in_published_layouts(tokenizer: Path, tmp_path: Path, layout: str) -> None:
    settings = small_settings(tokenizer)
    path = tmp_path / "a.pth"
    module: Any = {"eva": lambda: build_vision(settings.vision), "beats": lambda: Beats(SMALL_BEATS)}.get(
        layout, lambda: small_model(tokenizer)
    )()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    whole = {name: t + 1 for name, t in before.items()}
    if layout == "blip2":
        whole = {n: t for n, t in whole.items() if n.startswith(("Qformer.", "ln_vision.", "image_query_tokens"))}
    name = list(whole)[-1]
    for value, message in hostile(before[name]).values():
        torch.save({"model": {**whole, name: value}}, path)
        with pytest.raises(CheckpointError, match=message):
            load(module, layout, path, settings)
        assert same(module, before)


def test_exchanged_tensors_of_a_file_of_ours_are_refused(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = changed(model)
    checkpoint.save(path, tensors, cfg={"a": 1})
    assert checkpoint.read(path).cfg == {"a": 1}
    first, second = b'"image_query_tokens"', b'"audio_query_tokens"'
    data = path.read_bytes()
    path.write_bytes(data.replace(first, b"<kept>").replace(second, first).replace(b"<kept>", second))
    with pytest.raises(CheckpointError, match="holds other tensors than were written"):
        model.load_checkpoint(str(path))
    broken = bytearray(data)
    broken[-2] ^= 1
    path.write_bytes(broken)
    with pytest.raises(CheckpointError, match="holds other tensors than were written"):
        model.load_checkpoint(str(path))


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as source,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert checkpoint.read(tmp_path / "a.pth").tensors
    with pytest.raises(CheckpointError, match="its parts are compressed"):
        checkpoint.read(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"encoder_layers": 10**9}, "up to 256 layers"),
        ({"encoder_embed_dim": "x"}, "encoder_embed_dim: expected int"),
        ({"encoder_layers": 0.5}, "encoder_layers: expected int"),
        ({"embed_dim": -3}, "embed_dim -3"),
    ],
)
def test_sizes_in_a_file_are_checked_before_anything_is_built(cfg: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BeatsConfig.from_dict({**vars(SMALL_BEATS), **cfg})


@pytest.mark.parametrize("cfg", ["[]", "3", "[" * 100_000, "{"])
def test_a_malformed_cfg_is_told(tmp_path: Path, cfg: str) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"cfg": cfg})
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read(tmp_path / "a.safetensors")
