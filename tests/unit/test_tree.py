"""Each row once: what the store keeps of slot files that begin alike, and what it gives out of them."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from xxhash import xxh3_64_intdigest

from llamaslot.cache.ids import pack
from llamaslot.errors import LlamaslotError, SnapshotInvalid
from llamaslot.store.inventory import FileState, read_headers, remove, take_stock
from llamaslot.store.restore_file import is_passing
from llamaslot.store.shared_store import META, Neighbours
from llamaslot.store.slot_layout import read_layout
from llamaslot.store.snapshot import KV
from tests.support.slot_files import KINDS, slot_file
from tests.support.snapshots import Killed, Killer
from tests.support.trees import Tree, words

A = words(700, 1)
FORK = [*A[:500], *words(150, 2)]


async def tree_of(directory: Path, kind: str = "dense", quota_bytes: int = 1 << 20) -> Tree:
    tree = Tree(directory, kind, quota_bytes)
    await tree.open()
    return tree


async def grown(tree: Tree) -> list[str]:
    """A conversation of three saves, of which each replaces the one before, and another that parts from it."""
    first = await tree.take(A[:400])
    second = await tree.take(A[:600], after=first.id)
    await tree.catalog.drop(first.id)
    third = await tree.take(A, after=second.id)
    await tree.catalog.drop(second.id)
    other = await tree.take(FORK)
    await tree.catalog.settle()
    return [third.id, other.id]


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_there_is_not_written_again(kind: str, tmp_path: Path) -> None:
    """Two conversations with 500 tokens in common: their rows are there once; all that is given out is as it was."""
    tree = await tree_of(tmp_path, kind)
    ids = await grown(tree)
    await tree.check_all()
    rows = [part for id_ in ids for part in tree.catalog.snapshots[id_].parts if not part.is_state]
    assert [(part.start, part.end) for part in rows] == [
        *((0, 400), (400, 600), (600, 700)),
        *((0, 400), (400, 500), (500, 650)),
    ]
    assert rows[:2] == [rows[3], rows[4]._replace(end=600)]
    assert tree.catalog.commits.n_differing == 0
    again = Tree(tmp_path, kind)
    tree.catalog.close()
    await again.open()
    assert set(again.catalog.snapshots) == set(ids)
    await again.check_all()
    again.catalog.close()


@pytest.mark.parametrize("kind", ["window", "recurrent", "hybrid"])
async def test_the_end_of_a_long_answer_that_came_back_keeps_its_state(kind: str, tmp_path: Path) -> None:
    """The message behind it may be edited. The state is not written again. That of a short answer goes."""
    tree, tokens, last = await tree_of(tmp_path, kind), words(1900, 1), ""
    states = []
    for n in (1100, 1650, 1700, 1900):
        snapshot = await tree.take(tokens[:n], after=last)
        last = snapshot.id
        states.append([part for part in snapshot.parts if part.is_state])
    assert [part.end for part in states[0]] == [560, 1100]
    assert [part.end for part in states[-1]] == [560, 1100, 1650, 1900]
    assert states[-1][:2] == states[0]
    tree.catalog.close()


async def test_a_cut_is_a_file_of_the_first_tokens(tmp_path: Path) -> None:
    """At any token, also inside an extent and of a whole file."""
    tree = await tree_of(tmp_path)
    whole = await tree.take(A)
    assert not whole.parts
    longer = await tree.take([*A, *words(100, 3)], after=whole.id)
    for id_, n in ((whole.id, 350), (longer.id, 350), (longer.id, 750)):
        assert await tree.given(id_, n) == tree.file([*A, *words(100, 3)][:n])
    assert await tree.given(whole.id, 690) == tree.file(A)  # the copy would be nearly as large
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("kind", ["window", "recurrent", "hybrid"])
async def test_a_cut_at_a_state_ends_with_it(kind: str, tmp_path: Path) -> None:
    """Where the system part ended, or a message: all that llama-server needs to go on from there."""
    tree = await tree_of(tmp_path, kind)
    id_, _ = await grown(tree)
    for at in tree.catalog.snapshots[id_].checkpoints:
        (tmp_path / "given").write_bytes(await tree.given(id_, at))
        layout = read_layout(tmp_path / "given")
        assert layout.n_tokens == at
        assert layout.checkpoints[-1].n_tokens == at
        (tmp_path / "given").unlink()
    for at in (333, 250):  # not after a state, before all of them
        with pytest.raises(SnapshotInvalid):
            await tree.given(id_, at)
    assert id_ in tree.catalog.snapshots  # nothing is wrong with it
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_the_quota_holds_while_much_is_shared(kind: str, tmp_path: Path) -> None:
    """Ten conversations on one system part with room for a few: what goes frees what no other needs, tails first."""
    one = len(Tree(tmp_path, kind).file(A))
    tree = await tree_of(tmp_path, kind, 4 * one)
    for seed in range(10):
        last = await tree.take([*A[:400], *words(300, 10 + seed)])
        assert await tree.given(last.id)
        assert tree.catalog.size_bytes <= tree.quota_bytes
    assert len(tree.dropped) >= 1
    assert len(tree.catalog.snapshots) >= 3
    assert last.id in tree.catalog.snapshots
    await tree.check_all()
    tree.catalog.close()


async def test_what_others_need_outlives_its_snapshot(tmp_path: Path) -> None:
    """Dropped while it is being restored, and while another goes on from its rows."""
    tree = await tree_of(tmp_path)
    first = await tree.take(A[:400])
    second = await tree.take(A[:600], after=first.id)
    with tree.catalog.pin(first.id):
        await tree.catalog.drop(first.id)
        assert first.id + KV in tree.names()
    await tree.catalog.settle()
    assert first.id + KV in tree.names()
    assert f"{first.id}.json" not in tree.names()
    await tree.check_all()
    await tree.catalog.drop(second.id)
    await tree.catalog.settle()
    assert tree.names() == set()
    assert tree.catalog.size_bytes == 0
    tree.catalog.close()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_what_a_save_goes_on_from_is_dropped_meanwhile(kind: str, tmp_path: Path) -> None:
    """Its files are the new one's."""
    tree = await tree_of(tmp_path, kind)
    first = await tree.take(A[:400])
    tree.drops_bases = True
    second = await tree.take(A, after=first.id)
    assert set(tree.catalog.snapshots) == {second.id}
    assert second.parts[0].end == 400
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_a_whole_file_of_an_older_version_is_gone_on_from(kind: str, tmp_path: Path) -> None:
    """It stays as it is, and its rows are there once."""
    tree = await tree_of(tmp_path, kind)
    draft = await tree.catalog.reserve(1 << 18)
    old = await tree.commit(draft, pack(A[:400]), tree.write_file(draft, A[:400]))
    assert not old.parts
    tree.tokens[old.id] = old.tokens
    new = await tree.take(A, after=old.id)
    rows = [part for part in new.parts if not part.is_state]
    assert [(part.file, part.start, part.end) for part in rows][:1] == [(old.file_name, 0, 400)]
    await tree.catalog.drop(old.id)
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("how", ["gone", "cut short"])
async def test_without_a_file_its_longest_beginning_stays(how: str, tmp_path: Path) -> None:
    """Somebody has deleted an extent: what is before it is not lost."""
    tree = await tree_of(tmp_path, "hybrid")
    id_, other = await grown(tree)
    tree.catalog.close()
    rows = [part for part in tree.catalog.snapshots[id_].parts if not part.is_state]
    bad = tmp_path / rows[2].file
    bad.unlink() if how == "gone" else os.truncate(bad, 100)
    tree = await tree_of(tmp_path, "hybrid")
    lengths = {its.n_tokens for its in tree.catalog.snapshots.values()}
    assert other in tree.catalog.snapshots
    assert lengths == {650, 560}  # the last state before it
    await tree.check_all()
    tree.catalog.close()


