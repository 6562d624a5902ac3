"""Hostile annotations: every published format, our JSONL, shards, feature caches, and what MULTIS imports."""

from __future__ import annotations

import functools
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_chatbridge.datasets.check import check_file
from lavis_chatbridge.datasets.dataset import SourceDataset, SourceSettings, media_source
from lavis_chatbridge.datasets.features import FeatureStore
from lavis_chatbridge.datasets.files import SampleFile
from lavis_chatbridge.datasets.readers import READERS, Origin
from lavis_chatbridge.errors import DataError, MediaError
from lavis_chatbridge.media.types import EncodedMedium
from lavis_chatbridge.multis.annotation import from_json
from lavis_chatbridge.multis.annotators.base import View
from lavis_chatbridge.multis.annotators.imported import Imported
from lavis_chatbridge.schema import Medium, check_inside, read_jsonl, write_jsonl
from tests.fuzzing.mutations import DEEP, deep_json, mutated_bytes, mutated_value, nested
from tests.fuzzing.target import Target, dumped, packed, unpacked

_TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
_QUESTIONS = {
    "data_subtype": "train2014",
    "questions": [{"image_id": 9, "question": "What is it?", "question_id": 90}],
}
_VOTES = [{"answer": "cat", "answer_confidence": "yes", "answer_id": 1}]
_ANNOTATIONS = {
    "annotations": [{"multiple_choice_answer": "cat", "answers": _VOTES, "answer_type": "other", "question_id": 90}]
}
_KARPATHY = {
    "images": [
        {"filepath": "val2014", "filename": "a.jpg", "split": "train", "cocoid": 1, "sentences": [{"raw": "A cat."}]}
    ]
}
_WAV = {"data": [{"caption": "Rain falls.", "id": "101", "duration": 12.5}]}
_MUSIC = {
    "video_id": "0272",
    "question_id": 50,
    "type": '["Audio", "Counting"]',
    "question_deleted": 0,
    "question_content": "Is the <Object> sounding?",
    "templ_values": '["violin"]',
    "anser": "yes",
}
_MSRVTT = {
    "videos": [{"video_id": "video0", "split": "train"}],
    "sentences": [{"caption": "x", "video_id": "video0", "sen_id": 1}],
}
_AVSD = {"dialogs": [{"image_id": "7UPGT", "dialog": [{"question": "who?", "answer": "a man"}] * 2}]}
_MULTIS = [
    {"video_id": "v1", "conversations": _TALK},
    {"image_id": "v2", "question": ["q1", "q2"], "answer": ["a1", "a2"]},
    {"video_id": "v4", "desc": "d"},
    {"video_id": "v5", "text": ["STOP", "exit"]},
]
FORMATS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "audiocaps": (
        {"audio": "{youtube_id}.wav"},
        {"file": "audiocap_id,youtube_id,start_time,caption\n5,ab,30,A dog\n"},
    ),
    "avsd": ({"video": "{image_id}.mp4"}, {"file": _AVSD}),
    "clotho": (
        {"audio": "{file_name}"},
        {"file": "file_name," + ",".join(f"caption_{i}" for i in range(1, 6)) + "\nRain.wav,a,b,c,d,e\n"},
    ),
    "coco_annotations": (
        {"image": "{file_name}"},
        {
            "file": {
                "annotations": [{"image_id": 1, "caption": "A dog."}],
                "images": [{"id": 1, "file_name": "a.jpg", "domain": "near"}],
            }
        },
    ),
    "coco_karpathy": ({"image": "coco/{image}"}, {"file": _KARPATHY}),
    "gqa": (
        {"image": "{image_id}.jpg"},
        {"file": {"1": {"imageId": "5", "question": "q?", "answer": "a", "types": {"structural": "query"}}}},
    ),
    "llava": ({"image": "coco/{image}"}, {"file": [{"id": "1", "image": "1.jpg", "conversations": _TALK}]}),
    "msrvtt": ({"video": "{video_id}.mp4"}, {"file": _MSRVTT}),
    "msrvtt_qa": (
        {"video": "video{video_id}.mp4"},
        {"file": [{"answer": "couch", "id": 3, "question": "where?", "video_id": 1}]},
    ),
    "multis": ({"video": "{id}.mp4"}, {"file": _MULTIS}),
    "music_avqa": ({"video": "{video_id}.mp4"}, {"file": [_MUSIC]}),
    "pairs_json": ({"image": "{row}.jpg"}, {"file": [{"url": "http://x/1", "caption": "a dog", "image": "a.jpg"}]}),
    "pairs_tsv": ({"image": "{shard:05d}/{inner:04d}.jpg"}, {"file": "caption\turl\na dog\thttp://x/1\n"}),
    "valor": ({"video": "{video_id}.mp4"}, {"file": [{"video_id": "ab", "desc": ["A man plays.", "x"]}]}),
    "vatex": ({"video": "{video_id}.mp4"}, {"file": [{"videoID": "ab_1_2", "enCap": ["one", "two"]}]}),
    "visual_genome": (
        {"image": "{folder}/{image_id}.jpg"},
        {
            "questions": [{"id": 5, "qas": [{"image_id": 5, "qa_id": 9, "question": "What?", "answer": "Green."}]}],
            "images": [{"image_id": 5, "url": "https://x/VG_100K_2/5.jpg"}],
        },
    ),
    "vqav2": (
        {"image": "{data_subtype}/{image_id:012d}.jpg"},
        {"questions": _QUESTIONS, "annotations": _ANNOTATIONS},
    ),
    "wavcaps": ({"audio": "{id}.flac"}, {"file": _WAV}),
    "webvid": (
        {"video": "{page_dir}/{videoid}.mp4"},
        {"file": "videoid,contentUrl,duration,page_dir,name\n2,http://x/a.mp4,PT1S,006,Aerial shot\n"},
    ),
}
"""Reader -> where its media lie, and its files in the published layout (text, or JSON's types)."""


