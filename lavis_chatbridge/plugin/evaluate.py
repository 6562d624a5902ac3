"""``python -m lavis.evaluate`` and ``chatbridge evaluate``: score a model as a configuration file says.

Media may be taken away or exchanged (``--ablate``). The command also runs several benchmarks at once (``--suite``), and
scores a file of predictions again (``--rescore``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.plugin import launch as launching
from lavis_chatbridge.plugin.launch import command_line

if TYPE_CHECKING:
    from lavis_chatbridge.plugin.suite_table import Line

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One configuration, a set of suites, or a file of predictions; and LAVIS's overrides."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg-path", metavar="YAML", help="score as this configuration file says")
    what.add_argument("--suite", metavar="NAMES", help="benchmarks: zero-shot, all, or names with commas between them")
    what.add_argument("--rescore", metavar="FILE", help="score this file of predictions again, without a model")
    parser.add_argument(
        "--ablate",
        nargs="*",
        metavar="CONDITION",
        help="score again without media or with other samples': withheld, shuffled, or those of some kinds only "
        "(withheld:image,video); without CONDITION each kind that the data have is withheld, and shuffled",
    )
    parser.add_argument(
        "--suite-folder", metavar="DIR", help="where the suites' YAML files are (default projects/chatbridge/eval)"
    )
    parser.add_argument("--output", metavar="DIR", default="output/eval", help="where the table of --suite goes")
    launching.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate; the arguments are those of :func:`add_arguments`."""
    if args.rescore is not None:
        from lavis_chatbridge.plugin import rescore

        if args.ablate is not None:
            raise ConfigError("--ablate needs a model: it goes with --cfg-path or --suite, not with --rescore")
        return rescore.run(args.rescore, args.options)
    if args.suite is not None:
        from lavis_chatbridge.plugin import suites

        return suites.run(args.suite, args.options, args.suite_folder, args.output, args.ablate)
    return _evaluate(args.cfg_path, args.options, args.ablate)


def _evaluate(cfg_path: str, options: Sequence[str], ablate: Sequence[str] | None) -> int:
    """Score one configuration and print what was found, on the main process; 1 if a part could not be scored."""
    from lavis_chatbridge.plugin import scores

    with launching.Session(keep_journals=ablate is not None) as session:
        if ablate is not None:
            with session.together(cfg_path, options):
                _check_ablation(ablate, cfg_path, options)
        lines, files = _score(session, cfg_path, options)
        if ablate is not None:
            without, more = _ablated(session, cfg_path, options, ablate, lines)
            lines, files = lines + without, files + more
        session.remove_journals()
        printed, complete = scores.report(lines, files)

        from lavis_chatbridge.runners import distributed

        if distributed.is_main():
            print(printed)
    return 0 if complete else 1


def _check_ablation(ablate: Sequence[str], cfg_path: str, options: Sequence[str]) -> None:
    from lavis_chatbridge.plugin import ablation

    ablation.parse(ablate)  # before LAVIS is imported, which takes seconds
    from lavis_chatbridge.runners.config import dataset_sections, run_section

    ablation.check(ablate, dataset_sections(cfg_path, options), run_section(cfg_path, options))


def _ablated(
    session: launching.Session, cfg_path: str, options: Sequence[str], ablate: Sequence[str], whole: Sequence[Line]
) -> tuple[list[Line], list[str]]:
    """The lines and files of a configuration under each condition, after it was scored with all media."""
    from lavis.common.registry import registry

    from lavis_chatbridge.plugin import ablation

    files: list[str] = []

    def score(condition: ablation.Condition) -> list[Line]:
        lines, written = _score(session, cfg_path, launching.with_options(options, condition.options))
        files.extend(written)
        return lines

    cfg = registry.get("configuration")
    lines = ablation.scored(ablation.conditions(ablate, cfg), score, ", ".join(cfg.run.test_splits), whole)
    return lines, files


def _score(session: launching.Session, cfg_path: str, options: Sequence[str]) -> tuple[list[Line], list[str]]:
    """The lines of the table, and the files that hold the results."""
    from lavis_chatbridge.plugin import scores

    found = session.run(cfg_path, options, evaluate=True) or {}

    from lavis.common.registry import registry

    lines = scores.lines_of(found, registry.get("configuration").run)
    return lines, scores.files_of(found) or [registry.get_path("result_dir")]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.evaluate``: returns the exit status."""
    what = "Score a LAVIS model as a configuration file says."
    return command_line("lavis.evaluate", what, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
