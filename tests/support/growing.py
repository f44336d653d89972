"""Conversations through llamaslot on the real llama.cpp, and the files on disk for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamaslot.store.slot_layout import SlotLayout, read_layout
from tests.support.jobs import clients, ids
from tests.support.rounding import LIKELY_CHAT, is_right
from tests.support.stack import Stack
from tests.support.users import Client, Reply, rendered, words

Messages = list[dict[str, str]]


@dataclass(slots=True)
class Stored:
    """What is in a directory: numbers of snapshots, of whole ones among them, and of files; bytes in all, and of
    states. ``is_still``: every file belongs to a snapshot, so none is being written or about to be removed.
    """

    n_snapshots: int = 0
    n_whole: int = 0
    n_files: int = 0
    n_bytes: int = 0
    state_bytes: int = 0
    is_still: bool = True

    @classmethod
    def of(cls, directory: Path) -> Stored:
        found, states, files, named = cls(), dict[str, int](), set[str](), set[str]()
        for path in directory.glob("ls-*"):
            if path.suffix != ".json":
                files.add(path.name)
                found.n_bytes += path.stat().st_size
                continue
            parts = json.loads(path.read_bytes()).get("parts", [])
            found.n_snapshots += 1
            found.n_whole += not parts
            named |= {path.with_suffix(".kv").name, *(file for file, *_ in parts)}
            states |= {file: size for file, start, end, size, *_ in parts if start == end}
        found.n_files, found.is_still = len(files), files == named
        found.state_bytes = sum(states.values())
        return found


@dataclass(slots=True)
class Place:
    """A stack with one slot: each conversation that comes saves the one before it, and restores its own."""

    stack: Stack
    front: Client
    server: Client
    rng: random.Random
    said: list[tuple[Messages, str]] = field(default_factory=list)

    async def ask(self, messages: Messages, n_answer: int = 16) -> Reply:
        reply = await self.front.ask("/v1/chat/completions", _body(messages, n_answer))
        assert not reply.error, reply.error
        if n_answer == 16:
            self.said.append((list(messages), reply.text))
        return reply

    async def turn(self, messages: Messages, n_tokens: int, n_answer: int = 16) -> Reply:
        """Ask, and append the answer and another question of ``n_tokens`` to the conversation."""
        reply = await self.ask(messages, n_answer)
        messages += [
            {"role": "assistant", "content": reply.text},
            {"role": "user", "content": words(self.rng, n_tokens)},
        ]
        return reply

    async def figure(self, name: str) -> float:
        return (await self.stack.own_metrics()).get(f"llamaslot_{name}", 0.0)

    async def stored(self, directory: Path) -> Stored:
        """What is in ``directory``, once all saves are committed and the files that they replace are gone."""
        async with asyncio.timeout(30):
            while True:
                with contextlib.suppress(FileNotFoundError):  # it was replaced between listing and looking
                    found = Stored.of(directory)
                    if found.is_still and found.n_bytes == await self.figure("snapshot_stored_bytes"):
                        return found
                await asyncio.sleep(0.02)

    async def forget(self) -> None:
        """Have another conversation take the slot."""
        await self.ask([{"role": "user", "content": words(self.rng, 40)}], 2)

    async def layout(self, n_tokens: int) -> SlotLayout:
        """The layout of a slot file that llama-server writes for ``n_tokens`` tokens."""
        prompt = [self.rng.randrange(97, 122) for _ in range(n_tokens)]
        await self.server.post("/slots/0?action=erase", {})
        await self.server.post("/completion", {"prompt": prompt, "n_predict": 0, "id_slot": 0})
        await self.server.post("/slots/0?action=save", {"filename": "whole"})
        path = self.stack.server.save_dir / "whole"
        layout = read_layout(path)
        path.unlink()
        return layout

    async def n_other_answers(self, n: int) -> int:
        """How many of the last ``n`` answers differ from those that llama-server gives with nothing cached, apart from
        rounding. llamaslot is stopped.
        """
        await self.stack.llamaslot.stop()
        n_other = 0
        for messages, text in self.rng.sample(self.said, min(n, len(self.said))):
            await self.server.post("/slots/0?action=erase", {})
            body = _body(messages, 16) | LIKELY_CHAT | {"cache_prompt": False}
            n_other += not is_right(text, await self.server.post("/v1/chat/completions", body))
        await self.stack.llamaslot.start()
        return n_other


def _body(messages: Messages, n_answer: int) -> dict[str, Any]:
    return {"messages": messages, "max_tokens": n_answer, "temperature": 0}


@asynccontextmanager
async def place_of(
    kind: Callable[[Path], Path],
    directory: Path,
    *,
    context: int = 16384,
    seed: int = 1,
    landing: Path | None = None,
) -> AsyncIterator[Place]:
    """A llama-server with one slot, and llamaslot in front of it. ``landing``: the directory into which llama-server
    writes.
    """
    model = kind(directory.parent / "models")
    settings: dict[str, Any] = {
        "routing": {"small_prompt_tokens": 0}
    }  # each turn is saved, however short it is
    if landing is not None:
        (directory / "kept").mkdir(parents=True, exist_ok=True)
        settings["store"] = {"directory": str(directory / "kept")}
    stack = Stack(model, directory, slots=1, context=context, settings=settings, save_dir=landing)
    async with stack, clients(stack) as (front, server):
        yield Place(stack, front, server, random.Random(seed))


@dataclass(slots=True)
class Growth:
    """The figures of one conversation. ``added``: bytes that its saves have added. ``whole``: bytes of a slot file of
    all of it, without states.
    """

    n_tokens: int
    added: float
    saved: float  # by llama-server
    stored: Stored
    whole: int

    def __str__(self) -> str:
        stored, kept = self.stored, self.whole + self.stored.state_bytes
        return (
            f"{self.n_tokens} tokens, {stored.n_bytes} bytes on disk in {stored.n_files} files = "
            f"{stored.n_bytes / kept:.3f} of one file ({self.whole}) and the kept states ({stored.state_bytes}); "
            f"added by all saves {self.added:.0f} = {self.added / kept:.3f}; written by llama-server {self.saved:.0f}"
        )


async def grow(place: Place, n_turns: int, n_tokens: int, n_answer: int = 16) -> tuple[Growth, Messages]:
    """Have a conversation of ``n_turns`` with ``n_tokens`` each, of which ``n_answer`` are the answer. After each turn
    another short conversation makes it leave the slot.
    """
    messages: Messages = [{"role": "user", "content": words(place.rng, n_tokens)}]
    for _ in range(n_turns):
        await place.turn(messages, n_tokens - 44 - n_answer, n_answer)
        await place.forget()
    stored = await place.stored(place.stack.server.save_dir)
    added, saved = (
        await place.figure("snapshot_added_bytes"),
        await place.figure("snapshot_saved_bytes_total"),
    )
    n = len(ids(rendered(messages[:-1]))) - len(ids(rendered([])))
    layout = await place.layout(300)
    states = sum(state.size_bytes for state in layout.checkpoints) + (
        layout.end.size_bytes if layout.end else 0
    )
    return Growth(n, added, saved, stored, (layout.size_bytes - states) * n // 300), messages
