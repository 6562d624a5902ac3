"""``chatbridge multis STAGE``: one command per stage, with a short report. Knows nothing of how the stages work."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from lavis_chatbridge import config
from lavis_chatbridge.errors import ConfigError, DataError
from lavis_chatbridge.launchers import share_of

STOPPED_EARLY = 3
app = typer.Typer(no_args_is_help=True)
_ANNOTATORS = """An annotator: blip2, lavis, florence2, segmenter, audio_tagger (a folder of weights), or grit,
semantic_sam, captions, sound_captions, tags (JSON of another program). Repeatable."""
Out = Annotated[Path, Option("--out", help="folder of the result")]
Prompts = Annotated[Path | None, Option("--prompts", help="a folder with kinds.yaml and seeds/ of your own")]


@app.callback()
def _log() -> None:
    """Make chat data: annotate, generate, check, build."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command("annotate", help="Describe media in words; the same command continues an interrupted run.")
def annotate(
    items: Annotated[Path, Argument(help="JSON lines: id, media, and what people wrote about them")],
    out: Out,
    annotators: Annotated[list[str], Option("--with", metavar="NAME=PATH[,OPTION=VALUE...]", help=_ANNOTATORS)] = [],  # noqa: B006
    media_root: Annotated[Path | None, Option("--media-root", help="media paths are relative to it")] = None,
    rank: Annotated[int | None, Option("--rank", help="of this process (default: RANK or SLURM_PROCID)")] = None,
    world: Annotated[int | None, Option("--world", help="processes (default: WORLD_SIZE or SLURM_NTASKS)")] = None,
) -> None:
    """``chatbridge multis annotate``."""
    from lavis_chatbridge.multis import annotate as stage
    from lavis_chatbridge.multis.annotators import build

    share = share_of(rank, world, os.environ)
    built = [build(text) for text in annotators]
    report = stage.annotate(items, out, built, media_root, share.rank, share.world_size)
    print(f"annotated {report.annotated}, finished before {report.known}, unreadable {report.failed}: {out}")


@app.command("generate", help="Ask a language model for chat data; the same command continues an interrupted run.")
def generate(
    annotations: Annotated[Path, Argument(help="the folder or file of `annotate`")],
    out: Out,
    model: Annotated[str, Option("--model", help="the model's name at the server")],
    base_url: Annotated[str | None, Option("--base-url", help="an OpenAI-compatible server (default: OpenAI)")] = None,
    api_key_env: Annotated[str, Option("--api-key-env", help="variable with the key")] = "OPENAI_API_KEY",
    kinds: Annotated[str, Option("--kinds", help="comma-separated: conversation,detail,reasoning")] = "",
    counts: Annotated[str, Option("--counts", metavar="KIND=N,...", help="the most requests of a kind")] = "",
    prompts: Prompts = None,
    shots: Annotated[int, Option("--shots", help="seed examples per prompt")] = 3,
    seed: Annotated[int, Option("--seed", help="samples items and examples")] = 0,
    temperature: Annotated[float, Option("--temperature")] = 0.7,
    top_p: Annotated[float, Option("--top-p")] = 1.0,
    concurrency: Annotated[int, Option("--concurrency", help="requests at a time")] = 16,
    retries: Annotated[int, Option("--retries", help="further attempts per request")] = 5,
    timeout: Annotated[float, Option("--timeout", help="seconds per attempt")] = 120.0,
    requests_per_minute: Annotated[float | None, Option("--requests-per-minute")] = None,
    tokens_per_minute: Annotated[float | None, Option("--tokens-per-minute")] = None,
    max_cost: Annotated[float | None, Option("--max-cost", metavar="USD", help="stop when this much is spent")] = None,
    prices: Annotated[
        Path | None, Option("--prices", help="YAML: MODEL: {input: USD, output: USD} per million")
    ] = None,
    price_as: Annotated[str, Option("--price-of", help="use the price of this model; `local` costs nothing")] = "",
    token_limit_field: Annotated[str, Option("--token-limit-field", help="or max_completion_tokens")] = "max_tokens",
    extra_body: Annotated[str, Option("--extra-body", metavar="JSON", help="more fields of each request")] = "{}",
    dry_run: Annotated[bool, Option("--dry-run", help="print what it would cost, and send nothing")] = False,
) -> int:
    """``chatbridge multis generate``: 0, or 3 if it stopped before its end."""
    given = {name: value for name, value in locals().items() if name not in ("annotations", "out", "prompts", "prices")}
    from lavis_chatbridge.multis import generate as stage
    from lavis_chatbridge.multis.annotation import read_annotations
    from lavis_chatbridge.multis.prompts import PromptBook

    options = config.parse(stage.GenerateSettings, _generate_values(given), "generate")
    counted = max_cost is not None or dry_run or prices is not None or bool(price_as)
    price = stage.price_of(price_as or (model if counted else "local"), prices)
    book = PromptBook(prompts)
    requests = stage.plan(lambda: read_annotations(annotations), book, options)
    if dry_run:
        print(stage.estimate(requests, out, book, price))
        return 0
    report = stage.generate(requests, out, price, options)
    print(
        f"answered {report.answered}, known {report.known}, gave up {report.gave_up}; spent ${report.spent:.4f}: {out}"
    )
    if report.stopped or report.gave_up:
        print(f"{report.stopped or 'some requests had no answer'}; the same command continues")
    return STOPPED_EARLY if report.stopped else 0


