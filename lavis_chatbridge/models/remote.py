"""The language model on a vLLM server: receives prompts as embeddings and streams tokens back.

Only its embedding table, configuration and tokenizer are loaded in this process. Start the server with
``vllm serve FOLDER --enable-prompt-embeds`` (docs/server.md). This module handles no media and no conversation.

Shapes: ``N`` positions of a prompt, ``D`` width of the language model, ``V`` vocabulary.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NoReturn

import httpx
import torch
from safetensors import safe_open
from torch import Tensor, nn

from lavis_chatbridge.errors import CheckpointError, ConfigError, EngineError
from lavis_chatbridge.models.decoding import Generation, TokenLogprob
from lavis_chatbridge.models.families import LanguageModel
from lavis_chatbridge.models.sampling import Sampling
from lavis_chatbridge.models.tokenizer import Tokenizer

log = logging.getLogger(__name__)

KEY = "CHATBRIDGE_ENGINE_KEY"
"""The environment variable with the server's API key, if it asks for one."""
_TABLES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")  # ends of names
_WAITS = (0.25, 0.5, 1.0)  # seconds before further attempts
_BUSY = (429, 502, 503, 504)  # also a load balancer's answers while a server restarts
_PROBE = "The colour of the picture"
_HINT = "start it with 'vllm serve FOLDER --enable-prompt-embeds'"


class Client:
    """Thread-safe client of vLLM's completions API at an address such as ``http://HOST:PORT/v1``."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        key = os.environ.get(KEY)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(300.0, connect=5.0),
            # vLLM closes idle connections after 5 seconds: do not reuse one that it may be closing
            limits=httpx.Limits(max_connections=None, keepalive_expiry=2.0),
            trust_env=False,
        )
        self._model: str | None = None

    def connect(self, tokenizer: Tokenizer, width: int) -> int | None:
        """Check the server's tokenizer and that it accepts embeddings of width ``D``; returns its context length."""
        try:
            response = self._http.get(f"{self.url}/models")
            if response.status_code in (401, 403):
                self._refuse(response)
            served = response.json()["data"][0]
            self._model, most = str(served["id"]), served.get("max_model_len")
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise EngineError(f"no engine answers at {self.url} ({error}): {_HINT}") from error
        except (ValueError, KeyError, IndexError, TypeError):
            raise EngineError(f"{self.url} is not the address of a vLLM server, as http://HOST:PORT/v1") from None
        body = {"model": self._model, "prompt": _PROBE, "add_special_tokens": False}
        with suppress(httpx.TransportError, ValueError, KeyError, TypeError):  # some servers have no tokenizer
            found = self._http.post(f"{self.url.removesuffix('/v1')}/tokenize", json=body).json()["tokens"]
            if found != tokenizer.encode(_PROBE):
                raise EngineError(
                    f"the engine at {self.url} serves {self._model}, whose tokenizer gives other ids than "
                    "model.language_model: use the same folder for both"
                )
        list(self.tokens(torch.zeros(1, width), Sampling(max_new_tokens=1), (), ()))
        log.info("the language model %s runs at %s", self._model, self.url)
        return most

    def tokens(
        self, embeds: Tensor, sampling: Sampling, stops: Sequence[str], end_ids: Sequence[int]
    ) -> Generator[tuple[int, TokenLogprob | None]]:
        """Yields the tokens of the reply to ``[N, D]`` embeddings, until a stop text or an end id."""
        packed = io.BytesIO()
        torch.save(embeds.detach().cpu().contiguous().clone(), packed)
        prompt = base64.b64encode(packed.getvalue()).decode("ascii")
        for line in self._lines({"model": self._model, "prompt_embeds": prompt, **_fields(sampling, stops, end_ids)}):
            if line == "[DONE]":
                return
            chunk = json.loads(line)
            if "error" in chunk:
                raise EngineError(f"the engine at {self.url} refuses: {chunk['error']}")
            for choice in chunk.get("choices", ()):
                if choice.get("text") and not choice.get("token_ids"):
                    raise EngineError(f"the engine at {self.url} returns no token ids: use vLLM 0.11 or newer")
                yield from _tokens_of(choice)
        raise EngineError(f"the engine at {self.url} ended the reply early")

    def _lines(self, body: dict[str, Any]) -> Iterator[str]:
        """The data of the server's events. While none has come, a busy or lost server is asked again."""
        begun = False
        for wait in (*_WAITS, None):
            try:
                with self._http.stream("POST", f"{self.url}/completions", json=body) as response:
                    if response.status_code in _BUSY and wait is not None:
                        time.sleep(wait)
                        continue
                    if response.status_code != 200:
                        response.read()
                        self._refuse(response)
                    for line in response.iter_lines():
                        if line.startswith("data: "):
                            begun = True
                            yield line.removeprefix("data: ")
                return
            except httpx.TransportError as error:
                if begun:
                    raise EngineError(f"the engine at {self.url} was lost in the middle of a reply: {error}") from error
                if wait is None:
                    raise EngineError(f"no engine answers at {self.url}: {error}") from error
                time.sleep(wait)

    def _refuse(self, response: httpx.Response) -> NoReturn:
        """Raise an error with the server's message, or how to mend its cause."""
        message = response.text[:500]
        with suppress(ValueError, KeyError, TypeError):
            message = str(response.json()["error"]["message"])[:500]
        if "enable-prompt-embeds" in message:
            message = f"it does not accept embeddings: {_HINT}"
        elif response.status_code in (401, 403):
            message = f"it asks for an API key: set {KEY}"
        elif "lora" in message.lower():
            message = f"merge the LoRA adapters into the served folder ({message})"
        raise EngineError(f"the engine at {self.url} refuses: {message}")


