"""The Hugging Face door: the same answers and steps as LAVIS's door, and folders that load again."""

from __future__ import annotations

import base64
import json
import random
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import OmegaConf
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer, pipeline

from lavis_chatbridge import cli
from lavis_chatbridge.chat import Session
from lavis_chatbridge.errors import CheckpointError, ConfigError, MediaError, PromptError
from lavis_chatbridge.hf import (
    ChatBridgeCollator,
    ChatBridgeConfig,
    ChatBridgeForConditionalGeneration,
    ChatBridgeProcessor,
)
from lavis_chatbridge.models import state_dicts
from lavis_chatbridge.models.layout import elements_of
from lavis_chatbridge.prompting.conversation import Message, Slot
from lavis_chatbridge.toyworld import language, pictures
from lavis_chatbridge.toyworld.world import scenes
from tests.chat.building import picture, png, sound, video
from tests.hub_server import connect, serving
from tests.runners.runner_parts import logged

NEWEST = int(transformers.__version__.partition(".")[0]) >= 5


@pytest.fixture(scope="module")
def model() -> ChatBridgeForConditionalGeneration:
    return ChatBridgeForConditionalGeneration.from_pretrained("tiny")


@pytest.fixture(scope="module")
def processor() -> ChatBridgeProcessor:
    return ChatBridgeProcessor.from_pretrained("tiny")


def user(text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


@pytest.fixture(scope="module")
def talk() -> list[dict[str, Any]]:
    """An image, a video with its own sound, and a sound, in two turns."""
    return [
        user("what is the shape of the picture?", {"type": "image", "image": Image.fromarray(picture())}),
        {"role": "assistant", "content": "a star"},
        user("and now?", {"type": "video", "video": video()}, {"type": "audio", "audio": sound()}),
    ]


def answers(model: Any, processor: Any, talk: list, **more: Any) -> list[str]:
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    return processor.batch_decode(model.generate(**inputs, **more))


def test_the_ids_equal_those_of_our_own_prompts(processor: ChatBridgeProcessor, talk: list) -> None:
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, return_tensors="pt")
    said = [
        Message("user", "what is the shape of the picture?", ("image",)),
        Message("assistant", "a star"),
        Message("user", "and now?", ("video", "audio", "audio")),
    ]
    pieces = processor.template("").prompt(said, generate=True)
    slots = [piece for piece in pieces if isinstance(piece, Slot)]
    queries = processor.settings.perceiver.queries
    elements = elements_of(pieces, {slot: (slot.modality, range(queries)) for slot in slots}, processor.codec)
    ids = [e if isinstance(e, int) else processor.placeholder_ids[e[0]] for e in elements]
    assert inputs["input_ids"].tolist() == [ids]
    assert [len(inputs[name]) for name in ("pixel_values", "pixel_values_videos", "clips")] == [1, 1, 2]


@pytest.mark.parametrize(("hear_videos", "sounds"), [(False, 1), (None, 2)])
def test_a_call_can_leave_out_the_sound_of_its_videos(processor, talk, hear_videos: bool | None, sounds: int) -> None:
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True, hear_videos=hear_videos)
    assert len(inputs["clips"]) == sounds
    assert processor.apply_chat_template(talk, hear_videos=hear_videos).count("<audio>") == sounds
    assert ("clips" in processor(videos=video(), text="Why?", hear_videos=hear_videos)) == (sounds == 2)


def test_special_tokens_are_kept_on_request(processor: ChatBridgeProcessor) -> None:
    ids = [*processor.codec.encode("red"), processor.codec.eos_id, *processor.codec.encode("blue")]
    assert processor.batch_decode([ids]) == ["red"]
    assert processor.decode(ids, skip_special_tokens=False).strip() == f"red{processor.tokenizer.eos_token} blue"


def test_a_medium_in_base64_is_decoded(processor: ChatBridgeProcessor) -> None:
    parts = [{"type": "image", "image": png()}, {"type": "image", "base64": base64.b64encode(png()).decode()}]
    features = (processor.apply_chat_template([user("?", part)], tokenize=True, return_dict=True) for part in parts)
    assert torch.equal(*(found["pixel_values"] for found in features))


def test_media_alone_are_a_question_and_a_typed_placeholder_is_text(processor: ChatBridgeProcessor) -> None:
    alone, empty = (processor(images=picture(), text=text)["input_ids"].tolist() for text in (None, ""))
    assert alone == empty
    assert int(processor(text="<image> <video> <audio>")["input_ids"].max()) < len(processor.codec)


