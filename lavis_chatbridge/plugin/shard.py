"""``chatbridge shard``: a configuration's data sets, or a JSONL, as webdataset shards that training reads like files.

``--cfg-path`` also writes ``datasets.yaml``, a section ``datasets`` that reads the shards.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import write_text
from lavis_chatbridge.launchers import share_of
from lavis_chatbridge.plugin.launch import CfgPathOrNone, Options, load, prepare_world

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.dataset import SplitDataset
    from lavis_chatbridge.schema import SampleFile

_SHARED = ("templates", "reply_end", "data_root")  # settings that a mixture shares with its parts
_KEPT = (*_SHARED, "stage", "task", "style")
_HEAD = "# Made by `chatbridge shard`: a configuration with this section datasets reads the shards.\n"
_FROM_SHARDS: dict[str, str | bool | None] = {"reader": "jsonl", "options": None, "media": None, "media_root": None}
_FROM_SHARDS |= {"limit": None, "skip_missing": False}


def command(
    output: Annotated[Path, typer.Option(help="Folder of the shards.")],
    jsonl: Annotated[Path | None, typer.Argument(help="A JSONL of the schema in docs/data.md.")] = None,
    cfg_path: CfgPathOrNone = None,
    options: Options = None,
    splits: Annotated[list[str], typer.Option(help="With --cfg-path: a split; repeatable.")] = ["train"],  # noqa: B006
    root: Annotated[str | None, typer.Option(help="Of a JSONL: the folder of its media; default: its own.")] = None,
    allow_outside: Annotated[bool, typer.Option("--allow-outside", help="Of a JSONL: media outside the root.")] = False,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 1000,
    rank: Annotated[int | None, typer.Option(help="This process, from 0; default: from the launcher.")] = None,
    world: Annotated[int | None, typer.Option(help="Number of processes; default: from the launcher.")] = None,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="Accepted share of unreadable samples.")] = 0.05,
) -> None:
    """Write this process's shards, and print the data sets that are complete."""
    process = share_of(rank, world, os.environ)
    if (jsonl is None) == (cfg_path is None):
        raise ConfigError("name either a JSONL or a configuration (--cfg-path)")
    from lavis_chatbridge.datasets.shards import write
    from lavis_chatbridge.schema import SampleFile

    sections: dict[str, dict[str, Any]] = {}
    if jsonl is not None:
        targets = {(output, jsonl.stem): SampleFile(jsonl, root, allow_outside)}
    else:
        targets, sections = _from_configuration(str(cfg_path), options or [], splits, output, process.world_size)
    waiting = 0
    for (folder, stem), samples in targets.items():
        written = write(folder, samples, stem, per_shard, process.rank, process.world_size, max_bad_share)
        waiting += written is None
        if written is not None:
            print(written)
    if waiting:
        own = f"process {process.rank} of {process.world_size}"
        print(f"{own}: {waiting} of {len(targets)} files wait for other processes")
    elif sections:
        write_text(output / "datasets.yaml", _HEAD + OmegaConf.to_yaml({"datasets": sections}))
        print(f"{output / 'datasets.yaml'} has the section 'datasets' that reads them")


def _from_configuration(
    cfg_path: str, options: list[str], splits: list[str], output: Path, world_size: int
) -> tuple[dict[tuple[Path, str], SampleFile], dict[str, dict[str, Any]]]:
    """Folder and stem -> samples, of all splits of a configuration; and the sections that read their shards."""
    cfg = load(cfg_path, options)
    from lavis.common.registry import registry

    from lavis_chatbridge.datasets.builders import ChatBridgeBuilder, require_files

    if world_size == 1:
        prepare_world(cfg.datasets_cfg)
    require_files(cfg.datasets_cfg)
    targets: dict[tuple[Path, str], SampleFile] = {}
    sections: dict[str, dict[str, Any]] = {}
    training: dict[str, SplitDataset] = {}
    for name, section in ((str(name), section) for name, section in cfg.datasets_cfg.items()):
        builder = registry.get_builder_class(name)
        if not issubclass(builder, ChatBridgeBuilder):
            raise ConfigError(f"datasets.{name} is LAVIS's own, which chatbridge shard cannot read")
        for split, group in builder(section).build(splits).items():
            for (part, stem), samples in _files_of(group).items():
                folder = output / part / split
                targets[folder, stem] = samples
                own = sections.setdefault(part, _section(section, registry.get_builder_class(part), part != name))
                own["splits"][split] = [*(own["splits"].get(split) or []), str((folder / f"{stem}.jsonl").absolute())]
            if split == "train":
                training[name] = group
    if not targets:
        raise ConfigError(f"no data set of {cfg_path} has a split {' or '.join(splits)}")
    _add_ratios(sections, training)
    return targets, sections


def _files_of(group: SplitDataset) -> dict[tuple[str, str], SampleFile]:
    """Data set and a name for its shards, if possible the file's -> each annotation file of a split."""
    found: dict[tuple[str, str], SampleFile] = {}
    for source in group.sources:
        part, samples = source.name.split("/")[0], source.samples
        stem, number = Path(samples.path).stem, 0
        while (name := (part, f"{stem}-{number}" if number else stem)) in found and found[name] is not samples:
            number += 1
        found[name] = samples
    return found


def _section(section: DictConfig, builder: Any, of_mixture: bool) -> dict[str, Any]:
    """The section of a data set that reads shards: the user's settings for it, and a key for every split."""
    from lavis_chatbridge.processors.base import SECTIONS

    given: Any = OmegaConf.to_container(section, resolve=True)
    names = (*(_SHARED if of_mixture else _KEPT), *SECTIONS.values())
    kept = {name: given[name] for name in names if name in given and given[name] != builder.DEFAULTS.get(name)}
    if of_mixture and builder.DEFAULTS.get("templates") is False:  # its questions are complete instructions
        kept.pop("templates", None)
    splits = [*(builder.DEFAULTS.get("splits") or {}), *({} if of_mixture else given.get("splits") or {})]
    return kept | _FROM_SHARDS | {"splits": dict.fromkeys(splits)}


def _add_ratios(sections: dict[str, dict[str, Any]], training: Mapping[str, SplitDataset]) -> None:
    """The shares of the steps, if the configuration sets any: a mixture's parts become separate data sets."""
    from lavis_chatbridge.datasets.loader import source_ratios

    if all(group.ratio is None and all(s.ratio is None for s in group.sources) for group in training.values()):
        return
    for source, share in source_ratios(training).items():
        own = sections[source.split("/")[0]]
        own["ratio"] = own.get("ratio", 0.0) + share
