"""Hostile weight files and checkpoints: whatever is refused leaves the model as it was, and no code runs."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lavis_chatbridge.models import checkpoint, shapes, weights
from lavis_chatbridge.models.beats import Beats
from lavis_chatbridge.models.vision import build_vision
from lavis_chatbridge.runners import checkpoints
from tests.fuzzing.mutations import deep_json, mutated_bytes, mutated_value
from tests.fuzzing.target import Target, packed, unpacked
from tests.models.building import SMALL_BEATS, small_model, small_settings
from tests.runners.runner_parts import ToyModel, runner

ROOT = Path(__file__).resolve().parent.parent.parent
_TOKENIZER = ROOT / "tests" / "golden" / "tokenizer"
PWNED = "pwned"
"""The folder that the code in a hostile file makes, if it is run."""


class Foreign:
    """Pickles as a call of a function: what a hostile file holds in the place of a tensor."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple:
        return self._call


def foreign(rng: random.Random) -> Foreign:
    """One of the calls that people have hidden in weight files."""
    code = f"__import__('os').mkdir({PWNED!r})"
    calls = [(os.mkdir, PWNED), (eval, code), (exec, code), (os.system, f"mkdir {PWNED}"), (open, PWNED, "w")]
    calls += [(torch.load, PWNED), (dict, [(1, 2)]), (bytearray, 10), (Path, PWNED)]
    return Foreign(*rng.choice(calls))


@functools.cache
def settings() -> Any:
    """Of the small model."""
    return small_settings(_TOKENIZER)


@functools.cache
def model() -> Any:
    """The small model that files are loaded into."""
    return small_model(_TOKENIZER)


@functools.cache
def _contents() -> dict[str, Any]:
    """Layout -> what a whole file of it holds."""
    torch.manual_seed(0)
    bridge = {name: torch.randn(t.shape) for name, t in shapes.bridge_shapes(settings(), 32, 32).items()}
    vision = {name: torch.randn(t.shape) for name, t in shapes.vision_shapes(settings().vision).items()}
    audio = Beats(SMALL_BEATS).state_dict()
    cfg = {**vars(SMALL_BEATS), "layer_norm_first": False, "activation_fn": "gelu", "predictor_class": 527}
    own = {name: t for name, t in bridge.items() if name.startswith(("Qformer.", "ln_vision."))}
    return {
        "chatbridge": {"model": bridge, "epoch": 3, "optimizer": {"state": {}}, "config": {"a": [1]}},
        "eva": vision | {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32)},
        "beats": {"cfg": cfg, "model": audio | {"predictor.weight": torch.ones(2, 2)}},
        "blip2": {"model": {"query_tokens": bridge["image_query_tokens"], **own}},
    }


def _tensors_of(content: dict[str, Any]) -> dict[str, Any]:
    return content["model"] if isinstance(content.get("model"), dict) else content


def _changed_tensor(tensor: Tensor, rng: random.Random) -> Any:
    """A tensor as it should not be."""
    kind = rng.randrange(16)
    flat = tensor.clone().flatten()
    if kind < 3:
        flat[rng.randrange(len(flat))] = float(rng.choice(("nan", "inf", "-inf")))
        return flat.view(tensor.shape)
    others: list[Callable[[], Any]] = [
        lambda: torch.ones(rng.choice(((0,), (1,), (3, 3), (1, 1, 1, 1, 1)))),
        lambda: tensor.unsqueeze(0),
        lambda: tensor.to(torch.complex64),
        lambda: tensor.to(torch.int64),
        lambda: tensor > 0,
        lambda: tensor.double() * 1e300,
        lambda: tensor.to_sparse(),
        lambda: tensor.to("meta"),
        lambda: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
        lambda: torch.zeros(()).expand(tensor.shape),
        lambda: torch.zeros(1).expand(10**6, 10**6),
        lambda: torch.nn.Parameter(tensor),
        lambda: "no tensor",
    ]
    return others[kind - 3]()


