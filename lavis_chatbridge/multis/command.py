"""The command ``chatbridge multis STAGE``: options in, one stage run, a short report.

It knows the stages and how to word their results, nothing of how they work.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lavis_chatbridge import config as settings
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.launchers import share_of

STOPPED_EARLY = 3
_RunStage = Callable[[argparse.Namespace], int]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the stages and their options."""
    stages = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)
    for name, summary, define, run_stage in _STAGES:
        stage = stages.add_parser(name, help=summary, description=summary.capitalize() + ".")
        define(stage)
        stage.set_defaults(run_stage=run_stage)


def run(args: argparse.Namespace) -> int:
    """Run the stage that was asked for.

    Returns:
        0; 3 if a generation stopped before its end.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    return args.run_stage(args)


def _define_annotate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("items", help="JSON lines: id, media, and what people wrote about them")
    parser.add_argument("--out", required=True, help="folder for the annotations; run again to go on")
    parser.add_argument(
        "--with",
        dest="annotators",
        metavar="NAME=PATH[,OPTION=VALUE...]",
        action="append",
        default=[],
        help="an annotator: blip2, lavis, florence2, segmenter, audio_tagger (a folder of weights), or grit, "
        "semantic_sam, captions, sound_captions, tags (JSON made elsewhere); may be given several times",
    )
    parser.add_argument("--media-root", help="what the media's paths are relative to (default: the folder of ITEMS)")
    parser.add_argument("--rank", type=int, help="this process (default: RANK or SLURM_PROCID)")
    parser.add_argument("--world", type=int, help="number of processes (default: WORLD_SIZE or SLURM_NTASKS)")


def _annotate(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis.annotate import annotate
    from lavis_chatbridge.multis.annotators import registry

    place = share_of(args.rank, args.world, os.environ)
    annotators = [registry.build(text) for text in args.annotators]
    report = annotate(args.items, args.out, annotators, args.media_root, place.rank, place.world_size)
    print(f"annotated {report.annotated}, found finished {report.known}, unreadable {report.failed}: {args.out}")
    return 0


def _define_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("annotations", help="the folder or file that `annotate` made")
    parser.add_argument("--out", required=True, help="folder for the journal; run again to go on")
    parser.add_argument("--model", required=True, help="the model's name at the server")
    parser.add_argument(
        "--base-url", help="an OpenAI-compatible server, e.g. http://localhost:8000/v1 (default: OpenAI's)"
    )
    parser.add_argument(
        "--api-key-env", default="OPENAI_API_KEY", help="environment variable with the key (default: %(default)s)"
    )
    parser.add_argument("--kinds", help="comma-separated: conversation,detail,reasoning (default: all)")
    parser.add_argument(
        "--counts",
        default="",
        metavar="KIND=N,...",
        help="at most so many of a kind, e.g. conversation=24000,detail=18000",
    )
    parser.add_argument("--prompts", help="a folder with kinds.yaml and seeds/ of one's own")
    parser.add_argument("--shots", type=int, default=3, help="seed examples per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws items and examples (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="default: %(default)s")
    parser.add_argument("--top-p", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument(
        "--concurrency", type=int, default=16, help="requests under way at a time (default: %(default)s)"
    )
    parser.add_argument("--attempts", type=int, default=6, help="tries per request (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds per try (default: %(default)s)")
    parser.add_argument("--requests-per-minute", type=float, help="rate limit")
    parser.add_argument("--tokens-per-minute", type=float, help="rate limit, prompts and longest answers together")
    parser.add_argument(
        "--max-cost", type=float, metavar="USD", help="never spend more, all runs into this folder together"
    )
    parser.add_argument(
        "--prices", help="a price table of one's own (YAML: MODEL: {input: ..., output: ...} per million tokens)"
    )
    parser.add_argument(
        "--price-of", metavar="MODEL", help="use the price of this entry of the table; `local` costs nothing"
    )
    parser.add_argument(
        "--in-doubt", choices=("ask", "recover", "hold"), default="ask",
        help="requests that a kill cut off: ask again, recover what the server stored (OpenAI), or hold back "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--token-limit-field", choices=("max_tokens", "max_completion_tokens"), default="max_tokens")
    parser.add_argument("--extra-body", default="{}", metavar="JSON", help="further fields of each request")
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost, and send nothing")


def _generate(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis import generate as stage
    from lavis_chatbridge.multis.endpoint import EndpointSettings
    from lavis_chatbridge.multis.ledger import JOURNAL_NAME, Ledger
    from lavis_chatbridge.multis.limits import price_of
    from lavis_chatbridge.multis.prompts import PromptBook

    options = settings.parse(stage.GenerateSettings, _generate_values(args), "generate")
    endpoint = settings.parse(EndpointSettings, _endpoint_values(args), "endpoint")
    book = PromptBook(args.prompts)
    priced = options.max_cost is not None or args.dry_run or args.prices or args.price_of
    try:
        price = price_of(args.price_of or endpoint.model, args.prices)
    except ConfigError:
        if priced:
            raise
        price = price_of("local")  # nobody asked for money to be counted
    requests = stage.plan(_Annotations(args.annotations), book, options, endpoint)
    if args.dry_run:
        print(
            _estimate_text(stage.estimate(requests, book, price, Ledger.read(Path(args.out) / JOURNAL_NAME)), options)
        )
        return 0
    report = stage.generate(requests, args.out, endpoint, price, options)
    print(
        f"answered {report.answered} ({report.recovered} of them recovered), known {report.known}, held {report.held}, "
        f"gave up {report.gave_up}; spent ${report.spent:.4f} in all: {args.out}"
    )
    if report.stopped:
        print(f"stopped early: {report.stopped}; the same command goes on from here")
    return STOPPED_EARLY if report.stopped else 0


def _generate_values(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "shots", "seed", "concurrency", "attempts", "requests_per_minute", "tokens_per_minute", "max_cost", "in_doubt",
    )  # fmt: skip
    values: dict[str, Any] = {name: getattr(args, name) for name in names}
    if args.kinds:
        from lavis_chatbridge.multis.prompts import DATA_KINDS

        values["kinds"] = [kind.strip() for kind in args.kinds.split(",")]
        unknown = [kind for kind in values["kinds"] if kind not in DATA_KINDS]
        if unknown:
            raise ConfigError(f"--kinds has no {unknown[0]!r}; known are {', '.join(DATA_KINDS)}")
    if args.counts:
        try:
            pairs = [pair.split("=") for pair in args.counts.split(",")]
            values["counts"] = {kind.strip(): int(count) for kind, count in pairs}
        except ValueError as error:
            raise ConfigError(f"--counts: expected KIND=N,KIND=N, found {args.counts!r}") from error
    return values


def _endpoint_values(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "base_url", "api_key_env", "temperature", "top_p", "timeout", "token_limit_field")
    try:
        extra = json.loads(args.extra_body)
    except ValueError as error:
        raise ConfigError(f"--extra-body is not JSON: {error}") from error
    return {**{name: getattr(args, name) for name in names}, "store": args.in_doubt == "recover", "extra_body": extra}


def _estimate_text(estimate: Any, options: Any) -> str:
    lines = [
        f"requests to send:        {estimate.requests} ({estimate.known} have an answer already)",
        f"prompt tokens, about:    {estimate.prompt_tokens}",
        f"answer tokens, about:    {estimate.completion_tokens}",
        f"cost, about:             ${estimate.cost:.2f}",
        f"cost, never more than:   ${estimate.bound:.2f}",
        f"spent so far:            ${estimate.spent:.2f}",
    ]
    if options.max_cost is not None:
        lines.append(f"limit (--max-cost):      ${options.max_cost:.2f}")
        if estimate.spent + estimate.cost > options.max_cost:
            lines.append("the limit will probably stop the run before its end")
    return "\n".join(lines)


class _Annotations:
    """Re-iterable annotations, so that a plan may look through them first to draw items."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> Any:
        from lavis_chatbridge.multis.annotation import read_annotations

        return read_annotations(self._path)


