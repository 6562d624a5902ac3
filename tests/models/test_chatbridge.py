"""The model as a whole: batches of unequal media, freezing, generation, ranking, LAVIS's own tasks."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers.utils import logging as bars

from lavis_chatbridge.config import parse
from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.media.source import AudioClips
from lavis_chatbridge.models import chatbridge
from lavis_chatbridge.models.chatbridge import ChatBridge, losses_at
from lavis_chatbridge.models.encoding import positions_in_time
from lavis_chatbridge.models.settings import ModelSettings
from lavis_chatbridge.prompting.conversation import MODALITIES, Message, Slot, Text, alignment_prompt, chat_prompt
from tests.models.building import small_model, small_settings, tiny
from tests.models.folders import STYLES, write_folder


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_settings: Any) -> None:
        raise ConfigError(str(bars.is_progress_bar_enabled()))

    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(chatbridge, "load_language_model", load)
    with pytest.raises(ConfigError, match=str(terminal)):
        ChatBridge(small_settings())
    assert bars.is_progress_bar_enabled()


def image(seed: int = 0) -> Tensor:
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(seed))


def video(frames: int, seed: int = 1) -> Tensor:
    return torch.randn(frames, 3, 28, 28, generator=torch.Generator().manual_seed(seed))


def sound(*lengths: int, size: int | None = None, seed: int = 2) -> AudioClips:
    bank = torch.randn(len(lengths), size or max(lengths), 32, generator=torch.Generator().manual_seed(seed))
    return AudioClips(bank, torch.tensor(lengths))


def captioned(modality: Any, medium: Any, text: str) -> dict[str, Any]:
    return {modality: [medium], "pieces": alignment_prompt([modality], text)}


def batch_of(*samples: dict[str, Any]) -> dict[str, Any]:
    return {key: [sample.get(key, []) for sample in samples] for key in ("pieces", *MODALITIES)}


def losses(model: Any, samples: dict[str, Any]) -> float:
    return model(samples)["loss"].item()


MIXED = batch_of(
    captioned("image", image(), "a red dog"),
    captioned("video", video(2), "it runs on the beach and sings"),
    captioned("video", video(5, 3), "a bell"),
    captioned("audio", sound(48, 20), "rain"),
    captioned("audio", sound(90, 4), "a man and a woman"),
    captioned("audio", sound(64, 64, 64, seed=5), "three clips"),
    {
        "image": [image(6), image(7)],
        "audio": [sound(33)],
        "pieces": chat_prompt([Message("user", "And?", ("image", "audio", "image")), Message("assistant", "Both.")]),
    },
    {"pieces": chat_prompt([Message("user", "Who are you?"), Message("assistant", "A bridge.")])},
)


def test_unequal_media_in_one_batch_change_nothing(model: Any) -> None:
    whole = model(MIXED)
    total, count = 0.0, 0
    for i in range(len(MIXED["pieces"])):
        alone = model({key: values[i : i + 1] for key, values in MIXED.items()})
        total += alone["loss"].item() * int(alone["target_tokens"])
        count += int(alone["target_tokens"])
    assert int(whole["target_tokens"]) == count
    assert whole["loss"].item() == pytest.approx(total / count, abs=1e-5)


def test_a_setting_shows_padding_as_the_original_does() -> None:
    model = small_model(audio=small_settings().audio.model_copy(update={"mask_padding": False}))
    clips = sound(40, size=160)
    samples = {"pieces": [alignment_prompt(["audio"], "rain")]}
    shown = losses(model, {**samples, "audio": [[clips]]})
    assert shown == pytest.approx(losses(model, {**samples, "audio": clips.fbank[None]}), abs=1e-6)
    assert model.encode_media("audio", [clips])[0].mask.all()


def encoder_calls(model: Any, samples: dict[str, Any]) -> tuple[float, list[int]]:
    """The loss, and the frames or clips of each call of an encoder."""
    calls: list[int] = []

    def note(module: Any, inputs: tuple[Tensor, ...]) -> None:
        calls.append(len(inputs[0]))

    with (
        model.visual_encoder.register_forward_pre_hook(note),
        model.audio_encoder.register_forward_pre_hook(note),
    ):
        return losses(model, samples), calls


def test_each_encoder_runs_once_in_bounded_batches_and_not_for_encoded_media(model: Any) -> None:
    loss, calls = encoder_calls(model, MIXED)
    assert calls == [1 + 2 + 2 + 5, 2 + 2 + 3 + 1]
    bounded = encoder_calls(small_model(encoder_batch=3), MIXED)
    assert bounded == (pytest.approx(loss, abs=1e-5), [3, 3, 3, 1, 3, 3, 2])
    encoded = {name: [model.encode_media(name, listed) for listed in MIXED[name]] for name in MODALITIES}
    assert encoder_calls(model, {**MIXED, **encoded}) == (pytest.approx(loss, abs=1e-5), [])


def test_only_named_media_are_encoded(model: Any) -> None:
    samples = {"image": [[image(), image(1)]], "pieces": [[Slot("image", 1), Text("a", target=True)]]}
    one = {"image": [[image(1)]], "pieces": [alignment_prompt(["image"], "a", end="")]}
    assert encoder_calls(model, samples) == (pytest.approx(losses(model, one), abs=1e-6), [1])


def test_what_is_frozen_stays_frozen() -> None:
    model = small_model().train()
    assert model.Qformer.training
    frozen = (model.visual_encoder, model.audio_encoder, model.llama_model, model.ln_vision, model.ln_audio)
    assert not any(module.training for part in frozen for module in part.modules())
    trained = {name.split(".")[0] for name in model.trainable_state_dict()}
    queries = {"image_query_tokens", "audio_query_tokens"}
    times = {"visual_temporal_pos_embeds", "audio_temporal_pos_embeds"}
    assert trained == {"Qformer", "audio_trans", "llama_proj", *queries, *times}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model(MIXED)["loss"].backward()
    optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == set(model.trainable_state_dict())


def test_text_alone_has_a_loss_that_can_be_stepped(model: Any) -> None:
    out = model({"pieces": [chat_prompt([Message("user", "Hello?"), Message("assistant", "Yes.")])]})
    out["loss"].backward()
    assert out["loss"] > 0
    assert not model.llama_proj.bias.grad.any()
    model.zero_grad()


def test_a_sample_without_targets_is_counted_and_costs_nothing(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    samples = {"image": image()[None], "pieces": [[Slot("image"), Text("what is it"), Text("a dog", target=True)]]}
    before = model.samples_without_targets
    model.max_text_length = 2
    out = model(samples)
    model.max_text_length = 100
    out["loss"].backward()
    assert (out["loss"].item(), int(out["target_tokens"])) == (0.0, 0)
    assert model.samples_without_targets == before + 1
    assert "max_text_length 2 cut off all targets" in caplog.text
    model.zero_grad()


def test_lavis_keys_make_the_same_prompts_as_pieces(model: Any) -> None:
    pictures = torch.stack([image(), image(1)])
    texts, answers = ["a dog", "two red bells"], ["yes", "no"]
    caption = {"image": pictures, "pieces": [alignment_prompt(["image"], text) for text in texts]}
    assert losses(model, {"image": pictures, "text_input": texts}) == pytest.approx(losses(model, caption))
    turns = [[Message("user", q, ("image",)), Message("assistant", a)] for q, a in zip(texts, answers, strict=True)]
    chat = {"image": pictures, "pieces": [chat_prompt(t) for t in turns]}
    expected = losses(model, chat)
    for keys in (
        {"text_output": answers},
        {"answer": answers},
        {"answer": ["maybe", "yes", "no"], "weight": [0.1, 0.9, 1.0], "n_answers": torch.tensor([2, 1])},
    ):
        assert losses(model, {"image": pictures, "text_input": texts, **keys}) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        ({"image": torch.zeros(1, 3, 28, 28)}, "needs 'pieces' or 'text_input'"),
        ({"image": torch.zeros(2, 3, 28, 28), "text_input": ["a"]}, "1 texts, but media for 2 samples"),
        ({"image": torch.zeros(1, 3, 28, 28), "video": [[], []], "text_input": ["a"]}, "different numbers of samples"),
        ({"image": ["a.png"], "text_input": ["a"]}, "contains a str, expected a processed medium"),
        ({"image": 3, "text_input": ["a"]}, "'image' of a batch is a int"),
        ({"image": torch.zeros(3, 28, 28), "text_input": ["a"]}, r"expected a batch \[B, 3, H, W\]: image.unsqueeze"),
        ({"audio": torch.zeros(1, 64, 32)}, r"a batch \[B, T, F, M\]: audio.unsqueeze\(0\)"),
        ({"image": torch.zeros(1, 3, 56, 56), "text_input": ["a"]}, r"\[3, 28, 28\], found \[3, 56, 56\]"),
        ({"pieces": [[Slot("image"), Text("a", target=True)]]}, "refers to image 0, but the sample has no media"),
        ({"pieces": []}, "batch is empty"),
    ],
)
def test_unfit_batches_are_explained(model: Any, samples: dict[str, Any], words: str) -> None:
    with pytest.raises((PromptError, ConfigError), match=words):
        model(samples)


@pytest.mark.parametrize("slow", [False, True])
def test_autocast_and_half_precision_stay_near(model: Any, monkeypatch: pytest.MonkeyPatch, slow: bool) -> None:
    """A CPU without bf16 instructions loads in fp32."""
    monkeypatch.setattr("lavis_chatbridge.models.settings.slow_on_cpu", lambda dtype: slow)
    expected = losses(model, MIXED)
    parts = {name: getattr(small_settings(), name) for name in ("vision", "audio", "language_model")}
    half = small_model(**{name: part.model_copy(update={"dtype": "bfloat16"}) for name, part in parts.items()})
    expected_dtype = torch.float32 if slow else torch.bfloat16
    assert half.visual_encoder.cls_token.dtype == half.llama_model.dtype == expected_dtype
    assert half.llama_proj.weight.dtype == torch.float32
    for own, autocast in ((model, True), (half, True), (half, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = own(MIXED)
        out["loss"].backward()
        assert out["loss"].dtype == torch.float32
        assert out["loss"].item() == pytest.approx(expected, rel=0.05)
    model.zero_grad()


def test_a_whole_model_can_be_copied_and_pickled(model: Any, tmp_path: Path) -> None:
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert losses(twin, MIXED) == losses(model, MIXED)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
def test_chunks_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch, dtype: Any, tolerance: float) -> None:
    monkeypatch.setattr(chatbridge, "MAX_LOGITS", 3 * 97)
    model: Any = tiny("llama").to(dtype)
    head = model.get_output_embeddings()
    rows, columns = torch.arange(14) // 7, torch.arange(14) % 7
    targets, weights = torch.randint(97, (14,)), torch.rand(14)
    embeds = (torch.randn(2, 9, 32) * 0.2).to(dtype).requires_grad_()
    logits = model(inputs_embeds=embeds).logits[rows, columns].float()
    expected = functional.cross_entropy(logits, targets, reduction="none")
    (slope,) = torch.autograd.grad((expected * weights).sum(), embeds)
    read: list[int] = []
    head.register_forward_hook(lambda _module, _inputs, logits: read.append(logits.shape[0]))
    found = losses_at(model, rows, columns, targets, inputs_embeds=embeds)
    (ours,) = torch.autograd.grad((found * weights).sum(), embeds)
    assert found.dtype == torch.float32
    assert max(read) == 3
    assert sum(read) == 2 * 14
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    torch.testing.assert_close(ours, slope, atol=tolerance, rtol=tolerance)


QUESTIONS: dict[str, Any] = {
    "image": [[image(i)] for i in range(3)],
    "text_input": ["Who?", "What is the colour of the red car?", "Why now, and where?"],
}
ANSWERS = ["red", "a red car", "blue", "two", "on the beach", "yes", "no", "a"]


def test_generation_returns_several_results_and_repeats_them_with_a_seed(model: Any) -> None:
    assert len(model.generate(QUESTIONS, num_beams=4, num_captions=2, max_length=4, length_penalty=2.0)) == 6
    how = {"use_nucleus_sampling": True, "num_captions": 3, "max_length": 6, "temperature": 2.0}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(model.generate(QUESTIONS, **how))
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 9


def checked_scores(model: Any) -> tuple[Tensor, Tensor]:
    """The scores and lengths of `ANSWERS`; each score is the negative training loss of the same question and answer."""
    scores, lengths = model.answer_scores(QUESTIONS, ANSWERS)
    for i, answer in enumerate(ANSWERS):
        out = model({**QUESTIONS, "text_output": [answer] * 3})
        assert int(out["target_tokens"]) == 3 * lengths[i]
        assert out["loss"].item() == pytest.approx(-scores[:, i].mean().item() / int(lengths[i]), abs=1e-4)
    return scores, lengths


@pytest.mark.parametrize("style", ["qwen3", "gemma"])
def test_a_model_with_the_tokenizers_template(tmp_path: Path, style: str) -> None:
    """Training, generation and ranking use one prompt; a batch that is worded otherwise is refused."""
    model = small_model(write_folder(tmp_path, STYLES[style]), template="tokenizer")
    scores, lengths = checked_scores(model)
    assert len(model.generate(QUESTIONS, max_length=4)) == 3
    talk = [Message("user", "Who?", ("image",)), Message("assistant", "red")]
    worded = {"image": QUESTIONS["image"][:1], "pieces": [model.template.prompt(talk)]}
    assert losses(model, worded) == pytest.approx(-scores[0, 0].item() / int(lengths[0]), abs=1e-4)
    torch.testing.assert_close(model.answer_scores(worded, ANSWERS)[0], scores[:1], atol=1e-4, rtol=0)
    with pytest.raises(PromptError, match=r"worded as human_assistant: call set_template\(model.template\)"):
        model({**worded, "pieces": [chat_prompt(talk)]})
    with pytest.raises(ConfigError, match="prompt_layout original needs template human_assistant"):
        parse(ModelSettings, {**model.settings.model_dump(), "prompt_layout": "original"}, "model")


def test_answers_are_ranked_by_scores_that_need_one_pass_over_the_prompts(model: Any) -> None:
    scores, lengths = checked_scores(model)
    read: list[bool] = []
    with model.llama_model.register_forward_pre_hook(lambda *a: read.append("inputs_embeds" in a[2]), with_kwargs=True):
        likely, _ = model.answer_scores(QUESTIONS, ANSWERS, keep=1)
    assert read.count(True) == 1
    assert (likely.isfinite().sum(1) == 1).all()
    ranked = {"inference_method": "rank", "answer_list": ANSWERS}
    for power in (0.0, 1.0):
        best = (scores / lengths**power).argmax(1).tolist()
        assert model.predict_answers(QUESTIONS, **ranked, length_penalty=power) == [ANSWERS[i] for i in best]
    found = model.predict_answers(QUESTIONS, **ranked, num_ans_candidates=1)
    assert found == [ANSWERS[i] for i in likely.argmax(1).tolist()]


def test_answers_by_lavis_arguments(model: Any) -> None:
    samples = {"image": torch.stack([image(), image(1)]), "text_input": ["Who?", "Why?"]}
    asked = {**samples, "text_input": ["Question: Who? Answer:", "Question: Why? Answer:"]}
    found = model.predict_answers(samples, prompt="Question: {} Answer:", max_len=5)
    assert found == model.generate(asked, max_length=5) == model.predict_answers(asked, max_len=5)
    with pytest.raises(ConfigError, match="needs answer_list"):
        model.predict_answers(samples, inference_method="rank")
    with pytest.raises(ConfigError, match="neither 'generate' nor 'rank'"):
        model.predict_answers(samples, inference_method="ranking")


def test_positions_in_time_for_any_length() -> None:
    table = torch.tensor([0.0, 1.0, 4.0]).view(1, 3, 1, 1)
    assert positions_in_time(table, [2]).flatten().tolist() == [0.0, 1.0]
    assert positions_in_time(table, [5]).flatten().tolist() == [0.0, 0.5, 1.0, 2.5, 4.0]
    assert positions_in_time(table, [1, 3])[..., 0, 0].tolist() == [[0.0, 0.0, 0.0], [0.0, 1.0, 4.0]]
    assert positions_in_time(table[:, :1], [4]).flatten().tolist() == [0.0] * 4
