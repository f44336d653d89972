"""Which snapshots of the catalog a model finds, whatever goes and comes while it is met."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from llamaslot.cache.ids import pack
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.llama.identity import Identity
from llamaslot.store import Catalog, WithTokens, index_file
from llamaslot.store.model_snapshots import Libraries
from llamaslot.tasks import TaskOwner

PROBS = dict.fromkeys(range(8), -1.0)
MODEL, OTHER = Identity({"n_vocab": 9}, PROBS), Identity({"n_vocab": 7}, PROBS)
DRIFTED = Identity({"n_vocab": 9}, dict.fromkeys(range(8), -1.015))  # another build, the same model


class World:
    """A catalog of ``n`` snapshots of MODEL, and the libraries over it."""

    def __init__(self, directory: Path, n: int) -> None:
        self.snapshots = {f"ls-{i}": snapshot(f"ls-{i}", i) for i in range(n)}
        self.n_read = 0
        self.directory, self.tasks = directory, TaskOwner()
        self.libraries = self.start()

    def start(self) -> Libraries:
        """What llamaslot has after a start."""
        catalog = cast(
            Catalog,
            SimpleNamespace(snapshots=self.snapshots, verify_some=self.verify_some),
        )
        self.libraries = Libraries(catalog, self.directory / "gpu0.index", self.tasks)
        return self.libraries

    async def meet(self, identity: Identity = MODEL) -> set[str]:
        """What is offered to the model."""
        library = await self.libraries.of("gpu0", identity, lambda found: found.fingerprint == "model")
        await self.libraries.complete()
        library.check()
        assert library is self.libraries.current("gpu0")
        return set(library.snapshots)

    async def verify_some(self, ids: list[str]) -> list[WithTokens]:
        """As the catalog does: the headers are read."""
        self.n_read += len(ids)
        found = [self.snapshots[id_] for id_ in ids if id_ in self.snapshots]
        await asyncio.sleep(0)  # one may go while it is read
        return found

    def drop(self, id_: str) -> None:
        del self.snapshots[id_]
        self.libraries.drop(id_)

    async def written(self) -> set[str]:
        """Wait until the index file is written. Returns the snapshots in it."""
        await self.tasks.all_ended()
        library = self.libraries.current("gpu0")
        assert library is not None
        assert library.file is not None
        return set((await library.file.read()).holders())


def snapshot(id_: str, seed: int, fingerprint: str = "model") -> WithTokens:
    tokens = pack([*range(200), seed, *range(100)])
    fields = {"size_bytes": 1000, "created_at": float(seed), "checkpoints": (), "source": "test"}
    return WithTokens.of(tokens, id=id_, fingerprint=fingerprint, **fields)


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(index_file, "MIN_CHANGES", 100)
    world = World(tmp_path, 200)
    yield world
    await world.tasks.close()


async def test_one_file_is_written_of_all_that_was_found(world: World) -> None:
    """Not one of the first hundred and then another."""
    assert await world.meet() == world.snapshots.keys()
    assert await world.written() == world.snapshots.keys()


async def test_after_a_start_the_file_has_the_tokens(world: World) -> None:
    """What went and came meanwhile is noticed; of the rest no header is read."""
    await world.meet()
    await world.written()
    del world.snapshots["ls-0"]
    world.snapshots["ls-new"] = snapshot("ls-new", 999)
    world.start()
    world.n_read = 0
    assert await world.meet() == world.snapshots.keys()
    assert world.n_read == 1
    library = world.libraries.current("gpu0")
    assert library is not None
    for id_, found in world.snapshots.items():
        assert library.index.tokens(id_) == found.tokens


async def test_the_same_model_finds_the_same_library(world: World) -> None:
    """Also in the words of another build, and its file too."""
    await world.meet()
    await world.written()
    before = world.libraries.current("gpu0")
    await world.meet(DRIFTED)
    assert world.libraries.current("gpu0") is before
    world.start()
    world.n_read = 0
    await world.meet(DRIFTED)
    assert world.n_read == 0


async def test_another_model_ends_what_is_being_made(world: World) -> None:
    """Two would write to one directory. What the old one's leases still save is nothing to the new one."""
    await world.meet()
    old = world.libraries.current("gpu0")
    assert old is not None
    await asyncio.sleep(0)
    assert len(world.tasks) == 1
    world.snapshots = {"ls-b": snapshot("ls-b", 5)}
    world.libraries._catalog.snapshots = world.snapshots
    assert await world.meet(OTHER) == {"ls-b"}
    assert not len(world.tasks)
    for i in range(200):
        old.add(snapshot(f"ls-late-{i}", i))
    assert not len(world.tasks)
    new = world.libraries.current("gpu0")
    assert new is not None
    assert set(new.snapshots) == {"ls-b"}


async def test_what_goes_while_the_library_is_filled_is_not_in_it(world: World) -> None:
    """At every look at the event loop one is evicted."""
    world.start()
    meeting = world.tasks.spawn(world.meet(), "meeting")
    while not (world.n_read or meeting.done()):  # noqa: ASYNC110  # a thread looks for the file, however long
        await asyncio.sleep(0)
    gone = list[str]()
    while not meeting.done():
        gone.append(list(world.snapshots)[len(gone) % 7])
        world.drop(gone[-1])
        await asyncio.sleep(0)
    assert await meeting == world.snapshots.keys()
    assert gone


