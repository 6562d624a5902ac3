"""A server that answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.multis.openai_server import OpenAIServer


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    """A server that always answers."""
    with OpenAIServer() as running:
        yield running
