"""The commands and examples of README and guides are run, as they stand there, in a folder such as their reader has.

What is added to a command makes it small: a step of training in place of hundreds, a world of a few media. The commands
that nothing runs are those of the table in docs/contributing.md ("Commands of the guides"), each with what it needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from lavis_chatbridge import cli
from lavis_chatbridge.toyworld import pretrain_encoders
from tests.chat.building import picture, sound, video
from tests.tasks.eval import layouts
from tests.test_docs import GUIDES, blocks, command_lines

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"lavis.train": "lavis_chatbridge.plugin.train", "lavis.evaluate": "lavis_chatbridge.plugin.evaluate"}

STEP = "run.max_iters=1 run.warmup_steps=0 run.batch_size_train=2 run.num_workers=0 run.device=cpu run.keep_last=1"
SCORE = "run.max_len=2 run.min_len=1 run.num_beams=1 run.num_workers=0 run.device=cpu"
SUITES = f"{SCORE} model.checkpoint=null env.data_root=benchmarks"
WORLD = "--images 3 --videos 2 --sounds 2 --test 4 --heldout 1 --joint 1 --processes 1"
SHORT = "--max-new-tokens 3 --device cpu"
LANGUAGE = "--steps 1 --width 16 --layers 1 --heads 2 --feed-forward 16 --passages 2 --groups 1 --questions 1"


@dataclass(frozen=True)
class Step:
    """A command of the guides.

    Args:
        command: As it stands there.
        small: What is added to make it small.
        status: How it ends.
        leaves: What is there afterwards.
        typed: What is typed while it runs.
    """

    command: str
    small: str = ""
    status: int = 0
    leaves: str = ""
    typed: str = ""


TRAIN = "python -m lavis.train --cfg-path projects/chatbridge"
SCORED = "python -m lavis.evaluate --cfg-path projects/chatbridge/eval"
OWN = (
    "--options model.language_model.weights=output/tiny/llm model.vision.weights=output/tiny/eva_vit.safetensors "
    "model.audio.weights=output/tiny/beats.safetensors"
)
SHARD = "chatbridge shard --cfg-path projects/chatbridge/align.yaml --output output/shards"
STEPS = (
    Step("chatbridge doctor"),
    Step("chatbridge world build output/world", WORLD, leaves="output/world/world.json"),
    Step("chatbridge doctor --cfg-path projects/chatbridge/align.yaml"),
    Step("chatbridge doctor --cfg-path projects/chatbridge/vicuna7b/align.yaml", status=1),
    Step("chatbridge weights list"),
    Step("chatbridge weights list --model-type vicuna13b", status=1),
    Step("chatbridge weights list --cfg-path my.yaml --json"),
    Step("chatbridge check-data mine.jsonl"),
    Step("chatbridge check-data train.jsonl --decode"),
    Step(SHARD, leaves="output/shards/datasets.yaml"),
    Step("chatbridge shard my_data/train.jsonl --output output/shards", leaves="output/shards/train.jsonl"),
    Step(f"{SHARD} --rank 0 --world 2"),
    Step(f"{SHARD} --rank 1 --world 2", leaves="output/shards/datasets.yaml"),
    # training: both stages, by each of its names; and from parts of one's own
    Step(f"{TRAIN}/align.yaml", f"--options {STEP}", leaves="output/align/model.safetensors"),
    Step("chatbridge train --cfg-path projects/chatbridge/align.yaml --options run.anew=true", STEP),
    Step(
        f"{TRAIN}/align.yaml --options run.seed=1 run.output_dir=output/other",
        STEP,
        leaves="output/other/model.safetensors",
    ),
    Step(f"{TRAIN}/align.yaml --options run.resume=auto", STEP.replace("max_iters=1", "max_iters=2")),
    Step(f"{TRAIN}/instruct.yaml", f"--options {STEP}", leaves="output/instruct/model.safetensors"),
    Step("chatbridge cache-features --cfg-path my.yaml", f"--options {STEP} run.feature_cache=output/features"),
    Step("python -m lavis_chatbridge.toyworld.pretrain_llm --out output/tiny/llm", LANGUAGE),
    Step("python -m lavis_chatbridge.toyworld.pretrain_encoders vision --out output/tiny", "--renderings 16 --steps 1"),
    Step("python -m lavis_chatbridge.toyworld.pretrain_encoders audio --out output/tiny", "--renderings 60 --steps 1"),
    Step(f"{TRAIN}/align.yaml {OWN}", f"{STEP} run.output_dir=output/own", leaves="output/own/model.safetensors"),
    Step(
        f"{TRAIN}/instruct.yaml {OWN}",
        f"{STEP} run.output_dir=output/own2 model.checkpoint=output/own/model.safetensors",
    ),
    # what was trained: looked at, scored, asked
    Step("chatbridge weights check FILE"),
    Step("chatbridge weights convert FILE OUT.safetensors", leaves="OUT.safetensors"),
    Step(
        f"{SCORED}/world_captions.yaml --options model.checkpoint=output/align/model.safetensors",
        SCORE,
        leaves="output/world_captions/result/heldout_step0.json",
    ),
    Step(
        f"{SCORED}/world_answers.yaml --options model.checkpoint=output/instruct/model.safetensors",
        SCORE,
        leaves="output/world_answers/result/test_step0_metrics.json",
    ),
    Step(f"{SCORED}/world_captions.yaml", f"--options {SCORE} run.test_splits=[test]"),
    Step(
        "chatbridge evaluate --cfg-path projects/chatbridge/eval/world_captions.yaml",
        f"--options {SCORE} run.test_splits=[test]",
    ),
    Step(f"{SCORED}/okvqa.yaml", f"--options {SUITES}", leaves="output/eval/tiny/okvqa/result/test_step0.json"),
    Step("chatbridge evaluate --suite zero-shot", "--options env.data_root=nothing", status=2),
    Step("chatbridge evaluate --suite okvqa,clotho", f"--options {SUITES}", leaves="output/eval/tiny/scores.html"),
    Step("chatbridge evaluate --suite music_avqa --ablate", f"--options {SUITES}"),
    Step(
        f"{SCORED}/world_joint.yaml --ablate withheld:image,video withheld:audio shuffled",
        f"--options {SCORE}",
        status=1,  # this world has one picture with a sound: there are no others to exchange them for
        leaves="output/world_joint/result/test_withheld_audio_step0.json",
    ),
    Step(
        "chatbridge evaluate --suite msvd_qa --options run.inference_method=rank run.answer_list=answers.json", SUITES
    ),
    Step(
        "chatbridge evaluate --rescore output/eval/vicuna13b/gqa/result/test_step0.json",
        leaves="output/eval/vicuna13b/gqa/result/test_step0_rescored.json",
    ),
    Step(
        "chatbridge evaluate --rescore .../test_step0.json --options run.metrics=[exact_match] run.normalisation=squad",
        leaves=".../test_step0_rescored.json",
    ),
    Step('chatbridge ask "what is the colour of the picture?" --image output/world/images/test/00003.jpg', SHORT),
    Step('chatbridge ask "what is seen, and what is heard?" --image a.jpg --audio b.wav', SHORT),
    Step('chatbridge ask "what is it?" --image a.jpg', SHORT),
    Step("chatbridge ask --jsonl questions.jsonl answers.jsonl", SHORT, leaves="answers.jsonl"),
    Step("chatbridge chat", SHORT, typed="/image a.jpg\nwhat is it?\n/quit\n"),
    # two processes on one machine
    Step(
        "torchrun --nproc-per-node 2 -m lavis.train --cfg-path projects/chatbridge/align.yaml --options "
        "run.output_dir=output/two",
        STEP,
        leaves="output/two/model.safetensors",
    ),
)
ELSEWHERE = {
    "chatbridge evaluate --suite all": "tests/tasks/eval/test_suites.py",
    "chatbridge serve": "tests/chat/serving.py",
    "chatbridge web": "tests/test_guides.py",
    "curl http://127.0.0.1:8000/v1/chat/completions": "tests/chat/test_server.py",
    "chatbridge check-data my_data/train.jsonl": "tests/datasets/test_own_data.py",
    "python -m lavis.train --cfg-path my_data/run.yaml": "tests/datasets/test_own_data.py",
    "python -m lavis.evaluate --cfg-path my_data/run.yaml": "tests/datasets/test_own_data.py",
    "chatbridge multis": "tests/multis/test_guide.py",
    "python -m lavis.train --cfg-path my_clips/run.yaml": "tests/multis/test_guide.py",
    "make docs": "tests/test_api_reference.py",
    "make check": ".ci/run",
    "make test": ".ci/run",
}
"""What a command begins with -> the file that runs the same; commands of `STEPS` and of the table come first."""


def listed() -> dict[str, list[str]]:
    """The table of docs/contributing.md: a need -> the signs by which its commands are known."""
    text = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
    table = text.split("## Commands of the guides\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.+?) \|", table, flags=re.MULTILINE)
    return {need: re.findall(r"`([^`]+)`", signs) for signs, need in rows}


def commands() -> dict[str, str]:
    """Every command line of README and guides, without its comment -> a guide that it stands in."""
    found = {}
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8").replace("\\\n", "")
        lines = [line for block in blocks(text, "bash", "sh", "shell", "") for line in block.splitlines()]
        lines += re.findall(r"^    ((?:chatbridge|python|pip) .*)$", text, flags=re.MULTILINE)
        for line in lines:
            bare = re.sub(r"\s+#.*", "", line).strip()
            if re.match(
                r"(chatbridge|torchrun|srun|make|curl|apt-get|lmms-eval|(\w+=\S+ )?(\S*/)?(python3?|pip)) ", bare
            ):
                found.setdefault(bare, guide.name)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what a reader has who follows the guides; the working directory while they are followed."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "projects").symlink_to(ROOT / "projects")
    layouts.build(folder / "benchmarks")
    from PIL import Image

    for name in ("a.jpg", "a.png", "picture.png"):
        Image.fromarray(picture()).save(folder / name)
    (folder / "b.wav").write_bytes(sound())
    (folder / "c.mp4").write_bytes(video("tone"))
    [questions] = blocks((ROOT / "docs/chat.md").read_text(encoding="utf-8"), "json")
    (folder / "questions.jsonl").write_text(questions, encoding="utf-8")
    (folder / "answers.json").write_text('["red", "green"]')
    sample = {"id": "1", "media": [{"type": "image", "path": "a.jpg"}], "captions": ["a star"]}
    (folder / "my_data").mkdir()
    shutil.copy(folder / "a.jpg", folder / "my_data")
    for name in ("mine.jsonl", "train.jsonl", "my_data/train.jsonl"):
        (folder / name).write_text(json.dumps(sample) + "\n")
    shutil.copy(ROOT / "projects/chatbridge/align.yaml", folder / "my.yaml")
    record = {"sample_id": "1", "prediction": "Red.", "answers": ["red"], "source": "gqa"}
    for place in ("output/eval/vicuna13b/gqa/result", "..."):
        (folder / place).mkdir(parents=True)
        (folder / place / "test_step0.json").write_text(json.dumps([record]))
        (folder / place / "test_step0_metrics.json").write_text('{"metrics": ["exact_match"]}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("CHATBRIDGE_CACHE", str(folder / "cache"))
        patch.setenv("CHATBRIDGE_DATA", str(folder))
        patch.delenv("CHATBRIDGE_WEIGHTS", raising=False)
        patch.setattr("lavis_chatbridge.tasks.scoring.captions._java_fault", lambda heap: "no Java in this test")
        yield folder


def run_line(step: Step) -> tuple[int, str]:
    """Status and output of a command: our own in this process, torchrun's in processes of its own."""
    line = step.command.replace(" FILE", " output/align/model.safetensors")
    words = [*shlex.split(line), *shlex.split(step.small)]
    if words[0] == "torchrun":
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", *words[1:]]
        done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=600)
        return done.returncode, done.stdout + done.stderr
    if words[0] == "chatbridge":
        main: Callable[[Sequence[str]], int | None] = cli.main
        rest = words[1:]
    else:
        assert words[:2] == ["python", "-m"], words
        main, rest = import_module(MAINS.get(words[2], words[2])).main, words[3:]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(sys, "stdin", io.StringIO(step.typed))
        for name, recipe in pretrain_encoders.RECIPES.items():  # what only scores the encoders has no option
            patch.setitem(pretrain_encoders.RECIPES, name, dataclasses.replace(recipe, fresh=12))
        try:
            status = main(rest) or 0
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, said.getvalue()


