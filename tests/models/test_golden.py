"""The numbers of a golden folder (``GOLDEN_DIR``, else ``tests/golden``) within the tolerance that its README states.

All sizes and cases are read from the folder. Tolerances are maximum absolute differences.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis_chatbridge.models.decoding import Decoder, padded
from lavis_chatbridge.models.encoders.beats import BeatsConfig
from lavis_chatbridge.models.layout import PADDING, SOFT, Rows, embed, lay_out, media_of
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.settings import TemporalSettings
from lavis_chatbridge.models.tokenizer import load_tokenizer
from lavis_chatbridge.processors.audio import fbank
from lavis_chatbridge.prompting.conversation import (
    Message,
    Piece,
    Slot,
    Text,
    alignment_prompt,
    chat_prompt,
    clean_caption,
)
from lavis_chatbridge.runners.settings import RunSettings
from lavis_chatbridge.runners.step import learning_rate
from tests.processors.test_audio import test_fbank_slices  # noqa: F401 (this file checks a golden folder completely)
from tests.processors.test_pictures import test_frame_indices, test_transforms  # noqa: F401

ALONE = 2e-5
LAYERED = 5e-5
"""Also of gradients, as a share of a tensor's largest value."""
KEY_BIAS = "self.key.bias"
"""Its gradient is zero but for rounding."""


@pytest.fixture(scope="session")
def tensors(golden_dir: Path) -> Callable[[str], dict[str, Tensor]]:
    return functools.cache(lambda name: load_file(golden_dir / f"{name}.safetensors"))


@pytest.fixture(scope="session")
def facts(golden_dir: Path) -> Callable[[str], dict[str, Any]]:
    return lambda name: json.loads((golden_dir / f"{name}.json").read_text())


VIT = {"image_size": "img_size", "width": "embed_dim", "heads": "num_heads"}
VIT |= {name: name for name in ("patch_size", "depth", "mlp_ratio")}
QFORMER = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
QFORMER |= {"feed_forward": "intermediate_size", "cross_attention_every": "cross_attention_freq"}
QFORMER |= {"queries": "num_query_token", "norm_eps": "layer_norm_eps"}


def load(golden_dir: Path, file: Path | None = None, times: TemporalSettings | None = None) -> Any:
    """The recorded model, of the sizes in ``config.json``."""
    sizes = json.loads((golden_dir / "config.json").read_text())
    perceiver = {ours: sizes["qformer"][theirs] for ours, theirs in QFORMER.items()}
    settings = {
        "vision": {ours: sizes["vit"][theirs] for ours, theirs in VIT.items()},
        "audio": {"config": BeatsConfig.from_dict(sizes["beats"]).model_dump()},
        "perceiver": {"dropout": 0.0, **perceiver},
        "language_model": {"tokenizer": str(golden_dir / "tokenizer"), "config": sizes["llama"]},
        "prompt_layout": "original",
        "temporal_positions": times,
    }
    model = ChatBridge.from_config(settings)
    model.load_checkpoint(str(file or golden_dir / "chatbridge_state.safetensors"))
    return model.eval()


@pytest.fixture
def model(golden_dir: Path) -> Any:
    return load(golden_dir)


