"""``python -m lavis.evaluate`` and ``chatbridge evaluate``: score a model as a configuration file says.

The command also runs several benchmarks at once (``--suite``), with and without their media (``--ablate``), and scores
a file of predictions again (``--rescore``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lavis_chatbridge.errors import ConfigError
from lavis_chatbridge.plugin import launch as launching
from lavis_chatbridge.plugin.launch import command_line

__all__ = ["add_arguments", "main", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One configuration, a set of suites, or a file of predictions; and LAVIS's overrides."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg-path", metavar="YAML", help="score as this configuration file says")
    what.add_argument("--suite", metavar="NAMES", help="benchmarks: zero-shot, all, or names with commas between them")
    what.add_argument("--rescore", metavar="FILE", help="score this file of predictions again, without a model")
    parser.add_argument(
        "--ablate", action="store_true", help="with --suite: also withhold and shuffle each kind of medium"
    )
    parser.add_argument(
        "--suite-folder", metavar="DIR", help="where the suites' YAML files are (default projects/chatbridge/eval)"
    )
    parser.add_argument("--output", metavar="DIR", default="output/eval", help="where the table of --suite goes")
    launching.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate; the arguments are those of :func:`add_arguments`."""
    if args.ablate and args.suite is None:
        raise ConfigError("--ablate goes with --suite; for one configuration use --options run.media=withheld")
    if args.suite is not None:
        from lavis_chatbridge.plugin import suites

        return suites.run(args.suite, args.options, args.suite_folder, args.output, args.ablate)
    if args.rescore is not None:
        from lavis_chatbridge.plugin import rescore

        return rescore.run(args.rescore, args.options)
    return _evaluate(args.cfg_path, args.options)


def _evaluate(cfg_path: str, options: Sequence[str]) -> int:
    """Score one configuration and print what was found, on the main process; 1 if a part could not be scored."""
    from lavis_chatbridge.plugin import scores

    with launching.Session() as session:
        found = session.run(cfg_path, options, evaluate=True) or {}

        from lavis.common.registry import registry

        from lavis_chatbridge.runners import distributed

        printed, whole = scores.report(found, registry.get("configuration").run, registry.get_path("result_dir"))
        if distributed.is_main():
            print(printed)
    return 0 if whole else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of ``lavis.evaluate``: returns the exit status."""
    what = "Score a LAVIS model as a configuration file says."
    return command_line("lavis.evaluate", what, add_arguments, run, argv)


if __name__ == "__main__":
    sys.exit(main())