async def test_what_an_unreadable_sidecar_may_need_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are not known while it cannot be read: they count, and the next start finds it whole."""
    tree = await tree_of(tmp_path)
    ids = await grown(tree)
    before = await tree.settled()
    real = Path.read_bytes

    def refuse_sidecar(path: Path) -> bytes:
        if path.suffix == ".json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse_sidecar)
        await tree.reopen(has_manifest=False)
        await tree.catalog.abandon(await tree.catalog.reserve(1_000))
    assert not tree.catalog.snapshots
    assert tree.names() == before
    assert tree.catalog.size_bytes == tree.bytes_on_disk()
    await tree.reopen()
    assert set(tree.catalog.snapshots) == set(ids)
    await tree.check_all()
    tree.catalog.close()


async def test_gc_leaves_what_an_unreadable_sidecar_may_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another snapshot goes, of whose files it may need some. Readable again, it is whole."""
    tree = await tree_of(tmp_path)
    ids = await grown(tree)
    before = await tree.settled()
    real = Path.read_bytes

    def refuse_one(path: Path) -> bytes:
        if path.name == f"{ids[1]}.json":
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse_one)
        stock = take_stock(tmp_path)
        items = await read_headers(tmp_path, list(stock.items.values()), with_checksums=True)
        states = {item.id: item.state for item in items}
        assert states.pop(ids[0]) is FileState.WHOLE
        assert set(states.values()) == {FileState.UNREADABLE}
        assert ids[1] in states
        assert len(states) == 2  # and its extent, which no sidecar that can be read needs
        n_left, error = remove(tmp_path, stock, stock.items[ids[0]])
    assert (n_left > 0, error) == (True, None)
    assert tree.names() == before - {f"{ids[0]}.json"}
    await tree.reopen(has_manifest=False)
    assert set(tree.catalog.snapshots) == {ids[1]}
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: [5, *parts],
        lambda parts: [part for part in parts if part[1] == part[2]],  # states only
        lambda parts: [part for part in parts if part[1] != part[2]][:-1],
        lambda parts: [[*parts[0][:3], -1], *parts[1:]],
        lambda parts: [*parts, [parts[-1][0], -4, -4, parts[-1][3]]],
        lambda parts: [[parts[0][0][:-3] + "json", *parts[0][1:]], *parts[1:]],
        lambda parts: [["../" + parts[0][0], *parts[0][1:]], *parts[1:]],
    ],
)
async def test_damaged_parts_in_a_sidecar(
    change: Callable[[list[list[Any]]], list[Any]], tmp_path: Path
) -> None:
    """They cost the one snapshot, never the start."""
    tree = await tree_of(tmp_path, "hybrid")
    id_, other = await grown(tree)
    tree.sidecar(id_, parts=change(tree.sidecar(id_)["parts"]))
    assert take_stock(tmp_path).items[id_].state is FileState.BROKEN
    await tree.reopen()
    assert set(tree.catalog.snapshots) == {other}
    await tree.check_all()
    tree.catalog.close()