def near(found: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    assert found.shape == expected.shape, name
    difference = (found.detach() - expected).abs().max().item()
    assert difference <= tolerance, f"{name}: {difference:.2e} > {tolerance:.0e}"


def test_state_dict_has_the_originals_names(model: Any, facts: Callable) -> None:
    listed = facts("state_dict_keys")
    constants = ("rotary_emb.inv_freq", "position_ids")
    expected = {name: entry["shape"] for name, entry in listed["all"].items() if not name.endswith(constants)}
    found = {name: list(t.shape) for name, t in model.state_dict().items() if not name.endswith(constants)}
    assert found == expected
    trained = [entry["name"] if isinstance(entry, dict) else entry for entry in listed["trainable"]]
    assert sorted(model.trainable_state_dict()) == sorted(trained)


def test_beats(model: Any, tensors: Callable, golden_dir: Path) -> None:
    beats, golden = model.audio_encoder, tensors("beats")
    stacks = np.load(golden_dir / "audio" / "fbank_slices.npz")
    for case in (name.removesuffix(".input") for name in golden if name.endswith(".input")):
        near(beats(golden[f"{case}.input"])[0], golden[f"{case}.output"], LAYERED, case)
    for case in (name.removesuffix(".output") for name in golden if name.startswith("full")):
        stored = [name for name in stacks if f".mel{case.removeprefix('full')}." in name]
        ends = (".slice0", ".n1")  # a whole slice of the long clip where one is stored, else the short clip alone
        clip = torch.from_numpy(stacks[next(name for end in ends for name in stored if name.endswith(end))])
        near(beats(clip.reshape(1, *clip.shape[-2:]))[0], golden[f"{case}.output"], LAYERED, case)


def test_beats_with_a_padding_mask(model: Any, tensors: Callable) -> None:
    """The library's waveform entry: 128 mel bins, and a mask that is thinned out twice."""
    beats, golden = model.audio_encoder, tensors("beats")
    bank = torch.stack([fbank(sound, 128) for sound in golden["wavpath.source"]])
    patches = beats.patches(bank)
    padding = golden["wavpath.padding_mask"]
    for length in (bank.shape[1], patches.shape[1]):
        whole = padding.shape[1] // length * length
        padding = padding[:, :whole].unflatten(1, (length, -1)).all(-1)
    assert torch.equal(padding, golden["wavpath.padding_mask_out"])
    near(beats.encoder(beats.post_extract_proj(patches), ~padding), golden["wavpath.output"], LAYERED)


def test_eva_vit(model: Any, tensors: Callable) -> None:
    golden = tensors("eva_vit")
    after = []
    for block in model.visual_encoder.blocks:
        block.register_forward_hook(lambda *a: after.append(a[2]))
    tokens = model.visual_encoder(golden["image"].float())
    near(tokens, golden["tokens"], ALONE)
    near(model.ln_vision(tokens), golden["ln_vision_of_tokens"], LAYERED)
    assert len(after) == sum(name.startswith("after_block") for name in golden)
    for i, block in enumerate(after):
        near(block, golden[f"after_block{i}"], ALONE, f"block {i}")


@pytest.mark.parametrize("case", ["image", "video", "audio"])
def test_perceiver(model: Any, tensors: Callable, case: str) -> None:
    golden = {name.removeprefix(f"{case}."): t for name, t in tensors("perceiver").items() if name.startswith(case)}
    if "features_before_audio_trans" in golden:
        near(model.audio_trans(golden["features_before_audio_trans"]), golden["encoder_features"], LAYERED)
    queries = model.audio_query_tokens if case == "audio" else model.image_query_tokens
    features = golden["encoder_features"]
    out = model.Qformer.bert(
        query_embeds=queries.expand(len(features), -1, -1),
        encoder_hidden_states=features,
        output_hidden_states=True,
        return_dict=True,
    )
    assert len(out.hidden_states) == sum(name.startswith("hidden") for name in golden)
    for i, hidden in enumerate(out.hidden_states):
        near(hidden, golden[f"hidden{i}"], ALONE, f"hidden{i}")
    near(out.last_hidden_state, golden["query_output"], ALONE)
    near(model.llama_proj(out.last_hidden_state), golden["llama_proj"], LAYERED)


def inputs(tensors: Callable, name: str) -> tuple[str, Tensor]:
    """The modality of an input of ``encode.safetensors``, and its values."""
    modality = "audio" if name.startswith("audio") else name
    return modality, tensors("encode")[name].float()


def query_embeddings(model: Any, modality: str, values: Tensor) -> Tensor:
    soft, _ = model.soft_tokens([[Slot(modality)]] * len(values), media_of({modality: values}))  # type: ignore[arg-type]
    return soft.unflatten(0, (len(values), -1))


def test_encode(model: Any, tensors: Callable) -> None:
    golden = tensors("encode")
    special = ("encode_img.image5d_n1", "encode_img.stage3_video")
    for name in (name for name in golden if name.startswith("encode_") and name not in special):
        near(query_embeddings(model, *inputs(tensors, name.split(".")[1])), golden[name], LAYERED, name)
    one_frame = golden["image"].float().unsqueeze(1)
    near(query_embeddings(model, "video", one_frame), golden["encode_img.image5d_n1"], LAYERED, "one frame")
    model.video_queries = "per_frame"
    near(query_embeddings(model, *inputs(tensors, "video")), golden["encode_img.stage3_video"], LAYERED, "stage 3")


def test_multi_sample(tensors: Callable, golden_dir: Path, tmp_path: Path) -> None:
    golden = tensors("multi_sample")
    tables = {f"{name}_temporal_pos_embeds": golden[f"{name}_temporal_pos_embeds"] for name in ("visual", "audio")}
    frames, clips = (table.shape[1] for table in tables.values())
    torch.save({"model": {**tensors("chatbridge_state"), **tables}}, tmp_path / "all.pth")
    model = load(golden_dir, tmp_path / "all.pth", TemporalSettings(frames=frames, clips=clips))
    for name in (name for name in golden if name.startswith("encode_")):
        near(query_embeddings(model, *inputs(tensors, name.split(".")[1])), golden[name], LAYERED, name)


UNUSUAL = "hash_inside_answer_and_trailing_text"
"""Its conversations end with a question or an unfinished reply, which no prompt of ours does."""


def prepared(model: Any, tensors: Callable, name: str, case: dict[str, Any]) -> dict[str, Any]:
    """A recorded batch; the model gets the case's settings."""
    model.max_text_length = case["max_txt_len"]
    model.video_queries = "per_frame" if case.get("stage") == 3 else "joint"
    modalities = [*([case["image"]] if "image" in case else []), *(["audio"] if "audio" in case else [])]
    if "conversation" in case:
        word = by_hand if name == UNUSUAL else worded
        prompts = [word(text, modalities) for text in case["conversation"]]
    else:
        prompts = [alignment_prompt(modalities, text, case["end_sym"]) for text in case["text"]]
    media = dict(inputs(tensors, case[key]) for key in ("image", "audio") if key in case)
    return {"pieces": prompts, **{modality: values[: len(prompts)] for modality, values in media.items()}}


def worded(conversation: str, modalities: list[Any]) -> list[Piece]:
    """A recorded conversation's messages, worded by the package."""
    said = re.findall(r"(?s)###Human: (.*?)###Assistant:(.*?)(?=\n?###)", conversation.split("<query>.")[-1])
    messages = [m for question, reply in said for m in (Message("user", question), Message("assistant", reply))]
    messages[0] = dataclasses.replace(messages[0], media=tuple(modalities))
    pieces = chat_prompt(messages, reply_end="\n###" if conversation.endswith("\n###") else "###")
    assert "".join("<query>" if isinstance(p, Slot) else p.text for p in pieces) == conversation
    return pieces


def by_hand(conversation: str, modalities: list[Any]) -> list[Piece]:
    """The original's rule: cut at each ``<query>``, after each ``###Assistant:``, and after a reply's ``###``."""
    *before, rest = conversation.split("<query>")
    pieces: list[Piece] = [
        p for text, modality in zip(before, modalities, strict=True) for p in (Text(text), Slot(modality))
    ]
    for words, asks, reply in re.findall(r"(?s)(.+?(###Assistant:|$))(.*?(?:###|$))", rest):
        pieces += [Text(words), *([Text(reply, target=reply.endswith("###"))] if asks and reply else [])]
    return pieces


def check_losses(model: Any, samples: dict[str, Any], golden: dict[str, Tensor], name: str) -> tuple[Rows, Tensor]:
    soft, ranges = model.soft_tokens(samples["pieces"], media_of(samples))
    rows = lay_out(samples["pieces"], ranges, model.llama_tokenizer, "original", model.max_text_length)
    assert torch.equal(rows.labels, golden[f"{name}.labels"]), name
    assert torch.equal(rows.attention_mask, golden[f"{name}.attention_mask"]), name
    embeds = embed(rows, soft, model.llama_model.get_input_embeddings())
    if f"{name}.inputs_embeds" in golden:
        near(embeds, golden[f"{name}.inputs_embeds"], LAYERED, name)
    nll, _ = model.token_losses(rows, soft)
    numbers, columns, targets = rows.supervised()
    dense = torch.zeros_like(golden[f"{name}.token_nll"]).index_put((numbers, columns), nll)
    near(dense, golden[f"{name}.token_nll"], LAYERED, name)
    out = model(samples)
    near(out["loss"], golden[f"{name}.loss"], LAYERED, name)
    assert out["target_tokens"] == len(targets) == (rows.labels >= 0).sum()
    return rows, embeds


def test_stage1(model: Any, tensors: Callable, facts: Callable) -> None:
    golden = tensors("stage1")
    for name, case in facts("stage1").items():
        rows, embeds = check_losses(model, prepared(model, tensors, name, case), golden, name)
        if f"{name}.logits_last8" in golden:
            where = {"attention_mask": rows.attention_mask, "position_ids": rows.position_ids}
            logits = model.llama_model(inputs_embeds=embeds, **where).logits
            near(logits[:, -8:], golden[f"{name}.logits_last8"], LAYERED, name)


def test_stage2(model: Any, tensors: Callable, facts: Callable) -> None:
    golden = tensors("stage2")
    assert {SOFT, PADDING} == {-1, -2}
    for name, case in facts("stage2").items():
        samples = prepared(model, tensors, name, case)
        for pieces, segments in zip(samples["pieces"], case.get("segments", []), strict="segments" in case):
            texts = [piece.text for piece in pieces if isinstance(piece, Text)]
            assert texts == [segment["text"] for segment in segments], name
            assert [model.llama_tokenizer.encode(t) for t in texts] == [s["ids"] for s in segments], name
        rows, _ = check_losses(model, samples, golden, name)
        assert torch.equal(rows.token_ids, golden[f"{name}.token_ids"]), name


def test_gradients(model: Any, tensors: Callable, facts: Callable) -> None:
    golden, recorded = tensors("grads"), facts("grads")
    for case, expected in recorded.items():
        stage, name = case.split(".")
        model.zero_grad(set_to_none=True)
        model(prepared(model, tensors, name, facts(stage)[name]))["loss"].backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert sorted(found) == sorted(expected["grad_norm"]), case
        assert not set(found) & set(expected["no_grad"])
        for name, norm in expected["grad_norm"].items():
            if not name.endswith(KEY_BIAS):
                assert found[name].norm().item() == pytest.approx(norm, rel=1e-4), f"{case} {name}"
        for name, grad in found.items():
            stored = golden.get(f"{case}/{name}")
            if stored is not None and not name.endswith(KEY_BIAS):
                near(grad, stored, LAYERED * stored.abs().max().item(), f"{case}/{name}")


@pytest.mark.parametrize("case", ["image_x5", "alternating_set_to_none", "alternating_zero_fill"])
def test_five_optimiser_steps(model: Any, tensors: Callable, facts: Callable, case: str) -> None:
    recorded, described = facts("adamw")[case], facts("stage1")
    golden = {name.removeprefix(f"{case}/"): t for name, t in tensors("adamw").items() if name.startswith(f"{case}/")}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8)

    def loss_of(name: str) -> Tensor:
        return model(prepared(model, tensors, name, described[name]))["loss"]

    for name, expected in zip(recorded["order"], recorded["loss_before_each_step"], strict=True):
        optimizer.zero_grad(set_to_none=recorded["zero_grad_set_to_none"])
        loss = loss_of(name)
        assert loss.item() == pytest.approx(expected, abs=LAYERED)
        loss.backward()
        optimizer.step()
    for name, expected in recorded["losses_after"].items():
        assert loss_of(name).item() == pytest.approx(expected, abs=LAYERED)
    for name, norm in recorded["param_norms_after"].items():
        tolerance = 5e-3 if name.endswith(KEY_BIAS) else 1e-5
        assert trained[name].norm().item() == pytest.approx(norm, rel=tolerance), name
    for name, after in golden.items():
        near(trained[name], after, LAYERED, name)


