"""Weight files in each known layout, right and wrong ones."""

from __future__ import annotations

import os
import zipfile
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


def test_no_code_runs_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"refused.*never code"):
        checkpoint.read(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + b"0" * 100])
def test_damaged_files(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        checkpoint.read(tmp_path / name)


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


def test_fingerprints_follow_weights_and_settings(tokenizer: Path) -> None:
    model = small_model(tokenizer)
    before = {kind: model.frozen_fingerprint(kind) for kind in ("image", "video", "audio")}
    assert before["image"] == before["video"] != before["audio"]
    assert small_model(tokenizer).frozen_fingerprint("audio") == before["audio"]
    assert small_model(tokenizer, seed=1).frozen_fingerprint("audio") != before["audio"]
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
