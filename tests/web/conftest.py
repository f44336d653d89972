"""Fixtures of these tests, and the event loop that ``llamaslot serve`` uses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

from tests.support.idle_clock import IdleClock
from tests.support.leftovers import nothing_left

__all__ = ["nothing_left"]


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """How a test's loop is made."""
    has_limits = item.get_closest_marker("idle_clock") is not None
    return {"idle clock": IdleClock} if has_limits else {"uvloop": uvloop.new_event_loop}
