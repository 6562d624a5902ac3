"""A few real media and the annotations of all fifteen benchmarks, each in its published layout, under one folder."""

import csv
import itertools
import json
from pathlib import Path

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


def vqa(folder: str, prefix: str) -> dict[str, dict]:
    """VQAv2's two files; OK-VQA has the same layout."""
    top = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
    ids = [{"image_id": n, "question_id": 10 * n} for n in range(3)]
    asked = [own | {"question": f"What colour is picture {own['image_id']}?"} for own in ids]
    said = [[{"answer": text, "answer_id": i} for i, text in enumerate([name] * 7 + ["grey"] * 3, 1)] for name in NAMES]
    more = {"answer_type": "other", "question_type": "what"}
    return {
        f"{folder}/{prefix}OpenEnded_mscoco_val2014_questions.json": top | {"questions": asked},
        f"{folder}/{prefix}mscoco_val2014_annotations.json": top
        | {"annotations": [own | {"answers": texts} | more for own, texts in zip(ids, said, strict=True)]},
    }


def karpathy(n: int, **more: object) -> dict:
    """A picture in Karpathy's file, with five captions."""
    sentences = [{"raw": f"A {NAMES[n]} picture, number {i}.", "imgid": n, "sentid": 5 * n + i} for i in range(5)]
    return {"filename": f"{n}.jpg", "imgid": n, "split": "test", "sentences": sentences} | more


