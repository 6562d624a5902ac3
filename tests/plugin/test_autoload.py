"""The door into LAVIS in real processes: any order of imports, autoload on and off, both installs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.plugin.processes import Probe, Ran, python_of

NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

LAVIS_FIRST = """
from lavis.models import load_model, load_model_and_preprocess, model_zoo
import sys
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["printed"] = "chatbridge" in str(model_zoo)
facts["stand-ins left"] = [name for name in ("spacy", "ftfy") if name in sys.modules and not sys.modules[name].__spec__]
from lavis.common.registry import registry
facts["task"] = "chatbridge_alignment" in registry.list_tasks()
facts["runner"] = "chatbridge_runner" in registry.list_runners()
facts["processor"] = "chatbridge_audio_eval" in registry.list_processors()
facts["file"] = sys.modules["lavis_chatbridge"].__file__
model, vis_processors, txt_processors = load_model_and_preprocess("chatbridge", is_eval=True)
facts["model"] = type(model).__name__
facts["processors"] = sorted(vis_processors)
facts["words"] = [type(txt_processors[split]).__name__ for split in ("train", "eval")]
facts["same by load_model"] = type(load_model("chatbridge")) is type(model)
"""

TORCH_FIRST = """
import sys
import torch
facts["loaded by torch"] = sorted(name for name in sys.modules if name.startswith("lavis"))
from lavis_chatbridge.models.chatbridge import ChatBridge
from lavis.common.registry import registry
facts["same class"] = registry.get_model_class("chatbridge") is ChatBridge
facts["runner"] = "chatbridge_runner" in registry.list_runners()
import lavis.models
facts["zoo"] = dict(lavis.models.model_zoo).get("chatbridge")
"""

SWITCHED_OFF = """
import sys
import torch
facts["loaded by torch"] = sorted(name for name in sys.modules if name.startswith("lavis"))
import lavis_chatbridge
import lavis.train
from lavis.models import model_zoo
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["train"] = lavis.train.__spec__.name
"""

# What a child of `python -m lavis.train` does first when it is spawned: it imports the parent's main module again.
SPAWNED = """
import multiprocessing.spawn, pickle, sys
multiprocessing.spawn._fixup_main_from_name("lavis.train")
facts["main"] = sys.modules["__mp_main__"].main.__module__
# Protocol 0, as a parent would have written it: a class of the plugin by its name.
facts["class"] = pickle.loads(b"clavis_chatbridge.models.chatbridge\\nChatBridge\\n.").__name__
from lavis.models import model_zoo
facts["zoo"] = dict(model_zoo).get("chatbridge")
"""

SPAWNING = """
import json
import torch

