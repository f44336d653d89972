"""Conversations through llamaslot on the real llama.cpp, and what lies on disk for them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.support.jobs import clients
from tests.support.stack import Stack
from tests.support.users import Client, Reply, User, words


@dataclass(slots=True)
class Stored:
    """What lies in the directory. ``n_snapshots``: those with a sidecar; ``rows`` and ``states``: bytes of all files of
    that kind, each once; ``whole``: of whole slot files.
    """

    n_snapshots: int = 0
    n_bytes: int = 0
    n_whole: int = 0
    n_files: int = 0
    checkpoints: tuple[int, ...] = ()
    n_tokens: int = 0


def stored(directory: Path) -> Stored:
    """Of a directory in which nothing is being written."""
    found = Stored()
    for path in directory.glob("ls-*"):
        if path.suffix == ".json":
            fields = json.loads(path.read_bytes())
            found.n_snapshots += 1
            found.n_whole += "parts" not in fields
            found.n_tokens = max(found.n_tokens, fields["n_tokens"])
            found.checkpoints = max(found.checkpoints, tuple(fields["checkpoints"]))
        else:
            found.n_files += 1
            found.n_bytes += path.stat().st_size
    return found


async def saved(stack: Stack, patience_s: float = 20.0) -> None:
    """Wait until every slot is saved."""
    async with asyncio.timeout(patience_s):
        while any(slot["is_dirty"] for slot in (await stack.status())["backends"][0]["slots"]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def converse(stack: Stack, front: Client, user: User, n_turns: int, n_tokens: int) -> None:
    """Turns of ``n_tokens``; each is saved."""
    user.n_question = n_tokens - 24
    for _ in range(n_turns):
        turn = await user.turn(front, max_tokens=24)
        assert not turn.reply.error, turn.reply.error
        await saved(stack)


async def ask(front: Client, messages: list[dict[str, str]]) -> Reply:
    body = {"messages": messages, "max_tokens": 8, "temperature": 0}
    return await front.ask("/v1/chat/completions", body)


@dataclass(slots=True)
class Growth:
    n_tokens: int
    whole_bytes: int  # of one slot file of the conversation at its end
    stored: Stored
    written: float


__all__ = [
    "Callable",
    "Growth",
    "Stored",
    "User",
    "ask",
    "clients",
    "converse",
    "random",
    "saved",
    "stored",
    "words",
]
