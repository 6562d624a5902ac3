"""``chatbridge shard``: a configuration's data sets, or a JSONL, as webdataset shards that training reads like files.

``--cfg-path`` also writes ``datasets.yaml``, the section ``datasets`` that reads the shards in the place of the files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from lavis_chatbridge.config import find_yaml
from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.files import read_json
from lavis_chatbridge.launchers import share_of
from lavis_chatbridge.plugin.launch import add_options

if TYPE_CHECKING:
    from lavis_chatbridge.datasets.shards import ShardSet

__all__ = ["add_arguments", "run"]

_MIB = 1 << 20
_DATASETS = "datasets.yaml"
_SHARED = ("templates", "reply_end", "data_root")  # what a mixture sets for its parts
_KEPT = (*_SHARED, "stage", "task", "style", "split_modalities")
_FROM_SHARDS = {
    "reader": "jsonl",
    "media": None,
    "media_root": None,
    "allow_outside": False,
    "skip_missing": False,
    "limit": None,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to write, where to, and which part of it."""
    parser.add_argument("jsonl", nargs="?", type=Path, help="a JSONL of the schema in docs/data.md")
    parser.add_argument("--cfg-path", metavar="YAML", help="instead: a configuration, whose data sets are written")
    add_options(parser)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the shards go")
    parser.add_argument(
        "--splits", nargs="+", default=["train"], metavar="SPLIT", help="with --cfg-path: which (default train)"
    )
    parser.add_argument("--root", metavar="DIR", help="of a JSONL: what its media are relative to (default its folder)")
    parser.add_argument("--allow-outside", action="store_true", help="of a JSONL: accept media outside the root")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N", help="samples of a shard (default 1000)")
    parser.add_argument("--rank", type=int, metavar="N", help="this process, from 0 (default: as a launcher says)")
    parser.add_argument("--world", type=int, metavar="N", help="number of processes (default: as a launcher says)")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.05, metavar="X", help="most samples to leave out (default 0.05)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare what is there with its hashes, mend what differs"
    )


def run(args: argparse.Namespace) -> int:
    """Write this process's shards, and say which data sets are complete."""
    place = share_of(args.rank, args.world, os.environ)
    if args.per_shard < 1 or not 0 <= args.max_bad_share <= 1:
        raise ConfigError("--per-shard must be at least 1, and --max-bad-share within 0 and 1")
    if (args.jsonl is None) == (args.cfg_path is None):
        raise ConfigError("name either a JSONL or a configuration (--cfg-path)")
    from lavis_chatbridge.datasets.files import SampleFile
    from lavis_chatbridge.datasets.shards import ShardSet, write_shards

    sections: dict[str, dict[str, Any]] = {}
    if args.jsonl is not None:
        samples = SampleFile(args.jsonl, args.root, args.allow_outside)
        sets = [ShardSet(args.output, args.jsonl.stem, samples, per_shard=args.per_shard)]
    else:
        sets, sections = _from_configuration(args, place.world_size)
    complete = write_shards(sets, place.rank, place.world_size, args.max_bad_share, args.verify)
    for chosen in complete:
        print(_report(chosen))
    if len(complete) < len(sets):
        print(f"{len(sets) - len(complete)} of {len(sets)} files wait for the shards of other processes")
    elif sections:
        _write_sections(args.output / _DATASETS, sections)
        print(f"{args.output / _DATASETS} has the section 'datasets' that reads them")
    return 0


def _from_configuration(args: argparse.Namespace, world_size: int) -> tuple[list[ShardSet], dict[str, dict[str, Any]]]:
    """The shards of a configuration's splits, and the sections that read them."""
    find_yaml(args.cfg_path)  # before LAVIS is imported, which takes seconds
    from lavis.common.registry import registry

    from lavis_chatbridge.datasets.builders import ChatBridgeBuilder, require_files
    from lavis_chatbridge.datasets.shards import shard_sets
    from lavis_chatbridge.plugin import world
    from lavis_chatbridge.runners.config import load_config

    cfg = load_config(args.cfg_path, args.options)
    if world_size == 1:
        world.prepare(cfg.datasets_cfg)
    require_files(cfg.datasets_cfg)
    sets: list[ShardSet] = []
    sections: dict[str, dict[str, Any]] = {}
    training: dict[str, Any] = {}
    for name, section in ((str(name), section) for name, section in cfg.datasets_cfg.items()):
        builder = registry.get_builder_class(name)
        if not issubclass(builder, ChatBridgeBuilder):
            raise ConfigError(f"datasets.{name} is none of this package's data sets: there are no files to read")
        for split, group in builder(section).build(args.splits).items():
            for chosen in shard_sets(group, args.output, split, args.per_shard):
                sets.append(chosen)
                part = chosen.folder.parent.name
                own = sections.setdefault(part, _section(section, registry.get_builder_class(part), part != name))
                own["splits"][split] = [*(own["splits"].get(split) or []), str(chosen.jsonl.absolute())]
            if split == "train":
                training[name] = group
    if not sets:
        raise ConfigError(f"no data set of {args.cfg_path} has a split {' or '.join(args.splits)}")
    _add_ratios(sections, training)
    return sets, sections


def _section(section: DictConfig, builder: Any, of_mixture: bool) -> dict[str, Any]:
    """The section of one data set that reads shards: what the user had set for it, and the place of every split."""
    from lavis_chatbridge.processors.loading import SECTIONS

    given: Any = OmegaConf.to_container(section, resolve=True)
    kept = (*(_SHARED if of_mixture else _KEPT), *SECTIONS.values())
    names = [name for name in kept if name in given and given[name] != builder.ROW.get(name)]
    if of_mixture and builder.ROW.get("templates") is False:  # its questions are whole instructions
        names = [name for name in names if name != "templates"]
    splits = [*(builder.ROW.get("splits") or {}), *({} if of_mixture else given.get("splits") or {})]
    return {name: given[name] for name in names} | _FROM_SHARDS | {"splits": dict.fromkeys(splits)}


def _add_ratios(sections: dict[str, dict[str, Any]], training: Mapping[str, Any]) -> None:
    """The shares of the steps, where the configuration sets any: a mixture's parts become data sets of their own."""
    from lavis_chatbridge.datasets.loader import source_ratios

    if all(group.ratio is None and all(s.ratio is None for s in group.sources) for group in training.values()):
        return
    for source, share in source_ratios(training).items():
        own = sections[source.split("/")[0]]
        own["ratio"] = own.get("ratio", 0.0) + share


def _write_sections(path: Path, sections: Mapping[str, Any]) -> None:
    import yaml

    from lavis_chatbridge.files import write_text

    head = "# Made by `chatbridge shard`: a configuration with this section datasets reads the shards.\n"
    write_text(path, head + yaml.safe_dump({"datasets": dict(sections)}, sort_keys=False, allow_unicode=True))


def _report(chosen: ShardSet) -> str:
    """One line on a complete set."""
    known = read_json(chosen.manifest)
    kinds = ", ".join(f"{count} {kind}" for kind, count in known["modalities"].items())
    missing = f"; left out {known['left_out']} whose media cannot be read" if known["left_out"] else ""
    shards = f"{len(known['shards'])} shards, {known['bytes'] / _MIB:.1f} MiB"
    return f"{chosen.jsonl}: {known['samples']} samples ({kinds}) in {shards}{missing}"