def _make_annotations(rng: random.Random) -> bytes:
    reader = rng.choice(sorted(FORMATS))
    files = {}
    for role, content in FORMATS[reader][1].items():
        value = mutated_value(content, rng) if not isinstance(content, str) and rng.random() < 0.8 else content
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else dumped(value)
        files[role] = mutated_bytes(data, rng) if isinstance(value, str) or rng.random() < 0.3 else data
    return packed({"reader": reader.encode(), **files})


def _feed_annotations(data: bytes, folder: Path) -> None:
    files = unpacked(data)
    reader = files.pop("reader").decode()
    paths = {}
    for role, content in files.items():
        (folder / role).write_bytes(content)
        paths[role] = str(folder / role)
    root = folder / "media"
    origin = Origin("set", paths, str(root), FORMATS[reader][0])
    samples = list(READERS[reader](origin))
    for sample in samples:
        for medium in sample.files:
            _assert_inside(medium.path, root)
    target = folder / "samples.jsonl"
    write_jsonl(target, samples, root)
    again = list(read_jsonl(target, root))
    assert [sample.turns for sample in again] == [sample.turns for sample in samples]
    assert [sample.captions for sample in again] == [sample.captions for sample in samples]


def _assert_inside(path: str, root: Path) -> None:
    inside = os.path.commonpath([os.path.abspath(path), os.path.abspath(root)]) == os.path.abspath(root)
    assert inside, f"{path!r} leaves {root}"


def _reader_case(reader: str, role: str, content: bytes) -> Callable[[], bytes]:
    files = {r: (c.encode() if isinstance(c, str) else dumped(c)) for r, c in FORMATS[reader][1].items()} | {
        role: content
    }
    return lambda: packed({"reader": reader.encode(), **files})


