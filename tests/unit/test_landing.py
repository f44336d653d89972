"""Slot files that llama-server writes and reads elsewhere than where snapshots are kept."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from llamaslot.backend.probes import Probes
from llamaslot.cache.ids import pack
from llamaslot.errors import SlotActionFailed
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.rates import Rates
from llamaslot.store import DirectoryUnusable, QuotaExceeded, sidecar
from llamaslot.store import landing as places
from llamaslot.store.landing import NoLanding
from tests.support.stack import size_of
from tests.support.trees import Tree, words

A, B = words(700, 1), words(700, 2)
SIZE = 1 << 18


class Places:
    """Two directories, and what the file system of the landing place says."""

    def __init__(self, above: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.landing = above / "kv", above / "landing"
        self.are_apart, self.free, self.is_read_only = True, 1 << 30, False
        for path in (self.store, self.landing):
            path.mkdir()
        real = os.statvfs

        def statvfs(path: Any) -> Any:
            if path != self.landing:
                return real(path)
            used = sum(size_of(entry) for entry in self.landing.iterdir() if not entry.is_symlink())
            values = list(real(path))
            values[4], values[1] = self.free - used, 1
            values[8] = os.ST_RDONLY if self.is_read_only else 0
            return os.statvfs_result(values)

        monkeypatch.setattr(os, "statvfs", statvfs)
        monkeypatch.setattr(places, "_are_apart", lambda *_: self.are_apart)

    @asynccontextmanager
    async def tree(
        self, kind: str = "dense", quota_bytes: int = 1 << 20, landing_bytes: int = 0
    ) -> AsyncIterator[Tree]:
        tree = Tree(self.store, kind, quota_bytes, self.landing)
        tree.landing_bytes = landing_bytes
        tree.catalog = tree._catalog()
        await tree.open()
        try:
            yield tree
            await tree.check_all()
        finally:
            tree.catalog.close()

    def names(self) -> set[str]:
        return {entry.name for entry in self.landing.iterdir()} - {".llamaslot.lock"}


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    return Places(tmp_path, monkeypatch)


@pytest.mark.parametrize("are_apart", [True, False])
@pytest.mark.parametrize("kind", ["dense", "hybrid", "window"])
async def test_what_lands_elsewhere_is_taken_in_and_given_out(
    kind: str, are_apart: bool, both: Places
) -> None:
    """Each row once, as in one directory; nothing stays in the landing place, and all is there after a restart."""
    both.are_apart = are_apart
    async with both.tree(kind) as tree:
        first = await tree.take(A[:420])
        second = await tree.take(A, after=first.id)
        assert both.names() == set()
        await tree.check_all()
        await tree.reopen(has_manifest=False)
        assert set(tree.catalog.snapshots) == {first.id, second.id}
        if kind == "dense":
            assert await tree.given(second.id, 350) == tree.file(A[:350])
        await tree.catalog.settle()
        assert both.names() == set()


async def test_a_file_in_the_landing_place_takes_no_quota(both: Places) -> None:
    """Of a conversation that goes on only what is new is reserved, so nothing else is evicted for it."""
    n_bytes = len(Tree(both.store).file(A))
    async with both.tree(quota_bytes=n_bytes * 2) as tree:
        other = await tree.take(B)
        first = await tree.take(A[:600])
        draft = await tree.catalog.reserve(n_bytes, new_bytes=n_bytes // 8)
        await tree.catalog.abandon(draft)
        assert await tree.given(first.id, 300) == tree.file(A[:300])
        assert tree.catalog.snapshots.keys() == {other.id, first.id}
        with pytest.raises(QuotaExceeded):
            await tree.catalog.reserve(n_bytes * 3)
        assert both.names() == set()


async def test_what_does_not_fit_goes_through_a_link(both: Places) -> None:
    """As if there were no landing place; also what is restored."""
    both.free = 1000
    async with both.tree() as tree:
        first = await tree.take(A[:420])
        second = await tree.take(A, after=first.id)
        assert await tree.given(second.id) == tree.file(A)
        assert await tree.given(first.id) == tree.file(A[:420])
        await tree.catalog.settle()
        assert both.names() == set()


async def test_a_full_slot_proves_that_slots_can_be_saved_through_a_link_too(both: Places) -> None:
    """At a restart of llamaslot, if none is empty: else nothing would be saved until the next one."""
    both.free = 1000
    async with both.tree() as tree:
        data = tree.file(A)

        class Server:
            async def save(self, slot: int, name: str) -> None:
                if not (both.landing / name).is_symlink():
                    raise SlotActionFailed("no space left")
                (both.landing / name).write_bytes(data)

        rates = Rates()
        rates.size.observe(len(A), len(data))
        probes = Probes(cast(LlamaServer, Server()), tree.catalog, rates)
        assert await probes.can_save(0, len(A))
        await tree.catalog.settle()
        assert both.names() == set()
        assert tree.names() == set()


async def test_a_whole_file_is_a_snapshot_before_the_disk_has_it(
    both: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that llama-server writes there: a stop that has ten seconds must not wait for the disk, and a kill then
    loses nothing.
    """
    async with both.tree() as tree:
        with monkeypatch.context() as patch:
            patch.setattr("llamaslot.store.sidecar.make_durable", lambda *_: None)
            saved = await tree.take(A)
            await tree.catalog.settle()
        path = both.store / (saved.id + ".json")
        assert sidecar.parse(path.name, path.read_bytes()).boot == sidecar.boot_id()
        await tree.reopen(has_manifest=False)
        assert await tree.given(saved.id) == tree.file(A)


