"""Options that the commands of `chat` share: which model, how it is spoken to, how replies are chosen."""

from __future__ import annotations

import argparse
from typing import Any

from lavis_chatbridge.config import parse


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, where, and in which format it is spoken to."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="tiny", help="tiny, vicuna7b, vicuna13b, or a YAML (default: tiny)")
    group.add_argument(
        "--options",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override the model's YAML: model.checkpoint=FILE",
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    group.add_argument(
        "--template",
        default="human_assistant",
        choices=("human_assistant", "vicuna_v1", "tokenizer"),
        help="the conversation's format (default: human_assistant, the paper's)",
    )


def add_conversation_arguments(parser: argparse.ArgumentParser) -> None:
    """What else holds for a whole conversation."""
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", default="", metavar="TEXT", help="words in front of the conversation")
    group.add_argument("--no-video-sound", action="store_true", help="do not hear videos' own sound tracks")
    group.add_argument("--max-context", type=int, metavar="N", help="tokens that the model reads at most")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """How replies are chosen."""
    group = parser.add_argument_group("replies")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default 256")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest (default)")
    group.add_argument("--top-p", type=float, default=0.9, metavar="P", help="where tokens are drawn (default 0.9)")
    group.add_argument("--num-beams", type=int, default=1, metavar="N", help="search (default 1: greedy)")
    group.add_argument("--seed", type=int, metavar="N", help="the same seed draws the same reply")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends a reply too; repeatable")


def sampling_of(args: argparse.Namespace) -> Any:
    """The `Sampling` of parsed arguments.

    Raises:
        ConfigError: If a number is out of range.
    """
    from lavis_chatbridge.models.sampling import Sampling

    names = ("max_new_tokens", "temperature", "top_p", "num_beams", "seed", "stop")
    return parse(Sampling, {name: getattr(args, name) for name in names}, "sampling")


def session_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What parsed arguments say about a `Session`, beside its model."""
    return {
        "template": args.template,
        "system": args.system,
        "hear_videos": not args.no_video_sound,
        "max_context": args.max_context,
        "sampling": sampling_of(args),
    }