def _broken_content(layout: str, rng: random.Random) -> dict[str, Any]:
    source = _contents()[layout]
    content = {name: dict(value) if isinstance(value, dict) else value for name, value in source.items()}
    tensors = _tensors_of(content)
    names = sorted(name for name, value in tensors.items() if isinstance(value, Tensor))
    first, second = rng.choice(names), rng.choice(names)
    kind = rng.randrange(10)
    if kind < 4:
        tensors[first] = _changed_tensor(tensors[first], rng)
    elif kind == 4:
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif kind == 5:
        del tensors[first]
    elif kind == 6:
        tensors[rng.choice(("other.weight", f"{first}2", "", "module.module.x", "llama_model.x"))] = tensors.pop(first)
    elif kind == 7:
        tensors[first] = foreign(rng)
    elif kind == 8:
        content[rng.choice(("config", "optimizer", "cfg", "epoch", "model", "extra"))] = foreign(rng)
    elif "cfg" in content:
        content["cfg"] = mutated_value(content["cfg"], rng)
    else:
        content["cfg"] = {"encoder_layers": rng.choice((0, -1, 10**9, "x"))}
    return content


def _saved(content: Any, legacy: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def _as_safetensors(content: dict[str, Any], rng: random.Random) -> bytes | None:
    tensors = {name: value for name, value in _tensors_of(content).items() if isinstance(value, Tensor)}
    metadata = {"cfg": json.dumps(content["cfg"], default=str)} if "cfg" in content else None
    if rng.random() < 0.2:
        metadata = {"cfg": rng.choice(("", "[]", "3", "null", deep_json(5000).decode(), '{"encoder_layers": 1e999}'))}
    with contextlib.suppress(Exception):  # what has no form in this format is written in the other
        return safetensors.torch.save({name: t.contiguous().clone() for name, t in tensors.items()}, metadata)
    return None


def _make_weights(rng: random.Random) -> bytes:
    layout = rng.choice(sorted(_contents()))
    content = _broken_content(layout, rng) if rng.random() < 0.6 else _contents()[layout]
    data = _as_safetensors(content, rng) if rng.random() < 0.4 else None
    name = "a.pth" if data is None else "a.safetensors"
    if data is None:
        data = _saved(content, legacy=rng.random() < 0.2)
    if content is _contents()[layout] or rng.random() < 0.1:
        data = mutated_bytes(data, rng)
    return packed({name: data})


@contextlib.contextmanager
def nothing_changes(module: torch.nn.Module) -> Iterator[None]:
    """Asserts that a module is as before when an error leaves the block, and that its numbers are finite anyway."""
    before = {name: t.clone() for name, t in module.state_dict().items()}
    try:
        yield
    except Exception:
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} was loaded from a file that is refused"
        raise
    for name, tensor in module.state_dict().items():
        assert torch.isfinite(tensor).all(), f"{name} is not finite"
    module.load_state_dict(before)


@contextlib.contextmanager
def no_code_runs(folder: Path) -> Iterator[None]:
    """Asserts that nothing in the block makes the folder of a hostile file."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        assert not (folder / PWNED).exists(), "code from a file was run"


def _feed_weights(data: bytes, folder: Path) -> None:
    [(name, content)] = unpacked(data).items()
    path = folder / name
    path.write_bytes(content)
    with no_code_runs(folder):
        file = weights.open_file(path)
        layout = weights.layout_of(file.tensors)
        if layout == "eva":
            own = settings().vision
            vision = build_vision(own)
            with nothing_changes(vision):
                tensors = checkpoint.vision_tensors(file.tensors, own.depth, own.tokens)
                checkpoint.load_exactly(vision, tensors, path, "model.vision")
        elif layout == "beats":
            audio = Beats(SMALL_BEATS)
            with nothing_changes(audio):
                weights.check(file, settings())
                tensors = checkpoint.beats_tensors(file.tensors, SMALL_BEATS.encoder_layers)
                checkpoint.load_exactly(audio, tensors, path, "model.audio")
        elif layout == "blip2":
            with nothing_changes(model()):
                model()._load_blip2(str(path))
        else:
            with nothing_changes(model()):
                model().load_checkpoint(str(path))
        weights.check(file, settings())
        weights.check_finite(file)


def _zip_bomb() -> bytes:
    """A torch file whose pickle is 1 GiB of zeros, compressed to 1 MB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("a/data.pkl", "w", force_zip64=True) as member:
            for _ in range(1 << 10):
                member.write(bytes(1 << 20))
        archive.writestr("a/version", "3\n")
    return out.getvalue()


