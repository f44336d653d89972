"""A catalog that takes in slot files in llama-server's own layout, and checks of what it stores of them."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench.simulator.orders import ByUse
from llamaslot.cache.ids import common, pack, unpack
from llamaslot.store import Reservation, WithTokens
from llamaslot.store.deduplicate import Base
from llamaslot.store.extent import verify
from llamaslot.store.slot_layout import read_layout
from llamaslot.store.snapshot import EXT
from tests.support.slot_files import KINDS, Model, slot_file
from tests.support.snapshots import Shelter

STATES = (300, 420, 560)
APPENDIX = struct.pack("<I", 0x504B4353)


def words(n_tokens: int, seed: int = 0) -> list[int]:
    """The tokens of a conversation. Conversations of different seeds have none in common."""
    rng = random.Random(seed)
    return [rng.randrange(1, 1000) for _ in range(n_tokens)]


@cache
def _file(model: Model, tokens: tuple[int, ...]) -> bytes:
    return slot_file(model, tokens, [at for at in STATES if at <= len(tokens)] if model.has_states else [])


class Tree(Shelter):
    """Knows the tokens of all saved snapshots, as the prefix index does."""

    def __init__(
        self,
        directory: Path,
        kind: str = "dense",
        quota_bytes: int = 1 << 20,
        landing: Path | None = None,
    ) -> None:
        super().__init__(directory, quota_bytes, ByUse, landing)
        self.model: Model = KINDS[kind]
        self.tokens: dict[str, bytes] = {}
        self.most_bytes = 0
        self.drops_bases = False  # while a save goes on from them

    def file(self, tokens: Sequence[int]) -> bytes:
        """What llama-server writes for a slot that holds ``tokens``."""
        return _file(self.model, tuple(tokens))

    def write_file(self, draft: Reservation, tokens: Sequence[int]) -> int:
        """Save as llama-server does. Returns the size in bytes."""
        data = self.file(tokens)
        self.write_data(draft, data)
        return len(data)

    def write_data(self, draft: Reservation, data: bytes) -> None:
        (self.catalog.slot_files / draft.part_name).write_bytes(data)

    async def take(
        self, tokens: Sequence[int], *, after: str = "", data: bytes | None = None, **changes: Any
    ) -> WithTokens:
        """Save a slot with these tokens. ``after``: the snapshot that the slot goes on from."""
        data = self.file(tokens) if data is None else data
        draft = await self.catalog.reserve(len(data))
        self.write_data(draft, data)

        def find_base(saved: bytes) -> Base | None:
            listed = self.catalog.snapshots
            near = [(common(self.tokens[id_], saved), id_ == after, id_) for id_ in listed]
            n_shared, is_lineage, id_ = max(near, default=(0, False, ""))
            if id_ and self.drops_bases:
                asyncio.get_running_loop().call_soon(self.catalog._drop, id_)
            return Base(listed[id_], n_shared, is_lineage) if id_ else None

        snapshot = await self.commit(
            draft, pack(tokens), len(data), find_base=find_base, marks=STATES, **changes
        )
        self.tokens[snapshot.id] = snapshot.tokens
        self.look()
        return snapshot

    def look(self) -> None:
        self.most_bytes = max(self.most_bytes, self.bytes_on_disk())

    async def given(self, id_: str, n_tokens: int | None = None) -> bytes:
        """The slot file that a restore of the first ``n_tokens`` of a snapshot gets; None: of all."""
        snapshot = await self.catalog.verify(id_)
        with self.catalog.pin(id_):
            async with self.catalog.given_out(snapshot, n_tokens or snapshot.n_tokens) as given:
                self.look()
                return (self.catalog.slot_files / given.name).read_bytes()

    async def check_all(self) -> None:
        """Check that each snapshot is given out with its rows and its last state as llama-server wrote them. There must
        be no files except those of the snapshots, each unchanged, and every file must be accounted for.
        """
        for id_, snapshot in list(self.catalog.snapshots.items()):
            tokens = (await self.catalog.verify(id_)).tokens
            self.tokens[id_] = tokens
            data = await self.given(id_)
            path = self.directory / "given"
            path.write_bytes(data)
            layout = read_layout(path)
            path.unlink()
            assert layout.tokens == tokens
            whole = self.file(unpack(tokens))
            if not self.model.has_states:
                assert data == whole
            else:  # but for the checkpoints behind it
                n_same = data.index(APPENDIX) if APPENDIX in data else layout.size_bytes
                assert data[:n_same] == whole[:n_same], f"{snapshot}"
        await self.catalog.settle()
        for path in self.directory.glob(f"*{EXT}"):
            verify(path)
        self.catalog.check()
        assert self.names() == self.whole()
        assert self.bytes_on_disk() == self.catalog.size_bytes
        assert self.most_bytes <= self.quota_bytes
