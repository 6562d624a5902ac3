"""Building MULTIS: templates, shards, manifest, faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.files import hash_of_file
from lavis_chatbridge.multis.build import build, load_settings
from lavis_chatbridge.schema import read_jsonl


def sample(name: str, path: str, **values: Any) -> dict[str, Any]:
    return {"id": name, "media": [{"type": "image", "path": path}], **values}


CAPTIONS = [sample(str(n), f"{n}.png", captions=[f"caption {n}"]) for n in range(6)]


def built(
    folder: Path, samples: list[dict], extra: str = ", task: image_caption", top: str = "", to: str = "out"
) -> dict:
    """The manifest of one source, ``one``, whose media are written unless they are called missing."""
    (folder / "one.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in samples))
    for path in (medium["path"] for entry in samples for medium in entry["media"]):
        if "missing" not in path and not (folder / path).exists():
            (folder / path).write_bytes(path.encode() * 100)
    source = f"{{name: one, samples: [one.jsonl], licence: CC-BY-4.0{extra}}}"
    (folder / "build.yaml").write_text(f"{top}\nsources: [{source}]")
    return build(load_settings(folder / "build.yaml"), folder / to)


def test_the_manifest_describes_what_is_built(tmp_path: Path) -> None:
    manifest, folder = built(tmp_path, CAPTIONS), tmp_path / "out" / "one"
    assert built(tmp_path, CAPTIONS, to="again") == manifest, "the same inputs give the same bytes"
    entry = manifest["sources"]["one"]
    assert (entry["samples"], entry["licence"]) == (6, "CC-BY-4.0")
    assert entry["made_from"]["one.jsonl"] == hash_of_file(tmp_path / "one.jsonl")
    assert entry["files"] == {
        f"one/{file.name}": {"bytes": file.stat().st_size, "sha256": hash_of_file(file)} for file in folder.iterdir()
    }
    for read in read_jsonl(folder / "annotations.jsonl"):
        assert Path(read.media[0].path).suffix == ".tar"
        assert (read.task, read.source, read.captions) == ("image_caption", "one", (f"caption {read.id}",))


def test_faults_are_all_named_before_anything_is_built(tmp_path: Path) -> None:
    samples = [*CAPTIONS, *(sample(name, f"missing{name}.png", captions=["c"]) for name in "xy")]
    with pytest.raises(DataError, match=r"2 media are missing: one: .*missingx.png; one: .*missingy.png"):
        built(tmp_path, samples)
    assert not (tmp_path / "out").exists()
    entry = built(tmp_path, samples, top="skip_missing: true")["sources"]["one"]
    assert (entry["samples"], entry["skipped"]) == (6, 2)
    with pytest.raises(DataError, match="exists; remove it"):
        built(tmp_path, CAPTIONS)
    with pytest.raises(DataError, match="the id '0' occurs twice"):
        built(tmp_path, CAPTIONS * 2, to="twice")
    with pytest.raises(ConfigError, match="did you mean 'task'"):
        built(tmp_path, CAPTIONS, ", taks: image_caption")


def test_a_public_set_is_read_in_its_own_files(tmp_path: Path) -> None:
    questions = [{"image_id": 9, "question": "What is it?", "question_id": 9000}]
    answers = [{"question_id": 9000, "image_id": 9, "multiple_choice_answer": "cat", "answers": [{"answer": "cat"}]}]
    for name, content in {
        "vqav2/v2_OpenEnded_mscoco_train2014_questions.json": {"questions": questions},
        "vqav2/v2_mscoco_train2014_annotations.json": {"annotations": answers},
        "coco/images/train2014/COCO_train2014_000000000009.jpg": {},
        "coco/images/train2017/9.jpg": {},
    }.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text(json.dumps({"data_subtype": "train2014", **content}))
    config = tmp_path / "build.yaml"
    talk = [{"from": "human", "value": "Why?\n<image>"}, {"from": "gpt", "value": "It is a cat."}]
    (tmp_path / "data" / "llava").mkdir()
    (tmp_path / "data/llava/complex_reasoning_77k.json").write_text(
        json.dumps([{"id": "9", "image": "9.jpg", "conversations": talk}])
    )
    named = {"vqa": "multis_vqav2", "why": "multis_llava_reasoning"}
    sources = ", ".join(f"{{name: {n}, dataset: {d}, data_root: data, licence: x}}" for n, d in named.items())
    config.write_text(f"sources: [{sources}]")
    entries = build(load_settings(config), tmp_path / "out")["sources"]
    assert [entry["by_task"] for entry in entries.values()] == [{"image_qa": 1}, {"image_reasoning": 1}]
    assert len(entries["vqa"]["made_from"]) == 2
    [read], [complete] = (read_jsonl(tmp_path / "out" / name / "annotations.jsonl") for name in named)
    assert (read.task, read.style, read.turns[0].text) == ("image_qa", "short", "What is it?")
    assert (read.turns[1].text, read.answers) == ("cat", ("cat",))
    assert complete.task == "", "training adds no template to a complete instruction"
    config.write_text("sources: [{name: vqa, dataset: multis_vqav22, licence: x}]")
    with pytest.raises(ConfigError, match="did you mean 'multis_vqav2'"):
        build(load_settings(config), tmp_path / "out2")