async def test_a_meeting_that_is_cancelled_anywhere_is_made_good_by_the_next(world: World) -> None:
    """The server has restarted in the middle of it."""
    await world.meet()
    await world.written()
    for n_awaits in range(40):
        world.start()
        meeting = world.tasks.spawn(world.meet(), "meeting")
        while n_awaits >= 20 and not (world.libraries.current("gpu0") or meeting.done()):  # noqa: ASYNC110  # a thread
            await asyncio.sleep(0)
        for _ in range(n_awaits % 20):
            await asyncio.sleep(0)
        meeting.cancel()
        await asyncio.wait([meeting])
        assert await world.meet() == world.snapshots.keys()


async def test_many_that_no_file_has_are_read_afterwards(world: World) -> None:
    """The model is there before; what goes and comes meanwhile is right, and one file is written of all."""
    library = await world.libraries.of("gpu0", MODEL, lambda found: True)
    assert library.n_unread == 200
    world.drop("ls-150")
    late = world.snapshots["ls-late"] = snapshot("ls-late", 999)
    library.add(late)
    assert library.n_unread
    await world.libraries.complete()
    library.check()
    assert library.n_unread == 0
    assert library.snapshots.keys() == world.snapshots.keys()
    assert await world.written() == world.snapshots.keys()


class Gate:
    """The index file is read when ``opened`` is set, and not before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, read = asyncio.Event(), index_file.IndexFile.read

        async def late(file: index_file.IndexFile) -> PrefixIndex[str]:
            await self.opened.wait()
            return await read(file)

        monkeypatch.setattr(index_file.IndexFile, "read", late)


async def test_the_model_is_there_before_the_index_file_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then requests wait. What goes and comes meanwhile is right, and no header is read."""
    await world.meet()
    await world.written()
    gate = Gate(monkeypatch)
    world.start()
    world.n_read = 0
    library = await world.libraries.of("gpu0", MODEL, lambda found: True)
    seen = library.changes.n
    complete = world.tasks.spawn(world.libraries.complete(), "a request")
    world.drop("ls-150")
    world.snapshots["ls-late"] = snapshot("ls-late", 999)
    for id_ in (
        "ls-late",
        "ls-7",
    ):  # a slot is adopted that has been saved as the latter, which is in the file too
        library.add(world.snapshots[id_])
    library.check()
    assert library.n_unread
    assert not complete.done()
    gate.opened.set()
    await complete
    library.check()
    assert not library.n_unread
    assert library.snapshots.keys() == world.snapshots.keys()
    assert all(library.index.tokens(id_) == found.tokens for id_, found in world.snapshots.items())
    assert world.n_read == 0
    assert library.changes.since(seen) is None


async def test_a_second_backend_lets_no_request_pass_before_the_index_file_is_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects while the file is read for the first one. The file is read once."""
    await world.meet()
    await world.written()
    gate = Gate(monkeypatch)
    world.start()
    world.n_read = 0
    library = await world.libraries.of("gpu0", MODEL, lambda found: True)
    complete = world.tasks.spawn(world.libraries.complete(), "a request")
    await asyncio.sleep(0)
    assert await world.libraries.of("gpu1", MODEL, lambda found: True) is library
    for _ in range(5):
        await asyncio.sleep(0)
    assert library.n_unread == len(world.snapshots)
    assert not complete.done()
    gate.opened.set()
    await complete
    library.check()
    assert library.snapshots.keys() == world.snapshots.keys()
    assert world.n_read == 0


async def test_another_model_does_not_wait_for_the_index_file_of_the_last_one(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of the old one do not wait for it for ever either."""
    await world.meet()
    await world.written()
    gate = Gate(monkeypatch)
    world.start()
    old = await world.libraries.of("gpu0", MODEL, lambda found: True)
    complete = world.tasks.spawn(world.libraries.complete(), "a request")
    await asyncio.sleep(0)
    meeting = world.tasks.spawn(world.libraries.of("gpu0", OTHER, lambda found: False), "meeting")
    await complete
    assert not old.n_unread
    gate.opened.set()
    assert await meeting is not old
    assert not old.snapshots


async def test_two_backends_of_one_model_share_a_library(world: World) -> None:
    """It lives as long as one of them runs that model; each model has its own file."""
    first = await world.libraries.of("gpu0", MODEL, lambda found: found.fingerprint == "model")
    assert await world.libraries.of("gpu1", DRIFTED, lambda found: found.fingerprint == "model") is first
    other = await world.libraries.of("gpu1", OTHER, lambda found: found.fingerprint == "other")
    assert other is not first
    assert list(world.libraries) == [first, other]
    await world.tasks.all_ended()
    assert await world.libraries.of("gpu1", MODEL, lambda found: found.fingerprint == "model") is first
    assert list(world.libraries) == [first]
    world.drop("ls-3")
    assert "ls-3" not in first.snapshots
