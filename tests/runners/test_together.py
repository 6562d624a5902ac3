"""A process that must give up takes the others with it: before they have joined, and at each point of a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from lavis_chatbridge.datasets.plan import MixturePlan
from lavis_chatbridge.errors import ChatBridgeError, ConfigError, DataError
from lavis_chatbridge.plugin import cache_features, launch, suites, world
from lavis_chatbridge.prompting import Message
from lavis_chatbridge.runners import distributed
from lavis_chatbridge.schema import Sample, write_jsonl
from tests.runners.runner_parts import ToyGroup, ToySource, config, in_processes, runner

YAML = """
datasets: {chatbridge_world_caption: {}}
run: {task: chatbridge_alignment, max_iters: 1, device: cpu, timeout_minutes: 0.5, resume: RESUME}
"""


def told(folder: Path) -> list[str]:
    """What each process was told, in the order of ranks."""
    return [(folder / f"told{rank}").read_text() for rank in range(len(list(folder.glob("told*"))))]


def tell(folder: Path, rank: int, text: object) -> None:
    (folder / f"told{rank}").write_text(str(text))


def _launched(rank, folder, bad):
    """Each process has a file of its own; that of process ``bad`` names a checkpoint which it lacks."""
    resume = "absent" if rank == bad else "null"
    (folder / f"{rank}.yaml").write_text(YAML.replace("RESUME", resume))
    with pytest.raises(ChatBridgeError) as caught:
        launch.launch(str(folder / f"{rank}.yaml"), [], evaluate=False)
    tell(folder, rank, caught.value)


@pytest.mark.parametrize("bad", [0, 1], ids=["the one that others ask", "another one"])
def test_a_configuration_that_fails_on_one_process_ends_all(tmp_path, bad):
    in_processes(_launched, 2, tmp_path, bad)
    fault = f"{tmp_path}/{bad}.yaml: run: resume: no checkpoint at absent"
    expected = [fault, f"process 0: {fault}"] if bad == 0 else [f"process 1: {fault}", fault]
    assert told(tmp_path) == expected


def _meets_and_joins(rank, folder):
    words = []
    for faulty in (1, 2):  # processes may leave their group and meet for another one
        meeting = distributed.Meeting({"timeout_minutes": 0.5})
        try:
            with meeting.together():
                if rank == faulty:
                    raise KeyError("gone")  # no error of ours: the process keeps its traceback
        except (KeyError, ChatBridgeError) as error:
            words.append(str(error))
        with meeting.together():
            pass
        meeting.join(config(folder).run)
        assert distributed.gather_everywhere(rank) == [0, 1, 2]
        with meeting.together():
            pass
        distributed.close()
    tell(folder, rank, words)


def test_processes_meet_as_often_as_they_must_before_they_join(tmp_path):
    in_processes(_meets_and_joins, 3, tmp_path)
    first, second = "process 1: KeyError: 'gone'", "process 2: KeyError: 'gone'"
    assert told(tmp_path) == [str([first, second]), str(["'gone'", second]), str([first, "'gone'"])]


def _apart(rank, folder):
    distributed.choose_device = lambda *_: SimpleNamespace(type="cuda" if rank == 1 else "cpu")
    with pytest.raises(ConfigError) as caught:
        distributed.Meeting({"timeout_minutes": 0.5}).join(config(folder).run)
    tell(folder, rank, caught.value)


def test_processes_with_other_kinds_of_devices_are_no_group(tmp_path):
    in_processes(_apart, 3, tmp_path)
    assert len(set(told(tmp_path))) == 1
    assert told(tmp_path)[2].startswith("process 1 would compute on cuda, the others on cpu: look at the devices")


def _nothing_to_build_upon(rank, folder):
    distributed.init(config(folder).run)
    (folder / f"root{rank}").mkdir()
    (folder / f"root{rank}" / "something else").touch()
    with pytest.raises(ChatBridgeError) as caught:
        world.prepare({"chatbridge_world_caption": {"data_root": str(folder / f"root{rank}")}})
    tell(folder, rank, caught.value)
    distributed.close()


def test_a_world_that_the_main_process_cannot_build_ends_all(tmp_path):
    in_processes(_nothing_to_build_upon, 2, tmp_path)
    main, other = told(tmp_path)
    assert str(tmp_path / "root0") in main
    assert other == f"process 0: {main}"


class Malformed(ToySource):
    """Its samples from the sixth on have no form."""

    def item(self, index, epoch=0):
        if index > 5:
            raise DataError(f"sample {index} has no text")
        return super().item(index, epoch)


def _malformed_data(rank, folder, more):
    kind = Malformed if rank == 1 else ToySource
    pictures = {"pictures": {"train": ToyGroup([kind("pictures", "image", 40)])}}
    one = runner(folder, data=pictures, max_iters=12, save_every_steps=1, log_every=1, **more)
    with pytest.raises(ChatBridgeError) as caught:
        one.train()
    tell(folder, rank, caught.value)
    distributed.close()


@pytest.mark.parametrize("more", [{}, {"parallel": "fsdp"}], ids=["ddp", "fsdp"])
def test_data_that_fail_on_one_process_end_the_training_of_all(tmp_path, more):
    in_processes(_malformed_data, 2, tmp_path, more)
    first, second = told(tmp_path)
    assert second.endswith("has no text")
    assert first == f"process 1: {second}"


def _partly_unreadable(rank, folder, bad):
    pictures = {"pictures": {"train": ToyGroup([ToySource("pictures", "image", 400, bad=bad)])}}
    one = runner(folder, data=pictures, max_iters=10, save_every_steps=1, keep_last=20)
    try:
        one.train()
    except DataError as error:
        tell(folder, rank, error)
    else:
        tell(folder, rank, one.state.sources["pictures"])
    distributed.close()


@pytest.mark.parametrize("count", [2, 3])
def test_the_share_of_unreadable_samples_is_that_of_all_processes(tmp_path, count):
    """All of them are in the fifth batch of process 1, whose own share is then 10 or 15 %."""
    fifth = MixturePlan({"pictures": 400}, batch_size=4, world_size=2, seed=42).batch(4, 1)[1]
    bad = tuple(index for index, _ in fifth[:count])
    in_processes(_partly_unreadable, 2, tmp_path, bad)
    first, second = told(tmp_path)
    assert first == second
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    if count == 2:
        assert first.startswith("SourceCount(samples=78, skipped=2,")
        assert saved[-1] == "step_00000010"
    else:
        cause = f"cannot read pictures-{bad[0]}.png: truncated"
        assert first.startswith("pictures: 3 of 40 samples could not be read, more than the 5% that max_bad_share")
        assert first.endswith(f"lists them); one of them: {cause}")
        assert saved[-1] == "step_00000004"  # its counts are below the limit: a mended source can go on from there


def _evaluates(rank, folder, bad):
    splits = {"pictures": {"test": ToyGroup([ToySource("pictures", "image", 60, bad=bad)])}}
    one = runner(folder, data=splits, evaluate=True, test_splits=["test"])
    try:
        tell(folder, rank, one.evaluate()["test"]["samples"])
    except ChatBridgeError as error:
        tell(folder, rank, error)
    distributed.close()


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        ((0, 5, 10), ["57", "57"]),
        ((0, 5, 10, 1), ["pictures: 4 of 60 samples could not be read, more than the 5%"] * 2),
    ],
    ids=["as many as allowed", "one more"],
)
def test_an_evaluation_lacks_what_its_processes_lack_together(tmp_path, bad, expected):
    in_processes(_evaluates, 2, tmp_path, bad)
    for found, start in zip(told(tmp_path), expected, strict=True):
        assert found.startswith(start)


SUITE = """
datasets: {{chatbridge_jsonl: {{data_root: '{root}', splits: {{test: test.jsonl}}}}}}
run: {{task: chatbridge_captioning, test_splits: [test], metrics: [exact_match]}}
"""


class Noting(launch.Session):
    """A session that joins, and notes what it is asked to score."""

    ran: ClassVar[list[str]] = []

    def run(self, cfg_path, options, evaluate):
        self._meeting.join(config(Path(cfg_path).parent).run)
        self.ran.append(Path(cfg_path).stem)
        raise ConfigError("scored by nobody")


def _scores_suites(rank, folder):
    """The second process lacks the data of the first suite."""
    own = folder / str(rank)
    own.mkdir()
    there = folder / "test.jsonl"
    for name, root in (("one", folder if rank == 0 else own), ("two", folder)):
        (own / f"{name}.yaml").write_text(SUITE.format(root=root))
    write_jsonl(there, [Sample("s", turns=(Message("user", "Who?"), Message("assistant", "me")))])
    with Noting() as session:
        scored = suites._Runs(session, [])
        for suite in suites.find(own).values():
            scored.score(suite, None)
        assert session.ran == ["two"]
        assert distributed.gather_everywhere(rank) == [0, 1]
    tell(folder, rank, [f"{line.suite} {line.status} {line.remarks}" for line in scored.lines])


def test_a_suite_whose_data_one_process_lacks_is_scored_by_none(tmp_path):
    in_processes(_scores_suites, 2, tmp_path)
    first, second = told(tmp_path)
    assert "one missing" in second
    assert "one failed ['process 1: datasets.chatbridge_jsonl: 1 of its files" in first
    assert "two failed ['scored by nobody']" in first


def _caches(rank, folder):
    """The second process has no configuration."""
    path = folder / f"{rank}.yaml"
    if rank == 0:
        path.write_text("model: {arch: chatbridge}\n" + SUITE.format(root=folder))
        write_jsonl(folder / "test.jsonl", [Sample("s", turns=(Message("user", "Who?"), Message("assistant", "me")))])
    options = ["run.max_iters=1", "run.train_splits=[test]", f"run.feature_cache={folder / 'features'}"]
    try:
        cache_features.run(SimpleNamespace(cfg_path=str(path), options=options))
    except ChatBridgeError as error:
        tell(folder, rank, str(error))


def test_features_are_made_by_all_processes_or_none(tmp_path):
    in_processes(_caches, 2, tmp_path)
    first, second = told(tmp_path)
    assert second == f"no configuration file at {tmp_path / '1.yaml'}"
    assert first == f"process 1: {second}"