def _generate_values(given: dict[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in given.items() if name not in ("price_as", "dry_run")}
    try:
        values["extra_body"] = json.loads(given["extra_body"])
        values["counts"] = {k.strip(): int(n) for k, n in (pair.split("=") for pair in _split(given["counts"]))}
    except ValueError as error:
        raise ConfigError(f"--extra-body wants JSON, --counts KIND=N,KIND=N: {error}") from error
    values["kinds"] = _split(given["kinds"])
    return {name: value for name, value in values.items() if name != "kinds" or value}


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@app.command("check", help="Accept or reject the answers.")
def check(
    generated: Annotated[Path, Argument(help="the folder of `generate`")],
    annotations: Annotated[Path, Option("--annotations", help="the annotations from which it was made")],
    out: Out,
    prompts: Prompts = None,
    settings: Annotated[
        Path | None, Option("--config", help="YAML: limits, duplicate_from, unsafe, language, things")
    ] = None,
    unsafe: Annotated[
        str | None, Option("--unsafe", metavar="MODULE:FUNCTION", help="from a text to a reason or None")
    ] = None,
) -> None:
    """``chatbridge multis check``."""
    from lavis_chatbridge.multis import check as stage
    from lavis_chatbridge.multis.prompts import PromptBook
    from lavis_chatbridge.multis.statistics import table

    values = dict(config.read_yaml(settings)) if settings else {}
    options = config.parse(stage.CheckSettings, values | ({"unsafe": unsafe} if unsafe else {}), "check")
    print(table(stage.check(generated, annotations, out, stage.Checker(options, PromptBook(prompts)))))


@app.command("stats", help="Show the statistics of a check.")
def stats(
    checked: Annotated[Path, Argument(help="the folder of `check`")],
    as_json: Annotated[bool, Option("--json", help="all counts as JSON")] = False,
) -> None:
    """``chatbridge multis stats``."""
    from lavis_chatbridge.files import read_json
    from lavis_chatbridge.multis.statistics import table

    values = read_json(checked / "statistics.json")
    if values is None:
        raise DataError(f"{checked} has no statistics.json; run `chatbridge multis check` first")
    print(json.dumps(values, indent=2) if as_json else table(values))


@app.command("page", help="Write a page of samples with their media.")
def page(
    checked: Annotated[Path, Argument(help="the folder of `check`")],
    media_root: Annotated[Path, Option("--media-root", help="media paths are relative to it")],
    out: Annotated[Path, Option("--out", help="the HTML file")],
    annotations: Annotated[Path | None, Option("--annotations", help="adds the text that the writer had")] = None,
    accepted: Annotated[int, Option("--accepted", help="number of accepted samples")] = 40,
    rejected: Annotated[int, Option("--rejected", help="number of rejected samples")] = 20,
    seed: Annotated[int, Option("--seed", help="samples them")] = 0,
) -> None:
    """``chatbridge multis page``."""
    from lavis_chatbridge.multis.page import write_page

    print(f"{write_page(checked, media_root, out, annotations, accepted, rejected, seed)} samples: {out}")


@app.command("build", help="Write the sharded MULTIS with its manifest.")
def build(
    settings: Annotated[Path, Argument(metavar="CONFIG", help="YAML: sources with their files, licences and tasks")],
    out: Annotated[Path, Option("--out", help="the new folder")],
) -> None:
    """``chatbridge multis build``."""
    from lavis_chatbridge.multis import build as stage

    manifest = stage.build(stage.load_settings(settings), out)
    for name, source in manifest["sources"].items():
        skipped = f", {source['skipped']} skipped" if source["skipped"] else ""
        print(f"{name:30}{source['samples']:9} samples{skipped}  ({source['licence']})")
    print(f"{manifest['samples']} samples: {out}/manifest.json")
