"""A stand-in for vLLM on loopback: completions of prompt embeddings by a local model, refusing what vLLM refuses."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lavis_chatbridge.models.decoding import Decoder, Generation
from lavis_chatbridge.models.sampling import Sampling
from tests.hub_server import running

SAME = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")


class StandIn:
    """What the server does; tests change it.

    Attributes:
        takes_embeds: Whether it was started with ``--enable-prompt-embeds``.
        busy: Number of requests that get status 503.
        dies_after: It closes the connection after this many tokens.
        key: The API key that it asks for.
        width: The width of the model that it serves.
        tokens: The ids of any text, if not the tokenizer's.
        requests: The bodies of the completions so far.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.takes_embeds, self.busy, self.dies_after, self.key = True, 0, 10**9, ""
        self.width = model.get_input_embeddings().embedding_dim
        self.tokens: list[int] | None = None
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def refusal(self, body: dict[str, Any], width: int, key: str | None) -> tuple[int, str]:
        """The status and the message with which vLLM refuses a completion; 200 if it does not."""
        with self.lock:
            self.requests.append(body)
            self.busy -= 1
            if self.key and key != f"Bearer {self.key}":
                return 401, "Unauthorized"
            if self.busy >= 0:
                return 503, "busy"
            if not self.takes_embeds:
                return 400, "You must set `--enable-prompt-embeds` to input `prompt_embeds`."
            if width != self.width:
                return 400, f"`prompt_embeds` hidden_size {width} does not match the model's hidden_size {self.width}."
        return 200, ""

    def events(self, body: dict[str, Any], embeds: torch.Tensor) -> Iterator[str]:
        """A streamed reply, one token in each event."""
        same = {name: body[name] for name in (*SAME, "logprobs")}
        own = Sampling(max_new_tokens=body["max_tokens"], min_new_tokens=body["min_tokens"], **same)
        elements = [("prompt", i) for i in range(len(embeds))]
        prompt = {"prompt": embeds * self.model.embedding_scale}  # vLLM does not divide embeddings by it
        ends = body["stop"], frozenset(body["stop_token_ids"])
        reply = Generation(elements, prompt, self.tokenizer, own, *ends)
        with self.lock:  # the decoder is for one thread at a time
            Decoder(self.model).complete([reply])
        for number, token in enumerate(reply.ids):
            if number == self.dies_after:
                raise ConnectionError
            logprobs = None
            if own.logprobs is not None:
                found = reply.logprobs[number]
                top = {f"token_id:{i}": value for i, value in found.top}
                logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [found.logprob], "top_logprobs": [top]}
            choice = {"index": 0, "text": "?", "token_ids": [token], "logprobs": logprobs}
            yield f"data: {json.dumps({'choices': [choice]})}\n\n"
            time.sleep(0.001)
        yield "data: [DONE]\n\n"


@contextmanager
def serving(standin: StandIn) -> Iterator[str]:
    """Serve it; yields its address."""
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"data": [{"id": "tiny", "max_model_len": 512}]}

    @app.post("/tokenize")
    def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        return {"tokens": standin.tokens or standin.tokenizer.encode(body["prompt"])}

    @app.post("/v1/completions")
    def completions(body: dict[str, Any], request: Request) -> Response:
        embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
        status, message = standin.refusal(body, embeds.shape[1], request.headers.get("Authorization"))
        if status != 200:
            return JSONResponse({"error": {"message": message}}, status)
        return StreamingResponse(standin.events(body, embeds), media_type="text/event-stream")

    with running(app) as url:
        yield f"{url}/v1"
