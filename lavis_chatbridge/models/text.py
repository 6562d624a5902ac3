"""Decodes streamed token ids to text: only final characters, up to a stop text, stripped."""

from __future__ import annotations

from collections.abc import Sequence

from lavis_chatbridge.models.tokenizer import Codec

_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Incremental text of a growing list of tokens; in total, the same as decoding all ids at once.

    Stop texts are searched in the text, so they are found even if they begin or end inside a token.

    Args:
        codec: The tokenizer.
        stops: Texts that end the text and are not part of it.
        least: Ignore stop texts within the first ``least - 1`` tokens.
    """

    def __init__(self, codec: Codec, stops: Sequence[str] = (), least: int = 0) -> None:
        self.text = ""
        """The text returned so far."""
        self.stopped: str | None = None
        """The stop text that was found, or None."""
        self.codec = codec
        self.stops = tuple(stop for stop in stops if stop)
        self._least, self._ids = least, list[int]()

    @classmethod
    def of(cls, codec: Codec, ids: Sequence[int], stops: Sequence[str] = (), least: int = 0) -> TextStream:
        """A finished stream of these ids."""
        stream = cls(codec, stops, least)
        stream._ids = list(ids)
        stream.finish()
        return stream

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become final."""
        self._ids.append(token)
        # an incomplete character, or a run of bytes, may still change
        certain = len(self._ids)
        while certain and self._ids[certain - 1] in self.codec.byte_ids:
            certain -= 1
        return self._advance(self.codec.decode(self._ids[:certain]).rstrip(_BROKEN), final=False)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens follow."""
        return self._advance(self.codec.decode(self._ids), final=True)

    def _advance(self, whole: str, final: bool) -> str:
        if self.stopped is not None:
            return ""
        whole = whole.lstrip()
        exempt = len(self.codec.decode(self._ids[: self._least - 1]).lstrip()) if self._least > 1 else 0
        found = [(i, stop) for stop in self.stops if (i := whole.find(stop, exempt)) >= 0]
        if found:
            offset, self.stopped = min(found)
            whole = whole[:offset]
        elif not final:
            whole = whole[: len(whole) - max((_overlap(whole, stop) for stop in self.stops), default=0)]
        new = whole.rstrip()[len(self.text) :]
        self.text += new
        return new


def text_of(codec: Codec, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of all ``ids``, up to the first stop text."""
    return TextStream.of(codec, ids, stops).text


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of ``text`` that may be the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