async def test_two_files_that_fit_only_one_by_one(both: Places) -> None:
    """The second goes through a link while the first is being written."""
    both.free = SIZE + SIZE // 2
    async with both.tree() as tree:
        drafts = [await tree.catalog.reserve(SIZE) for _ in range(2)]
        links = [(both.landing / draft.part_name).is_symlink() for draft in drafts]
        assert links == [False, True]
        for draft, tokens in zip(drafts, (A, B), strict=True):
            saved = await tree.commit(draft, pack(tokens), tree.write_file(draft, tokens))
            tree.tokens[saved.id] = saved.tokens


async def test_without_room_and_links_nothing_is_saved_and_that_is_said_once(
    both: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """llama-server in a container does not see the store."""
    async with both.tree() as tree:
        saved = await tree.take(A)
        both.free = 1000
        draft = await tree.catalog.reserve(SIZE)
        await tree.catalog.abandon(draft, is_refused=True)
        for _ in range(3):
            with pytest.raises(NoLanding):
                await tree.catalog.reserve(SIZE)
            with pytest.raises(NoLanding):
                await tree.given(saved.id)
        assert caplog.text.count("Give the slot directory more room") == 1
        both.free = 1 << 30
        assert await tree.given(saved.id) == tree.file(A)


async def test_a_link_that_llama_server_cannot_read_is_noticed(both: Places) -> None:
    """The next file that does not fit is not tried."""
    async with both.tree() as tree:
        saved = await tree.take(A)
        both.free = 1000
        with tree.catalog.pin(saved.id), pytest.raises(NoLanding):  # which blames no snapshot
            async with tree.catalog.given_out(saved, saved.n_tokens):
                raise SlotActionFailed("400")
        with pytest.raises(NoLanding):
            await tree.given(saved.id)
        both.free = 1 << 30


async def test_links_that_worked_are_not_blamed_for_what_llama_server_refuses(both: Places) -> None:
    """It may have no free cells for a restore, for example: the next save is made."""
    both.free = 1000
    async with both.tree() as tree:
        saved = await tree.take(A)
        await tree.catalog.abandon(await tree.catalog.reserve(SIZE), is_refused=True)
        with tree.catalog.pin(saved.id), pytest.raises(SlotActionFailed):
            async with tree.catalog.given_out(saved, saved.n_tokens):
                raise SlotActionFailed("400")
        assert await tree.given(saved.id) == tree.file(A)


@pytest.mark.parametrize("fault", ["gone", "read-only", "unmounted"])
async def test_a_landing_place_that_cannot_be_used_costs_no_snapshot(
    fault: str, both: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """That is said once, with what mends it."""
    async with both.tree() as tree:
        saved = await tree.take(A)
        if fault == "gone":
            shutil.rmtree(both.landing)
        elif fault == "unmounted":
            (both.landing / ".llamaslot.lock").unlink()
        both.is_read_only = fault == "read-only"
        for _ in range(2):
            with pytest.raises(NoLanding):
                await tree.catalog.reserve(SIZE)
            with pytest.raises(NoLanding):
                await tree.given(saved.id)
        said = [line for line in caplog.messages if "landing place" in line]
        assert len(said) == 1
        assert "Make or mount it again" in said[0]
        both.is_read_only = False
        both.landing.mkdir(exist_ok=True)
        await tree.reopen()
        assert await tree.given(saved.id) == tree.file(A)


async def test_a_full_landing_place_costs_one_save(both: Places) -> None:
    """llama-server reports a write error: what it has left goes, and the slot is as it was."""
    async with both.tree() as tree:
        draft = await tree.catalog.reserve(SIZE)
        (both.landing / draft.part_name).write_bytes(tree.file(A)[:5000])
        await tree.catalog.abandon(draft, is_refused=True)
        assert both.names() == set()


async def test_leftovers_of_a_crash_are_removed_and_other_files_stay(both: Places) -> None:
    """Also a link into the store, and what it led to."""
    ours = ["ls-0123456789abcdef.part", "ls-1123456789abcdef.probe"]
    others = ["ls-2123456789abcdef.kv", "mine.part", "ls-3123456789abcdef.part.bak", "model.gguf"]
    for name in (*ours, *others):
        (both.landing / name).write_bytes(b"x")
    left = "ls-4123456789abcdef.part"
    (both.store / left).write_bytes(b"x")
    (both.landing / left).symlink_to(both.store / left)
    (both.landing / "ls-5123456789abcdef.part").symlink_to("/etc/passwd")
    async with both.tree() as tree:
        assert both.names() == {*others, "ls-5123456789abcdef.part"}
        assert left not in tree.names()


async def test_a_late_file_of_llama_server_is_removed(both: Places) -> None:
    """It completes a save whose client has gone."""
    async with both.tree() as tree:
        draft = await tree.catalog.reserve(SIZE)
        await tree.catalog.abandon(draft)
        (both.landing / draft.part_name).write_bytes(b"late")
        await tree.catalog.abandon(await tree.catalog.reserve(SIZE))
        await tree.catalog.settle()
        assert both.names() == set()


async def test_a_sweep_of_the_store_spares_a_save_whose_slot_file_is_being_removed(
    both: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several GB take a while, and the next save begins meanwhile."""
    begun, may_go_on, real = threading.Event(), threading.Event(), places._unlink_quietly

    def unlink(path: Path) -> None:
        begun.set()
        may_go_on.wait(5.0)
        real(path)

    async with both.tree() as tree:
        first = await tree.take(A[:420])
        monkeypatch.setattr(places, "_unlink_quietly", unlink)
        second = asyncio.get_running_loop().create_task(tree.take(A, after=first.id))
        await asyncio.to_thread(begun.wait)
        draft = await tree.catalog.reserve(SIZE // 8)
        while tree.catalog._quota.removing:
            await tree.catalog._quota.next_removal()
        may_go_on.set()
        await tree.catalog.abandon(draft)
        assert await tree.given((await second).id) == tree.file(A)


async def test_two_llamaslots_do_not_share_a_landing_place(both: Places, tmp_path: Path) -> None:
    """Each would remove the other's files."""
    async with both.tree():
        other = Tree(tmp_path / "other", landing=both.landing)
        (tmp_path / "other").mkdir()
        with pytest.raises(DirectoryUnusable, match="in use by another llamaslot"):
            await other.open()


class TestWhatStays:
    """``store.landing_quota``."""

    @staticmethod
    def n_kept(both: Places) -> int:
        return len(both.names())

    async def take_each(self, tree: Tree, conversations: Sequence[list[int]]) -> list[str]:
        return [(await tree.take(tokens)).id for tokens in conversations]

    async def test_a_restore_finds_what_was_saved(
        self, both: Places, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is put together for it, nor for the same restore again."""
        async with both.tree(landing_bytes=SIZE * 4) as tree:
            first = await tree.take(A[:420])
            second = await tree.take(A, after=first.id)
            assert await tree.given(second.id, 300) == tree.file(A[:300])
            with monkeypatch.context() as patch:
                patch.setattr("llamaslot.store.restore_file.assemble", None)
                patch.setattr("llamaslot.store.restore_file.copy_file", None)
                assert await tree.given(second.id) == tree.file(A)
                assert await tree.given(second.id, 300) == tree.file(A[:300])
                assert await tree.given(second.id, 680) == tree.file(A)  # whole, as a file of its own is
                assert await tree.given(first.id) == tree.file(A[:420])
            assert self.n_kept(both) == 3

    async def test_what_was_used_longest_ago_goes_first(self, both: Places) -> None:
        """A use counts; what is larger than all there may be does not stay at all."""
        n_bytes = len(Tree(both.store).file(A))
        async with both.tree(landing_bytes=n_bytes * 2, quota_bytes=1 << 22) as tree:
            ids = await self.take_each(tree, [A, B])
            before = both.names()
            await tree.given(ids[0])
            await self.take_each(tree, [words(700, 3)])
            await tree.catalog.settle()
            assert self.n_kept(both) == 2
            kept = tree.catalog.landing.take(ids[0], 700, or_more=700)
            assert kept is not None
            assert kept.name in before
            tree.catalog.landing.give_back(kept)
            tree.catalog.landing.quota_bytes = 10
            await self.take_each(tree, [words(650, 4)])
            assert self.n_kept(both) == 2

    async def test_it_makes_room_for_a_save(self, both: Places) -> None:
        """But for a file that is being restored."""
        n_bytes = len(Tree(both.store).file(A))
        both.free = n_bytes * 3
        async with both.tree(landing_bytes=n_bytes * 2, quota_bytes=1 << 22) as tree:
            ids = await self.take_each(tree, [A, B])
            snapshot = await tree.catalog.verify(ids[0])
            with tree.catalog.pin(ids[0]):
                async with tree.catalog.given_out(snapshot, 700) as given:
                    await tree.catalog.abandon(await tree.catalog.reserve(n_bytes * 2))
                    assert both.names() == {given.name}

    async def test_it_goes_with_its_snapshot(self, both: Places) -> None:
        """And with llamaslot: nothing of it is used after a restart."""
        async with both.tree(landing_bytes=SIZE * 4) as tree:
            (id_,) = await self.take_each(tree, [A])
            assert self.n_kept(both) == 1
            await tree.catalog.drop(id_)
            await tree.catalog.settle()
            assert self.n_kept(both) == 0
            await self.take_each(tree, [B])
            await tree.reopen()
            assert self.n_kept(both) == 0


async def test_bookings_that_are_cancelled_leave_nothing(both: Places) -> None:
    """At each step of a reservation that has to wait."""
    both.free = 1000
    async with both.tree() as tree:
        for n_steps in range(12):
            task = asyncio.get_running_loop().create_task(tree.catalog.reserve(SIZE))
            for _ in range(n_steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled():
                await tree.catalog.abandon(task.result())
            await tree.catalog.settle()
            assert both.names() == set(), n_steps


def test_memory_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is beyond the limit of a container or a service would end llama-server."""
    own, inner = tmp_path / "own", tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    own.write_text("0::/a/b\n")
    monkeypatch.setattr(places, "_CGROUPS", tmp_path)
    monkeypatch.setattr(places, "_OWN_GROUP", own)
    whole = places.available_memory()
    for group, limit in ((inner, "max"), (inner.parent, "5000")):
        (group / "memory.max").write_text(limit)
        (group / "memory.high").write_text("max")
        (group / "memory.current").write_text("4000")
        (group / "memory.stat").write_text("anon 1000\ninactive_file 1000\nactive_file 500\n")
    assert whole > 2500
    assert places.available_memory() == 2500
