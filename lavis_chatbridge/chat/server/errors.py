"""Errors as OpenAI's clients know them: an HTTP status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 404: "not_found_error"}


class RequestError(Exception):
    """A request that is refused.

    Args:
        status: The HTTP status.
        message: What is wrong, and how to mend it; it goes to the client.
        code: A short name for programs.
        param: The part of the request that is at fault.
        headers: Further HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON that describes it."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def too_large(what: str, limit: int, param: str | None = None) -> RequestError:
    """Something has more bytes than are allowed."""
    return RequestError(413, f"{what} is larger than the limit of {limit} bytes", "too_large", param)


def timed_out(seconds: float) -> RequestError:
    """A request took too long."""
    return RequestError(504, f"the request took longer than the limit of {seconds:g} s", "timeout")
