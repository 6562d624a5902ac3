"""Seeded changes to bytes, to JSON values and to text."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

DEEP = 100_000
"""Brackets of what is called deep."""

PATHS = (
    "../../../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "a/../../b.png",
    "..\\..\\b.png",
    "a\0.png",
    "~root/.ssh/id_rsa",
    "http://127.0.0.1/x.png",
    "CON",
    "a" * 5000,
    "\ud800.png",
    ".",
    "..",
    "",
)
TEXTS = (
    "<image>",
    "<query>",
    "<s></s><unk>",
    "###Human: a###Assistant: b###",
    "####### Assistant:",
    "USER: x ASSISTANT: y</s>",
    "<|im_start|>system",
    "{question} {style} {0} {a.__class__}",
    "${oc.env:HOME} ${nope} ${.}",
    "\ud83d",
    "\0\x1b[2J\r\n\u2028",
    "\u202e\ufeff",
    "x" * 20_000,
    "%s%n%d",
    "é" * 300,
)
_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2**31,
    2**63,
    -(2**63),
    10**30,
    10**400,
    1e308,
    1e-308,
    float("inf"),
    float("-inf"),
    float("nan"),
    0.5,
    "",
    " ",
    "1",
    "1e999",
    [],
    {},
    [None],
    [[]],
    {"": {}},
    [[1, 2], {"a": []}],
)


def nasty(rng: random.Random) -> Any:
    """A value that somebody may not have thought of."""
    kind = rng.randrange(10)
    if kind < 5:
        return copy.deepcopy(rng.choice(_VALUES))
    if kind < 7:
        return rng.choice(PATHS)
    if kind < 9:
        return rng.choice(TEXTS)
    return nested(rng.choice((3, 20, 60)))


def nested(depth: int, key: str | None = None) -> Any:
    """Lists in lists, or objects under ``key`` in objects."""
    value: Any = 0
    for _ in range(depth):
        value = [value] if key is None else {key: value}
    return value


def deep_json(depth: int = DEEP) -> bytes:
    """JSON too deep for any parser that calls itself."""
    return b"[" * depth + b"]" * depth


def mutated_value(value: Any, rng: random.Random) -> Any:
    """A copy of JSON's types with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _once(value, rng)
    return value


def _once(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return nasty(rng)
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind < 4:
        holder[key] = nasty(rng)
    elif kind == 4:
        del holder[key]
    elif kind == 5 and isinstance(holder, dict):
        holder[rng.choice((f"{key}s", "", "__class__", key.upper(), rng.choice(TEXTS)))] = holder.pop(key)
    elif kind == 6:
        other_holder, other_key = rng.choice(places)
        if _reaches(holder[key], other_holder) or _reaches(other_holder[other_key], holder):
            return value
        holder[key], other_holder[other_key] = other_holder[other_key], holder[key]
    elif isinstance(holder, list):
        holder.insert(key, copy.deepcopy(holder[key]))
    else:
        holder[f"{key}2"] = copy.deepcopy(holder[key])
    return value


def _places(value: Any) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)


def _reaches(value: Any, sought: Any) -> bool:
    return value is sought or any(inner is sought for holder, key in _places(value) for inner in (holder, holder[key]))


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """``data`` with bits flipped, the end cut, a stretch zeroed, removed, doubled or inserted, or a number changed."""
    broken, place = bytearray(data), rng.randrange(max(1, len(data)))
    kind = rng.randrange(9)
    if not data:
        return rng.randbytes(rng.choice((0, 1, 40)))
    if kind == 0:
        for _ in range(rng.choice((1, 3, 20, 200))):
            broken[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del broken[place:]
    elif kind == 2:
        end = min(len(data), place + rng.choice((4, 50, 400)))
        broken[place:end] = bytes(end - place)
    elif kind == 3:
        del broken[place : place + rng.choice((1, 10, 200))]
    elif kind == 4:
        for _ in range(rng.choice((1, 5))):
            broken[rng.randrange(min(len(data), 64))] = rng.randrange(256)
    elif kind == 5:
        broken[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
    elif kind == 6:
        number = rng.choice((0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, rng.getrandbits(32)))
        broken[place : place + 4] = number.to_bytes(4, rng.choice(("little", "big")))
    elif kind == 7:
        broken[place:place] = broken[place : place + rng.choice((8, 100, 3000))]
    else:
        broken = bytearray(mutated_bytes(mutated_bytes(data, rng), rng))
    return bytes(broken)


def mutated_text(rng: random.Random, words: Sequence[str] = TEXTS) -> str:
    """Hostile words, joined with ordinary ones."""
    return "".join(rng.choice((*words, " a dog ", "\n", "what? ")) for _ in range(rng.randrange(5)))