def _header(text: bytes, size: int | None = None) -> bytes:
    return (len(text) if size is None else size).to_bytes(8, "little") + text


def _torch_case(**changes: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        content = dict(_contents()["chatbridge"])
        content["model"] = {**content["model"], **{name.replace("__", "."): value for name, value in changes.items()}}
        return packed({"a.pth": _saved(content)})

    return make


def _pth(make: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: packed({"a.pth": make()})


def _st(make: Callable[[], bytes]) -> Callable[[], bytes]:
    return lambda: packed({"a.safetensors": make()})


def _swapped() -> bytes:
    """Two tensors of one shape exchanged in a file that was written by us."""
    bridge = _contents()["chatbridge"]["model"]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.safetensors"
        checkpoint.save(path, bridge)
        data = path.read_bytes()
    first, second = b'"image_query_tokens"', b'"audio_query_tokens"'
    return data.replace(first, b"<kept>").replace(second, first).replace(b"<kept>", second)


def _beats_cfg(**changes: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        content = _contents()["beats"]
        return packed({"a.pth": _saved({**content, "cfg": {**content["cfg"], **changes}})})

    return make


WEIGHT_CASES: dict[str, Callable[[], bytes]] = {
    "pickle that calls os.mkdir": _torch_case(llama_proj__weight=Foreign(os.mkdir, PWNED)),
    "pickle that evaluates code": _torch_case(extra=Foreign(eval, f"__import__('os').mkdir({PWNED!r})")),
    "bare pickle of 1 GiB in 1 MB": _pth(_zip_bomb),
    "tensor of 10^12 numbers in 4 bytes": _torch_case(llama_proj__weight=torch.zeros(1).expand(10**6, 10**6)),
    "NaN": _torch_case(llama_proj__bias=torch.full((32,), float("nan"))),
    "infinity": _torch_case(audio_query_tokens=torch.full((1, 3, 32), float("inf"))),
    "beyond half of what fp32 holds": _torch_case(llama_proj__bias=torch.full((32,), 1e300, dtype=torch.float64)),
    "meta tensor": _torch_case(llama_proj__bias=torch.zeros(32, device="meta")),
    "sparse tensor": _torch_case(llama_proj__bias=torch.zeros(32).to_sparse()),
    "complex tensor": _torch_case(llama_proj__bias=torch.zeros(32, dtype=torch.complex64)),
    "whole numbers": _torch_case(llama_proj__bias=torch.zeros(32, dtype=torch.int32)),
    "two tensors of one shape exchanged": _st(_swapped),
    "header of 2^63 bytes": _st(lambda: _header(b"{}", 2**63)),
    "header of 100,000 brackets": _st(lambda: _header(b'{"__metadata__": ' + deep_json() + b"}")),
    "tensor beyond the end": _st(
        lambda: _header(
            b'{"llama_proj.weight": {"dtype": "F32", "shape": [4000000000], "data_offsets": [0, 16000000000]}}'
        )
    ),
    "shape whose product overflows": _st(
        lambda: _header(b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}')
    ),
    "BEATs of 10^9 layers": _beats_cfg(encoder_layers=10**9),
    "BEATs of width 10^9": _beats_cfg(encoder_embed_dim=10**9 // 32 * 32, encoder_ffn_embed_dim=10**9),
    "BEATs of half a layer": _beats_cfg(encoder_layers=0.5),
    "BEATs whose sizes are words": _beats_cfg(encoder_embed_dim="x"),
    "empty": _pth(lambda: b""),
}


# ---- a run's own checkpoints, and those of LAVIS and the original


@functools.cache
def _run() -> Any:
    """A runner whose model, optimiser and place in the data a checkpoint replaces."""
    return runner(Path(tempfile.mkdtemp(prefix="fuzz-run-")), ToyModel(), max_iters=6, save_every_steps=2)


@functools.cache
def _training() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        one = runner(Path(name), ToyModel(), max_iters=2)
        one.train()
        [folder] = (Path(name) / "checkpoints").iterdir()
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def with_manifest(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of a checkpoint with a manifest that agrees with them: as a hostile hand would write it."""
    import hashlib

    own = {name: content for name, content in files.items() if name != checkpoints.MANIFEST}
    entries = {
        name: {"bytes": len(content), "blake2b": hashlib.blake2b(content, digest_size=32).hexdigest()}
        for name, content in own.items()
    }
    return {**own, checkpoints.MANIFEST: json.dumps(entries).encode()}


def _make_training(rng: random.Random) -> bytes:
    files = dict(_training())
    kind = rng.randrange(5)
    if kind == 0:
        changed = rng.choice(sorted(files))
        files[changed] = mutated_bytes(files[changed], rng)
        return packed(files)
    if kind == 1:
        files[checkpoints.MANIFEST] = json.dumps(mutated_value(json.loads(files[checkpoints.MANIFEST]), rng)).encode()
        return packed(files)
    if kind == 2:
        files[checkpoints.STATE] = json.dumps(mutated_value(json.loads(files[checkpoints.STATE]), rng)).encode()
    elif kind == 3:
        changed = rng.choice((checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE))
        files[changed] = mutated_bytes(files[changed], rng)
    else:
        name = rng.choice((checkpoints.MODEL, checkpoints.OPTIMIZER))
        tensors = safetensors.torch.load(files[name])
        chosen = rng.choice(sorted(tensors))
        broken = _changed_tensor(tensors[chosen].float(), rng)
        with contextlib.suppress(Exception):
            files[name] = safetensors.torch.save({**tensors, chosen: broken.contiguous().clone()})
    return packed(with_manifest(files))


def run_state(one: Any) -> list[Any]:
    """What a checkpoint replaces in a runner, as plain values and copies."""
    tensors = [p.detach().clone() for p in one.model.parameters()]
    held = [t.clone() for state in one.optimizer.state.values() for t in state.values()]
    plan = json.dumps(one._plan_record(), default=str)
    loaders = json.dumps(one.train_loader.state_dict(), default=str)
    return [tensors, held, [torch.get_rng_state()], one.state.to_dict(), plan, loaders, one.scaler.state_dict()]


def assert_same_state(found: list[Any], expected: list[Any]) -> None:
    """Both are the state of a runner at one moment."""
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, list):
            assert len(one) == len(other)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "half of a checkpoint was loaded"
        else:
            assert one == other, "half of a checkpoint was loaded"


def _load(path: Path) -> None:
    one = _run()
    before = run_state(one)
    try:
        one._load_checkpoint(path)
    except Exception:
        assert_same_state(run_state(one), before)
        raise
    assert all(torch.isfinite(p).all() for p in one.model.parameters())
    _run.cache_clear()


def _feed_training(data: bytes, folder: Path) -> None:
    place = folder / "step_00000002"
    place.mkdir()
    for name, content in unpacked(data).items():
        (place / name).write_bytes(content)
    checkpoints.newest_in(folder)
    _load(place)


def _training_case(name: str, change: Callable[[bytes], bytes]) -> Callable[[], bytes]:
    return lambda: packed(with_manifest({**_training(), name: change(_training()[name])}))


def _manifest_case(content: bytes) -> Callable[[], bytes]:
    return lambda: packed({**_training(), checkpoints.MANIFEST: content})


TRAINING_CASES: dict[str, Callable[[], bytes]] = {
    "state of 100,000 brackets": _training_case(checkpoints.STATE, lambda data: deep_json()),
    "state that is a list": _training_case(checkpoints.STATE, lambda data: b"[]"),
    "state without anything": _training_case(checkpoints.STATE, lambda data: b'{"format": 1}'),
    "weights cut off": _training_case(checkpoints.MODEL, lambda data: data[:-8]),
    "optimiser cut off": _training_case(checkpoints.OPTIMIZER, lambda data: data[:-8]),
    "no weights": _training_case(checkpoints.MODEL, lambda data: b""),
    "manifest of 100,000 brackets": _manifest_case(deep_json()),
    "manifest that names other files": _manifest_case(b'{"../../../../../../dev/zero": {"bytes": 0, "blake2b": ""}}'),
}


@functools.cache
def _lavis() -> dict[str, Any]:
    toy = ToyModel()
    named = {name: p for name, p in toy.named_parameters() if p.requires_grad}
    matrices = [p for name, p in named.items() if p.ndim >= 2 and "bias" not in name]
    rest = [p for p in named.values() if all(p is not other for other in matrices)]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": rest}], lr=0.1)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": toy.state_dict(), "optimizer": optimizer.state_dict(), "config": {}, "iters": 1, "scaler": None}


def _make_foreign(rng: random.Random) -> bytes:
    source = _lavis()
    content = {**source, "model": dict(source["model"])}
    kind = rng.randrange(7)
    if kind == 0:
        return mutated_bytes(_saved(source, legacy=rng.random() < 0.3), rng)
    name = rng.choice(sorted(content["model"]))
    if kind < 3:
        content["model"][name] = _changed_tensor(content["model"][name], rng)
    elif kind == 3:
        content["optimizer"] = _broken_optimizer(content["optimizer"], rng)
    elif kind == 4:
        content[rng.choice(("epoch", "iters", "optimizer", "model"))] = rng.choice(
            (None, "x", -1, 10**30, float("nan"), [], {}, {"param_groups": 3}, {"state": {}, "param_groups": [{}]})
        )
    elif kind == 5:
        content[rng.choice(("config", "model", "extra"))] = foreign(rng)
    else:
        content["model"].pop(name)
    return _saved(content)


def _broken_optimizer(source: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    state = {number: dict(values) for number, values in source["state"].items()}
    number = rng.choice(sorted(state))
    key = rng.choice(sorted(state[number]))
    tensor = state[number][key]
    choices: list[Any] = [
        None,
        "x",
        torch.ones(3),
        torch.full(tensor.shape, float("nan")),
        _changed_tensor(tensor, rng),
    ]
    state[number][key] = rng.choice(choices)
    if rng.random() < 0.3:
        state[rng.choice((-1, 99, "x", 10**30))] = state.pop(number)
    return {**source, "state": state}


def _feed_foreign(data: bytes, folder: Path) -> None:
    path = folder / "checkpoint.pth"
    path.write_bytes(data)
    with no_code_runs(folder):
        _load(path)


def _foreign_case(**changes: Any) -> Callable[[], bytes]:
    return lambda: _saved({**_lavis(), **changes})


FOREIGN_CASES: dict[str, Callable[[], bytes]] = {
    "pickle that calls os.mkdir": _foreign_case(config=Foreign(os.mkdir, PWNED)),
    "pickle of 1 GiB in 1 MB": _zip_bomb,
    "NaN": lambda: _saved({**_lavis(), "model": {n: t * float("nan") for n, t in _lavis()["model"].items()}}),
    "cut off": lambda: _saved(_lavis())[:-500],
    "no optimiser": _foreign_case(optimizer=None),
    "empty": lambda: b"",
}

TARGETS = (
    Target("weights", _make_weights, _feed_weights, WEIGHT_CASES, megabytes=300),
    Target("training checkpoints", _make_training, _feed_training, TRAINING_CASES),
    Target("LAVIS checkpoints", _make_foreign, _feed_foreign, FOREIGN_CASES),
)
