"""The package's exceptions. Every mistake that a user can correct raises one of them.

A message is one line: what is wrong, what was found, what was expected, and how to correct it. Commands print it and
exit with status 2. A traceback therefore means a bug in this package.
"""

from __future__ import annotations

INSTALL_LAVIS = "pip install --no-deps salesforce-lavis==1.0.2"
"""LAVIS's own requirements exclude current libraries; setup.cfg lists what LAVIS needs."""


class ChatBridgeError(Exception):
    """Base of all errors that the package raises for a user's mistake or an unusable input."""


class ConfigError(ChatBridgeError, ValueError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another one."""


class MediaError(ChatBridgeError):
    """A medium (its path, or the bytes, array or tensor itself) cannot be opened or decoded."""

    def __init__(self, source: object, cause: object) -> None:
        self.source = source if isinstance(source, str) else _describe(source)
        self.cause = str(cause)
        super().__init__(f"cannot read {self.source}: {self.cause}")

    def __reduce__(self) -> tuple:
        """Pickle both arguments: data workers send errors to their parent process."""
        return type(self), (self.source, self.cause)


class TooShortError(MediaError):
    """A medium can be read, but is shorter than the model's minimum."""


class DataError(ChatBridgeError, ValueError):
    """An annotation file or a sample violates its format."""


class PromptError(ChatBridgeError, ValueError):
    """A prompt and its media do not match."""


class CheckpointError(ChatBridgeError):
    """A weight file is missing, unsafe or damaged, or belongs to a model of other dimensions."""


class TrainingError(ChatBridgeError):
    """Training cannot continue: too many unusable samples, non-finite losses, or a lost worker."""


class EngineError(ChatBridgeError):
    """The server that runs the language model refuses a prompt, or cannot be reached."""


class MissingExtraError(ChatBridgeError, ImportError):
    """A package of one of the extras is not installed; ``purpose`` is the feature that needs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}: pip install 'lavis-chatbridge[{extra}]'")


def one_line(error: BaseException, limit: int = 300) -> str:
    """An error's message, or its class, on one line of at most ``limit`` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def _describe(source: object) -> str:
    if isinstance(source, tuple) and source:  # samples and their rate
        return _describe(source[0])
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None)
    return str(source) if shape is None else f"array of shape {tuple(shape)}"