class Question(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        from lavis.models import model_zoo
        return "chatbridge" in dict(model_zoo)

if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(Question(), num_workers=1, multiprocessing_context="spawn", collate_fn=list)
    print(json.dumps({"known in the worker": next(iter(loader))}))
"""

QUICK = """
import sys
import lavis_chatbridge
from pathlib import Path
from lavis_chatbridge import cli
picture = Path(lavis_chatbridge.__file__).parent / "assets" / "examples" / "picture.jpg"
facts["status"] = cli.main(["ask", "what is it?", "--image", str(picture), "--device", "cpu"])
heavy = ("torch._dynamo", "torch.distributed.tensor", "torchvision", "timm", "pandas", "decord", "cv2")
facts["imported"] = [name for name in (*heavy, "lavis.models.blip2_models.blip2") if name in sys.modules]
from lavis.common.registry import registry
facts["another processor"] = registry.get_processor_class("blip_image_eval").__name__
facts["another model"] = registry.get_model_class("blip_caption").__name__
facts["task"] = registry.get_task_class("chatbridge_alignment").__name__
import torch
from lavis.models import load_model_and_preprocess
facts["model"] = type(load_model_and_preprocess("chatbridge", is_eval=True)[0]).__name__
facts["compiled"] = torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item()
"""

STALE = """
import sys
import torch
facts["hidden"] = "lavis_chatbridge" not in sys.modules
import lavis_chatbridge
from importlib.util import find_spec
facts["door"] = type(sys.meta_path[0]).__module__
"""

# Runs before everything else in its process, and makes the hook fail where it puts its finder in place.
FAILING_HOOK = """
import sys

class Refusing(list):
    def insert(self, *arguments):
        raise RuntimeError("no finder today")

sys.meta_path = Refusing(sys.meta_path)
"""

# Makes one of the plugin's own modules fail while it registers.
FAILING_MODEL = """
import sys

class Breaking:
    def find_spec(self, name, path=None, target=None):
        if name == "lavis_chatbridge.models.chatbridge":
            raise RuntimeError("a broken model")

sys.meta_path.insert(0, Breaking())
"""

WITH_FAILURE = """
import torch
from lavis.models import model_zoo
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["others"] = "blip_caption" in dict(model_zoo)
from lavis.common.registry import registry
facts["runner"] = "chatbridge_runner" in registry.list_runners()
"""

PROBES = {
    "lavis first, editable": Probe(python_of(LAVIS_FIRST)),
    "lavis first, wheel": Probe(python_of(LAVIS_FIRST), install="wheel"),
    "torch first": Probe(python_of(TORCH_FIRST)),
    "switched off": Probe(python_of(SWITCHED_OFF), environment=NO_AUTOLOAD),
    "spawned": Probe(python_of(SPAWNED)),
    "spawning": Probe(["spawning.py"], files={"spawning.py": SPAWNING}),
    "quick": Probe(python_of(QUICK)),
    "stale": Probe(
        python_of(STALE), files={"lavis_chatbridge.egg-info/PKG-INFO": "Name: lavis-chatbridge\nVersion: 0.0.1\n"}
    ),
    "failing hook": Probe(
        python_of("import torch\nfacts['sum'] = torch.ones(2).sum().item()"),
        environment={"PYTHONPATH": "."},
        files={"sitecustomize.py": FAILING_HOOK},
    ),
    "failing model": Probe(
        python_of(WITH_FAILURE), environment={"PYTHONPATH": "."}, files={"sitecustomize.py": FAILING_MODEL}
    ),
    "evaluate fault, wheel": Probe(["-m", "lavis.evaluate", "--cfg-path", "absent.yaml"], install="wheel"),
    "shipped, wheel": Probe(["doctor", "--cfg-path", "align"], install="wheel", script="chatbridge"),
    "command, switched off": Probe(
        ["train", "--cfg-path", "absent.yaml"], install="wheel", script="chatbridge", environment=NO_AUTOLOAD
    ),
}
TYPES = ["qwen3_8b", "small", "tiny", "vicuna13b", "vicuna7b"]


@pytest.fixture(scope="module")
def ran(run_all: Callable[[dict[str, Probe]], Callable[[str], Ran]]) -> Callable[[str], Ran]:
    return run_all(PROBES)


@pytest.mark.parametrize("install", ["editable", "wheel"])
def test_lavis_alone_knows_chatbridge(ran, install, repository):
    result = ran(f"lavis first, {install}")
    facts = result.facts
    assert facts.pop("zoo") == TYPES
    assert facts.pop("file").startswith(str(repository)) == (install == "editable")
    assert facts == {
        "printed": True,
        "stand-ins left": [],
        "task": True,
        "runner": True,
        "processor": True,
        "model": "ChatBridge",
        "processors": ["eval", "train"],
        "words": ["TextProcessor", "TextProcessor"],
        "same by load_model": True,
    }
    assert "does not know" not in result.err
    assert result.err.count("it knows nothing outside that world") == 1
    assert "Importing from timm" not in result.err


def test_torch_loads_only_the_door_and_any_module_of_ours_may_come_first(ran):
    expected = {"loaded by torch": ["lavis_chatbridge"], "same class": True, "runner": True, "zoo": TYPES}
    assert ran("torch first").facts == expected


def test_with_autoload_off_one_import_does_the_same(ran):
    assert ran("switched off").facts == {"loaded by torch": [], "zoo": TYPES, "train": "lavis.train"}


def test_a_spawned_child_of_lavis_train_finds_main_module_and_classes(ran):
    assert ran("spawned").facts == {"main": "__mp_main__", "class": "ChatBridge", "zoo": TYPES}


def test_a_spawned_data_worker_knows_chatbridge(ran):
    assert ran("spawning").facts == {"known in the worker": [True]}


def test_a_quick_start_imports_the_rest_when_it_is_used(ran):
    assert ran("quick").facts == {
        "status": 0,
        "imported": [],
        "another processor": "BlipImageEvalProcessor",
        "another model": "BlipCaption",
        "task": "AlignmentTask",
        "model": "ChatBridge",
        "compiled": 2.0,
    }


def test_a_stale_egg_info_hides_the_entry_point_but_not_the_package(ran):
    assert ran("stale").facts == {"hidden": True, "door": "lavis_chatbridge"}


def test_a_failing_hook_does_not_break_torch(ran):
    result = ran("failing hook")
    assert result.facts == {"sum": 2.0}
    assert "lavis-chatbridge is not active: RuntimeError: no finder today" in result.err


def test_a_failing_module_costs_its_own_classes_only(ran):
    result = ran("failing model")
    assert result.facts == {"zoo": None, "others": True, "runner": True}
    assert "does not know the classes of lavis_chatbridge.models.chatbridge: RuntimeError: a broken model" in result.err


def test_the_wheel_has_the_shipped_configurations(ran):
    assert "the embedded world will be built in output/world" in ran("shipped, wheel").out


@pytest.mark.parametrize("name", ["evaluate fault, wheel", "command, switched off"])
def test_a_fault_is_one_line_and_status_2(ran, name):
    result = ran(name)
    assert result.status == 2
    assert result.err.splitlines()[-1] == "error: no configuration file at absent.yaml"
    assert "Traceback" not in result.err
