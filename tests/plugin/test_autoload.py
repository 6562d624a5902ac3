"""The plugin in real processes: any order of imports, autoload on and off, both installs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch
from lavis.models.blip2_models.Qformer import BertLMHeadModel
from transformers import BertConfig

TYPES = ["qwen3_8b", "small", "tiny", "vicuna13b", "vicuna7b"]

LAVIS_FIRST = """
from lavis.models import load_model_and_preprocess, model_zoo
import sys
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["stand-in left"] = "spacy" in sys.modules
from lavis.models.img2prompt_models import img2prompt_vqa
try:
    img2prompt_vqa.spacy.load("en_core_web_sm")
except ImportError as error:
    facts["needs"] = str(error)
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
import importlib.util
importlib.util.find_spec("lavis_chatbridge.files")  # as `coverage run --source` does, which then forgets the package
for name in [name for name in sys.modules if name.startswith("lavis_chatbridge")]:
    del sys.modules[name]
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

WITH_FAILURE = """
import torch
from lavis.models import model_zoo
facts["zoo"] = dict(model_zoo).get("chatbridge")
facts["others"] = "blip_caption" in dict(model_zoo)
from lavis.common.registry import registry
facts["runner"] = "chatbridge_runner" in registry.list_runners()
"""


@pytest.mark.parametrize("packed", [False, True], ids=["editable", "wheel"])
def test_lavis_alone_knows_chatbridge(facts_of, packed, repository):
    facts, stderr = facts_of(LAVIS_FIRST, wheel=packed)
    assert facts.pop("file").startswith(str(repository)) is not packed
    assert facts == {
        "zoo": TYPES,
        "stand-in left": False,
        "needs": "this LAVIS model needs the package 'spacy': pip install spacy",
        "task": True,
        "runner": True,
        "loaded": ["ChatBridge", "eval", "train", "eval", "train"],
    }
    assert "does not know" not in stderr
    assert stderr.count("it knows nothing outside that world") == 1
    assert "Importing from timm" not in stderr


def test_the_plugins_class_can_be_imported_first(facts_of):
    facts, _ = facts_of(TORCH_FIRST)
    assert facts == {"loaded by torch": ["lavis_chatbridge"], "same class": True, "runner": True, "zoo": TYPES}


def test_importing_the_package_activates_it_where_autoload_is_off(facts_of):
    facts, _ = facts_of(SWITCHED_OFF, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert facts == {"loaded by torch": [], "zoo": TYPES, "train": "lavis.train"}


def test_a_spawned_child_of_lavis_train_has_the_plugin(facts_of):
    assert facts_of(SPAWNED)[0] == {"main": "__mp_main__", "class": "ChatBridge"}


def test_a_quick_start_imports_the_rest_when_it_is_used(facts_of):
    assert facts_of(QUICK)[0] == {
        "status": 0,
        "imported": [],
        "another processor": "BlipImageEvalProcessor",
        "another model": "BlipCaption",
        "task": "ChatBridgeTask",
        "model": "ChatBridge",
    }


def test_a_failing_hook_does_not_break_torch(facts_of):
    no_finder_fits = "import sys\nsys.meta_path = tuple(sys.meta_path)"
    facts, stderr = facts_of("import torch\nfacts['sum'] = torch.ones(2).sum().item()", startup=no_finder_fits)
    assert facts == {"sum": 2.0}
    assert "lavis-chatbridge is not active: AttributeError: 'tuple' object has no attribute 'insert'" in stderr


def test_of_a_failing_module_only_its_own_classes_are_missing(facts_of):
    startup = "import sys\nsys.modules['lavis_chatbridge.models.chatbridge'] = None"
    facts, stderr = facts_of(WITH_FAILURE, startup=startup)
    assert facts == {"zoo": None, "others": True, "runner": True}
    assert "does not know the classes of lavis_chatbridge.models.chatbridge: ModuleNotFoundError: import of" in stderr


def test_the_wheel_has_the_package_and_all_its_data(run, wheel_file: Path, repository: Path):
    with zipfile.ZipFile(wheel_file) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    walked = os.walk(repository / "lavis_chatbridge", followlinks=True)  # configs/projects is a link
    sources = {Path(folder, name).relative_to(repository).as_posix() for folder, _, files in walked for name in files}
    assert packed == {name for name in sources if "__pycache__" not in name}
    assets = [repository / name for name in packed if name.startswith("lavis_chatbridge/assets/")]
    assert 0 < sum(path.stat().st_size for path in assets) <= 12_000_000
    ran = run("chatbridge", "doctor", "--cfg-path", "align", wheel=True, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "model.vision.weights" in ran.stdout
    ran = run("python", "-m", "lavis.evaluate", "--cfg-path", "absent.yaml", wheel=True)
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1] == "error: no configuration file at absent.yaml"


def test_laviss_q_former_ignores_masked_tokens():
    config = BertConfig(vocab_size=5, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8)
    config.encoder_width, config.add_cross_attention = 6, True
    config.cross_attention_freq, config.query_length = 1, 3
    torch.manual_seed(0)
    bert = BertLMHeadModel(config).eval().bert
    queries, features, mask = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

    def read(features, mask):
        return bert(query_embeds=queries, encoder_hidden_states=features, encoder_attention_mask=mask)[0]

    changed = features.clone()
    changed[:, 3] += 1
    before, after = read(features, mask), read(changed, mask)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    assert torch.equal(read(features, mask[:, None].expand(-1, 3, -1)), before)
