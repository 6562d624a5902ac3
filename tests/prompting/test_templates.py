"""Instruction templates: their number, their words, what is drawn, and the exact prompts.

The snapshot changes only on purpose: run with ``UPDATE_SNAPSHOTS=1`` and read the difference.
"""

from __future__ import annotations

import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from lavis_chatbridge.errors import ConfigError, PromptError
from lavis_chatbridge.prompting.templates import STYLE, Templates

SNAPSHOT = Path(__file__).with_name("templates_snapshot.json")


@pytest.fixture(scope="module")
def templates():
    return Templates.load()


def test_sixteen_tasks_with_ten_to_fifteen_wordings_each(templates):
    asking = product(("image", "video", "audio", "video_audio"), ("caption", "qa", "detail", "reasoning"))
    assert set(templates.tasks) == {"_".join(words) for words in asking}
    for task, entry in templates.tasks.items():
        assert 10 <= len(set(entry.templates)) == len(entry.templates) <= 15
        assert all(STYLE in text for text in entry.templates)
        assert entry.asks == task.endswith(("_qa", "_reasoning"))


def test_exact_prompts(templates):
    asked = {task: "What is it?" * templates.tasks[task].asks for task in sorted(templates.tasks)}
    found = {
        "first": {task: templates.apply(task, question) for task, question in asked.items()},
        "drawn": {
            task: [templates.apply(task, question, rng=np.random.default_rng(n)) for n in range(4)]
            for task, question in asked.items()
        },
    }
    if os.environ.get("UPDATE_SNAPSHOTS"):
        SNAPSHOT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    assert found == json.loads(SNAPSHOT.read_text())


def test_text_of_the_data_is_never_read_as_a_template(templates):
    question = "What is {style} and {question} in <image>?"
    assert templates.apply("image_qa", question) == f"{question} Answer in a word or two."


def test_the_samples_style_and_question_win(templates):
    assert templates.apply("image_qa", "Who?", "sentence") == "Who? Answer in a sentence."
    assert templates.apply("image_caption", "Describe it as a poem.") == "Describe it as a poem."
    with pytest.raises(PromptError, match="no words for style 'shrt'; known are detail, reasons, sentence, short"):
        templates.apply("image_qa", "Who?", "shrt")
    with pytest.raises(PromptError, match="task 'image_qa' has no question"):
        templates.apply("image_qa")


def test_users_extend_and_replace(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "styles: {poem: [a poem]}\n"
        "tasks:\n"
        "  rhyme: {style: poem, templates: ['Write of it in {style}.']}\n"
        "  image_caption: {templates: ['Caption?']}\n"
    )
    templates = Templates.load(mine)
    assert templates.apply("rhyme") == "Write of it in a poem."
    assert templates.apply("image_caption") == "Caption?"
    assert templates.apply("video_caption", style="poem") == "Describe the video in a poem."
    assert Templates.load().apply("image_caption") == "Describe the image in a sentence."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("taks: {}", r"unknown key templates mine.yaml.taks, did you mean 'tasks'\?"),
        ("tasks: {a: {templates: []}}", "templates.*at least 1 item"),
        ("tasks: {a: {templates: ['{question}', 'x']}}", r"some templates contain \{question\} and some do not"),
        ("tasks: {a: {templates: ['in {style}']}}", "the task needs a style"),
        ("tasks: {a: {style: odd, templates: ['in {style}']}}", "tasks.a: no words for style 'odd'"),
        ("tasks: [", "while parsing"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message):
        Templates.load(tmp_path / "mine.yaml")