_DIGITS = b"9" * 100_000
READER_CASES: dict[str, Callable[[], bytes]] = {
    "list of 100,000 brackets": _reader_case("valor", "file", deep_json()),
    "object of 100,000 objects": _reader_case("gqa", "file", b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "field of 100,000 brackets in front": _reader_case("vqav2", "questions", b'{"x": ' + deep_json() + b"}"),
    "text that is 100,000 brackets": _reader_case(
        "music_avqa", "file", dumped([_MUSIC | {"templ_values": deep_json().decode()}])
    ),
    "number of 100,000 digits": _reader_case("msrvtt_qa", "file", b'[{"video_id": ' + _DIGITS + b"}]"),
    "number of 100,000 digits in a text": _reader_case("msrvtt_qa", "file", dumped([{"video_id": _DIGITS.decode()}])),
    "infinite number": _reader_case("msrvtt_qa", "file", b'[{"video_id": 1e999}]'),
    "no number": _reader_case("msrvtt_qa", "file", b'[{"video_id": NaN}]'),
    "table with 10 MB in one cell": _reader_case("webvid", "file", b'videoid,name\n1,"' + b"a" * 10_000_000),
    "table with NUL": _reader_case("webvid", "file", b"videoid,name\n1,a\0b\n"),
    "not UTF-8": _reader_case("valor", "file", b'[{"video_id": "\xff\xfe", "desc": "a"}]'),
    "lone surrogates": _reader_case("valor", "file", b'[{"video_id": "a", "desc": "\\ud800"}]'),
    "NUL in a name": _reader_case("valor", "file", b'[{"video_id": "a\\u0000b", "desc": "a"}]'),
    "empty file": _reader_case("valor", "file", b""),
    "10 MB of white space": _reader_case("valor", "file", b" " * 10_000_000),
    "text of 20 MB that does not end": _reader_case("valor", "file", b'["' + b"a" * 20_000_000),
}


# ---- JSONL of our schema

_RECORDS: list[dict[str, Any]] = [
    {"id": "a", "captions": ["fine", "good"], "media": [{"type": "image", "path": "a.png"}], "meta": {"n": [1]}},
    {
        "id": 2,
        "media": [{"type": "video", "path": "b.mp4"}, {"type": "audio", "words": ["low", "deep"]}],
        "turns": [
            {"role": "user", "text": "q", "media": [0, 1]},
            {"role": "assistant", "text": "a"},
            {"role": "user", "text": "and?"},
            {"role": "assistant", "text": "b"},
        ],
        "answers": ["b"],
        "facts": {"colour": "red"},
        "task": "video_qa",
        "style": "short",
        "held_out": True,
    },
    {"id": "c", "captions": ["x"], "media": [{"type": "audio", "path": "s.tar", "offset": 512, "size": 100}]},
]


def _make_jsonl(rng: random.Random) -> bytes:
    lines = [dumped(mutated_value(record, rng) if rng.random() < 0.5 else record) for record in _RECORDS]
    data = b"\n".join(lines) + b"\n"
    return mutated_bytes(data, rng) if rng.random() < 0.3 else data


def _feed_jsonl(data: bytes, folder: Path) -> None:
    path = folder / "data.jsonl"
    path.write_bytes(data)
    (folder / "a.png").write_bytes(b"\x89PNG")
    (folder / "s.tar").write_bytes(bytes(600))
    check_file(path, decode=True)
    for sample in read_jsonl(path):
        for medium in sample.files:
            _assert_inside(medium.path, folder)
    samples = SampleFile(path)
    source = SourceDataset("set", samples, SourceSettings(train=False, root=str(folder)))
    for number, sample in enumerate(samples):
        source.digest(number)
        source.pieces(sample, None)
        for medium in dict.fromkeys(sample.files):
            try:
                check_inside(medium.path, str(folder))
                media_source(medium)
            except (MediaError, DataError):
                continue
    write_jsonl(folder / "again.jsonl", samples)


def _jsonl_case(**record: Any) -> Callable[[], bytes]:
    return lambda: dumped({"id": "a", "captions": ["x"], **record})


JSONL_CASES: dict[str, Callable[[], bytes]] = {
    "line of 100,000 brackets": deep_json,
    "meta 900 deep": _jsonl_case(meta=nested(900, "a")),
    "number of 100,000 digits": lambda: b'{"id": ' + _DIGITS + b', "captions": ["x"]}',
    "offset beyond 2^63": _jsonl_case(media=[{"type": "image", "path": "a.png", "offset": 2**70, "size": 1}]),
    "size of 10^15 bytes": _jsonl_case(media=[{"type": "image", "path": "a.png", "offset": 0, "size": 10**15}]),
    "100,000 media": _jsonl_case(media=[{"type": "image", "path": "a.png"}] * 100_000),
    "20 MB in one line": _jsonl_case(captions=["a" * 20_000_000]),
    "unknown key of 1 MB": lambda: dumped({"id": "a", "captions": ["x"], "a" * 1_000_000: 1}),
    "lone surrogate": _jsonl_case(captions=["\ud800"]),
    "lone surrogate in a path": _jsonl_case(media=[{"type": "image", "path": "\ud800.png"}]),
    "NUL in a name": _jsonl_case(media=[{"type": "image", "path": "a\0.png"}]),
    "not UTF-8": lambda: b'{"id": "\xff", "captions": ["x"]}',
    "UTF-16": lambda: json.dumps({"id": "a", "captions": ["x"]}).encode("utf-16"),
    "byte order mark": lambda: b"\xef\xbb\xbf" + dumped({"id": "a", "captions": ["x"]}),
    "empty": lambda: b"",
    "file of line ends": lambda: b"\n" * 1_000_000,
}


# ---- shards


def _tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


@functools.cache
def _shard() -> bytes:
    meta = dumped({"caption": "from json", "url": "u"})
    members = [("0.jpg", b"J" * 700), ("0.json", meta), ("0.txt", b"a cat"), ("1.png", b"PNG"), ("1.json", meta)]
    return _tar([*members, ("ü" * 60 + ".wav", b"WAV"), ("ü" * 60 + ".txt", b"a bell")])


def _member(size: bytes, kind: bytes = b"0", name: bytes = b"0.txt", extra: bytes = b"") -> bytes:
    """A tar of one member whose header says what it is told to say."""
    head = bytearray(512)
    head[: len(name)] = name
    head[100:108], head[108:116], head[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    head[124:136], head[136:148] = size.ljust(12, b"\0"), b"00000000000\0"
    head[156:157], head[257:265] = kind, b"ustar  \0"
    head[345 : 345 + len(extra)] = extra
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    return bytes(head)


def _sparse_text() -> bytes:
    """A text of 8 GiB, all of it a hole, in 512 bytes (GNU's old sparse form)."""
    extra = bytearray(b"\0" * 150)
    extra[41:53], extra[53:65] = b"00000000000\0", b"00000000000\0"
    extra[138:150] = b"77777777777\0"
    return _tar([("0.jpg", b"J")])[:1024] + _member(b"00000000000", b"S", extra=bytes(extra)) + bytes(1024)


SHARD_CASES: dict[str, Callable[[], bytes]] = {
    "member larger than the shard": lambda: _member(b"77777777777\0", name=b"0.jpg") + bytes(1024),
    "text larger than the shard": lambda: _member(b"77777777777\0") + bytes(1024),
    "member of 2^90 bytes": lambda: _member(b"\x80" + b"\x7f" * 11) + bytes(1024),
    "member of less than no bytes": lambda: _member(b"\xff" * 12) + bytes(1024),
    "text of 8 GiB that is a hole": _sparse_text,
    "JSON of 100,000 brackets": lambda: _tar([("0.jpg", b"J"), ("0.json", deep_json())]),
    "names that climb out": lambda: _tar([("../../etc/0.jpg", b"J"), ("../../etc/0.txt", b"a")]),
    "absolute names": lambda: _tar([("/etc/0.jpg", b"J"), ("/etc/0.txt", b"a")]),
    "name of 100,000 characters": lambda: _tar([("a" * 100_000 + ".jpg", b"J"), ("a" * 100_000 + ".txt", b"a")]),
    "20,000 empty members": lambda: _member(b"0\0") * 20_000 + bytes(1024),
    "empty": lambda: b"",
}


def _feed_shard(data: bytes, folder: Path) -> None:
    path = folder / "0.tar"
    path.write_bytes(data)
    samples = list(READERS["webdataset"](Origin("set", {"file": str(path)}, str(folder))))
    for sample in samples:
        for medium in sample.files:
            assert medium.path == str(path)
            try:
                media_source(medium)
            except MediaError:
                continue
    write_jsonl(folder / "samples.jsonl", samples)


# ---- the feature cache


@functools.cache
def _features() -> dict[str, bytes]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "a.png").write_bytes(b"a picture")
        store = FeatureStore(folder / "store")
        medium = Medium("image", str(folder / "a.png"))
        store.add([(medium, EncodedMedium(torch.ones(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)))])
        return {path.name: path.read_bytes() for path in sorted((folder / "store").iterdir())}


def _make_features(rng: random.Random) -> bytes:
    files = dict(_features())
    index, shard = sorted(files, key=lambda name: name.endswith(".tar"))
    if rng.random() < 0.6:
        files[index] = dumped(mutated_value(json.loads(files[index]), rng))
    else:
        changed = rng.choice((index, shard))
        files[changed] = mutated_bytes(files[changed], rng)
    return packed(files)


def _feed_features(data: bytes, folder: Path) -> None:
    for name, content in unpacked(data).items():
        (folder / name).write_bytes(content)
    store = FeatureStore(folder)
    for key in list(store._places):
        store.get(key)


def _places(*numbers: int) -> Callable[[], bytes]:
    def make() -> bytes:
        files = dict(_features())
        index = next(name for name in files if name.endswith(".json"))
        content = json.loads(files[index])
        content["places"] = {key: list(numbers) for key in content["places"]}
        return packed(files | {index: dumped(content)})

    return make


def _feature_array(head: bytes) -> Callable[[], bytes]:
    """A cache whose entries bear the right names and sizes, and hold something else than arrays."""

    def make() -> bytes:
        files = dict(_features())
        index, shard = sorted(files, key=lambda name: name.endswith(".tar"))
        content, tar = json.loads(files[index]), io.BytesIO()
        [key] = content["places"]
        place = []
        with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name in (f"{key}.tokens.npy", f"{key}.mask.npy"):
                entry = tarfile.TarInfo(name)
                entry.size = len(head)
                place += [archive.offset + tarfile.BLOCKSIZE, len(head)]
                archive.addfile(entry, io.BytesIO(head))
        content["places"] = {key: place}
        return packed({index: dumped(content), shard: tar.getvalue()})

    return make


def _npy(shape: str, kind: str = "<f2") -> bytes:
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64)