def _define_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("generated", help="the folder that `generate` made")
    parser.add_argument("--annotations", required=True, help="the annotations from which it was made")
    parser.add_argument("--out", required=True, help="folder for accepted.jsonl, rejected.jsonl and statistics.json")
    parser.add_argument("--prompts", help="the folder with prompts of one's own, if `generate` had one")
    parser.add_argument("--config", help="YAML: limits, duplicate_from, unsafe, language, things")
    parser.add_argument(
        "--unsafe", metavar="MODULE:FUNCTION", help="from a text to a reason or None, e.g. a classifier"
    )


def _check(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis.check import Checker, CheckSettings, check
    from lavis_chatbridge.multis.prompts import PromptBook
    from lavis_chatbridge.multis.statistics import table

    values = _yaml(args.config) if args.config else {}
    if args.unsafe:
        values["unsafe"] = args.unsafe
    checker = Checker(settings.parse(CheckSettings, values, "check"), PromptBook(args.prompts))
    print(table(check(args.generated, args.annotations, args.out, checker).to_json()))
    return 0


def _define_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checked", help="the folder that `check` made")
    parser.add_argument("--json", action="store_true", help="all counts as JSON")


def _stats(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis.statistics import table

    file = Path(args.checked) / "statistics.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}; run `chatbridge multis check` first") from error
    print(json.dumps(values, indent=2) if args.json else table(values))
    return 0


def _define_page(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checked", help="the folder that `check` made")
    parser.add_argument("--media-root", required=True, help="what the media's paths are relative to")
    parser.add_argument("--out", required=True, help="the HTML file")
    parser.add_argument("--annotations", help="show beside each sample what its writer knew")
    parser.add_argument("--accepted", type=int, default=40, help="how many accepted samples (default: %(default)s)")
    parser.add_argument("--rejected", type=int, default=20, help="how many of those turned down (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="draws them (default: %(default)s)")


def _page(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis.page import PageSettings, write_page

    options = PageSettings(args.accepted, args.rejected, args.seed)
    count = write_page(args.checked, args.media_root, args.out, options, args.annotations)
    print(f"{count} samples: {args.out}")
    return 0


def _define_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML: sources with their files, licences and tasks")
    parser.add_argument("--out", required=True, help="the folder to make; must not exist")


def _build(args: argparse.Namespace) -> int:
    from lavis_chatbridge.multis.build import build, load_settings

    manifest = build(load_settings(args.config), args.out)
    for name, source in manifest["sources"].items():
        skipped = f", {source['skipped']} skipped" if source["skipped"] else ""
        print(f"{name:30}{source['samples']:9} samples{skipped}  ({source['licence']})")
    print(f"{manifest['samples']} samples: {args.out}/manifest.json")
    return 0


def _yaml(path: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping, found {type(values).__name__}")
    return values


_STAGES: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None], _RunStage], ...] = (
    ("annotate", "put media into words", _define_annotate, _annotate),
    ("generate", "ask a language model for chat data", _define_generate, _generate),
    ("check", "accept or turn down what it wrote", _define_check, _check),
    ("stats", "show the statistics of a check", _define_stats, _stats),
    ("page", "make a page of samples with their media", _define_page, _page),
    ("build", "make the sharded MULTIS with its manifest", _define_build, _build),
)
