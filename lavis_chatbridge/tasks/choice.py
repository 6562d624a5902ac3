"""Multiple choice: the model answers with the options in several orders, or the options are ranked by likelihood."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lavis.common.registry import registry

from lavis_chatbridge.config import shown
from lavis_chatbridge.errors import DataError
from lavis_chatbridge.prompting.conversation import MODALITIES, Piece, Text, escape_markers
from lavis_chatbridge.prompting.templates import LETTERS, listed
from lavis_chatbridge.tasks.generation import GenerationTask
from lavis_chatbridge.tasks.scoring.answers import squad

if TYPE_CHECKING:
    from lavis_chatbridge.models.answering import Answering


@registry.register_task("chatbridge_choice")
class ChoiceTask(GenerationTask):
    """Multiple choice for samples with ``meta.options``, ``meta.correct`` and `listed` options at the question's end.

    ``inference_method: generate`` asks with all rotations of the options, or the first ``run.option_orders`` of them.
    The score is the share of orders in which the right option was chosen, so a favourite letter gives no bonus.
    ``rank`` asks without the options and chooses the one with the highest mean log-probability per token.
    """

    def predict(self, model: Answering, samples: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Fields of a `Prediction` for each sample: the chosen option, and the reply to each order."""
        options = [_options(meta, name) for meta, name in zip(samples["meta"], samples["sample_id"], strict=True)]
        if self.settings.inference_method == "rank":
            return [_ranked(model, _part(samples, [n]), own) for n, own in enumerate(options)]
        replies: list[list[str]] = [[] for _ in options]
        positions: list[list[int]] = [[] for _ in options]
        most = max(map(len, options))
        for shift in range(min(most, self.settings.option_orders or most)):
            asked = [n for n, own in enumerate(options) if shift < len(own)]
            orders = {n: [*options[n][shift:], *options[n][:shift]] for n in asked}
            batch = _part(samples, asked)
            batch["pieces"] = [
                replaced(pieces, listed(options[n]), listed(orders[n]))
                for n, pieces in zip(asked, batch["pieces"], strict=True)
            ]
            generated = model.generate(batch, sampling=self.sampling)
            for n, reply in zip(asked, generated, strict=True):
                position = chosen(reply, orders[n])
                replies[n].append(reply)
                positions[n].append(-1 if position < 0 else (position + shift) % len(options[n]))
        columns = zip(options, replies, positions, strict=True)
        return [{"prediction": _most_frequent(o, p), "replies": r, "chosen": p} for o, r, p in columns]


def chosen(reply: str, options: Sequence[str]) -> int:
    """Position of the option in a reply: by its letter, by its text, or as the only option in a sentence.

    Args:
        reply: ``"B"``, ``"(b) a drum"``, ``"The answer is B."``, ``"a drum"``.
        options: In the order in which they were asked.

    Returns:
        The position; -1 if the reply has none or several.
    """
    reply = reply.strip()
    letters = LETTERS[: len(options)]
    texts = [squad(option) for option in options]
    if squad(reply) in texts:
        return texts.index(squad(reply))
    leading = re.match(rf"[(\[]?([{letters}])(?:[)\].:,]|$|\s*\n)", reply, re.IGNORECASE)
    stated = re.search(rf"\b(?:answer|option|choice)\s*(?:is|:)?\s*[(\[]?([{letters}])\b", reply, re.IGNORECASE)
    if letter := leading or stated:
        return letters.index(letter.group(1).upper())
    words = f" {squad(reply)} "
    named = [number for number, text in enumerate(texts) if text and f" {text} " in words]
    return named[0] if len(named) == 1 else -1


def replaced(pieces: Sequence[Piece], block: str, by: str) -> list[Piece]:
    """Replace a block of options in a prompt, which must have it."""
    before, after = escape_markers(block), escape_markers(by)
    if not any(before in piece.text for piece in pieces if isinstance(piece, Text)):
        raise DataError(f"a prompt of multiple choice does not list its options as {shown(before)}")
    return [Text(p.text.replace(before, after), p.target) if isinstance(p, Text) else p for p in pieces]


def _ranked(model: Answering, sample: dict[str, Any], options: Sequence[str]) -> dict[str, Any]:
    sample["pieces"] = [replaced(sample["pieces"][0], "\n" + listed(options), "")]
    scores, lengths = model.answer_scores(sample, options)
    best = int((scores[0] / lengths).argmax())
    return {"prediction": options[best], "chosen": [best]}


def _options(meta: Mapping[str, Any], name: str) -> list[str]:
    options = meta.get("options")
    if not isinstance(options, (list, tuple)) or not options or not isinstance(meta.get("correct"), int):
        raise DataError(f"sample {name!r} has no meta.options and meta.correct, which run.task chatbridge_choice needs")
    return [str(option) for option in options]


def _part(samples: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """The model's inputs for some samples of a batch."""
    columns = ("sample_id", "pieces", *MODALITIES)
    return {key: [samples[key][n] for n in numbers] for key in columns if key in samples}


def _most_frequent(options: Sequence[str], positions: Sequence[int]) -> str:
    counts = Counter(number for number in positions if number >= 0)
    return options[counts.most_common(1)[0][0]] if counts else ""
