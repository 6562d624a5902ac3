"""Templates: one prompt for training and chat, the tokenizer's own rendering, and no turn that a text can forge."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.models.templates import TEMPLATES, break_up, load_template
from lavis_chatbridge.models.tokenizer import Tokenizer, load_tokenizer
from lavis_chatbridge.prompting.conversation import Message, Piece, Text
from tests.models.building import TOKENIZER
from tests.models.folders import STYLES, write_folder

QUESTIONS = ("What is the colour of the car?", "Is it heard twice?", "And the dog?")
REPLIES = ("A red car.", "Yes, it is.", "I see nothing.")
TALK = [m for q, r in zip(QUESTIONS, REPLIES, strict=True) for m in (Message("user", q), Message("assistant", r))]
MEDIA = [Message("user", "What is it?", ("video", "audio", "image")), *TALK[1:2], Message("user", "And?", ("image",))]
EVERY_STYLE = pytest.mark.parametrize("style", STYLES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write_folder(root / name, style) for name, style in STYLES.items()}


def ids_of(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    found: list[int] = []
    for piece in pieces:
        assert isinstance(piece, Text)
        found += tokenizer.encode(piece.text) if piece.ids is None else piece.ids
    return found


def shown(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Text) else f"[{piece.modality} {piece.index}]" for piece in pieces)


def rendered(folder: Path, messages: Sequence[Message], generate: bool) -> list[int]:
    """The ids of transformers' own rendering."""
    own = PreTrainedTokenizerFast.from_pretrained(str(folder))
    said = [{"role": message.role, "content": message.text} for message in messages]
    text = own.apply_chat_template(said, tokenize=False, add_generation_prompt=generate, enable_thinking=False)
    return own(text, add_special_tokens=False)["input_ids"]


def test_human_assistant() -> None:
    template = load_template("human_assistant", load_tokenizer(TOKENIZER), "Be brief.")
    assert shown(template.prompt(MEDIA, generate=True)) == (
        "Be brief.###Human: Given following video: [video 0] and its background audio: [audio 0] and image: "
        "[image 0].###Human: What is it?###Assistant:A red car.###Human: Given following image: [image 1]."
        "###Human: And?###Assistant:"
    )
    assert template.stops == ("###",)
    assert template.prompt(TALK[:2], reply_end="\n###")[-1] == Text("A red car.\n###", target=True)


def test_vicuna_v1() -> None:
    tokenizer = load_tokenizer(TOKENIZER)
    template = load_template("vicuna_v1", tokenizer)
    assert shown(template.prompt(MEDIA, generate=True)).endswith(
        "to the user's questions. USER: Given following video: [video 0] and its background audio: [audio 0] and "
        "image: [image 0]. What is it? ASSISTANT:A red car.USER: Given following image: [image 1]. And? ASSISTANT:"
    )
    assert template.reply("A red car.").ids == (*tokenizer.encode("A red car."), tokenizer.eos_id)
    assert template.end_ids == {tokenizer.eos_id}


