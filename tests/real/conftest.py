"""Fixtures of these tests, and their event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest

from tests.support.figures import figure
from tests.support.forked import forking
from tests.support.idle_clock import IdleClock

__all__ = ["figure"]


@pytest.fixture(scope="session", autouse=True)
def _forker() -> Iterator[None]:
    """Starts of llamaslot without its imports."""
    with forking():
        yield


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """How a test's loop is made."""
    has_limits = item.get_closest_marker("idle_clock") is not None
    return {"idle clock": IdleClock} if has_limits else {"asyncio": asyncio.new_event_loop}