class RemoteLanguageModel(LanguageModel):
    """A causal language model that runs on a server with a context of ``max_context`` tokens.

    vLLM multiplies Gemma's embeddings by their factor only where it looks up words itself, so ``table`` is multiplied
    here; Granite's it multiplies in the forward pass.
    """

    def __init__(self, table: Tensor, config: Any, client: Client, max_context: int | None) -> None:
        super().__init__()
        if config.model_type.startswith("gemma"):
            table = table * torch.tensor(config.hidden_size**0.5, dtype=table.dtype)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=True)
        self.dtype, self.device = table.dtype, table.device
        self.embedding_scale = float(getattr(config, "embedding_multiplier", 1.0))
        self.config, self.client, self.max_context = config, client, max_context

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ConfigError(
            f"model.language_model.engine is {self.client.url}, which only generates: losses, ranking and beam "
            "search need the local language model (set it to null)"
        )

    get_output_embeddings = forward

    def run(self, generation: Generation) -> Iterator[str]:
        """Yields a reply's text as it becomes final."""
        own = generation.sampling
        embeds = generation.embeds(0, self.embed_tokens, self.embedding_scale)
        # Closing this generator closes the connection, and then the server stops generating.
        with closing(self.client.tokens(embeds, own, generation.stream.stops, sorted(generation.end_ids))) as tokens:
            for token, logprob in tokens:
                if generation.cancelled:
                    yield generation.end("cancelled")
                    return
                if logprob is not None and own.logprobs is not None:
                    generation.logprobs.append(logprob._replace(top=logprob.top[: own.logprobs]))
                yield generation.accept(token)
                if generation.done:
                    return
        yield generation.end("stop")

    def complete(self, generations: Sequence[Generation]) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda generation: list(self.run(generation)), generations))


def load_remote(url: str, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype) -> RemoteLanguageModel:
    """The remote language model of a Hugging Face folder; only its embedding table is read."""
    from transformers import AutoConfig

    table = _embedding_table(folder).to(dtype)
    client = Client(url)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    most = client.connect(tokenizer, table.shape[1])
    return RemoteLanguageModel(table, config, client, most)


def _embedding_table(folder: Path) -> Tensor:
    """The ``[V, D]`` embedding table in a folder's safetensors; no other tensor is read."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            if names := [name for name in opened.keys() if name.endswith(_TABLES)]:  # noqa: SIM118
                return opened.get_tensor(names[0])
    raise CheckpointError(
        f"{folder} has no embedding table (model.{_TABLES[0]}) in safetensors, which a remote engine needs: "
        "convert its weights with save_pretrained"
    )


def _tokens_of(choice: dict[str, Any]) -> list[tuple[int, TokenLogprob | None]]:
    """The tokens of an event with their log-probabilities. In the latter, vLLM names a token ``token_id:ID``."""
    ids, logprobs = choice.get("token_ids") or [], choice.get("logprobs")
    if not logprobs:
        return [(token, None) for token in ids]
    tops = logprobs["top_logprobs"] or [{}] * len(ids)
    found: list[tuple[int, TokenLogprob | None]] = []
    for token, own, top in zip(ids, logprobs["token_logprobs"], tops, strict=False):
        likeliest = tuple((int(name.rpartition(":")[2]), value) for name, value in (top or {}).items())
        found.append((token, TokenLogprob(token, own, likeliest)))
    return found


def _fields(sampling: Sampling, stops: Sequence[str], end_ids: Sequence[int]) -> dict[str, Any]:
    """`Sampling` as vLLM's fields. All are sent, so that the folder's generation_config.json has no effect."""
    if sampling.num_beams > 1:
        raise ConfigError(f"num_beams is {sampling.num_beams}: beam search needs the local language model")
    if sampling.repetition_penalty != 1:  # vLLM counts the prompt's ids too, which embeddings do not have
        raise ConfigError(
            f"repetition_penalty is {sampling.repetition_penalty:g}: it needs the local language model; "
            "presence_penalty and frequency_penalty work with an engine"
        )
    greedy = sampling.temperature == 0
    same = {"temperature", "presence_penalty", "frequency_penalty", "seed", "ignore_eos", "logprobs"}
    return {
        **sampling.model_dump(include=same),
        "stream": True,
        "max_tokens": sampling.max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "top_p": 1.0 if greedy else sampling.top_p,
        "top_k": -1 if greedy or sampling.top_k == 0 else sampling.top_k,
        "min_p": 0.0 if greedy else sampling.min_p,
        "repetition_penalty": 1.0,
        "stop": list(stops),
        "stop_token_ids": list(end_ids),
        "return_token_ids": True,
        "return_tokens_as_token_ids": sampling.logprobs is not None,
        "include_stop_str_in_output": True,
    }
