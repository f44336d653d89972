"""Random days of a catalog against a naive oracle, one operation after another and many at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from bench.simulator.orders import ByUse
from llamaslot.errors import SnapshotInvalid
from llamaslot.store import QuotaExceeded, Reservation
from llamaslot.store.snapshot_table import Pin
from tests.support.snapshots import Shelter, some_tokens, temporary_directory

T = TypeVar("T")
QUOTA = 10_000
SIZES = st.integers(1_500, 6_000)  # a few fill the disk
FINGERPRINTS = st.sampled_from(["model-a", "model-b"])


@dataclass
class Known:
    """What the oracle remembers of a snapshot."""

    size_bytes: int
    fingerprint: str
    last_used: float
    pins: list[Pin] = field(default_factory=list)
    is_listed: bool = True


class CatalogMachine(RuleBasedStateMachine):
    """The oracle keeps plain lists and adds everything up anew each time."""

    drafts: Bundle[Reservation] = Bundle("drafts")
    saved: Bundle[str] = Bundle("saved")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.stack = contextlib.ExitStack()
        self.shelter = Shelter(self.stack.enter_context(temporary_directory()), QUOTA, order=ByUse)
        self.run(self.shelter.open())
        self.known: dict[str, Known] = {}
        self.promised: dict[str, int] = {}
        self.kept: dict[str, set[str]] = {}
        self.n_saved = 0
        self.fingerprint: str | None = None

    def run(self, operation: Coroutine[Any, Any, T]) -> T:
        async def settled() -> T:
            try:
                return await operation
            finally:
                await self.shelter.catalog.settle()

        return self.runner.run(settled())

    def teardown(self) -> None:
        self.shelter.catalog.close()
        self.runner.close()
        self.stack.close()

    # -- the oracle

    def used(self) -> int:
        return sum(known.size_bytes for known in self.known.values()) + sum(self.promised.values())

    def evict(self, size_bytes: int, keep: set[str]) -> bool:
        """Stale first, then least recently used; all that is needed, and no more, or none."""
        free, victims = QUOTA - self.used(), []
        mortal = [
            id_ for id_, known in self.known.items() if known.is_listed and not known.pins and id_ not in keep
        ]
        mortal.sort(
            key=lambda id_: (
                self.fingerprint is not None and self.known[id_].fingerprint == self.fingerprint,
                self.known[id_].last_used,
            )
        )
        for id_ in mortal:
            if free >= size_bytes:
                break
            victims.append(id_)
            free += self.known[id_].size_bytes
        if free < size_bytes:
            return False
        for id_ in reversed(victims[:-1]):
            if free - self.known[id_].size_bytes >= size_bytes:
                victims.remove(id_)
                free -= self.known[id_].size_bytes
        for id_ in victims:
            del self.known[id_]
        return True

    # -- the rules

    @initialize(target=saved, sizes=st.lists(SIZES, min_size=2, max_size=6))
    def fill(self, sizes: list[int]) -> Any:
        """A disk that is full already, or nearly: else no short day would come to evict anything."""
        ids = [self.save(size_bytes) for size_bytes in sizes if self.used() + size_bytes <= QUOTA]
        return multiple(*ids)

    def save(self, size_bytes: int) -> str:
        self.n_saved += 1
        tokens = some_tokens(10, self.n_saved)
        snapshot = self.run(self.shelter.save(tokens, size_bytes))
        self.known[snapshot.id] = Known(size_bytes, snapshot.fingerprint, snapshot.created_at)
        return snapshot.id

    @rule(target=drafts, size_bytes=SIZES | st.just(QUOTA + 1), keep=st.sets(st.integers(0, 5), max_size=2))
    def reserve(self, size_bytes: int, keep: set[int]) -> Any:
        kept = {id_ for at, id_ in enumerate(self.known) if at in keep}
        expected = self.evict(size_bytes, kept)
        try:
            draft = self.run(self.shelter.catalog.reserve(size_bytes, kept))
        except QuotaExceeded:
            assert not expected
            return multiple()
        assert expected
        self.promised[draft.id] = size_bytes
        self.kept[draft.id] = kept
        return draft

    @rule(
        target=saved,
        draft=consumes(drafts),
        fingerprint=FINGERPRINTS,
        grows=st.sampled_from([-200, 0, 0, 700]),
    )
    def commit(self, draft: Reservation, fingerprint: str, grows: int) -> Any:
        self.n_saved += 1
        if draft.id not in self.promised:  # reopened meanwhile
            with pytest.raises(SnapshotInvalid):
                self.run(self.shelter.commit(draft, some_tokens(1), draft.size_bytes))
            return multiple()
        tokens = some_tokens(10, self.n_saved)
        n_written = self.shelter.write(draft, tokens, draft.size_bytes + grows)
        if grows > 0:
            self.promised[draft.id] = n_written
            fits = self.evict(0, self.kept[draft.id])
        else:
            fits = True
        del self.promised[draft.id]
        try:
            snapshot = self.run(self.shelter.commit(draft, tokens, n_written, fingerprint=fingerprint))
        except QuotaExceeded:
            assert not fits
            return multiple()
        assert fits
        self.known[snapshot.id] = Known(n_written, fingerprint, snapshot.created_at)
        return snapshot.id

    @rule(draft=consumes(drafts), lie=st.sampled_from(["missing", "short", "other", "tokens"]))
    def commit_of_something_else(self, draft: Reservation, lie: str) -> None:
        tokens = some_tokens(10, self.n_saved)
        if draft.id not in self.promised:
            return
        n_written = 0 if lie == "missing" else self.shelter.write(draft, tokens)
        lies: dict[str, dict[str, Any]] = {
            "missing": {},
            "short": {"n_written": n_written + 1},
            "other": {"tokens_expected": some_tokens(10, -1)},
            "tokens": {"n_saved": 9},
        }
        with pytest.raises(SnapshotInvalid):
            self.run(self.shelter.commit(draft, tokens, **({"n_written": n_written} | lies[lie])))
        del self.promised[draft.id]

    @rule(draft=consumes(drafts), is_written=st.booleans())
    def abandon(self, draft: Reservation, is_written: bool) -> None:
        if is_written and draft.id in self.promised:
            self.shelter.write(draft, some_tokens(10))
        self.run(self.shelter.catalog.abandon(draft))
        self.promised.pop(draft.id, None)

    @rule(id_=saved)
    def pin(self, id_: str) -> None:
        if id_ in self.known and self.known[id_].is_listed:
            pin = self.shelter.catalog.pin(id_)
            self.known[id_].pins.append(pin)
        else:
            with pytest.raises(KeyError):
                self.shelter.catalog.pin(id_)

    @rule(id_=saved)
    def unpin(self, id_: str) -> None:
        known = self.known.get(id_)
        if known is None or not known.pins:
            return

        async def leave() -> None:
            known.pins.pop().release()

        self.run(leave())
        if not known.pins and not known.is_listed:
            del self.known[id_]

    @rule(id_=saved)
    def touch(self, id_: str) -> None:
        async def touch() -> None:
            self.shelter.catalog.touch(id_)

        self.run(touch())
        if id_ in self.known and self.known[id_].is_listed:
            self.known[id_].last_used = self.shelter.time

    @rule(id_=saved)
    def drop(self, id_: str) -> None:
        self.run(self.shelter.catalog.drop(id_))
        self.forget(id_)

    def forget(self, id_: str) -> None:
        if id_ in self.known and self.known[id_].pins:
            self.known[id_].is_listed = False
        else:
            self.known.pop(id_, None)

    @rule(id_=saved, is_spoilt=st.booleans())
    def verify(self, id_: str, is_spoilt: bool) -> None:
        is_listed = id_ in self.known and self.known[id_].is_listed
        if id_ in self.known and not is_listed:
            return  # dropped and still pinned: its file is as it was, or spoilt before
        if is_listed and not is_spoilt:
            assert self.run(self.shelter.catalog.verify(id_)).id == id_
            return
        if is_listed:
            self.shelter.put(f"{id_}.kv", bytes(self.known[id_].size_bytes))
        with pytest.raises(SnapshotInvalid):
            self.run(self.shelter.catalog.verify(id_))
        self.forget(id_)

    @rule(fingerprint=FINGERPRINTS)
    def another_model(self, fingerprint: str) -> None:
        self.shelter.catalog.serve("gpu0", fingerprint)
        self.fingerprint = fingerprint

    @rule()
    def reopen(self) -> None:
        """All drafts end, all pins are gone; what was dropped is dropped for good."""

        async def unpin_all() -> None:
            for known in self.known.values():
                while known.pins:
                    known.pins.pop().release()

        self.run(unpin_all())
        self.known = {id_: known for id_, known in self.known.items() if known.is_listed}
        self.promised.clear()
        self.fingerprint = None
        self.run(self.shelter.reopen())

    # -- what holds at all times

    @invariant()
    def the_quota_holds_on_disk(self) -> None:
        assert self.shelter.bytes_on_disk() <= QUOTA

    @invariant()
    def the_oracle_agrees(self) -> None:
        catalog = self.shelter.catalog
        catalog.check()
        listed = {id_: known for id_, known in self.known.items() if known.is_listed}
        assert catalog.snapshots.keys() == listed.keys()
        assert {id_: catalog.last_used(id_) for id_ in listed} == {
            id_: known.last_used for id_, known in listed.items()
        }
        assert catalog.size_bytes == self.used()
        assert len(self.shelter.dropped) == len(set(self.shelter.dropped)), "told twice"


TestCatalogMachine = CatalogMachine.TestCase
TestCatalogMachine.settings = settings(
    max_examples=30, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


@settings(max_examples=30, deadline=None)
@given(days=st.lists(st.lists(st.integers(0, 1_000), max_size=12), min_size=2, max_size=6))
def test_many_at_once(days: list[list[int]]) -> None:
    """Several clients, each with a random day of its own; at each write the quota holds, in the end all is whole."""

    async def client(shelter: Shelter, number: int, day: list[int]) -> None:
        catalog = shelter.catalog
        for turn, choice in enumerate(day):
            for _ in range(choice % 7):
                await asyncio.sleep(0)
            ids = sorted(catalog.snapshots)
            id_ = ids[choice % len(ids)] if ids else "ls-0000000000000000"
            match choice % 5:
                case 0:
                    await catalog.drop(id_)
                case 1 if ids:
                    with catalog.pin(id_) as pinned:
                        await catalog.drop(ids[0])
                        assert (shelter.directory / pinned.file_name).exists(), "pinned and gone"
                        catalog.touch(id_)
                case _:
                    try:
                        draft = await catalog.reserve(500 + 5 * choice, keep=ids[:1])
                    except QuotaExceeded:
                        continue
                    tokens = some_tokens(10, 1_000 * number + turn)
                    n_written = shelter.write(draft, tokens)
                    assert shelter.bytes_on_disk() <= shelter.quota_bytes
                    catalog.check()
                    if choice % 3:
                        snapshot = await shelter.commit(draft, tokens, n_written)
                        assert snapshot.tokens == tokens
                    else:
                        await catalog.abandon(draft)

    async def play() -> None:
        with temporary_directory() as directory:
            shelter = Shelter(directory, QUOTA)
            await shelter.open()
            await asyncio.gather(*(client(shelter, number, day) for number, day in enumerate(days)))
            assert await shelter.settled() == shelter.whole()
            for id_ in list(shelter.catalog.snapshots):
                await shelter.catalog.verify(id_)
            shelter.catalog.check()
            assert shelter.catalog.size_bytes == shelter.bytes_on_disk() <= QUOTA
            assert len(shelter.dropped) == len(set(shelter.dropped)), "told twice"
            listed = dict(shelter.catalog.snapshots)
            assert (await shelter.reopen()).snapshots == listed
            shelter.catalog.close()

    asyncio.run(play())
