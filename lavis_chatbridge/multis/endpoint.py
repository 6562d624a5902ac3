"""One request to an OpenAI-compatible server, by the official client: an answer, or a failure and what may follow.

This module decides whether a failure can be tried again, after how long, and whether it may have been paid for. It
neither retries nor counts money: `generate` does.
"""

from __future__ import annotations

import email.utils
import itertools
import json
import math
import os
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from lavis_chatbridge.errors import ChatBridgeError, ConfigError, MissingExtraError
from lavis_chatbridge.multis.prompts import Message

_KEPT_OF_A_BODY = 20_000
_PLACES_PER_CLIENT = 16


@dataclass(frozen=True)
class EndpointSettings:
    """Where to ask, and how.

    Args:
        model: The model's name at the server.
        base_url: The server, e.g. ``http://localhost:8000/v1``; None for OpenAI's own.
        api_key_env: The environment variable that holds the key.
        temperature: Sampling temperature.
        top_p: Nucleus sampling.
        timeout: Seconds until a request counts as lost.
        token_limit_field: What the server calls the longest answer; newer OpenAI models want the second.
        store: Ask the server to keep its answers (OpenAI's ``store``), so that those which a kill cut off are fetched.
        extra_body: Further fields of the request, for servers with options of their own.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.7
    top_p: float = 1.0
    timeout: float = 120.0
    token_limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    store: bool = False
    extra_body: dict[str, Any] = field(default_factory=dict)

    def check(self) -> list[str]:
        """Contradictions, and a base URL that is none."""
        faults = []
        if self.base_url is not None and urlsplit(self.base_url).scheme not in ("http", "https"):
            faults.append(f"base_url must begin with http:// or https://, found {self.base_url!r}")
        if self.timeout <= 0:
            faults.append(f"timeout must be positive, found {self.timeout}")
        return faults


@dataclass(frozen=True)
class Answer:
    """What the server wrote, and what it says that it counted."""

    text: str
    finish: str
    model: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class RequestFailed(Exception):
    """A request without a usable answer.

    Args:
        reason: What happened.
        retry: Whether another attempt may succeed.
        after: Seconds that the server asks to wait.
        paid: Whether the server may have done, and counted, the work.
        body: What it sent, where that was paid for but cannot be read.
    """

    def __init__(
        self, reason: str, retry: bool, after: float | None = None, paid: bool = False, body: str = ""
    ) -> None:
        super().__init__(reason)
        self.reason, self.retry, self.after, self.paid, self.body = reason, retry, after, paid, body


class EndpointError(ChatBridgeError):
    """The server will answer no request: wrong key, unknown model, empty account."""


class Endpoint:
    """The connections to the server.

    Args:
        options: Where to ask, and how.
        concurrency: Requests under way at a time. A client looks through all its connections for each request, so there
            is one client for every sixteen.

    Raises:
        MissingExtraError: If the package ``openai`` is absent.
        ConfigError: If OpenAI's own server is asked without a key.
    """

    def __init__(self, options: EndpointSettings, concurrency: int = 1) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError("openai", "multis", "chatbridge multis generate") from error
        self._openai = openai
        self.options = options
        key = os.environ.get(options.api_key_env)
        if key is None and options.base_url is None:
            raise ConfigError(f"set {options.api_key_env} to your key, or name a server of your own with --base-url")
        self._authorization = f"Bearer {key or 'none'}"  # stated, as the client might take an administrator's key
        self._clients = [
            openai.AsyncOpenAI(api_key=key or "none", base_url=options.base_url, timeout=options.timeout, max_retries=0)
            for _ in range(math.ceil(concurrency / _PLACES_PER_CLIENT))
        ]
        self._next_client = itertools.cycle(self._clients).__next__

    async def close(self) -> None:
        """Close all connections."""
        for client in self._clients:
            await client.close()

    async def ask(self, request_id: str, messages: list[Message], max_tokens: int) -> Answer:
        """Send one chat and wait for its answer.

        Args:
            request_id: Sent as ``Idempotency-Key``, so that a gateway which knows it does no work twice.
            messages: The chat.
            max_tokens: The longest answer.

        Raises:
            RequestFailed: If there is no usable answer this time.
            EndpointError: If no request can succeed.
        """
        options = self.options
        body: dict[str, Any] = {
            "model": options.model,
            "messages": messages,
            "temperature": options.temperature,
            "top_p": options.top_p,
            options.token_limit_field: max_tokens,
        }
        if options.store:
            body |= {"store": True, "metadata": {"chatbridge_request": request_id}}
        try:
            # Not `chat.completions.create`: its walk over typed messages and answers takes much of the CPU time.
            content = await self._next_client().post(
                "/chat/completions",
                cast_to=bytes,
                body=body | options.extra_body,
                options={"headers": {"Authorization": self._authorization, "Idempotency-Key": request_id}},
            )
        except self._openai.APIStatusError as error:
            raise self._status_failure(error) from error
        except self._openai.APITimeoutError as error:
            raise RequestFailed(f"no answer within {options.timeout:g} s", True, paid=_was_sent(error)) from error
        except self._openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise RequestFailed(f"{type(cause).__name__}: {cause}", True, paid=_was_sent(error)) from error
        return read_answer(content)

    async def stored(self, request_id: str) -> Answer | None:
        """The answer that the server kept to an earlier request (see ``store``); None where it has none.

        Raises:
            RequestFailed: If the server cannot be asked this time.
        """
        try:
            page = await self._next_client().chat.completions.list(metadata={"chatbridge_request": request_id}, limit=1)
        except self._openai.APIStatusError as error:
            raise self._status_failure(error) from error
        except self._openai.APIConnectionError as error:
            raise RequestFailed(f"{type(error).__name__}: {error}", retry=True) from error
        return read_answer(page.data[0].model_dump_json().encode()) if page.data else None

    def _status_failure(self, error: Any) -> Exception:
        status, code = error.status_code, getattr(error, "code", None)
        reason = f"HTTP {status}: {str(error.message)[:300]}"
        if status in (401, 403, 404) or code == "insufficient_quota":
            return EndpointError(
                f"{self.options.base_url or 'OpenAI'} refuses the model {self.options.model!r}: {reason}"
            )
        retry = status in (408, 409, 425, 429) or status >= 500
        return RequestFailed(reason, retry, retry_after(error.response.headers), paid=status in (408, 504, 524))


def read_answer(body: bytes) -> Answer:
    """The answer in a response's body.

    Raises:
        RequestFailed: If the body is not the JSON of a chat completion. It was paid for, so the failure carries it.
    """
    text = body.decode("utf-8", "replace")
    try:
        values = json.loads(text)
        choice = values["choices"][0]
        content = choice["message"].get("content") or ""
        usage = values.get("usage") or {}
        if not isinstance(content, str):
            raise TypeError(f"the content is {type(content).__name__}")
        return Answer(
            content,
            str(choice.get("finish_reason") or ""),
            str(values.get("model") or ""),
            _count(usage.get("prompt_tokens")),
            _count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"unreadable answer ({type(error).__name__}: {error})"
        raise RequestFailed(reason, retry=True, paid=True, body=text[:_KEPT_OF_A_BODY]) from error


def retry_after(headers: Any) -> float | None:
    """Seconds to wait as ``Retry-After`` (seconds or a date) or ``retry-after-ms`` states; None without either."""
    milliseconds, value = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        if milliseconds is not None:
            return max(0.0, float(milliseconds) / 1000)
        if value is not None:
            return max(0.0, float(value))
    except ValueError:
        moment = email.utils.parsedate_tz(value) if value is not None else None
        if moment is not None:
            return max(0.0, email.utils.mktime_tz(moment) - time.time())
    return None


def _was_sent(error: Exception) -> bool:
    """Whether a request may have reached the server before its connection failed."""
    return "Connect" not in type(error.__cause__ or error).__name__  # ConnectError, ConnectTimeout


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
