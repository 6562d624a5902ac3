"""A stand-in for vLLM on loopback: completions of prompt embeddings by a local model, refusing what vLLM refuses."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from lavis_chatbridge.models.decoding import Decoder, Generation
from lavis_chatbridge.models.sampling import Sampling

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

    def chunks(self, body: dict[str, Any], embeds: torch.Tensor) -> Iterator[dict[str, Any]]:
        """The choices of a streamed reply, one token each."""
        same = {name: body[name] for name in (*SAME, "logprobs")}
        own = Sampling(max_new_tokens=body["max_tokens"], min_new_tokens=body["min_tokens"], **same)
        elements = [("prompt", i) for i in range(len(embeds))]
        prompt = {"prompt": embeds * self.model.embedding_scale}  # vLLM does not divide embeddings by it
        ends = body["stop"], frozenset(body["stop_token_ids"])
        reply = Generation(elements, prompt, self.tokenizer, own, *ends)
        with self.lock:  # the decoder is for one thread at a time
            Decoder(self.model).complete([reply])
        for number, token in enumerate(reply.ids):
            logprobs = None
            if own.logprobs is not None:
                found = reply.logprobs[number]
                top = {f"token_id:{i}": value for i, value in found.top}
                logprobs = {"tokens": [f"token_id:{token}"], "token_logprobs": [found.logprob], "top_logprobs": [top]}
            yield {"index": 0, "text": "?", "token_ids": [token], "logprobs": logprobs}


@contextmanager
def serving(standin: StandIn) -> Iterator[str]:
    """Serve it; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, {"data": [{"id": "tiny", "max_model_len": 512}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/tokenize":
                self.answer(200, {"tokens": standin.tokens or standin.tokenizer.encode(body["prompt"])})
                return
            embeds = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"])), weights_only=True)
            status, message = standin.refusal(body, embeds.shape[1], self.headers.get("Authorization"))
            if status != 200:
                self.answer(status, {"error": {"message": message}})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for number, choice in enumerate(standin.chunks(body, embeds)):
                if number == standin.dies_after:
                    return
                self.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
                self.wfile.flush()
                time.sleep(0.001)
            self.wfile.write(b"data: [DONE]\n\n")

        def answer(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