@pytest.fixture(scope="module")
def ran(folder: Path) -> dict[str, tuple[int, str]]:
    """All of `STEPS`, one after the other: what a command leaves the next ones need."""
    return {step.command: run_line(step) for step in STEPS}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.command)
def test_a_command_of_the_guides(ran: dict[str, tuple[int, str]], folder: Path, step: Step) -> None:
    status, said = ran[step.command]
    assert status == step.status, said
    assert not step.leaves or (folder / step.leaves).stat().st_size > 0, said


def test_what_the_commands_say(ran: dict[str, tuple[int, str]], folder: Path) -> None:
    """The tables, answers and counts for which a reader runs them."""
    said = {command: text for command, (_, text) in ran.items()}
    assert "mine.jsonl: 1 samples" in said["chatbridge check-data mine.jsonl"]
    assert "MISSING" in said["chatbridge weights list --model-type vicuna13b"]
    assert "model.language_model.weights" in said["chatbridge weights list --cfg-path my.yaml --json"]
    assert "are missing" in said["chatbridge doctor --cfg-path projects/chatbridge/vicuna7b/align.yaml"]
    assert "model.vision.weights" in said["chatbridge doctor --cfg-path projects/chatbridge/vicuna7b/align.yaml"]
    assert "fits         tiny" in said["chatbridge weights check FILE"]
    assert "going on from" in said[f"{TRAIN}/align.yaml --options run.resume=auto"]
    table = said["chatbridge evaluate --suite music_avqa --ablate"]
    assert [f"{kind} {mode}" in table for kind in ("video", "audio") for mode in ("withheld", "shuffled")] == [True] * 4
    assert "exact_match" in said["chatbridge evaluate --rescore output/eval/vicuna13b/gqa/result/test_step0.json"]
    assert "the model got: image a.jpg" in said["chatbridge chat"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["1", "2", "3"]
    assert all("answer" in answer for answer in answers)


def test_the_conversation_of_the_chat_guide(ran: dict[str, tuple[int, str]], folder: Path) -> None:
    """Its reader's lines get the notes that it shows, and it shows answers that are true of the media."""
    assert ran["chatbridge world build output/world"][0] == 0
    (folder / "world").symlink_to("output/world")
    talk = next(b for b in blocks((ROOT / "docs/chat.md").read_text(encoding="utf-8"), "") if b.startswith("you> "))
    typed = [line.removeprefix("you> ") for line in talk.splitlines() if line.startswith("you> ")]
    status, said = run_line(Step("chatbridge chat", "--device cpu", typed="\n".join([*typed, "/quit", ""])))
    assert status == 0
    shown = [line for line in talk.splitlines() if not line.startswith("you> ")]
    notes = [line for line in shown if not line.startswith("chatbridge> ")]
    assert [line for line in said.splitlines() if line in notes] == notes, said
    answers = [line.removeprefix("chatbridge> ") for line in shown if line.startswith("chatbridge> ")]
    assert len(re.findall(r"chatbridge> \S", said)) == len(answers) == 2, said
    truth = {}
    for name in ("image", "audio"):
        for line in (folder / f"world/annotations/{name}_test.jsonl").read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            truth[f"world/{sample['media'][0]['path']}"] = sample["facts"]
    media = [line.split()[-1] for line in typed if line.startswith("/")]
    assert answers == [truth[media[0]]["colour"], truth[media[1]]["timbre"]]


def test_every_command_is_run_or_listed_with_what_it_needs() -> None:
    own = {step.command for step in STEPS}
    needs = listed()
    unused = {sign for signs in needs.values() for sign in signs}
    left = {}
    for command, guide in commands().items():
        signs = {sign for signs in needs.values() for sign in signs if sign in command}
        if command not in own:
            unused -= signs
            if not signs and not any(command.startswith(start) for start in ELSEWHERE):
                left[command] = guide
    assert left == {}, "no test runs these, and the table of docs/contributing.md does not name them"
    assert unused == set(), "the table of docs/contributing.md speaks of commands that there are not"
    assert [file for file in ELSEWHERE.values() if not (ROOT / file).is_file()] == []


def test_every_step_stands_in_a_guide() -> None:
    texts = "\n".join(guide.read_text(encoding="utf-8") for guide in GUIDES)
    assert [step.command for step in STEPS if step.command not in texts] == []


SAID = {"weights": r"GPU|weights|real models", "GPUs": r"GPU|weights", "a network": r"network|[Ii]nstall"}
"""How a need begins -> what stands in the section of a command that has it."""


def test_commands_that_need_something_say_so_where_they_stand() -> None:
    own = {step.command for step in STEPS}
    silent = []
    for guide in GUIDES:
        for words, section in command_lines(guide.read_text(encoding="utf-8")):
            line = shlex.join(words)
            for need, signs in listed().items():
                word = next((SAID[start] for start in SAID if need.startswith(start)), "")
                if line not in own and any(sign in line for sign in signs) and not re.search(word, section):
                    silent.append(f"{guide.name}: {line} needs {need}")
    assert silent == []


def python_examples() -> list[tuple[str, str]]:
    found = []
    for name in ("README.md", "docs/chat.md", "docs/lavis.md", "docs/troubleshooting.md"):
        found += [(name, code) for code in blocks((ROOT / name).read_text(encoding="utf-8"), "python")]
    return found


@pytest.mark.parametrize(("guide", "code"), python_examples(), ids=lambda value: value.splitlines()[0][:40])
def test_a_python_example(guide: str, code: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the shipped model, which answers about what it is shown; server.md's is run by tests/chat/test_server.py."""
    values: dict[str, object] = {}
    exec(compile(code, guide, "exec"), values)
    said = capsys.readouterr().out
    if "print(" in code:
        assert said.strip(), code
    if "decoder.step()" in code:
        assert values["text"] == values["answer"].text  # type: ignore[attr-defined]


def test_every_guide_with_python_is_run() -> None:
    """contributing.md's examples are run by tests/test_contributing.py."""
    others = {"contributing.md", "server.md"}
    run = {Path(name).name for name, _ in python_examples()}
    assert {guide.name for guide in GUIDES if blocks(guide.read_text(encoding="utf-8"), "python")} == run | others


def yaml_of(guide: str, sign: str) -> str:
    """The YAML example of a guide that holds these words."""
    [found] = [one for one in blocks((ROOT / "docs" / guide).read_text(encoding="utf-8"), "yaml") if sign in one]
    return found


def test_a_suite_of_ones_own(folder: Path) -> None:
    (folder / "suites").mkdir()
    (folder / "suites/mine.yaml").write_text(yaml_of("evaluation.md", "zero_shot: true"), encoding="utf-8")
    shutil.copy(folder / "my_data/train.jsonl", folder / "my_data/test.jsonl")
    small = f"--options {SCORE} model.model_type=tiny"
    status, said = run_line(Step("chatbridge evaluate --suite mine --suite-folder suites", small))
    assert status == 0, said
    assert json.loads((folder / "output/eval/tiny/mine/result/test_step0.json").read_text())[0]["references"] == [
        "a star"
    ]


def test_templates_of_ones_own(folder: Path) -> None:
    from lavis.common.registry import registry

    text = yaml_of("data.md", "scan_qa")
    (folder / "my_templates.yaml").write_text(text, encoding="utf-8")
    [section] = re.findall(r"chatbridge_jsonl: (\{.*?), \.\.\.\}", text)
    turns = [{"role": "user", "text": "Is it broken?"}, {"role": "assistant", "text": "No."}]
    sample = {"id": "1", "media": [{"type": "image", "path": "a.jpg"}], "turns": turns}
    (folder / "scans.jsonl").write_text(json.dumps(sample) + "\n")
    own = {"data_root": str(folder), "splits": {"test": "scans.jsonl"}, **yaml.safe_load(section + "}")}
    source = registry.get_builder_class("chatbridge_jsonl")(own).build()["test"].sources[0]
    words = "".join(getattr(piece, "text", "") for piece in source.pieces(source.sample(0), None))
    assert "Is it broken? Answer in one clinical sentence." in words


def test_sections_that_are_shown_are_understood() -> None:
    from lavis.common.registry import registry

    from lavis_chatbridge.models.chatbridge import ChatBridge

    tiny = yaml.safe_load(Path(ChatBridge.default_config_path("tiny")).read_text(encoding="utf-8"))["model"]
    shown = yaml.safe_load(yaml_of("training.md", "lora"))["model"]["language_model"]
    settings = ChatBridge.check_config({**tiny, "language_model": {**tiny["language_model"], **shown}})
    assert settings.language_model.lora is not None
    assert (settings.language_model.lora.rank, settings.language_model.lora.alpha) == (8, 16.0)
    for guide, sign in (("data.md", "img_vqa_vqav2.json"), ("multis.md", "parts: [], data_root: multis,")):
        for name, section in yaml.safe_load(yaml_of(guide, sign))["datasets"].items():
            assert registry.get_builder_class(name)(section).settings.used_splits == ["train"]


def test_the_page_comes_up_and_goes(folder: Path) -> None:
    """``chatbridge web``: a page at the address that it prints; nothing is left behind when it is ended."""
    httpx = pytest.importorskip("httpx", reason="the tests need the extra 'test'")
    (folder / "tmp").mkdir()
    environment = os.environ | {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lavis_chatbridge.cli", "web", "--port", "0", "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            [address] = re.findall(r"http://\S+", process.stdout.readline())
            page = httpx.get(address, timeout=120)
            assert page.status_code == 200
            assert "default-src 'self'" in page.headers["content-security-policy"]
        finally:
            process.terminate()
            process.wait(60)
    assert list((folder / "tmp").glob("chatbridge-web-*")) == []