FEATURE_CASES: dict[str, Callable[[], bytes]] = {
    "features of 10^15 bytes": _places(0, 10**15, 0, 10),
    "features at byte 2^70": _places(2**70, 10, 0, 10),
    "features before the start": _places(-5, 10, -5, 10),
    "three numbers for a place": _places(0, 10, 20),
    "array of 10^14 numbers": _feature_array(_npy("(100000000000000,)")),
    "array of 10^10 numbers": _feature_array(_npy("(10000000000,)")),
    "array of objects": _feature_array(_npy("(3,)", "|O")),
    "array of texts": _feature_array(_npy("(3,)", "<U4")),
    "array that is a zip": lambda: _feature_array(packed({"a.npy": _npy("(3,)")}))(),
    "index of 100,000 brackets": lambda: packed(
        {name: deep_json() if name.endswith(".json") else content for name, content in _features().items()}
    ),
}


# ---- what MULTIS imports

_ITEM = {
    "id": "item1",
    "media": [{"type": "image", "path": "a.png"}],
    "captions": ["A dog."],
    "tags": [{"label": "bark", "score": 0.5}, "rain"],
    "frames": [{"position": 0.0, "caption": "A dog.", "regions": [{"text": "dog", "box": [0.0, 0.0, 1.0, 1.0]}]}],
}
_IMPORTS: dict[str, Any] = {
    "grit": [{"image_id": "item1", "annotations": [{"caption": "dog", "box": [1, 2, 30, 40], "score": 0.9}]}],
    "semantic_sam": {
        "item1": [{"class_name": "dog", "area": 120, "bbox": [1, 2, 3, 4], "segmentation": {"size": [48, 64]}}]
    },
    "captions": {"item1": ["A dog.", {"caption": "It barks."}]},
    "sound_captions": {"item1": ["A dog barks.", {"caption": "It barks."}]},
    "tags": [{"id": "item1", "tags": [["bark", 0.7], {"label": "rain", "score": 0.2}]}],
}