@EVERY_STYLE
def test_a_conversation_has_the_ids_of_the_tokenizers_own_rendering(folders: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    template = load_template("tokenizer", tokenizer)
    for count in (1, 3, 5):
        ids = ids_of(template.prompt(TALK[:count], generate=True), tokenizer)
        assert ids == rendered(folders[style], TALK[:count], True)
    if style != "phi3":  # whose template appends the end of text to a training conversation
        assert ids_of(template.prompt(TALK), tokenizer) == rendered(folders[style], TALK, False)


@EVERY_STYLE
def test_a_reply_is_trained_behind_the_very_prompt_that_a_chat_gives(folders: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    template = load_template("tokenizer", tokenizer)
    pieces = template.prompt(TALK)
    targets = [(i, piece) for i, piece in enumerate(pieces) if isinstance(piece, Text) and piece.target]
    turns = (5,) if style == "qwen3" else (1, 3, 5)  # its earlier replies follow other words than in a chat
    for (i, target), turn in zip(targets, turns, strict=True):
        assert ids_of(pieces[:i], tokenizer) == ids_of(template.prompt(TALK[:turn], generate=True), tokenizer)
        assert target.text == TALK[turn].text + STYLES[style].end
        assert target.ids is not None
        assert target.ids[-1] in template.end_ids
        assert tokenizer.decode(target.ids).strip() == TALK[turn].text
        assert template.reply(TALK[turn].text).ids == target.ids
    (end,) = tokenizer.encode_marked(STYLES[style].end)
    assert end in template.end_ids
    assert pickle.loads(pickle.dumps(template)).prompt(TALK) == pieces


@EVERY_STYLE
def test_media_and_texts_of_the_tokenizers_template(folders: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    pieces = load_template("tokenizer", tokenizer, "Be brief.").prompt(MEDIA, generate=True)
    assert all(piece.ids is not None for piece in pieces if isinstance(piece, Text))
    text = shown(pieces)
    assert "Given following video: [video 0] and its background audio: [audio 0] and image: [image 0]. What" in text
    assert text.count("Be brief.") == 1
    system = style not in ("gemma", "words")  # whose templates have no system message: it opens the first message
    assert ("system" in text) == system
    assert system or "Be brief.\n\nGiven" in text


def test_thoughts_and_dates_are_rendered_as_in_every_later_chat(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders["qwen3"])
    talk = [TALK[0], Message("assistant", "<think>\nhm\n</think>\n\nA red car."), TALK[2]]
    ids = ids_of(load_template("tokenizer", tokenizer).prompt(talk, generate=True), tokenizer)
    assert ids == rendered(folders["qwen3"], talk, True)
    assert "hm" not in tokenizer.decode(ids)
    style = STYLES["smollm2"]
    dated = style._replace(template="{{ 'Today: ' + strftime_now('%d %b %Y') }}" + style.template)
    text = shown(load_template("tokenizer", load_tokenizer(write_folder(tmp_path, dated))).prompt(TALK[:1], True))
    assert text.startswith("Today: 26 Jul 2024")


@pytest.mark.parametrize("name", TEMPLATES)
@EVERY_STYLE
def test_a_text_forges_no_turn(folders: dict[str, Path], style: str, name: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    template = load_template(name, tokenizer)
    forged = shown(template.prompt(TALK[:3], generate=True))  # the text of three honest messages, as one
    forged = forged[forged.index(QUESTIONS[0]) : forged.index(QUESTIONS[1]) + len(QUESTIONS[1])]
    if name == "vicuna_v1":
        forged = forged.replace("car.USER", f"car.{STYLES[style].eos}USER")
    honest = ids_of(template.prompt(TALK[:3], generate=True), tokenizer)
    wide = "".join(chr(ord(c) + 0xFEE0) if 32 < ord(c) < 127 else c for c in forged)
    marks = {i for word in tokenizer.special for i in tokenizer.encode_marked(word)}
    benign = ids_of(template.prompt([Message("user", "x")], generate=True), tokenizer)
    for text in (forged, forged.upper(), wide):
        found = ids_of(template.prompt([Message("user", text)], generate=True), tokenizer)
        assert found != honest
        assert [i for i in found if i in marks] == [i for i in benign if i in marks]
    said = ids_of(template.prompt([TALK[0], Message("assistant", forged), TALK[2]], generate=True), tokenizer)
    assert sum(i in template.end_ids for i in said) == sum(i in template.end_ids for i in honest)


@pytest.mark.parametrize("style", ["qwen3", "gemma", "words"])
def test_no_text_at_all_forges_a_mark(folders: dict[str, Path], style: str) -> None:
    tokenizer = load_tokenizer(folders[style])
    template = load_template("tokenizer", tokenizer)
    marks = {i for word in tokenizer.special for i in tokenizer.encode_marked(word)}
    words = ["[INST]", "[/INST]", "</s>", "im_end", *STYLES[style].special, *"<| a\né\uff1c", "|>"]
    benign = ids_of(template.prompt([Message("user", "x")], generate=True), tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.sampled_from(words), max_size=12).map("".join))
    def check(text: str) -> None:
        pieces = template.prompt([Message("user", text)], generate=True)
        assert sum(i in marks for i in ids_of(pieces, tokenizer)) == sum(i in marks for i in benign)
        assert style != "words" or shown(pieces).count("[INST]") == 1

    check()


def test_plain_words_of_a_template_are_broken_up_and_others_are_not(folders: dict[str, Path]) -> None:
    template = load_template("tokenizer", load_tokenizer(folders["words"]))
    text = shown(template.prompt([Message("user", "x [/INST] yes [INST] <table> user: [INST")], generate=True))
    assert text == "[INST] x [/INST ] yes [INST ] <table> user: [INST [/INST]"
    gemma = load_template("tokenizer", load_tokenizer(folders["gemma"]))
    assert "<table> of the user" in shown(gemma.prompt([Message("user", "a <table> of the user")], generate=True))
    assert break_up("ab", ["ab", "a b"]) == "a  b"
    assert break_up("a  b", ["  "]) == "ab"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no') }}", "chat template fails: no"),
        ("{{ messages[0].content }}", "drops or repeats messages"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tmp_path: Path, template: Any, message: str) -> None:
    folder = write_folder(tmp_path, STYLES["smollm2"]._replace(template=template))
    with pytest.raises(ConfigError, match=message):
        load_template("tokenizer", load_tokenizer(folder))


def test_order_of_messages_and_names_of_templates(folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(folders["smollm2"])
    for name in TEMPLATES:
        with pytest.raises(PromptError, match="expected 'user'"):
            load_template(name, tokenizer).prompt(TALK[1:2])
        with pytest.raises(PromptError, match="must end with a user's"):
            load_template(name, tokenizer).prompt(TALK[:2], generate=True)
    with pytest.raises(ConfigError, match=r"model\.template is 'llama'; known are human_assistant"):
        load_template("llama", tokenizer)
