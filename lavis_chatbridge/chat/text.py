"""Token ids become text as they come: whole characters only, up to a stop text, without spaces around the whole.

It knows a tokenizer, no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from lavis_chatbridge.models.language_model import Codec

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes of a character in UTF-8, and so tokens that may each hold a part of it


class TextStream:
    """The text of a growing row of tokens.

    Stop texts are looked for in the text, so it does not matter into which tokens a model cuts them.

    Args:
        codec: The tokenizer.
        stops: Texts that end the row and are no part of its text.
    """

    def __init__(self, codec: Codec, stops: Sequence[str] = ()) -> None:
        self.text = ""
        """What has been handed out so far."""
        self.stopped: str | None = None
        """The stop text that was found."""
        self.codec = codec
        self.stops = tuple(stop for stop in stops if stop)
        self._ids: list[int] = []
        self._before, self._read = 0, 0  # tokens that give the next ones their context; tokens whose text is known
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; returns the text that has become certain."""
        self._ids.append(token)
        self._held += self._decoded(final=False)
        return self._hand_out(final=False)

    def finish(self) -> str:
        """No more tokens come; returns the rest of the text."""
        self._held += self._decoded(final=True)
        return self._hand_out(final=True)

    def _decoded(self, final: bool) -> str:
        """The text of the tokens that have not been read, once it holds whole characters only.

        Tokens are decoded together with some before them: a token's text may depend on whether it comes first.
        """
        known = self.codec.decode(self._ids[self._before : self._read])
        whole = self.codec.decode(self._ids[self._before :])
        waiting = len(self._ids) - self._read
        if whole.endswith(_BROKEN) and not final and waiting < _LONGEST_CHARACTER:
            return ""
        if len(whole) <= len(known):
            return ""
        self._before, self._read = self._read, len(self._ids)
        return whole[len(known) :]

    def _hand_out(self, final: bool) -> str:
        if self.stopped is not None:
            return ""
        found = [(self._held.find(stop), stop) for stop in self.stops if stop in self._held]
        if found:
            place, self.stopped = min(found)
            certain, self._held = self._held[:place].rstrip(), ""
        elif final:
            certain, self._held = self._held.rstrip(), ""
        else:
            keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
            certain = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(certain) :]
        if not self.text:
            certain = certain.lstrip()
        self.text += certain
        return certain


def text_of(codec: Codec, ids: Sequence[int], stops: Sequence[str] = ()) -> str:
    """The text of all ``ids``, up to the first stop text."""
    stream = TextStream(codec, stops)
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
