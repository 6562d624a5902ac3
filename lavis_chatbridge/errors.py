"""The package's exceptions: every mistake that a user can mend raises one of them.

A message says what is wrong, what was found against what was expected, and how to mend it, in one line. The
command-line entry points print that line and exit with status 2; a traceback is left for faults of ours.
"""

from __future__ import annotations


class ChatBridgeError(Exception):
    """Base of all errors that the package raises for a user's mistake or an unusable input."""


class ConfigError(ChatBridgeError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or contradicts another."""


class MediaError(ChatBridgeError):
    """A medium cannot be opened or decoded.

    Args:
        source: The path, or a short description when the medium came as bytes or an array.
        cause: What is wrong with it.
    """

    def __init__(self, source: object, cause: object) -> None:
        self.source = source if isinstance(source, str) else _describe(source)
        self.cause = str(cause)
        super().__init__(f"cannot read {self.source}: {self.cause}")

    def __reduce__(self) -> tuple:
        """Keep both arguments when the error crosses a process boundary (a data worker, say)."""
        return type(self), (self.source, self.cause)


class TooShortError(MediaError):
    """A medium is whole, but shorter than the least that the model can take."""


class DataError(ChatBridgeError, ValueError):
    """An annotation file or a sample does not have the form that its format prescribes."""


class PromptError(ChatBridgeError, ValueError):
    """A prompt and its media do not fit together."""


class CheckpointError(ChatBridgeError):
    """A weight file is missing, unsafe, damaged, or made for other dimensions."""


class TrainingError(ChatBridgeError):
    """Training cannot go on: too many unusable samples, non-finite losses, a lost worker."""


class MissingExtraError(ChatBridgeError, ImportError):
    """An optional package is needed for what was asked.

    Args:
        package: The package that could not be imported.
        extra: The extra of ``lavis-chatbridge`` that installs it.
        purpose: What needs it.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'lavis-chatbridge[{extra}]'")


def _describe(source: object) -> str:
    if isinstance(source, tuple) and source:  # samples and their rate
        return _describe(source[0])
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return str(source) if shape is None else f"array of shape {tuple(shape)}"