QUESTIONS = [
    {"id": 100 + n, "video_id": 7010 + n, "question": "what is shown?", "answer": NAMES[n], "category_id": 1}
    for n in range(3)
]
LETTERED = [f"{letter}. {name}" for letter, name in zip("ABC", NAMES, strict=True)]
JSON: dict[str, list | dict] = vqa("vqav2", "v2_") | vqa("okvqa", "") | {
    "gqa/testdev_balanced_questions.json": {
        f"2013{n}": {"question": f"Is it {name}?", "imageId": f"n{n}", "answer": "yes", "fullAnswer": "Yes, it is.",
                     "isBalanced": True, "types": {"structural": "verify" if n else "choose", "semantic": "attr",
                                                   "detailed": "verifyAttr"}}
        for n, name in enumerate(NAMES)
    },
    "flickr30k/dataset_flickr30k.json": {"dataset": "flickr30k", "images": [karpathy(n) for n in range(3)]},
    "coco/annotations/dataset_coco.json": {"dataset": "coco", "images": [
        *(karpathy(n, filepath="val2014", cocoid=n, filename=f"COCO_val2014_{n:012d}.jpg") for n in range(3)),
        karpathy(0, filepath="train2014", cocoid=9, split="train"),
    ]},
    "nocaps/nocaps_val_4500_captions.json": {
        "info": {},
        "images": [
            {"id": n, "file_name": f"{n}.jpg", "open_images_id": f"o{n}", "domain": "near-domain"} for n in range(3)
        ],
        "annotations": [{"image_id": n % 3, "id": n, "caption": f"A {NAMES[n % 3]} thing {n}."} for n in range(30)],
    },
    "msrvtt/test_qa.json": QUESTIONS,
    "msrvtt/test_videodatainfo.json": {
        "info": {},
        "videos": [{"video_id": f"video{7010 + n}", "split": "test", "url": "", "id": n} for n in range(3)],
        "sentences": [
            {"video_id": f"video{7010 + n % 3}", "sen_id": n, "caption": f"a {NAMES[n % 3]} screen {n}"}
            for n in range(9)
        ],
    },
    "msvd/test_qa.json": [question | {"video_id": 1 + n} for n, question in enumerate(QUESTIONS)],
    "vatex/vatex_public_test_english_v1.1.json": [
        {"videoID": f"clip{n}_000000_000010", "enCap": [f"A {NAMES[n % 3]} screen {i}." for i in range(10)]}
        for n in range(4)  # the fourth video is not there any more
    ],
    "avsd/lbl_test_set4DSTC7-AVSD.json": {"type": "test", "version": "0.1", "dialogs": [
        {"image_id": f"CH{n}", "caption": "c", "summary": "s", "dialog": [
            {"question": "What is shown?", "answer": "A colour."}, {"question": "Which one?", "answer": "It is plain."},
        ]}
        for n in range(3)
    ]},
    "valor/desc_test.json": [{"video_id": f"v{n}_0_10", "desc": f"A {NAMES[n]} screen hums."} for n in range(3)],
    "music_avqa/avqa-test.json": [
        {"video_id": f"0000{n}", "question_id": n, "question_deleted": 0, "anser": "no",
         "type": '["Audio-Visual", "Location"]' if n else '["Audio", "Counting"]', "templ_values": '["flute", "drum"]',
         "question_content": "Is the <Object> louder than the <Object>?"}
        for n in range(3)
    ],
    "avqa/val_qa.json": [
        {"id": n, "video_name": f"yt{n}_000010", "video_id": 40 + n, "question_text": "What is shown?",
         "multi_choice": NAMES, "answer": n, "question_relation": "View", "question_type": "Which"}
        for n in range(3)
    ],
    "worldsense/worldsense_qa.json": {
        f"ws{n}": {
            "video_id": f"ws{n}", "duration": "<1min", "domain": "Music", "audio_class": ["Music"],
            "task0": {"question": "What is shown?", "answer": "ABC"[n], "candidates": LETTERED,
                      "task_domain": "Recognition", "task_type": "Attribute Recognition"},
        }
        for n in range(3)
    },
    "omnibench/dataset/batch-5_1142_20240817.jsonl": [
        {"index": n, "task type": "Action and Activity", "audio type": "speech", "question": "What is it?",
         "options": NAMES, "answer": NAMES[n], "audio_path": f"{n}.wav", "image_path": f"{n}.jpg",
         "audio content": "a tone", "image content": "a colour"}
        for n in range(3)
    ],
    "daily_omni/qa.json": [
        {"Question": "What is shown?", "Choice": LETTERED, "Answer": "ABC"[n], "video_id": f"do{n}",
         "Type": "AV Event Alignment", "content_parent_category": "Music", "content_fine_category": "Tones",
         "video_category": "Music", "video_duration": "30s"}
        for n in range(3)
    ],
    "av_odyssey/av_odyssey.json": [
        {"question_id": f"1_{n}", "question_type_id": 1, "data_type": "image,audio", "subfield": "Timbre",
         "question": "Which sound belongs to [img1]?", "options": ["A. [audio1]", "B. [audio2]", "C. both", "D. none"],
         "answer": "A", "image_path": [f"image/{n}.jpg"], "audio_path": [f"audio/{n}.wav", f"audio/{(n + 1) % 3}.wav"],
         "video_path": []}
        for n in range(3)
    ],
    "mmau/mmau-test-mini.json": [
        {"id": f"mm{n}", "audio_id": f"./test-mini-audios/mm{n}.wav", "question": "What is heard?",
         "choices": ["A tone", "A voice"], "answer": "A tone", "dataset": "d", "task": "sound", "split": "test-mini",
         "category": "Reasoning", "sub-category": "Source", "difficulty": "easy"}
        for n in range(3)
    ],
    "video_mme/output_test_template.json": [
        {"video_id": f"00{n}", "duration": "short", "domain": "Knowledge", "sub_category": "s",
         "url": f"https://www.youtube.com/watch?v=vm{n}",
         "questions": [{"question_id": f"00{n}-1", "task_type": "Attribute Perception", "question": "What is shown?",
                        "options": LETTERED, "response": "", "answer": "ABC"[n]}]}
        for n in range(3)
    ],
    "avhbench/qa.json": [
        *({"video_id": f"0000{n}", "task": "Video-driven Audio Hallucination", "text": "Is the screen making sound?",
           "label": "Yes" if n else "No"} for n in range(3)),
        {"video_id": "00000", "task": "AV Captioning", "text": "Describe it.", "label": "A screen hums."},
    ],
}  # fmt: skip
SENTIMENTS = [
    ["video_id", "clip_id", "text", "label", "label_T", "label_A", "label_V", "annotation", "mode"],
    *([f"s{n}", n, "I like it", 1.5, "", "", "", "Positive", "test"] for n in range(3)),
    ["s0", 7, "so so", 0, "", "", "", "Neutral", "train"],
]
CSV: dict[str, list[list]] = {
    "audiocaps/test.csv": [
        ["audiocap_id", "youtube_id", "start_time", "caption"],
        *([5 * n + i, f"yt{n}", 30 + n, f"A tone number {n}, {i}"] for n in range(3) for i in range(5)),
    ],
    "clotho/clotho_captions_evaluation.csv": [
        ["file_name", *(f"caption_{i}" for i in range(1, 6))],
        *([f"tone {n}.wav", *(f"A tone is heard {i} times." for i in range(5))] for n in range(3)),
    ],
    "mosi/label.csv": SENTIMENTS,
    "mosei/label.csv": SENTIMENTS,
    "charades_ego/CharadesEgo_v1_test.csv": [
        ["id", "subject", "scene", "quality", "relevance", "verified", "script", "descriptions", "actions", "length",
         "egocentric", "charades_video"],
        *([f"E{n}{'EGO' if view == 'Yes' else ''}", "S", "Kitchen", 7, 7, "Yes", "A person hums.",
           f"A {NAMES[n]} screen hums.;A screen is shown.", "c092 0.0 1.0", 1.5, view, ""]
          for n in range(3) for view in ("No", "Yes")),
    ],
}  # fmt: skip


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
    for name in (*JSON, *CSV):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    for name, content in JSON.items():
        rows = content if name.endswith(".jsonl") else [content]
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, rows in CSV.items():
        with open(root / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    (root / "msvd/youtube_mapping.txt").write_text("".join(f"clip_{n}_0_5 vid{1 + n}\n" for n in range(3)))
    for n, (ending, paths) in itertools.product(range(3), MEDIA.items()):
        for path in (root / pattern.format(n=n) for pattern in paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(pool / f"{n}.{ending}")
    return root