def test_greedy_answers_equal_those_of_a_session_and_of_the_lavis_model(model, processor) -> None:
    session = Session(model.chatbridge, processor.processors)
    rng, words = np.random.default_rng(5), random.Random(5)
    images, texts = [], []
    for scene in islice(scenes("image", held_out=False, seed=1), 100):
        images += [pictures.render(scene, rng)] * 2
        texts += [question.text for question in language.questions(scene, words)[:2]]
    inputs = processor(images=[[image] for image in images], text=texts)
    ours = processor.batch_decode(model.generate(**inputs, max_new_tokens=12))
    batch = {"image": inputs["pixel_values"], "text_input": texts}
    assert ours == model.chatbridge.generate(batch, max_length=12)
    for image, text, answer in zip(images, texts, ours, strict=True):
        session.clear()
        assert session.ask(text, images=[image], max_new_tokens=12).text == answer


def test_a_batch_of_different_media_answers_as_its_rows_do(model, processor, talk) -> None:
    talks = [talk[:1], talk, [user("what is it?", {"type": "audio", "audio": sound()})], [user("hello")]]
    assert answers(model, processor, talks) == [answers(model, processor, one)[0] for one in talks]


def test_beams_sampling_and_several_results(model, processor, talk) -> None:
    assert len(answers(model, processor, talk, num_beams=3, num_return_sequences=2)) == 2
    assert len(set(answers(model, processor, talk, do_sample=True, temperature=5.0, num_return_sequences=6))) > 1


def test_streaming_gives_the_answer_without_its_end_mark(model, processor, talk) -> None:
    inputs = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**inputs, "streamer": streamer})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == answers(model, processor, talk)[0]


@pytest.mark.parametrize("task", ["image-text-to-text", *(["any-to-any"] if NEWEST else [])])
def test_pipelines(model, processor, talk, task: str) -> None:
    run = pipeline(task, model=model, processor=processor)
    found = run(text=talk, max_new_tokens=12, return_full_text=False)
    assert found[0]["generated_text"] == answers(model, processor, talk, max_new_tokens=12)[0]


def same(first: Any, second: Any) -> bool:
    left, right = first.chatbridge.state_dict(), second.chatbridge.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_saved_model_loads_again_and_answers_identically(tmp_path: Path, model, processor, talk) -> None:
    model.save_pretrained(tmp_path / "a", max_shard_size="1MB")
    processor.save_pretrained(tmp_path / "a")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    (tmp_path / "a").rename(tmp_path / "b")  # references are relative
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "b")
    reader = AutoProcessor.from_pretrained(tmp_path / "b")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "b"), ChatBridgeConfig)
    assert same(model, again)
    assert answers(again, reader, talk) == answers(model, processor, talk)
    assert not (tmp_path / "b" / "frozen").exists()
    assert again.config.frozen["model.language_model.weights"]["source"] == ["package:assets/tiny/llm"]


def test_another_frozen_part_is_refused(tmp_path: Path, model) -> None:
    model.save_pretrained(tmp_path, save_frozen=True)
    file = tmp_path / "frozen" / "language_model_weights" / "config.json"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(
        CheckpointError, match=r"model\.language_model\.weights: .* is not what this bridge was trained"
    ):
        ChatBridgeForConditionalGeneration.from_pretrained(tmp_path)


