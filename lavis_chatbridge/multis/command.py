"""``chatbridge multis STAGE``: the command lines of the stages and their short reports."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from lavis_chatbridge.config import merged, parse, read_options, read_yaml
from lavis_chatbridge.launchers import share_of

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Out = Annotated[str, typer.Option("--out", help="The folder to write.")]
Prompts = Annotated[str | None, typer.Option(help="A folder with kinds.yaml and seeds/ that replaces the package's.")]


@app.command()
def annotate(
    items: Annotated[str, typer.Argument(help="JSONL: id, media and human captions.")],
    out: Out,
    with_: Annotated[
        list[str],
        typer.Option(
            "--with",
            metavar="NAME=PATH[,OPTION=VALUE...]",
            help="An annotator: captioner, florence2, segmenter, audio_tagger (a model), or grit, semantic_sam, "
            "captions (a JSON file). Repeatable.",
        ),
    ] = [],  # noqa: B006
    media_root: Annotated[str | None, typer.Option(help="Folder of the media paths; default: that of ITEMS.")] = None,
    rank: Annotated[int | None, typer.Option(help="This process; default: RANK or SLURM_PROCID.")] = None,
    world: Annotated[int | None, typer.Option(help="Number of processes; default: WORLD_SIZE or SLURM_NTASKS.")] = None,
) -> None:
    """Describe media in text. Run again to resume."""
    from lavis_chatbridge.multis.annotate import annotate as run
    from lavis_chatbridge.multis.annotators import build_annotator

    process = share_of(rank, world, os.environ)
    report = run(items, out, [build_annotator(text) for text in with_], media_root, process.rank, process.world_size)
    print(f"annotated {report.annotated}, finished before {report.known}, unreadable {report.failed}: {out}")


@app.command()
def generate(
    annotations: Annotated[str, typer.Argument(help="The output folder of `annotate`.")],
    out: Out,
    model: Annotated[str, typer.Option(help="The model's name on the server.")],
    base_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible server; default: OpenAI's.")] = None,
    counts: Annotated[str, typer.Option(metavar="KIND=N,...", help="Maximum number of requests per kind.")] = "",
    prompts: Prompts = None,
    temperature: float = 0.7,
    concurrency: Annotated[int, typer.Option(help="Number of concurrent requests.")] = 16,
    retries: Annotated[int, typer.Option(help="Retries per request.")] = 5,
    timeout: Annotated[float, typer.Option(help="Seconds for one attempt.")] = 120.0,
    requests_per_minute: float | None = None,
    max_cost: Annotated[float | None, typer.Option(metavar="USD", help="Limit over all runs with this --out.")] = None,
    prices: Annotated[str | None, typer.Option(help="YAML: MODEL: {input, output}, USD per million tokens.")] = None,
    price_of: Annotated[str | None, typer.Option(help="Entry of the price table to use; `local` is free.")] = None,
    token_limit_field: Annotated[
        str, typer.Option(help="`max_completion_tokens` for new OpenAI models.")
    ] = "max_tokens",
    extra_body: Annotated[
        list[str], typer.Option(metavar="KEY=VALUE", help="An additional field of each request. Repeatable.")
    ] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cost and send nothing.")] = False,
) -> None:
    """Query a language model for chat data. Run again to resume."""
    from lavis_chatbridge.multis import generate as stage
    from lavis_chatbridge.multis.annotation import read_annotations
    from lavis_chatbridge.multis.prompts import PromptBook

    values: dict[str, Any] = {k: v for k, v in locals().items() if k in stage.GenerateSettings.model_fields}
    values["counts"] = dict(pair.partition("=")[::2] for pair in counts.split(",") if pair)
    values["extra_body"] = read_options(extra_body)
    options = parse(stage.GenerateSettings, merged(values), "generate")
    free = base_url is not None and max_cost is None and not dry_run
    price = stage.price_of(price_of or model, prices, or_free=free)
    requests = stage.plan(list(read_annotations(annotations)), PromptBook(prompts), options)
    if dry_run:
        found = stage.estimate(requests, price, out)
        print(f"requests to send:      {found.requests} ({found.known} have an answer)")
        print(f"tokens, about:         {found.tokens}")
        print(f"cost, about:           ${found.cost:.4f}; spent so far ${found.spent:.4f}")
        return
    report = stage.generate(requests, out, price, options)
    print(f"answered {report.answered}, known {report.known}, failed {report.failed}; ${report.spent:.4f} spent: {out}")
    if report.stopped:
        print(f"stopped early: {report.stopped}; run the same command again to resume")
        raise typer.Exit(3)


@app.command()
def check(
    generated: Annotated[str, typer.Argument(help="The output folder of `generate`.")],
    annotations: Annotated[str, typer.Option(help="The annotations that `generate` used.")],
    out: Out,
    prompts: Prompts = None,
    config: Annotated[str | None, typer.Option(help="YAML: limits, duplicate_from, language, things.")] = None,
) -> None:
    """Accept or reject the answers by rules."""
    from lavis_chatbridge.multis import check as stage
    from lavis_chatbridge.multis.prompts import PromptBook
    from lavis_chatbridge.multis.rules import Checker, CheckSettings

    options = parse(CheckSettings, read_yaml(config) if config else {}, "check")
    print(stage.table(stage.check(generated, annotations, out, Checker(options, PromptBook(prompts)))))


@app.command()
def page(
    checked: Annotated[str, typer.Argument(help="The output folder of `check`.")],
    media_root: Annotated[str, typer.Option(help="Folder that media paths are relative to.")],
    out: Annotated[str, typer.Option(help="The HTML file.")],
    annotations: Annotated[str | None, typer.Option(help="Also show each sample's description.")] = None,
) -> None:
    """Write an HTML page of samples with their media."""
    from lavis_chatbridge.multis.check import write_page

    print(f"{write_page(checked, media_root, out, annotations)} samples: {out}")


@app.command()
def build(
    config: Annotated[str, typer.Argument(help="YAML: sources with files, licences and tasks.")], out: Out
) -> None:
    """Write MULTIS as shards with a manifest."""
    from lavis_chatbridge.multis.build import build as run
    from lavis_chatbridge.multis.build import load_settings

    manifest = run(load_settings(config), out)
    for name, source in manifest["sources"].items():
        skipped = f", {source['skipped']} skipped" if source["skipped"] else ""
        print(f"{name:30}{source['samples']:9} samples{skipped}  ({source['licence']})")
    print(f"{manifest['samples']} samples: {out}/manifest.json")