def _make_imports(rng: random.Random) -> bytes:
    form = rng.choice(sorted(_IMPORTS))
    content = dumped(mutated_value(_IMPORTS[form], rng))
    item = dumped(mutated_value(_ITEM, rng) if rng.random() < 0.5 else _ITEM)
    if rng.random() < 0.2:
        content = mutated_bytes(content, rng)
    return packed({"form": form.encode(), "item": item, "found.json": content})


def _feed_imports(data: bytes, folder: Path) -> None:
    files = unpacked(data)
    form: Any = files["form"].decode()
    (folder / "found.json").write_bytes(files["found.json"])
    imported = Imported(folder / "found.json", form)
    kind = imported.kind
    view = View("item1", kind, "a.png", lambda: np.zeros((48, 64, 3), np.uint8))
    imported.annotate([view])
    try:
        item = json.loads(files["item"])
    except (ValueError, RecursionError):
        return
    if isinstance(item, dict):
        annotation = from_json(item)
        json.dumps(annotation.to_json())
        _feed_folder(folder, form, annotation.id)


def _feed_folder(folder: Path, form: Any, name: str) -> None:
    """A folder of imports is asked for an item of this name: nothing outside it is read."""
    inner = folder / "inner"
    inner.mkdir(exist_ok=True)
    (inner / "a.json").write_text("[]")
    (folder / "outside.json").write_text("not JSON: reading it would fail")
    view = View(
        name, "sound" if form in ("tags", "sound_captions") else "frame", name, lambda: np.zeros((48, 64, 3), np.uint8)
    )
    Imported(inner, form).annotate([view])