def test_the_card_names_parts_data_recipe_and_scores(tmp_path: Path, model) -> None:
    run = OmegaConf.load(model.chatbridge.default_config_path("tiny"))
    run = OmegaConf.merge(run, {"datasets": {"my_captions": {}}, "run": {"seed": 7}})
    OmegaConf.save(run, tmp_path / "config.yaml")
    (tmp_path / "log.txt").write_text('{"train_loss": 1}\n{"val_step": 4, "val_agg_metrics": 0.5, "val_by": {}}\n')
    state_dicts.save(tmp_path / "model.safetensors", model.chatbridge.trainable_state_dict())
    ChatBridgeForConditionalGeneration.from_pretrained(tmp_path).save_pretrained(tmp_path / "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "| model.vision.weights | package:assets/tiny/eva_vit.safetensors | see the source |\n| model." in text
    for rows in ("- my_captions\n", "| --- | --- |\n| seed | 7 |\n", "| agg_metrics | 0.5 |"):
        assert rows in text


def test_dtype_and_quantization_apply_to_frozen_parts(processor, talk) -> None:
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    more = {"dtype": torch.float32, "device_map": "cpu", "quantization_config": config}
    small = ChatBridgeForConditionalGeneration.from_pretrained("tiny", **more)
    settings = small.chatbridge.settings.language_model
    assert (settings.dtype, settings.quantization) == ("float32", "8bit")
    assert answers(small, processor, talk, max_new_tokens=3)[0]
    with pytest.raises(ConfigError, match="dtype"):
        ChatBridgeForConditionalGeneration.from_pretrained("tiny", dtype=torch.int8)


def test_a_pushed_model_loads_by_its_hub_id(tmp_path: Path, model, talk, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path / "hub") as server:
        connect(server, tmp_path / "cache", monkeypatch)
        model.push_to_hub("org/bridge", save_frozen=True, max_shard_size="1MB")
        assert (tmp_path / "hub" / "org" / "bridge" / "README.md").is_file()
        again = ChatBridgeForConditionalGeneration.from_pretrained("org/bridge")
        reader = ChatBridgeProcessor.from_pretrained("org/bridge")
        with pytest.raises(MediaError, match=r"^cannot read http\S+/none/none\.png: .*404[^\n]*$"):
            reader(images=f"{server.url}/cdn/none/none.png")
    assert again.config.frozen["model.language_model.weights"]["source"] == ["frozen/language_model_weights"]
    assert same(model, again)
    assert answers(again, reader, talk) == answers(model, reader, talk)


def test_mistakes_are_named(processor: ChatBridgeProcessor, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="2 texts, but images for 1 rows"):
        processor(text=["a", "b"], images=picture())
    with pytest.raises(PromptError, match="images=, videos= and audio=, not image="):
        processor(text="a", image=picture())
    with pytest.raises(PromptError, match="a part of type 'smell'"):
        processor.apply_chat_template([user("x", {"type": "smell", "path": "y"})], tokenize=True)
    with pytest.raises(PromptError, match="has no medium"):
        processor.apply_chat_template([user("x", {"type": "image"})], tokenize=True)
    with pytest.raises(CheckpointError, match="is not a ChatBridge"):
        ChatBridgeForConditionalGeneration.from_pretrained(tmp_path)


def test_the_collator_gives_the_loss_of_the_lavis_model(model, processor, talk) -> None:
    replied = [[*talk[:1], {"role": "assistant", "content": "a star"}], talk[:2]]
    batch = ChatBridgeCollator(processor)([{"messages": messages} for messages in replied])
    image = processor.processors["image"]["eval"](Image.fromarray(picture()))
    question = "what is the shape of the picture?"
    expected = model.chatbridge({"image": [image] * 2, "text_input": [question] * 2, "text_output": ["a star"] * 2})
    found = model(**batch).loss
    assert torch.allclose(found, expected["loss"], atol=1e-6)
    assert int((batch["labels"] != -100).sum()) == int(expected["target_tokens"])
    halved = model(**batch, num_items_in_batch=2 * int(expected["target_tokens"])).loss
    assert torch.allclose(halved, found / 2)


TRAINING = """
model: {{model_type: tiny}}
datasets:
  chatbridge_jsonl:
    {{stage: instruction, templates: false, splits: {{train: {folder}/data.jsonl}},
      vis_processor: {{train: {{name: chatbridge_image_eval, image_size: 56}}}}}}
run:
  {{task: chatbridge_instruction, max_iters: 5, batch_size_train: 1, init_lr: 1e-3, min_lr: 1e-3, warmup_steps: 0,
    weight_decay: 0.0, clip_grad_norm: null, num_workers: 0, device: cpu, log_every: 1, output_dir: {folder}/run,
    job_id: ""}}
"""


@pytest.mark.skipif(not NEWEST, reason="its Trainer imports datasets, which is newer here")
def test_five_steps_of_the_trainer_equal_those_of_the_runner(tmp_path: Path) -> None:
    """The runner divides gradients by the number of targets, the Trainer the loss: the same bits for a power of two."""
    Image.fromarray(picture()).save(tmp_path / "a.png")
    turns = [{"role": "user", "text": "what is it?"}, {"role": "assistant", "text": "a large red star on the left"}]
    sample = {"id": "a", "media": [{"type": "image", "path": "a.png"}], "turns": turns}
    (tmp_path / "data.jsonl").write_text(json.dumps(sample) + "\n")
    (tmp_path / "run.yaml").write_text(TRAINING.format(folder=tmp_path))
    assert cli.main(["train", "--cfg-path", str(tmp_path / "run.yaml")]) == 0
    model = ChatBridgeForConditionalGeneration.from_pretrained("tiny")
    losses: list[float] = []  # the Trainer's log rounds them
    model.register_forward_hook(lambda module, inputs, output: losses.append(output.loss.item()))
    question = [{"type": "image", "path": str(tmp_path / "a.png")}, {"type": "text", "text": "what is it?"}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "a large red star on the left"}]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "hf"), max_steps=5, per_device_train_batch_size=1, learning_rate=1e-3, weight_decay=0.0,
        lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to=[], remove_unused_columns=False,
        use_cpu=True, adam_epsilon=1e-8, optim="adamw_torch", disable_tqdm=True,
    )  # fmt: skip
    collator = ChatBridgeCollator(ChatBridgeProcessor.from_pretrained("tiny"))
    transformers.Trainer(model, arguments, collator, [{"messages": messages}] * 5).train()
    assert losses == pytest.approx(logged(tmp_path / "run", "train_loss"), abs=1e-6)
    assert len(losses) == 5
    trained = state_dicts.read(tmp_path / "run" / "model.safetensors").tensors
    found = model.chatbridge.trainable_state_dict()
    assert found.keys() == trained.keys()
    worst = {name: float((tensor - trained[name]).abs().max()) for name, tensor in found.items()}
    assert max(worst.values()) < 1e-6, worst
