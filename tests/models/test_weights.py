"""``chatbridge weights``: shapes as the real modules have them, files of each published layout, right and wrong."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lavis_chatbridge import cli
from lavis_chatbridge.errors import CheckpointError, ConfigError
from lavis_chatbridge.models import checkpoint, shapes, weights, weights_command
from lavis_chatbridge.models.beats import Beats
from lavis_chatbridge.models.settings import LoraSettings
from tests.models.building import SMALL_BEATS, small_settings


@pytest.fixture(scope="module")
def settings(golden_dir: Path) -> Any:
    return small_settings(golden_dir / "tokenizer")


def real(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random tensors of the shapes of others."""
    torch.manual_seed(0)
    return {name: torch.randn(tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def bridge(settings: Any) -> dict[str, torch.Tensor]:
    return real(shapes.bridge_shapes(settings, SMALL_BEATS.encoder_embed_dim, 32))


@pytest.fixture(scope="module")
def eva(settings: Any) -> dict[str, torch.Tensor]:
    one_more = replace(settings.vision, depth=settings.vision.depth + 1)  # the published file has a 40th block too
    return real(shapes.vision_shapes(one_more)) | {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)}


@pytest.fixture(scope="module")
def beats() -> dict[str, Any]:
    cfg = {**vars(SMALL_BEATS), "layer_norm_first": False, "activation_fn": "gelu", "predictor_class": 527}
    return {"cfg": cfg, "model": {**Beats(SMALL_BEATS).state_dict(), "predictor.weight": torch.ones(2, 2)}}


@pytest.fixture(scope="module")
def blip2(bridge: dict[str, torch.Tensor]) -> dict[str, Any]:
    own = {name: t for name, t in bridge.items() if name.startswith(("Qformer.", "ln_vision."))}
    text = {"Qformer.bert.encoder.layer.0.output.dense.weight": torch.ones(2), "Qformer.cls.bias": torch.ones(2)}
    return {"model": {"query_tokens": bridge["image_query_tokens"], **own, **text}}


def without_constants(tensors: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in checkpoint.bridge_tensors(tensors).items()}


def test_shapes_are_those_of_the_real_modules(settings: Any) -> None:
    from tests.models.building import small_model

    model = small_model(Path(settings.language_model.tokenizer))
    expected = shapes.bridge_shapes(settings, SMALL_BEATS.encoder_embed_dim, 32)
    expected |= {f"visual_encoder.{name}": t for name, t in shapes.vision_shapes(settings.vision).items()}
    expected |= {f"audio_encoder.{name}": t for name, t in shapes.beats_shapes(SMALL_BEATS).items()}
    found = {name: t for name, t in model.state_dict().items() if not name.startswith("llama_model.")}
    assert without_constants(expected) == without_constants(found)
    assert all(tensor.device.type == "meta" for tensor in expected.values())


def test_the_papers_sizes() -> None:
    settings = weights_command.model_settings("vicuna13b")
    assert sum(t.numel() for t in shapes.vision_shapes(settings.vision).values()) == 985_894_528
    assert sum(t.numel() for t in shapes.bridge_shapes(settings, 768, 5120).values()) == 110_211_200


def test_each_layout_is_known_and_fits(
    settings: Any, tmp_path: Path, eva: Any, beats: Any, blip2: Any, bridge: Any
) -> None:
    whole = {"model": {f"module.{n}": t for n, t in bridge.items()}, "epoch": 3, "optimizer": {"lr": 1.0}}
    files = {"eva": eva, "beats": beats, "blip2": blip2, "chatbridge": whole}
    for layout, content in files.items():
        torch.save(content, tmp_path / f"{layout}.pth")
        file = weights.open_file(tmp_path / f"{layout}.pth")
        assert weights.layout_of(file.tensors) == layout
        weights.check(file, settings)
        weights.check_finite(file)
    checkpoint.save(tmp_path / "b.safetensors", beats["model"], beats["cfg"])
    weights.check(weights.open_file(tmp_path / "b.safetensors"), settings)


def test_positions_of_another_image_size_fit(settings: Any, tmp_path: Path, eva: Any) -> None:
    torch.save({**eva, "pos_embed": torch.randn(1, 17, 32)}, tmp_path / "eva.pth")
    weights.check(weights.open_file(tmp_path / "eva.pth"), settings)


def misfits(eva: Any, beats: Any, blip2: Any, bridge: Any) -> dict[str, tuple[Any, str]]:
    short = {name: t for name, t in bridge.items() if name != "audio_trans.bias"}
    return {
        "eva of another width": ({**eva, "cls_token": torch.ones(1, 1, 8)}, r"cls_token is \[1, 1, 8\], expected"),
        "eva cut off": ({n: t for n, t in eva.items() if ".1." not in n}, "missing: blocks.1.norm1.weight"),
        "beats of other sizes": ({**beats, "cfg": {**beats["cfg"], "encoder_layers": 5}}, "encoder_layers=5"),
        "beats of another variant": ({**beats, "cfg": {**beats["cfg"], "layer_norm_first": True}}, "layer_norm_first"),
        "blip2 with fewer queries": (
            {"model": {**blip2["model"], "query_tokens": torch.ones(1, 2, 32)}},
            r"image_query_tokens is \[1, 2, 32\], expected \[1, 3, 32\]",
        ),
        "bridge that lacks a tensor": (short, "missing: audio_trans.bias"),
        "bridge of another llm": (
            {**bridge, "llama_proj.weight": torch.ones(8, 32)},
            r"llama_proj.weight is \[8, 32\]",
        ),
        "part of an llm": ({"model.layers.0.mlp.up_proj.weight": torch.ones(2)}, "is a part of a language model"),
        "something else": ({"conv1.weight": torch.ones(2)}, "no layout that is known here; it holds conv1.weight"),
    }


def test_misfits_are_named(settings: Any, tmp_path: Path, eva: Any, beats: Any, blip2: Any, bridge: Any) -> None:
    for content, message in misfits(eva, beats, blip2, bridge).values():
        torch.save(content, tmp_path / "a.pth")
        file = weights.open_file(tmp_path / "a.pth")
        with pytest.raises((CheckpointError, ConfigError), match=message):
            weights.check(file, settings)


def test_conversion_keeps_what_is_trained_and_the_norms(tmp_path: Path, bridge: Any) -> None:
    frozen = {"visual_encoder.cls_token": torch.ones(1, 1, 32), "llama_model.lm_head.weight": torch.ones(3)}
    old = {**bridge, **frozen, "Qformer.bert.embeddings.position_ids": torch.ones(1, 4)}
    old["query_tokens"] = old.pop("image_query_tokens")
    torch.save({"model": {f"module.{n}": t for n, t in old.items()}, "config": {"a": 1}}, tmp_path / "a.pth")
    done = weights.convert(tmp_path / "a.pth", tmp_path / "new" / "b.safetensors")
    made = checkpoint.read(tmp_path / "new" / "b.safetensors").tensors
    assert set(made) == set(bridge) == set(done.kept)
    assert all(torch.equal(made[name], bridge[name]) for name in bridge)
    assert done.dropped == {"visual_encoder": 1, "llama_model": 1, "Qformer": 1}
    assert done.parameters == sum(t.numel() for t in bridge.values())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.safetensors"]


def test_a_folder_of_training_is_converted(tmp_path: Path, bridge: Any, settings: Any) -> None:
    checkpoint.save(tmp_path / "step_00000001" / "model.safetensors", bridge)
    weights.convert(tmp_path / "step_00000001", tmp_path / "b.safetensors", settings)
    assert set(checkpoint.read(tmp_path / "b.safetensors").tensors) == set(bridge)


class _Evil:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("pwned",)


def test_what_cannot_be_converted_leaves_the_target_as_it_was(
    tmp_path: Path, bridge: Any, eva: Any, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    nan = {**bridge, "llama_proj.bias": torch.full((32,), float("nan"))}
    wrong = {**bridge, "llama_proj.bias": torch.ones(31)}
    torch.save(bridge, "whole.pth")
    Path("cut.pth").write_bytes(Path("whole.pth").read_bytes()[:-2000])
    for name, content in {"nan": nan, "wrong": wrong, "evil": {"model": _Evil()}, "eva": eva}.items():
        torch.save(content, f"{name}.pth")
    Path("out.safetensors").write_bytes(b"before")
    messages = {
        "nan": "NaN or infinity in llama_proj.bias",
        "wrong": r"llama_proj.bias is \[31\], expected \[32\]",
        "evil": r"refused.*never code",
        "eva": "is EVA-ViT, not a trained ChatBridge",
        "cut": "cannot be read",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message):
            weights.convert(Path(f"{name}.pth"), Path("out.safetensors"), settings, replace=True)
    with pytest.raises(CheckpointError, match=r"exists.*--force"):
        weights.convert(Path("whole.pth"), Path("out.safetensors"))
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        weights.convert(Path("whole.pth"), Path("out.pth"))
    assert Path("out.safetensors").read_bytes() == b"before"
    assert not Path("pwned").exists()
    assert not Path("out.pth").exists()


def test_list_says_what_is_found_and_where_the_rest_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CHATBRIDGE_WEIGHTS", str(tmp_path))
    (tmp_path / "eva_vit_g.pth").write_bytes(b"x" * 2048)
    assert cli.main(["weights", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("tiny", "vicuna7b", "vicuna13b"))
    assert cli.main(["weights", "list", "--model-type", "tiny"]) == 0
    assert "MISSING" not in capsys.readouterr().out
    assert cli.main(["weights", "list", "--model-type", "vicuna13b", "--fingerprint"]) == 1
    printed = capsys.readouterr().out
    found = next(line for line in printed.splitlines() if "model.vision.weights" in line)
    assert "2.0 KiB" in found
    assert f"sha256 {hashlib.sha256(b'x' * 2048).hexdigest()}" in found
    assert f"{tmp_path}/BEATs_iter3_plus_AS2M.pt does not exist (published by https://github.com/microsoft" in printed
    assert cli.main(["weights", "list", "--model-type", "vicuna13b", "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)["vicuna13b"]
    assert [need["setting"] for need in listed if need["fault"]] == [
        "model.language_model.weights",
        "model.audio.weights",
        "model.perceiver.weights",
    ]


def test_list_finds_fault_with_what_loading_would_refuse(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("folder", "step", "llm"):
        Path(name).mkdir()
    checkpoint.save(Path("step/model.safetensors"), {"a": torch.ones(2)})
    Path("empty.pth").touch()
    places = {
        "vision": ("folder", "FAULT    model.vision.weights: folder is a folder without model.safetensors"),
        "audio": ("empty.pth", "FAULT    model.audio.weights: empty.pth is empty"),
        "perceiver": ("~no_such_user/a", "MISSING  model.perceiver.weights: ~no_such_user/a cannot be looked for"),
        "language_model": ("llm", "FAULT    model.language_model.weights: llm holds no weights"),
    }
    section: dict[str, Any] = {part: {"weights": place} for part, (place, _) in places.items()}
    Path("run.yaml").write_text(yaml.safe_dump({"model": {"model_type": "tiny", "checkpoint": "step", **section}}))
    assert cli.main(["weights", "list", "--cfg-path", "run.yaml", "--fingerprint"]) == 1
    printed = capsys.readouterr().out
    assert all(message in printed for _, message in places.values())
    found = next(line for line in printed.splitlines() if "model.checkpoint" in line)
    assert found.endswith(hashlib.sha256(Path("step/model.safetensors").read_bytes()).hexdigest())
    assert cli.main(["weights", "list", "--cfg-path", "run.yaml", "--fingerprint", "--json"]) == 1
    listed = json.loads(capsys.readouterr().out)["run.yaml"]
    assert [need["setting"] for need in listed if "sha256" in need] == ["model.checkpoint"]


def test_what_cannot_be_written_is_one_line(tmp_path: Path, bridge: Any) -> None:
    import resource
    import signal

    torch.save(bridge, tmp_path / "a.pth")
    (tmp_path / "d.safetensors").mkdir()
    targets = {
        "d.safetensors": "is a folder, expected the name",
        "a.pth/b.safetensors": "cannot be written",
        "b" * 300 + ".safetensors": "cannot be written: .*too long",
    }
    for name, message in targets.items():
        with pytest.raises(CheckpointError, match=message):
            weights.convert(tmp_path / "a.pth", tmp_path / name, replace=True)
    (tmp_path / "old.safetensors").write_bytes(b"before")
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # as on a full disk, a part can be written
    try:
        with pytest.raises(CheckpointError, match=r"old\.safetensors cannot be written: .*too large"):
            weights.convert(tmp_path / "a.pth", tmp_path / "old.safetensors", replace=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "old.safetensors").read_bytes() == b"before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "d.safetensors", "old.safetensors"]


def test_conversion_counts_queries_of_a_second_name(tmp_path: Path, bridge: Any) -> None:
    torch.save({**bridge, "query_tokens": bridge["image_query_tokens"] + 1}, tmp_path / "a.pth")
    done = weights.convert(tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert done.dropped == {"query_tokens": 1}
    made = checkpoint.read(tmp_path / "b.safetensors").tensors
    assert torch.equal(made["image_query_tokens"], bridge["image_query_tokens"])


def test_a_damaged_file_of_torch_is_found_by_its_checksums(tmp_path: Path, bridge: Any) -> None:
    torch.save({"model": {**bridge, "llama_proj.bias": torch.zeros(32)}}, tmp_path / "a.pth")
    data = bytearray((tmp_path / "a.pth").read_bytes())
    data[data.index(bytes(128)) + 60] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    checkpoint.read(tmp_path / "a.pth")
    for action in (weights.open_file, lambda path: weights.convert(path, tmp_path / "b.safetensors")):
        with pytest.raises(CheckpointError, match="differs from its checksum"):
            action(tmp_path / "a.pth")


def adapters(rank: int, *layers: int) -> dict[str, torch.Tensor]:
    names = (f"llama_model.model.layers.{i}.self_attn.{target}" for i in layers for target in ("q_proj", "v_proj"))
    return {
        f"{n}.lora_{x}.default.weight": torch.ones(s) for n in names for x, s in (("A", (rank, 32)), ("B", (32, rank)))
    }


def test_check_judges_a_language_model_and_adapters_as_loading_does(
    settings: Any, tmp_path: Path, bridge: Any, golden_dir: Path
) -> None:
    from tests.models.building import small_model

    own = settings.language_model
    tuned = replace(settings, language_model=replace(own, lora=LoraSettings(rank=4)))
    models = {id(s): small_model(golden_dir / "tokenizer", language_model=s.language_model) for s in (settings, tuned)}
    llm = {n: t for n, t in models[id(settings)].state_dict().items() if n.startswith("llama_model.")}
    around = {n.replace("q_proj.weight", "q_proj.base_layer.weight"): t for n, t in llm.items()}
    head = "llama_model.lm_head.weight"
    scalar = {"llama_model.model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.tensor(1.0)}
    cases: list[tuple[Any, dict[str, torch.Tensor], str]] = [
        (settings, {}, ""),
        (settings, llm, ""),
        (settings, {head: llm[head]}, "missing: "),
        (settings, {**llm, head: torch.ones(641, 32)}, r"lm_head.weight is \[641, 32\], expected \[640, 32\]"),
        (settings, adapters(4, 0, 1), "has LoRA adapters of rank 4 on q_proj, v_proj, but the model has none"),
        (settings, scalar, "has LoRA adapters of rank 0 on q_proj"),
        (tuned, {}, ""),
        (tuned, adapters(4, 0, 1), ""),
        (tuned, {**adapters(4, 0, 1), **llm}, ""),
        (tuned, {**adapters(4, 0, 1), **around}, ""),
        (tuned, adapters(2, 0, 1), "of rank 2 .* the model's of rank 4"),
        (tuned, adapters(4, 0), "missing: "),
    ]
    for chosen, more, message in cases:
        torch.save({**bridge, **more}, tmp_path / "a.pth")
        file = weights.open_file(tmp_path / "a.pth")
        for judge in (lambda: weights.check(file, chosen), lambda: models[id(chosen)].load_checkpoint(str(file.path))):  # noqa: B023
            if not message:
                judge()
                continue
            with pytest.raises(CheckpointError, match=message):
                judge()
    quantised = replace(settings, language_model=replace(own, quantization="8bit"))
    torch.save({**bridge, **llm}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a whole language model, but this one's is quantised to 8bit"):
        weights.check(weights.open_file(tmp_path / "a.pth"), quantised)


def test_adapters_and_what_is_said_of_them_are_converted(settings: Any, tmp_path: Path, bridge: Any) -> None:
    told = {"rank": 4, "alpha": 3.0, "target_modules": ["q_proj", "v_proj"]}
    own = adapters(4, 0, 1)
    checkpoint.save(tmp_path / "a.safetensors", {**bridge, **own}, {"lora": told, "step": 3})
    done = weights.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert set(done.kept) == {*bridge, *own}
    file = weights.open_file(tmp_path / "b.safetensors")
    assert file.cfg == {"lora": told}
    for alpha in (3.0, 5.0):
        tuned = replace(settings.language_model, lora=LoraSettings(rank=4, alpha=alpha))
        if alpha == told["alpha"]:
            weights.check(file, replace(settings, language_model=tuned))
            continue
        with pytest.raises(
            CheckpointError, match="of rank 4, alpha 3 on q_proj, v_proj, the model's of rank 4, alpha 5"
        ):
            weights.check(file, replace(settings, language_model=tuned))


def test_a_frozen_perceiver_need_not_be_in_the_file(settings: Any, tmp_path: Path, bridge: Any) -> None:
    some = {name: t for name, t in bridge.items() if name.startswith(("llama_proj.", "visual_", "audio_temporal_"))}
    torch.save(some, tmp_path / "a.pth")
    file = weights.open_file(tmp_path / "a.pth")
    weights.check(file, replace(settings, perceiver=replace(settings.perceiver, frozen=True)))
    with pytest.raises(CheckpointError, match=r"missing: audio_trans\.weight"):
        weights.check(file, settings)


@pytest.mark.parametrize(
    ("config", "width"),
    [("[]", 32), ('{"model_type": "gpt2", "n_embd": 48}', 48), ('{"word_embed_proj_dim": 16, "hidden_size": 48}', 16)],
)
def test_check_knows_the_width_of_any_family(
    settings: Any, tmp_path: Path, bridge: Any, config: str, width: int
) -> None:
    (tmp_path / "config.json").write_text(config)
    chosen = replace(settings, language_model=replace(settings.language_model, weights=str(tmp_path)))
    torch.save(bridge, tmp_path / "a.pth")
    file = weights.open_file(tmp_path / "a.pth")
    if width == 32:
        weights.check(file, chosen)
        return
    with pytest.raises(CheckpointError, match=rf"llama_proj.weight is \[32, 32\], expected \[{width}, 32\]"):
        weights.check(file, chosen)


def test_check_and_convert_by_configuration(
    tmp_path: Path, settings: Any, bridge: Any, capsys: pytest.CaptureFixture
) -> None:
    section = {
        "model_type": "tiny",
        "vision": {**vars(settings.vision)},
        "audio": {"weights": None, "config": {**vars(SMALL_BEATS)}},
        "perceiver": {**vars(settings.perceiver)},
        "language_model": {**vars(settings.language_model)},
        "temporal_positions": {**vars(settings.temporal_positions)},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": section, "run": {"task": "x"}}))
    torch.save({"model": bridge}, tmp_path / "a.pth")
    assert cli.main(["weights", "check", str(tmp_path / "a.pth"), "--cfg-path", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "a.pth: a trained ChatBridge" in printed
    assert f"fits         {path}" in printed
    assert cli.main(["weights", "check", str(tmp_path / "a.pth"), "--model-type", "tiny"]) == 1
    assert "does not fit tiny: " in capsys.readouterr().out
    out = tmp_path / "b.safetensors"
    assert cli.main(["weights", "convert", str(tmp_path / "a.pth"), str(out), "--cfg-path", str(path)]) == 0
    assert weights.digest(out) in capsys.readouterr().out
    assert cli.main(["weights", "convert", str(tmp_path / "a.pth"), str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert cli.main(["weights", "check", str(tmp_path / "none.pth")]) == 2
    path.write_text("model: {visoin: {}}")
    assert cli.main(["weights", "list", "--cfg-path", str(path)]) == 2
    assert "did you mean 'vision'" in capsys.readouterr().err
