"""A few real media and the annotations of all fifteen benchmarks, each in its published layout, under one folder."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.media.making import sound_file, tone, video_file

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 220)}
NAMES = list(COLOURS)


MEDIA = {
    "jpg": [
        "coco/images/val2014/COCO_val2014_{n:012d}.jpg", "gqa/images/n{n}.jpg", "flickr30k/images/{n}.jpg",
        "nocaps/images/{n}.jpg", "omnibench/mm_data/image/{n}.jpg", "av_odyssey/image/{n}.jpg",
    ],
    "wav": [
        "audiocaps/audio/yt{n}_3{n}.wav", "clotho/evaluation/tone {n}.wav", "omnibench/mm_data/audio/{n}.wav",
        "daily_omni/Videos/do{n}/do{n}_audio.wav", "av_odyssey/audio/{n}.wav", "mmau/test-mini-audios/mm{n}.wav",
    ],
    "mp4": [
        "msrvtt/videos/video701{n}.mp4", "msvd/videos/clip_{n}_0_5.avi", "vatex/videos/clip{n}_000000_000010.mp4",
        "avsd/videos/CH{n}.mp4", "valor/videos/v{n}_0_10.mp4", "music_avqa/videos/0000{n}.mp4",
        "avqa/videos/yt{n}_000010.mp4", "worldsense/videos/ws{n}.mp4", "daily_omni/Videos/do{n}/do{n}_video.mp4",
        "video_mme/data/vm{n}.mp4", "mosi/Raw/s{n}/{n}.mp4", "mosei/Raw/s{n}/{n}.mp4", "avhbench/video/0000{n}.mp4",
        "charades_ego/CharadesEgo_v1_480/E{n}.mp4",
    ],
}  # fmt: skip
"""Ending of a medium of the pool -> the paths that it has in the benchmarks."""


def build(root: Path) -> Path:
    """Write everything under ``root``: three samples of each benchmark."""
    pool = root / "pool"
    pool.mkdir(parents=True)
    for number, name in enumerate(NAMES):
        Image.new("RGB", (64, 56), COLOURS[name]).save(pool / f"{number}.jpg")
        (pool / f"{number}.wav").write_bytes(sound_file(tone(1.5, 16_000, 220.0 * (number + 1)), 16_000))
        sound = tone(1.5, 48_000, 220.0 * (number + 1))
        drawn = Image.new("RGB", (64, 48), COLOURS[name])
        (pool / f"{number}.mp4").write_bytes(video_file(38, sound=sound, drawn=lambda *_, drawn=drawn: np.array(drawn)))
    for write in (_vqa, _gqa, _captioned_pictures, _videos, _sounds, _seen_and_heard, _choices, _other_questions):
        write(root)
    for n, (ending, paths) in itertools.product(range(3), MEDIA.items()):
        for path in (root / pattern.format(n=n) for pattern in paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(pool / f"{n}.{ending}")
    return root


def _vqa(root: Path) -> None:
    for folder, prefix in (("vqav2", "v2_"), ("okvqa", "")):
        top = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
        questions, annotations = [], []
        for n, name in enumerate(NAMES):
            ids = {"image_id": n, "question_id": 10 * n}
            questions.append(ids | {"question": f"What colour is picture {n}?"})
            said = [{"answer": text, "answer_id": i} for i, text in enumerate([name] * 7 + ["grey"] * 3, 1)]
            annotations.append(ids | {"answers": said, "answer_type": "other", "question_type": "what"})
        files = {"OpenEnded_mscoco_val2014_questions": {"questions": questions},
                 "mscoco_val2014_annotations": {"annotations": annotations}}  # fmt: skip
        for name, content in files.items():
            _json(root, f"{folder}/{prefix}{name}.json", top | content)


def _gqa(root: Path) -> None:
    types = [{"structural": "choose"}, {"structural": "verify"}, {"structural": "verify"}]
    entries = {
        f"2013{n}": {"question": f"Is it {name}?", "imageId": f"n{n}", "answer": "yes", "fullAnswer": "Yes, it is.",
                     "isBalanced": True, "types": types[n] | {"semantic": "attr", "detailed": "verifyAttr"}}
        for n, name in enumerate(NAMES)
    }  # fmt: skip
    _json(root, "gqa/testdev_balanced_questions.json", entries)


def _captioned_pictures(root: Path) -> None:
    def karpathy(n: int, **more: Any) -> dict:
        sentences = [{"raw": f"A {NAMES[n]} picture, number {i}.", "imgid": n, "sentid": 5 * n + i} for i in range(5)]
        return {"filename": f"{n}.jpg", "imgid": n, "split": "test", "sentences": sentences} | more

    _json(root, "flickr30k/dataset_flickr30k.json", {"dataset": "flickr30k", "images": [karpathy(n) for n in range(3)]})
    coco = [karpathy(n, filepath="val2014", cocoid=n, filename=f"COCO_val2014_{n:012d}.jpg") for n in range(3)]
    coco.append(karpathy(0, filepath="train2014", cocoid=9, split="train"))
    _json(root, "coco/annotations/dataset_coco.json", {"dataset": "coco", "images": coco})
    images = [{"id": n, "file_name": f"{n}.jpg", "open_images_id": f"o{n}", "domain": "near-domain"} for n in range(3)]
    captions = [{"image_id": n % 3, "id": n, "caption": f"A {NAMES[n % 3]} thing {n}."} for n in range(30)]
    _json(root, "nocaps/nocaps_val_4500_captions.json", {"info": {}, "images": images, "annotations": captions})


def _videos(root: Path) -> None:
    questions = [
        {"id": 100 + n, "video_id": 7010 + n, "question": "what is shown?", "answer": NAMES[n], "category_id": 1}
        for n in range(3)
    ]
    _json(root, "msrvtt/test_qa.json", questions)
    videos = [{"video_id": f"video{7010 + n}", "split": "test", "url": "", "category": 1, "id": n} for n in range(3)]
    sentences = [
        {"video_id": f"video{7010 + n % 3}", "sen_id": n, "caption": f"a {NAMES[n % 3]} screen {n}"} for n in range(9)
    ]
    _json(root, "msrvtt/test_videodatainfo.json", {"info": {}, "videos": videos, "sentences": sentences})
    _json(root, "msvd/test_qa.json", [q | {"video_id": 1 + n} for n, q in enumerate(questions)])
    (root / "msvd/youtube_mapping.txt").write_text("".join(f"clip_{n}_0_5 vid{1 + n}\n" for n in range(3)))
    vatex = [
        {"videoID": f"clip{n}_000000_000010", "enCap": [f"A {NAMES[n % 3]} screen {i}." for i in range(10)]}
        for n in range(4)
    ]
    _json(root, "vatex/vatex_public_test_english_v1.1.json", vatex)  # the fourth video is not there any more


def _sounds(root: Path) -> None:
    rows = [[5 * n + i, f"yt{n}", 30 + n, f"A tone number {n}, {i}"] for n in range(3) for i in range(5)]
    _csv(root, "audiocaps/test.csv", ["audiocap_id", "youtube_id", "start_time", "caption"], rows)
    captions = [f"caption_{i}" for i in range(1, 6)]
    rows = [[f"tone {n}.wav", *(f"A tone is heard {i} times." for i in range(5))] for n in range(3)]
    _csv(root, "clotho/clotho_captions_evaluation.csv", ["file_name", *captions], rows)


def _seen_and_heard(root: Path) -> None:
    said = {"What is shown?": "A colour.", "Which one?": "It is plain."}
    dialog = [{"question": question, "answer": answer} for question, answer in said.items()]
    dialogs = [{"image_id": f"CH{n}", "dialog": dialog, "caption": "c", "summary": "s"} for n in range(3)]
    _json(root, "avsd/lbl_test_set4DSTC7-AVSD.json", {"type": "test", "version": "0.1", "dialogs": dialogs})
    texts = [{"video_id": f"v{n}_0_10", "desc": f"A {NAMES[n]} screen hums."} for n in range(3)]
    _json(root, "valor/desc_test.json", texts)
    questions = [
        {"video_id": f"0000{n}", "question_id": n, "question_deleted": 0, "anser": "no",
         "type": '["Audio-Visual", "Location"]' if n else '["Audio", "Counting"]', "templ_values": '["flute", "drum"]',
         "question_content": "Is the <Object> louder than the <Object>?"}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "music_avqa/avqa-test.json", questions)


def _choices(root: Path) -> None:
    lettered = [f"{letter}. {name}" for letter, name in zip("ABC", NAMES, strict=True)]
    rows = [
        {"id": n, "video_name": f"yt{n}_000010", "video_id": 40 + n, "question_text": "What is shown?",
         "multi_choice": NAMES, "answer": n, "question_relation": "View", "question_type": "Which"}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "avqa/val_qa.json", rows)
    videos = {
        f"ws{n}": {
            "video_id": f"ws{n}", "duration": "<1min", "domain": "Music", "audio_class": ["Music"],
            "task0": {"question": "What is shown?", "answer": "ABC"[n], "candidates": lettered,
                      "task_domain": "Recognition", "task_type": "Attribute Recognition"},
        }
        for n in range(3)
    }  # fmt: skip
    _json(root, "worldsense/worldsense_qa.json", videos)
    rows = [
        {"index": n, "task type": "Action and Activity", "audio type": "speech", "question": "What is it?",
         "options": NAMES, "answer": NAMES[n], "audio_path": f"{n}.wav", "image_path": f"{n}.jpg",
         "audio content": "a tone", "image content": "a colour"}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "omnibench/dataset/batch-5_1142_20240817.jsonl", rows)
    rows = [
        {"Question": "What is shown?", "Choice": lettered, "Answer": "ABC"[n], "video_id": f"do{n}",
         "Type": "AV Event Alignment", "content_parent_category": "Music", "content_fine_category": "Tones",
         "video_category": "Music", "video_duration": "30s"}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "daily_omni/qa.json", rows)
    rows = [
        {"question_id": f"1_{n}", "question_type_id": 1, "data_type": "image,audio", "subfield": "Timbre",
         "question": "Which sound belongs to [img1]?", "options": ["A. [audio1]", "B. [audio2]", "C. both", "D. none"],
         "answer": "A", "image_path": [f"image/{n}.jpg"], "audio_path": [f"audio/{n}.wav", f"audio/{(n + 1) % 3}.wav"],
         "video_path": []}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "av_odyssey/av_odyssey.json", rows)
    rows = [
        {"id": f"mm{n}", "audio_id": f"./test-mini-audios/mm{n}.wav", "question": "What is heard?",
         "choices": ["A tone", "A voice"], "answer": "A tone", "dataset": "d", "task": "sound", "split": "test-mini",
         "category": "Reasoning", "sub-category": "Source", "difficulty": "easy"}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "mmau/mmau-test-mini.json", rows)
    ask = {"task_type": "Attribute Perception", "question": "What is shown?", "options": lettered, "response": ""}
    rows = [
        {"video_id": f"00{n}", "duration": "short", "domain": "Knowledge", "sub_category": "s",
         "url": f"https://www.youtube.com/watch?v=vm{n}",
         "questions": [ask | {"question_id": f"00{n}-1", "answer": "ABC"[n]}]}
        for n in range(3)
    ]  # fmt: skip
    _json(root, "video_mme/output_test_template.json", rows)


def _other_questions(root: Path) -> None:
    rows = [
        {"video_id": f"0000{n}", "task": "Video-driven Audio Hallucination", "text": "Is the screen making sound?",
         "label": "Yes" if n else "No"}
        for n in range(3)
    ]  # fmt: skip
    rows.append({"video_id": "00000", "task": "AV Captioning", "text": "Describe it.", "label": "A screen hums."})
    _json(root, "avhbench/qa.json", rows)
    head = ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"]
    for name in ("mosi", "mosei"):
        clips = [[f"s{n}", n, "I like it", 1.5, "", "", "", "Positive", "test"] for n in range(3)]
        clips += [["s0", 7, "so so", 0, "", "", "", "Neutral", "train"]]
        _csv(root, f"{name}/label.csv", head, clips)
    head = ["id", "subject", "scene", "quality", "relevance", "verified", "script", "descriptions", "actions", "length",
            "egocentric", "charades_video"]  # fmt: skip
    clips = [
        [f"E{n}{'EGO' if view == 'Yes' else ''}", "S", "Kitchen", 7, 7, "Yes", "A person hums.",
         f"A {NAMES[n]} screen hums.;A screen is shown.", "c092 0.0 1.0", 1.5, view, ""]
        for n in range(3) for view in ("No", "Yes")
    ]  # fmt: skip
    _csv(root, "charades_ego/CharadesEgo_v1_test.csv", head, clips)


def _json(root: Path, name: str, content: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    rows = content if name.endswith(".jsonl") else [content]
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _csv(root: Path, name: str, head: list[str], rows: list[list]) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with open(root / name, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])
