"""What tests with the clients' own libraries have in common: a stack, and waiting until it is at rest."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamaslot.scheduling.slots import IDLE
from tests.support import models
from tests.support.stack import Stack


class Imported:
    """A module that is imported when it is first used: each of the clients' libraries takes 1 to 3 s, and each worker
    imports every test file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what pytest asks of everything in a module
            raise AttributeError(name)
        return getattr(importlib.import_module(self._name), name)


N_SLOTS, N_CTX = 3, 8192
PATIENCE_S = 20.0
_AT_REST = {state.value for state in IDLE}

#: A tool that a grammar can fill in, as each of the libraries wants it.
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {"place": {"enum": ["Paris", "Rome"]}, "celsius": {"type": "boolean"}},
    "required": ["place", "celsius"],
}


def sdk_stack(directory: Path, **settings: Any) -> Stack:
    """A llama-server and ``llamaslot serve`` in front of it."""
    return Stack(models.dense(directory), directory, slots=N_SLOTS, context=N_CTX, settings=settings or None)


async def until(stack: Stack, condition: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until ``condition`` is true of llamaslot's status. Raises AssertionError with the status if it never is."""
    status: dict[str, Any] = {}
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(status := await stack.status()):  # noqa: ASYNC110  # llamaslot is another process
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never: {status}") from None


async def at_work(stack: Stack) -> None:
    """Wait until some slot is at work."""
    await until(
        stack, lambda status: any(slot["state"] not in _AT_REST for slot in status["backends"][0]["slots"])
    )


async def at_rest(stack: Stack) -> None:
    """Wait until every slot is given back and no request waits."""

    def rests(status: dict[str, Any]) -> bool:
        return not status["queue"] and all(
            slot["state"] in _AT_REST for slot in status["backends"][0]["slots"]
        )

    await until(stack, rests)