async def test_rows_that_differ_are_not_trusted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The slot was saved as the first one, so its rows must be the same: the second save is kept whole."""
    tree = await tree_of(tmp_path)
    first = await tree.take(A[:400])
    second = await tree.take(A, after=first.id, data=slot_file(replace(tree.model, seed=9), A))
    assert not second.parts
    assert tree.catalog.commits.n_differing == 1
    assert "kept whole" in caplog.text
    tree.catalog.close()


async def test_rows_of_another_conversation_need_not_be_its_own(tmp_path: Path) -> None:
    """Computed apart, in other batches, they differ by rounding. They stand for those of a second conversation, of
    which only what it has alone is compared from save to save."""
    tree, other = await tree_of(tmp_path), [*A[:350], *words(300, 2)]
    await tree.take(A[:400])
    own = replace(tree.model, seed=9)
    begun = await tree.take(other[:500], data=slot_file(own, other[:500]))
    more = await tree.take(other, after=begun.id, data=slot_file(own, other))
    assert (begun.own_from, more.own_from) == (350, 350)
    assert len(more.parts) == 3
    assert tree.catalog.commits.n_differing == 0
    tree.catalog.close()


async def test_what_cannot_be_told_apart_is_kept_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once, with the reason."""
    caplog.set_level(logging.INFO)
    tree = await tree_of(tmp_path)
    for n in (400, 700):
        data = tree.file(A[:n])[:-3]
        snapshot = await tree.take(A[:n], data=data)
        assert not snapshot.parts
        assert (tmp_path / snapshot.file_name).read_bytes() == data
    assert caplog.text.count("slot files of this model are kept whole") == 1
    tree.catalog.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