def test_greedy_tokens(model: Any, tensors: Callable, facts: Callable) -> None:
    golden = tensors("generate")
    cases = {name: case for name, case in facts("generate").items() if "greedy_ids" in case}
    assert cases
    of_case = {"image": ["image"], "imageaudio": ["image", "audio1"], "video_audio": ["video", "audio2"]}
    for name, case in cases.items():
        media = dict(inputs(tensors, one) for one in of_case[name.split("_", 1)[1]])
        first, *texts = re.split(r"<ImageHere>|<query>", case["prompt"])
        shown: Any = zip(media, texts, strict=True)
        pieces = [Text(first), *(piece for one, text in shown for piece in (Slot(one), Text(text)))]
        samples = {"pieces": [pieces], **{modality: values[:1] for modality, values in media.items()}}
        model.prompt_layout = "text" if name.startswith("chat_") else "original"  # with BOS, without
        sampling = Sampling(max_new_tokens=len(case["greedy_ids"]), ignore_eos=True)
        (reply,) = model.replies(samples, sampling)
        embeds = reply.embeds(0, model.llama_model.get_input_embeddings())
        near(embeds[None], golden[f"{name}.inputs_embeds"], LAYERED, name)
        near(model.llama_model(inputs_embeds=embeds[None]).logits[:, -1], golden[f"{name}.first_logits"], LAYERED, name)
        Decoder(model.llama_model).complete([reply])
        assert reply.ids == case["greedy_ids"], name


