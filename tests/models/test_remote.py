"""A language model on a server, against a stand-in for vLLM: equal replies, retries, faults in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from lavis_chatbridge.chat import Conversation, Session, load_model
from lavis_chatbridge.errors import CheckpointError, ConfigError, EngineError
from lavis_chatbridge.models import remote
from lavis_chatbridge.models.remote import load_remote
from tests.chat.building import picture, sound
from tests.models.building import Letters, answers, prompt, reply, tiny
from tests.models.standin import StandIn, serving
from tests.models.test_families import SUPPORTED

ASKED = {"images": [picture()], "audios": [sound()]}


@pytest.fixture(scope="module")
def local() -> Session:
    return Session.open("tiny", device="cpu")


@pytest.fixture(scope="module")
def shared(local: Session) -> Iterator[tuple[StandIn, str]]:
    standin = StandIn(local.model.llama_model, local.model.llama_tokenizer)
    with serving(standin) as url:
        yield standin, url


@pytest.fixture
def standin(shared: tuple[StandIn, str], monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in as it was; the client waits for nothing."""
    monkeypatch.setattr(remote, "_WAITS", (0.01, 0.01, 0.01))
    shared[0].__init__(shared[0].model, shared[0].tokenizer)  # type: ignore[misc]
    return shared[0]


@pytest.fixture
def session(shared: tuple[StandIn, str], standin: StandIn) -> Session:
    return open_on(shared[1])


def open_on(url: str) -> Session:
    return Session(*load_model("tiny", device="cpu", engine=url))


def test_only_the_embedding_table_is_loaded(session: Session, local: Session, tmp_path: Path):
    loaded = sum(p.numel() for p in session.model.llama_model.parameters())
    assert loaded == local.model.llama_model.get_input_embeddings().weight.numel()
    assert session.engine.max_context == 512
    with pytest.raises(CheckpointError, match="no embedding table"):
        load_remote("", tmp_path, Letters(), torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stop": ["a"], "max_new_tokens": 30},
        {"ignore_eos": True, "max_new_tokens": 12},
        {"min_new_tokens": 6, "frequency_penalty": 0.5, "presence_penalty": 0.2},
        {"temperature": 1.0, "seed": 3, "logprobs": 2},
    ],
)
def test_replies_equal_those_of_the_local_model(session: Session, local: Session, settings: dict[str, Any]):
    for talk in (session, local):
        talk.clear()
    for question, media in (("what is here?", ASKED), ("and what is its colour?", {})):
        expected, answer = (talk.ask(question, **media, **settings) for talk in (local, session))
        assert (answer.text, answer.ids, answer.finish) == (expected.text, expected.ids, expected.finish)
        assert answer.prompt_tokens == expected.prompt_tokens
        for row, other in zip(answer.logprobs, expected.logprobs, strict=True):
            assert row.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in row.top] == [i for i, _ in other.top]
    streamed = session.restream(**settings)
    assert "".join(streamed) == streamed.answer.text


def test_generate_of_the_model_uses_the_engine(session: Session, local: Session):
    samples = {"text_input": ["what is red?", "what is blue?"]}
    assert session.model.generate(samples, max_length=6) == local.model.generate(samples, max_length=6)
    for refused in (
        lambda: session.model.generate(samples, num_beams=3),
        lambda: session.ask("hello", repetition_penalty=1.3),
        lambda: session.model.predict_answers(samples, inference_method="rank", answer_list=["a", "b"]),
    ):
        with pytest.raises(ConfigError, match=r"needs? the local language model"):
            refused()


def test_many_at_once_and_a_busy_engine(session: Session, standin: StandIn, local: Session):
    standin.busy = 3
    asked = [Conversation().asking(f"what is number {i}?") for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda one: session.engine.reply(one).answer.text, asked))
    assert found == [local.engine.reply(one).answer.text for one in asked]
    assert len(standin.requests) == 1 + 16 + 3  # the first when the model was loaded


def test_a_cancelled_reply_and_an_engine_that_is_lost_and_comes_back(session: Session, standin: StandIn):
    stream = session.stream("hello", ignore_eos=True, max_new_tokens=400)
    next(stream)
    stream.cancel()
    assert stream.answer.finish == "cancelled"
    assert stream.answer.tokens < 400
    session.clear()
    standin.dies_after = 2
    with pytest.raises(EngineError, match="was lost in the middle of a reply"):
        session.ask("hello", ignore_eos=True, max_new_tokens=20)
    assert session.messages == ()
    standin.dies_after = 1000
    assert session.ask("hello", max_new_tokens=4).tokens >= 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("takes_embeds", False, "start it with 'vllm serve FOLDER --enable-prompt-embeds'"),
        ("tokens", [1, 2, 3], "whose tokenizer gives other ids"),
        ("key", "secret", "asks for an API key: set CHATBRIDGE_ENGINE_KEY"),
        ("busy", 9, "refuses: busy"),
        ("width", 64, r"hidden_size \d+ does not match the model's hidden_size 64"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_when_the_model_is_loaded(
    shared: tuple[StandIn, str], standin: StandIn, name: str, value: Any, message: str, monkeypatch: pytest.MonkeyPatch
):
    setattr(standin, name, value)
    with pytest.raises(EngineError, match=message):
        open_on(shared[1])
    if name == "key":
        monkeypatch.setenv(remote.KEY, value)
        assert open_on(shared[1]).ask("hello").tokens >= 1


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3_text", "granite", "gpt2", "gpt_neox", "opt", "bloom"])
def test_a_family_replies_alike_here_and_on_the_engine(name: str, tmp_path: Path) -> None:
    model = tiny(name, **SUPPORTED[name], **({"embedding_multiplier": 12.0} if name == "granite" else {}))
    model.save_pretrained(tmp_path)
    tokenizer: Any = Letters()
    with serving(StandIn(model, tokenizer)) as url:
        engine = load_remote(url, tmp_path, tokenizer, torch.float32)
        asked = reply(*prompt(4, 3))
        engine.complete([asked])
    assert asked.ids == answers(model, [reply(*prompt(4, 3))])[0]