async def test_a_disk_that_fails_costs_no_save(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written is on the disk whole already: it stays so."""
    tree = await tree_of(tmp_path)
    first = await tree.take(A[:400])

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        second = await tree.take(A, after=first.id)
        assert not second.parts
    await tree.check_all()
    tree.catalog.close()


# -- killed ----------------------------------------------------------------------------------------------------------


async def before(directory: Path, kind: str) -> list[str]:
    tree = await tree_of(directory, kind)
    first = await tree.take(A[:400])
    other = await tree.take(words(300, 7))
    await tree.catalog.settle()
    tree.catalog.close()
    return [first.id, other.id]


async def a_day(tree: Tree, first: str) -> list[str]:
    """The conversation goes on and replaces its snapshot; another branches off; a cut is given out."""
    await tree.open()
    for id_ in tree.catalog.snapshots:
        tree.tokens[id_] = (await tree.catalog.verify(id_)).tokens
    second = await tree.take(A, after=first)
    await tree.catalog.drop(first)
    other = await tree.take(FORK)
    await tree.given(second.id)
    await tree.catalog.settle()
    return [second.id, other.id]


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
async def test_killed_at_each_step(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After every single file operation: the conversation is there, as it was before or after the save."""
    caplog.set_level(logging.CRITICAL)
    n_steps = 0
    while True:  # those of a hybrid are many of the same kind
        directory = tmp_path / str(n_steps)
        directory.mkdir()
        first, other = await before(directory, kind)
        tree, killer = Tree(directory, kind), Killer(n_steps)
        with killer.armed():
            try:
                await a_day(tree, first)
            except (Killed, LlamaslotError):
                assert killer.has_struck
            finally:
                await tree.catalog.settle()
                tree.catalog.close()
        survivor = await tree_of(directory, kind)
        lengths = sorted(its.n_tokens for its in survivor.catalog.snapshots.values())
        assert other in survivor.catalog.snapshots
        assert {400, 700} & set(lengths), f"after step {n_steps}"
        await survivor.check_all()
        survivor.catalog.close()
        if not killer.has_struck:
            assert lengths == [300, 650, 700]
            break
        n_steps += 1 if kind == "dense" else 3
    assert n_steps > 25


# -- the commands ----------------------------------------------------------------------------------------------------


async def test_stock_counts_each_file_once(tmp_path: Path) -> None:
    """What an item frees, what others need too, and the sum of all."""
    tree = await tree_of(tmp_path)
    ids = await grown(tree)
    stock = take_stock(tmp_path)
    assert set(stock.items) == set(ids)
    assert all(item.size_bytes > 0 and item.shared_bytes > 0 for item in stock.items.values())
    assert stock.size_bytes == tree.catalog.size_bytes == tree.bytes_on_disk()
    for id_, item in stock.items.items():
        assert item.size_bytes == tree.catalog.own_bytes(id_)
    held = sum(tree.catalog.own_bytes(id_) + tree.catalog.share_bytes(id_) for id_ in ids)
    assert held == pytest.approx(tree.catalog.size_bytes, abs=len(ids))  # what the page shows adds up
    tree.catalog.close()


async def test_a_changed_byte_is_found_and_what_is_before_it_stays(tmp_path: Path) -> None:
    """``verify --remove`` removes the file; the next start keeps the rest of the conversation."""
    tree = await tree_of(tmp_path)
    id_, _ = await grown(tree)
    tree.catalog.close()
    path = tmp_path / tree.catalog.snapshots[id_].parts[2].file
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    stock = take_stock(tmp_path)
    assert not [item for item in await read_headers(tmp_path, list(stock.items.values())) if item.why]
    (broken,) = [
        item
        for item in await read_headers(tmp_path, list(stock.items.values()), with_checksums=True)
        if item.state is FileState.BROKEN
    ]
    assert broken.id == id_
    assert broken.bad_files == (path.name,)
    assert broken.why == f"{path.name} is damaged; with --remove, the next start keeps what is before it"
    assert remove(tmp_path, stock, broken) == (0, None)
    tree = await tree_of(tmp_path)
    assert {its.n_tokens for its in tree.catalog.snapshots.values()} == {600, 650}
    await tree.check_all()
    tree.catalog.close()


async def test_a_changed_token_in_a_header_is_found(tmp_path: Path) -> None:
    """By ``verify`` and by a start, in the header that goes before parts and in a whole slot file."""
    tree = await tree_of(tmp_path)
    whole = await tree.take(words(300, 3))
    id_, other = await grown(tree)
    await tree.catalog.settle()
    tree.catalog.close()
    for each in (whole.id, id_):
        path = tmp_path / (each + KV)
        data = bytearray(path.read_bytes())
        data[600] ^= 1
        path.write_bytes(data)
    items = await read_headers(tmp_path, list(take_stock(tmp_path).items.values()))
    broken = {item.id: item.why for item in items if item.why}
    assert broken == dict.fromkeys([whole.id, id_], "holds other tokens than when it was saved")
    tree.manifest.unlink(missing_ok=True)
    tree = await tree_of(tmp_path)
    assert set(tree.catalog.snapshots) == {other}
    await tree.check_all()
    tree.catalog.close()


async def test_a_sidecar_without_a_digest_is_valid(tmp_path: Path) -> None:
    """Those of before have none."""
    tree = await tree_of(tmp_path)
    ids = set(await grown(tree))
    tree.catalog.close()
    for id_ in ids:
        assert tree.sidecar(id_)["digest"] == tree.catalog.snapshots[id_].digest
        tree.sidecar(id_, digest="")
    tree = await tree_of(tmp_path)
    assert set(tree.catalog.snapshots) == ids
    tree.catalog.close()


def damage(path: Path, at: int) -> None:
    """Change a byte."""
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("asked", ["root", "cut", "other"])
async def test_damaged_rows_of_a_shared_slot_file_are_not_given_out(tmp_path: Path, asked: str) -> None:
    """Once others name it, it has a checksum: compared by a restore, its own too, and by ``verify``."""
    tree = await tree_of(tmp_path)
    root = await tree.take(A[:500])
    first, second = await tree.take(A, after=root.id), await tree.take(FORK)
    path = tmp_path / (root.id + KV)
    checksum = xxh3_64_intdigest(path.read_bytes())
    assert [each.parts[0].checksum for each in (first, second)] == [checksum, checksum]
    await tree.catalog.settle()
    tree.catalog.close()
    damage(path, path.stat().st_size - 100)
    items = await read_headers(tmp_path, list(take_stock(tmp_path).items.values()))
    assert not [item for item in items if item.why]
    items = await read_headers(tmp_path, list(take_stock(tmp_path).items.values()), with_checksums=True)
    assert {item.id: item.bad_files for item in items if item.state is FileState.BROKEN} == {
        root.id: (), first.id: (path.name,), second.id: (path.name,),
    }  # fmt: skip
    tree = await tree_of(tmp_path)
    with pytest.raises(SnapshotInvalid, match=f"{path.name}: has changed"):
        await tree.given(second.id if asked == "other" else root.id, 100 if asked == "cut" else None)
    assert not tree.catalog.snapshots
    await tree.catalog.settle()
    tree.catalog.close()


async def test_the_checksum_of_a_slot_file_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart too: what others have noted holds, also if the file has changed since."""
    tree = await tree_of(tmp_path)
    root = await tree.take(A[:500])
    first = await tree.take(A, after=root.id)
    tree.tokens |= {root.id: root.tokens}
    damage(tmp_path / (root.id + KV), 20_000)
    await tree.reopen()
    second = await tree.take(FORK)
    third = await tree.take([*FORK, *words(40, 8)], after=second.id)
    assert {each.parts[0] for each in (second, third)} == {first.parts[0]}
    with pytest.raises(SnapshotInvalid, match="has changed"):
        await tree.given(third.id)
    tree.catalog.close()


async def test_parts_without_a_checksum_are_valid(tmp_path: Path) -> None:
    """A llamaslot of before noted none."""
    tree = await tree_of(tmp_path)
    root = await tree.take(A[:500])
    first = await tree.take(A, after=root.id)
    await tree.catalog.settle()
    tree.catalog.close()
    tree.sidecar(first.id, parts=[part[:4] for part in tree.sidecar(first.id)["parts"]])
    tree = await tree_of(tmp_path)
    assert tree.catalog.snapshots[first.id].parts[0].checksum is None
    await tree.check_all()
    items = await read_headers(tmp_path, list(take_stock(tmp_path).items.values()), with_checksums=True)
    assert not [item for item in items if item.why]
    tree.catalog.close()


async def test_removing_one_leaves_what_the_other_needs(tmp_path: Path) -> None:
    tree = await tree_of(tmp_path, "hybrid")
    id_, other = await grown(tree)
    tree.catalog.close()
    stock = take_stock(tmp_path)
    assert remove(tmp_path, stock, stock.items[id_]) == (0, None)
    tree = await tree_of(tmp_path, "hybrid")
    assert set(tree.catalog.snapshots) == {other}
    await tree.check_all()
    tree.catalog.close()


async def test_another_llamaslot_of_a_shared_store_evicts_what_nobody_needs(tmp_path: Path) -> None:
    """It sees what each frees, and removes no file that a snapshot of ours goes on needing."""
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        (tmp_path / META / part).mkdir(parents=True)
    tree = await tree_of(tmp_path / "a")
    id_, other = await grown(tree)
    tree.catalog.close()
    for each, used in ((id_, 1_000.0), (other, 2_000.0)):
        os.utime(tmp_path / "a" / f"{each}.json", (used, used))
    neighbours = Neighbours(tmp_path / "b")
    await neighbours.look()
    assert neighbours.others == tree.catalog.size_bytes
    (first,) = neighbours.share_of_others(1)
    assert (first.id, first.size_bytes) == (id_, tree.catalog.own_bytes(id_))
    await neighbours.remove([first])
    tree = await tree_of(tmp_path / "a")
    assert set(tree.catalog.snapshots) == {other}
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("how", ["changed", "missing"])
async def test_one_damaged_file_takes_all_that_need_it(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At the first restore that meets it: else each of them would cost a request its restore."""
    tree = await tree_of(tmp_path)
    id_, _ = await grown(tree)
    apart = await tree.take(words(300, 9))
    path = tmp_path / tree.catalog.snapshots[id_].parts[1].file
    if how == "missing":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 1
        path.write_bytes(data)
    with pytest.raises(SnapshotInvalid):
        await tree.given(id_)
    assert set(tree.catalog.snapshots) == {apart.id}
    (line,) = [line for line in caplog.messages if line.startswith("snapshot dropped:")]
    assert path.name in line
    assert "; 1 others that need the same file" in line
    await tree.check_all()
    tree.catalog.close()


@pytest.mark.parametrize("number", [errno.EPERM, errno.EMFILE, errno.EIO])
async def test_what_cannot_be_copied_now_is_given_out_later(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A directory that takes no new file, too many open files: the snapshots stay."""
    tree = await tree_of(tmp_path)
    id_, other = await grown(tree)

    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("llamaslot.store.restore_file.assemble", refuse)
        with pytest.raises(SnapshotInvalid) as refused:
            await tree.given(id_)
    assert is_passing(refused.value)
    assert set(tree.catalog.snapshots) == {id_, other}
    await tree.check_all()
    tree.catalog.close()