def test_a_batch_of_prompts(model: Any, tensors: Callable, facts: Callable) -> None:
    golden, case = tensors("generate"), facts("generate")["batch_prompt"]
    before, after = case["prompt"].split("<query>")
    prompts: list[list[Piece]] = [
        [Text(before), Slot("image"), Text(after.replace("<question>", question))] for question in case["questions"]
    ]
    modality, values = inputs(tensors, case["images"].split(":")[1])
    replies = model.replies({"pieces": prompts, modality: values[: len(prompts)]}, Sampling())
    embeds, mask = padded(model.llama_model, replies)
    assert torch.equal(mask, golden["batch_prompt.attention_mask"])
    near(embeds, golden["batch_prompt.inputs_embeds"], LAYERED)


def test_tokenizer(golden_dir: Path) -> None:
    tokenizer = load_tokenizer(golden_dir / "tokenizer")
    cases = json.loads((golden_dir / "tokenizer" / "cases.json").read_text())
    assert cases
    for case in cases:
        assert tokenizer.encode(case["text"]) == case["ids"], case["text"]
        assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == case["ids_with_bos"], case["text"]


def test_caption_cleaning(facts: Callable) -> None:
    for case in facts("data_rules")["stage1_caption_cleaning"]:
        assert clean_caption(case["text"]) == case["cleaned"]


@pytest.mark.parametrize("schedule", ["linear_warmup_cosine_lr", "original"])
def test_learning_rates(facts: Callable, schedule: str) -> None:
    """With ``original`` every rate is the original's; else its ramp does not restart with the second epoch."""
    config, lrs = (facts("data_rules")["lr_schedule"][name] for name in ("config", "lrs"))
    values = {name: config[name] for name in ("init_lr", "min_lr", "warmup_steps")} | {"lr_sched": schedule}
    run = RunSettings(task="chatbridge_alignment", warmup_lr=config["warmup_start_lr"], max_iters=len(lrs), **values)
    ours = [learning_rate(run, step, len(lrs), config["iters_per_epoch"]) for step in range(len(lrs))]
    if schedule == "original":
        assert ours == pytest.approx(lrs, rel=1e-9)
        return
    ramp = min(config["iters_per_epoch"], config["warmup_steps"])
    assert ours[:ramp] == pytest.approx(lrs[:ramp], rel=1e-6)
    assert ours[config["warmup_steps"]] == pytest.approx(config["init_lr"])
    assert all(a < b for a, b in pairwise(ours[: config["warmup_steps"] + 1]))