def _item_case(**changes: Any) -> Callable[[], bytes]:
    return lambda: packed({"form": b"grit", "item": dumped(_ITEM | changes), "found.json": dumped(_IMPORTS["grit"])})


IMPORT_CASES: dict[str, Callable[[], bytes]] = {
    "import of 100,000 brackets": lambda: packed({"form": b"grit", "item": dumped(_ITEM), "found.json": deep_json()}),
    "item whose name climbs out": _item_case(id="../outside"),
    "item whose name holds NUL": _item_case(id="a\0b"),
    "item whose name is not Unicode": _item_case(id="\ud800"),
    "item with a nameless medium": _item_case(media=[{"type": "image", "path": ""}]),
    "region of infinite size": lambda: packed(
        {
            "form": b"grit",
            "item": dumped(_ITEM),
            "found.json": b'[{"image_id": "item1", "annotations": [{"caption": "x", "box": [1e999, NaN, 1, 1e400]}]}]',
        }
    ),
}

TARGETS = (
    Target("annotations", _make_annotations, _feed_annotations, READER_CASES),
    Target("JSONL", _make_jsonl, _feed_jsonl, JSONL_CASES),
    Target("shards", lambda rng: mutated_bytes(_shard(), rng), _feed_shard, SHARD_CASES),
    Target("feature cache", _make_features, _feed_features, FEATURE_CASES),
    Target("MULTIS imports", _make_imports, _feed_imports, IMPORT_CASES),
)
