"""Trunks that the operator asks for, made while nobody wants anything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import SlotActionFailed, SlotWedged, UpstreamError
from llamaslot.fleet.prewarm import Bodies, Prewarm
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotState
from llamaslot.store import Catalog, Snapshot
from llamaslot.tokens.tokenizer import Prompt, Tokenizer
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

N = 1000


class Rendered:
    """Bodies that say what they are rendered to: ``tokens`` and how many of them are in common."""

    async def opening(self, body: Mapping[str, Any]) -> tuple[Prompt, int]:
        await asyncio.sleep(0)
        if "tokens" not in body:
            raise UpstreamError(400, b"no template for that")
        return Prompt(body["tokens"]), body["n"]


def body(first: int, n: int = N) -> dict[str, Any]:
    return {"tokens": tokens_of(first, n + 5), "n": n}


AGENT, OTHER = body(1), body(50_000)


@pytest.fixture(params=list(CacheKind))
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    house = House(VirtualLoop(), StubServer(2, pace=lambda op: 0.01))
    house.cache_kind = request.param
    assert house.leases.table is not None
    house.leases.table.cache_kind = house.cache_kind
    yield house
    house.finish()
    house.check_nothing_is_left()
    house.close()


def prewarm(house: House, *bodies: dict[str, Any]) -> Prewarm:
    named: Bodies = [(f"body {i}", body) for i, body in enumerate(bodies)]
    catalog, prompts = cast(Catalog, house.catalog), cast(Tokenizer, Rendered())
    return Prewarm(
        named,
        house.dispatcher,
        lambda _: house.executor,
        lambda: prompts,
        lambda _: catalog,
        house.tasks,
        2.0,
    )


def run(house: House, warm: Prewarm, seconds: float = 60.0) -> None:
    """As its task would, for a while."""
    task = house.loop.create_task(warm.run(), name="prewarm")
    house.loop.pass_time(seconds)
    task.cancel()
    house.loop.settle()


def pinned(house: House) -> list[Snapshot]:
    return [snapshot for snapshot in house.catalog.snapshots.values() if snapshot.is_pinned]


def test_each_body_is_computed_once_and_kept(house: House) -> None:
    """Exactly up to where conversations part; then nothing is left to do."""
    run(house, prewarm(house, AGENT, OTHER))
    assert [house.server.files[snapshot.file_name] for snapshot in pinned(house)] == [
        tokens_of(1, N),
        tokens_of(50_000, N),
    ]
    assert {snapshot.kind for snapshot in pinned(house)} == {SnapshotKind.TRUNK}
    assert house.server.n_computed == 2 * N


def test_a_conversation_finds_it(house: House) -> None:
    """The first one already."""
    run(house, prewarm(house, AGENT))
    asks = Request("first", tokens_of(1, N) + tokens_of(9000, 300), n_system=N)
    assert house.loop.run(house.ask(asks)) >= N - 5


def test_one_that_is_on_disk_is_not_computed_again(house: House) -> None:
    """After a restart of llamaslot, of llama-server, or of both."""
    run(house, prewarm(house, AGENT))
    house.restart()
    house.notice(is_down=False)
    house.loop.run(house.meet())
    n_computed = house.server.n_computed
    run(house, prewarm(house, AGENT))
    assert house.server.n_computed == n_computed
    assert len(pinned(house)) == 1


def test_what_a_conversation_has_computed_is_not_computed_again(house: House) -> None:
    """It is saved up to where conversations part, if that was not done yet, and the conversation is kept too."""
    tokens = tokens_of(1, N) + tokens_of(9000, 300)
    house.loop.run(house.ask(Request("first", tokens, boundaries=(N,), n_system=N)))
    n_computed = house.server.n_computed
    run(house, prewarm(house, AGENT))
    assert house.server.n_computed <= n_computed + 6
    assert [house.server.files[snapshot.file_name] for snapshot in pinned(house)] == [tokens_of(1, N)]
    assert house.leases.table is not None
    held = [slot.content.tokens for slot in house.leases.table.slots]
    assert tokens in [*held, *house.server.files.values()]


def test_one_that_was_saved_for_others_is_pinned(house: House) -> None:
    """Of two conversations that began together; nothing is computed for it."""

    async def both() -> None:
        asks = (Request(f"{n}", tokens_of(1, N) + tokens_of(n, 300), n_system=N) for n in (9000, 90_000))
        await asyncio.gather(*map(house.ask, asks))

    house.loop.run(both())
    n_computed = house.server.n_computed
    run(house, prewarm(house, AGENT))
    assert house.server.n_computed == n_computed
    assert len(pinned(house)) == 1


def test_one_that_is_not_asked_for_any_more_is_unpinned(house: House) -> None:
    """It stays, as any other snapshot."""
    run(house, prewarm(house, AGENT, OTHER))
    run(house, prewarm(house, OTHER))
    (kept,) = pinned(house)
    assert house.server.files[kept.file_name] == tokens_of(50_000, N)
    assert len(house.catalog.snapshots) == 2


def test_what_a_user_has_pinned_stays_pinned(house: House) -> None:
    """Pinned on the page, it was never a matter of the configuration."""
    run(house, prewarm(house, AGENT))
    (one,) = pinned(house)
    table = house.leases.table
    assert table is not None
    for is_pinned in (False, True):
        table.kind_changed(house.loop.run(house.catalog.change_kind(one.id, one.kind, is_pinned=is_pinned)))
    run(house, prewarm(house, OTHER))
    assert {snapshot.n_tokens for snapshot in pinned(house)} == {N}
    assert len(pinned(house)) == 2


def test_nothing_is_unpinned_while_a_body_cannot_be_rendered(house: House) -> None:
    """It may be the one."""
    run(house, prewarm(house, AGENT))
    run(house, prewarm(house, {"messages": []}))
    assert len(pinned(house)) == 1


def test_small_ones_are_left_alone(house: House) -> None:
    """They are computed faster than read."""
    run(house, prewarm(house, body(1, 100)))
    assert house.server.n_computed == 0


def test_it_gives_way_to_a_client(house: House) -> None:
    """Even with a single slot he waits for no more than the batch that runs, and what was computed is not lost."""
    house.server.pace = lambda op: 0.5 if op.kind == "batch" else 0.01
    one = tokens_of(1, N)
    task = house.loop.create_task(prewarm(house, AGENT).run(), name="prewarm")
    house.loop.pass_time(4.0)
    n_before = house.server.n_computed
    assert 0 < n_before < N
    client = house.start(house.ask(Request("client", tokens_of(90_000, 100))), "client")
    house.loop.pass_time(3.0)
    assert client.done()
    house.loop.pass_time(60.0)
    task.cancel()
    house.loop.settle()
    assert [house.server.files[snapshot.file_name] for snapshot in pinned(house)] == [one]


def test_one_that_cannot_be_saved_is_given_up(house: House) -> None:
    """After a few attempts; the next one has its turn."""
    house.server.pace = lambda op: None if op.kind == "save" else 0.01
    task = house.loop.create_task(prewarm(house, AGENT, OTHER).run(), name="prewarm")
    for _ in range(3):
        house.loop.pass_time(10.0)
        (save,) = house.server.pending
        house.server.fail(save, SlotActionFailed("no", 500))
    house.server.pace = lambda op: 0.01
    house.loop.pass_time(20.0)
    task.cancel()
    house.loop.settle()
    assert [house.server.files[snapshot.file_name] for snapshot in pinned(house)] == [tokens_of(50_000, N)]


def test_a_slot_that_falls_silent_is_counted_and_abandoned(house: House) -> None:
    """As one of a client's; it is tried again."""
    house.server.pace = lambda op: None if op.kind in ("batch", "notice") else 0.01
    task = house.loop.create_task(prewarm(house, AGENT).run(), name="prewarm")
    house.loop.pass_time(4.0)
    [batch] = house.server.pending
    house.server.fail(batch, SlotWedged("nothing was told"))
    house.loop.settle()
    assert house.metrics.wedged._value.get() == 1
    assert house.leases.table is not None
    assert SlotState.ABANDONED in {slot.state for slot in house.leases.table.slots}
    house.server.pace = lambda op: 0.01
    [notice] = house.server.pending
    house.server.serve(notice)
    house.loop.pass_time(20.0)
    task.cancel()
    house.loop.settle()
    assert [house.server.files[snapshot.file_name] for snapshot in pinned(house)] == [tokens_of(1, N)]


def test_it_waits_while_there_are_requests(house: House) -> None:
    """Two seconds of quiet come first."""
    task = house.loop.create_task(prewarm(house, AGENT).run(), name="prewarm")
    for i in range(10):
        house.loop.run(house.ask(Request(f"client {i}", tokens_of(90_000 + 1000 * i, 70))))
        house.loop.pass_time(1.0)
    assert pinned(house) == []
    assert house.server.n_computed <= 10 * 70
    task.cancel()
    house.loop.settle()
