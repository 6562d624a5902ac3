"""The door into LAVIS in real processes: any order of imports, autoload on and off, both installs."""

from __future__ import annotations

import pytest

from tests.plugin.conftest import Probe, facts_of

NO_AUTOLOAD = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}

LAVIS_FIRST = """
from lavis.models import load_model_and_preprocess, model_zoo
import sys
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["stand-ins left"] = [name for name in ("spacy", "ftfy") if name in sys.modules and not sys.modules[name].__spec__]
from lavis.common.registry import registry
facts["task"] = "chatbridge_alignment" in registry.list_tasks()
facts["runner"] = "chatbridge_runner" in registry.list_runners()
facts["file"] = sys.modules["lavis_chatbridge"].__file__
model, vis_processors, txt_processors = load_model_and_preprocess("chatbridge", is_eval=True)
facts["loaded"] = [type(model).__name__, *sorted(vis_processors), *sorted(txt_processors)]
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

QUICK = """
import sys
import lavis_chatbridge
from pathlib import Path
from lavis_chatbridge import cli
picture = Path(lavis_chatbridge.__file__).parent / "assets" / "examples" / "picture.jpg"
facts["status"] = cli.main(["ask", "what is it?", "--image", str(picture), "--device", "cpu"])
slow = ("timm", "pandas", "torchvision", "scipy", "decord", "cv2", "lavis.models.blip2_models.blip2")
facts["imported"] = [name for name in slow if name in sys.modules]
from lavis.common.registry import registry
facts["another processor"] = registry.get_processor_class("blip_image_eval").__name__
facts["another model"] = registry.get_model_class("blip_caption").__name__
facts["task"] = registry.get_task_class("chatbridge_alignment").__name__
from lavis.models import load_model_and_preprocess
facts["model"] = type(load_model_and_preprocess("chatbridge", is_eval=True)[0]).__name__
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
    "lavis first, editable": Probe.python(LAVIS_FIRST),
    "lavis first, wheel": Probe.python(LAVIS_FIRST, wheel=True),
    "torch first": Probe.python(TORCH_FIRST),
    "switched off": Probe.python(SWITCHED_OFF, environment=NO_AUTOLOAD),
    "spawned": Probe.python(SPAWNED),
    "quick": Probe.python(QUICK),
    "failing hook": Probe.python(
        "import torch\nfacts['sum'] = torch.ones(2).sum().item()",
        environment={"PYTHONPATH": "."},
        files={"sitecustomize.py": FAILING_HOOK},
    ),
    "failing model": Probe.python(
        WITH_FAILURE, environment={"PYTHONPATH": "."}, files={"sitecustomize.py": FAILING_MODEL}
    ),
    "evaluate fault, wheel": Probe(["-m", "lavis.evaluate", "--cfg-path", "absent.yaml"], wheel=True),
    "shipped, wheel": Probe(["doctor", "--cfg-path", "align"], wheel=True, script="chatbridge"),
    "command, switched off": Probe(
        ["train", "--cfg-path", "absent.yaml"], wheel=True, script="chatbridge", environment=NO_AUTOLOAD
    ),
}
TYPES = ["qwen3_8b", "small", "tiny", "vicuna13b", "vicuna7b"]


@pytest.fixture(scope="module")
def ran(run_all):
    return run_all(PROBES)


@pytest.mark.parametrize("install", ["editable", "wheel"])
def test_lavis_alone_knows_chatbridge(ran, install, repository):
    result = ran(f"lavis first, {install}")
    facts = facts_of(result)
    assert facts.pop("file").startswith(str(repository)) == (install == "editable")
    assert facts == {
        "zoo": TYPES,
        "stand-ins left": [],
        "task": True,
        "runner": True,
        "loaded": ["ChatBridge", "eval", "train", "eval", "train"],
    }
    assert "does not know" not in result.stderr
    assert result.stderr.count("it knows nothing outside that world") == 1
    assert "Importing from timm" not in result.stderr


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("torch first", {"loaded by torch": ["lavis_chatbridge"], "same class": True, "runner": True, "zoo": TYPES}),
        ("switched off", {"loaded by torch": [], "zoo": TYPES, "train": "lavis.train"}),
        ("spawned", {"main": "__mp_main__", "class": "ChatBridge", "zoo": TYPES}),
    ],
)
def test_the_plugin_is_active_however_it_is_imported(ran, name, facts):
    assert facts_of(ran(name)) == facts


def test_a_quick_start_imports_the_rest_when_it_is_used(ran):
    assert facts_of(ran("quick")) == {
        "status": 0,
        "imported": [],
        "another processor": "BlipImageEvalProcessor",
        "another model": "BlipCaption",
        "task": "AlignmentTask",
        "model": "ChatBridge",
    }


def test_a_failing_hook_does_not_break_torch(ran):
    result = ran("failing hook")
    assert facts_of(result) == {"sum": 2.0}
    assert "lavis-chatbridge is not active: RuntimeError: no finder today" in result.stderr


def test_a_failing_module_costs_its_own_classes_only(ran):
    result = ran("failing model")
    assert facts_of(result) == {"zoo": None, "others": True, "runner": True}
    why = "does not know the classes of lavis_chatbridge.models.chatbridge: RuntimeError: a broken model"
    assert why in result.stderr


def test_the_wheel_has_the_shipped_configurations(ran):
    assert "model.vision.weights" in ran("shipped, wheel").stdout


@pytest.mark.parametrize("name", ["evaluate fault, wheel", "command, switched off"])
def test_a_fault_is_one_line_and_status_2(ran, name):
    result = ran(name)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: no configuration file at absent.yaml"
    assert "Traceback" not in result.stderr
