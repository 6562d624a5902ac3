"""vLLM itself (``make test-vllm``; skipped elsewhere): equal replies, many clients, a killed engine.

``CHATBRIDGE_VLLM`` names its command. It runs the tiny model's language model on a CPU, in its own environment.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import torch

from lavis_chatbridge.chat import Conversation, Engine, MediaReader, Session, load_model, media_of
from lavis_chatbridge.errors import EngineError
from lavis_chatbridge.models.remote import load_remote
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import load_tokenizer
from lavis_chatbridge.prompting.conversation import MODALITIES
from lavis_chatbridge.toyworld.world import scenes
from tests.chat.building import TINY_TOKENIZER
from tests.chat.test_engine import FIVE, files_of
from tests.models.building import answers, prompt, reply, tiny

COMMAND = os.environ.get("CHATBRIDGE_VLLM", "")
pytestmark = pytest.mark.skipif(not COMMAND, reason="make test-vllm has an environment with vLLM")
ANSWERS = 200
SERVE = "--served-model-name tiny --dtype float32 --max-model-len 512 --max-num-seqs 16 --max-num-batched-tokens 512"
OPTIONS = f"{SERVE} --enforce-eager --enable-prompt-embeds --generation-config vllm"


class Vllm:
    """A server process, started and killed by the tests."""

    def __init__(self, folder: Path, model: Path = TINY_TOKENIZER) -> None:
        self.model = model
        self._log = open(folder / "vllm.log", "w")  # noqa: SIM115  (open as long as the process)
        with socket.socket() as line:
            line.bind(("127.0.0.1", 0))
            self.port = line.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        words = [COMMAND, "serve", str(self.model), "--host", "127.0.0.1", "--port", str(self.port), *OPTIONS.split()]
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        environment = {**os.environ, **cpu, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            words, env=environment, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True
        )
        end = time.monotonic() + 600
        while time.monotonic() < end:
            assert self.process.poll() is None, f"vLLM has ended, see {self._log.name}"
            try:
                if httpx.get(f"{self.url}/models", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise AssertionError(f"vLLM does not answer, see {self._log.name}")

    def kill(self) -> None:
        """Kill the server and its workers."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    server = Vllm(tmp_path_factory.mktemp("vllm"))
    yield server
    server.kill()


@pytest.fixture(scope="module")
def local() -> Engine:
    return Session.open("tiny", device="cpu").engine


@pytest.fixture(scope="module")
def remote(vllm: Vllm) -> Engine:
    model, processors = load_model("tiny", device="cpu", engine=vllm.url)
    return Engine(model, MediaReader(model, processors), waiting=ANSWERS)


def questions(count: int) -> list[Conversation]:
    """Conversations about new images, videos and sounds of the embedded world."""
    sampled = {modality: scenes(modality, False, 77) for modality in MODALITIES}
    result = []
    for number, modalities in zip(range(count), itertools.cycle(FIVE), strict=False):
        found = tuple(next(sampled[modality]) for modality in modalities)
        media = media_of(media=files_of(found, number))
        result.append(Conversation().asking(f"what is the colour or the sound of number {number}?", media))
    return result


def test_answers_of_sixteen_clients_at_once_equal_the_local_ones_token_for_token(local: Engine, remote: Engine):
    asked = [(one, Sampling(max_new_tokens=4 + number % 29)) for number, one in enumerate(questions(ANSWERS))]
    with ThreadPoolExecutor(16) as pool:
        answered = list(pool.map(lambda both: remote.reply(*both).answer, asked))
    for both, found in zip(asked, answered, strict=True):
        expected = local.reply(*both).answer
        assert (found.text, found.ids, found.finish) == (expected.text, expected.ids, expected.finish), both


def test_logprobs_and_penalties(local: Engine, remote: Engine):
    [asked] = questions(1)
    for settings in ({"logprobs": 3}, {"min_new_tokens": 9}, {"frequency_penalty": 0.7, "presence_penalty": 0.5}):
        sampling = Sampling(max_new_tokens=16, ignore_eos=True, **settings)
        expected, found = (engine.reply(asked, sampling).answer for engine in (local, remote))
        assert found.ids == expected.ids
        values, others = ([row.logprob for row in answer.logprobs] for answer in (found, expected))
        assert values == pytest.approx(others, abs=1e-3)


def test_a_killed_engine_costs_its_replies_and_the_next_request_works(remote: Engine, vllm: Vllm):
    asked = questions(1)[0]
    reply = remote.reply(asked, Sampling(max_new_tokens=400, ignore_eos=True))
    next(reply)
    vllm.kill()
    with pytest.raises(EngineError, match=r"lost in the middle of a reply|ended the reply early"):
        _ = reply.answer
    with pytest.raises(EngineError, match="no engine answers"):
        _ = remote.reply(asked).answer
    vllm.start()
    assert remote.reply(asked).answer.tokens >= 1


@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_a_family_with_scaled_embeddings_replies_alike(family: str, tmp_path: Path):
    """vLLM multiplies the embeddings of words, of a prompt or of both by the family's factor."""
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "max_position_embeddings": 512}
    more = {"sliding_window": 256} if family == "gemma2" else {"embedding_multiplier": 12.0}
    model = tiny(family, **sizes, **more, vocab_size=640, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "llm")
    for file in TINY_TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llm")
    server = Vllm(tmp_path, tmp_path / "llm")
    try:
        engine = load_remote(server.url, tmp_path / "llm", load_tokenizer(tmp_path / "llm"), torch.float32)
        elements, _ = prompt(5, 7)
        media = {"m0": 0.2 * torch.randn(3, 64, generator=torch.Generator().manual_seed(3))}
        asked = reply(elements, media, tokens=16)
        engine.complete([asked])
    finally:
        server.kill()
    assert asked.ids == answers(model, [reply(elements, media, tokens=16)])[0]
