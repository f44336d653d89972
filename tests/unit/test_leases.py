"""What a lease allows, and what is left when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from bench.virtual import VirtualLoop
from llamaslot.cache.ids import count
from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import (
    BackendRestarted,
    LlamaslotError,
    SlotActionFailed,
)
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits
from llamaslot.scheduling.slots import SlotState
from llamaslot.store import QuotaExceeded
from tests.support.house import House, outcome, outcome_of, tokens_of
from tests.support.stub import StubServer


@pytest.fixture
def house() -> Iterator[House]:
    """Two free slots; what is asked of the server waits until it is served."""
    house = House(VirtualLoop(), StubServer(2), limits=QueueLimits(max_waiting=2, max_wait_s=5.0))
    yield house
    house.close()


def test_a_lease_of_the_old_process_sends_nothing_to_the_new_one(house: House) -> None:
    """Its slot number is somebody else's now."""

    async def slow(told: asyncio.Event) -> None:
        with await house.dispatcher.lease(Request("a", tokens_of(1, 90))) as lease:
            await told.wait()
            lease.begin_request()

    told = asyncio.Event()
    client = house.start(slow(told), "a")
    house.loop.settle()
    house.restart()
    house.notice(is_down=False)
    house.loop.run(house.meet())
    told.set()
    house.loop.settle()
    assert isinstance(outcome(client), BackendRestarted)
    house.check_nothing_is_left()


def test_a_lease_is_released_once(house: House) -> None:
    """However often that is said; the next holder keeps the slot."""
    first = house.loop.run(house.dispatcher.lease(Request("a", tokens_of(1, 90))))
    first.release()
    others = [house.loop.run(house.dispatcher.lease(Request(f"{i}", tokens_of(500 * i, 90)))) for i in (1, 2)]
    assert first.slot in [other.slot for other in others]
    first.release()
    house.check()
    assert first.slot is not None
    assert first.slot.state is SlotState.LEASED
    for other in others:
        other.release()
    house.check_nothing_is_left()


def test_a_save_goes_on_when_its_client_has_left(house: House) -> None:
    """The slot comes back after it, and its content is on disk."""
    house.start(house.ask(Request("a", tokens_of(1, 500))), "a")
    house.finish()
    client = house.start(house.idle_save.save_all(), "idle save")
    house.loop.settle()
    client.cancel()
    house.loop.settle()
    assert house.leases.table is not None
    assert [slot.state for slot in house.leases.table.slots].count(SlotState.LEASED) == 1
    house.finish()
    assert len(house.catalog.snapshots) == 1
    house.check_nothing_is_left()


def test_a_save_that_outlives_its_server_is_the_next_one_s(house: House) -> None:
    """The file is whole: the commit that ends after the restart offers it to the new process."""
    house.start(house.ask(Request("a", tokens_of(1, 500))), "a")
    house.finish()
    house.start(house.idle_save.save_all(), "idle save")
    for _ in range(2):  # reserved, saved
        house.loop.settle()
        house.server.serve(house.server.pending[0])
    house.loop.settle()
    assert [op.kind for op in house.server.pending] == ["commit"]
    house.restart()
    house.notice(is_down=False)
    house.loop.run(house.meet())
    house.finish()
    assert house.leases.table is not None
    assert len(house.leases.table.model_snapshots.snapshots) == 1
    house.check_nothing_is_left()


def test_one_failed_save_does_not_keep_the_others_from_being_saved(house: House) -> None:
    """At a clean stop."""
    for i in (1, 2):
        house.start(house.ask(Request(f"{i}", tokens_of(9000 * i, 500))), f"{i}")
    house.finish()
    stop = house.start(house.idle_save.save_all(), "stop")
    house.loop.settle()
    house.server.serve(house.server.pending[0])
    house.loop.settle()
    house.server.fail(house.server.pending[0], SlotActionFailed("no"))
    house.finish()
    assert outcome_of(stop) == 1
    assert len(house.catalog.snapshots) == 1
    house.check_nothing_is_left()


def test_a_failed_restore_is_no_news_of_the_model(house: House) -> None:
    """The request computes what was not restored, and nobody concludes that the model cannot go back."""
    house.loop.run(_auto(house))
    own = house.saved_tokens
    client = house.start(house.ask(Request("owner", own + tokens_of(1, 5))), "owner")
    while not any(op.kind == "restore" for op in house.server.pending):
        house.loop.settle()
        house.server.serve(house.server.pending[0])
        house.loop.settle()
    house.server.fail(house.server.pending[0], SlotActionFailed("no"))
    house.finish()
    assert outcome_of(client) == 0
    assert house.leases.table is not None
    assert house.leases.table.cache_kind is CacheKind.DENSE
    assert house.metrics.reuse_mispredictions._value.get() == 0
    house.check_nothing_is_left()


@pytest.mark.parametrize("error", [SlotActionFailed("no"), QuotaExceeded("full")])
def test_after_a_failed_restore_it_resumes_from_the_next_best(house: House, error: LlamaslotError) -> None:
    """From a slot that holds half of its prompt. Want of room drops no snapshot: it is offered again a little later."""
    house.loop.run(_auto(house))
    own, table = house.saved_tokens, house.leases.table
    assert table is not None
    house.start(house.ask(Request("half", own[: len(own) // 2] + tokens_of(50_000, 50))), "half")
    house.finish()
    wanted = table.best_snapshot(Request("owner", own + tokens_of(1, 5)))
    assert wanted is not None
    client = house.start(house.ask(Request("owner", own + tokens_of(1, 5))), "owner")
    kind = "restore" if isinstance(error, SlotActionFailed) else "verify"
    while not any(op.kind == kind for op in house.server.pending):
        house.loop.settle()
        house.server.serve(house.server.pending[0])
        house.loop.settle()
    house.server.fail(house.server.pending[0], error)
    house.finish()
    assert outcome_of(client) == count(own) // 2
    assert table.has_snapshot(wanted) is isinstance(error, QuotaExceeded)
    if isinstance(error, QuotaExceeded):
        request = Request("later", own + tokens_of(1, 5))
        assert wanted not in [view.id for view in table.view(request, house.loop.time(), {}).snapshots]
        assert wanted in [view.id for view in table.view(request, house.loop.time() + 60, {}).snapshots]
    house.check_nothing_is_left()


async def _auto(house: House) -> None:
    """Two hot contexts, one of them on disk only; what was asked is served at once."""
    house.server.pace = lambda op: 0.01
    for i in (1, 2):
        await house.ask(Request(f"first {i}", tokens_of(20_000 * i, 600)))
    await house.keep_one_on_disk()
    house.server.pace = lambda op: None


def test_what_was_computed_with_lora_scales_is_gone_on_from_with_the_same_ones_only(house: House) -> None:
    """It is erased before another use, also after a client that left in the middle."""
    scaled = Namespace(lora='[{"id":0,"scale":0.5}]')
    tokens = tokens_of(1, 90)
    house.start(house.ask(Request("whole", tokens, namespace=scaled)), "whole")
    house.finish()
    leaves = house.start(house.ask(Request("leaves", tokens, namespace=scaled)), "leaves")
    for _ in range(3):
        house.loop.settle()
        for op in list(house.server.pending):
            house.server.serve(op)
    house.loop.settle()
    leaves.cancel()
    house.finish()
    table = house.leases.table
    assert table is not None
    own = house.start(house.ask(Request("own", tokens, namespace=scaled)), "own")
    house.finish()
    assert outcome_of(own) == 89
    client = house.start(house.ask(Request("next", tokens)), "next")
    house.finish()
    assert outcome_of(client) == 0
    house.check_nothing_is_left()


def test_a_slot_that_cannot_be_erased_gives_other_lora_scales_nothing(house: House) -> None:
    """None of its tokens are expected to be reused, so nothing is computed ahead behind them."""
    assert house.leases.table is not None
    house.leases.table.can_save = house.leases.table.can_erase = False
    scaled, tokens = Namespace(lora='[{"id":0,"scale":0.5}]'), tokens_of(1, 9000)
    for i in (1, 2):
        house.start(house.ask(Request(f"scaled {i}", tokens, namespace=scaled)), "scaled")
    house.finish()
    house.server.sent.clear()
    lease = house.loop.run(house.dispatcher.lease(Request("next", tokens)))
    preparing = house.start(house.executor.prepare(lease, lambda text: None), "next")
    house.finish()
    assert (preparing.result(), lease.content, house.server.sent) == (None, None, [])
    lease.release()


def test_a_suspect_slot_that_was_not_used_stays_suspect(house: House) -> None:
    """Its holder left before it could be erased."""
    first = house.loop.run(house.dispatcher.lease(Request("a", tokens_of(1, 90))))
    first.finish(None)
    first.release()
    assert first.slot is not None
    assert first.slot.state is SlotState.SUSPECT
    both = [house.loop.run(house.dispatcher.lease(Request(f"{i}", tokens_of(500 * i, 90)))) for i in (1, 2)]
    for lease in both:
        lease.release()
    assert first.slot.state is SlotState.SUSPECT
    house.check_nothing_is_left()


def test_until_the_server_has_begun_only_what_both_share_is_believed(house: House) -> None:
    """It may have cut the old context back already, and nobody knows."""
    own = tokens_of(1, 500)
    house.start(house.ask(Request("a", own)), "a")
    house.finish()
    lease = house.loop.run(house.dispatcher.lease(Request("b", own[: 4 * 450] + tokens_of(9000, 50))))
    lease.begin_request()
    assert lease.content is not None
    assert lease.content.n_tokens == 450
    lease.finish(lease.content)
    lease.release()
    house.check_nothing_is_left()


def test_the_owner_is_served_as_soon_as_its_context_is_on_disk(house: House) -> None:
    """The commit wakes him, not a timer, nor the end of the request that has displaced him."""
    house.server.token_s = 1.0
    own = tokens_of(9000, 500)
    for i, tokens in enumerate((own, tokens_of(20_000, 500))):
        house.start(house.ask(Request(f"first {i}", tokens)), "first")
        house.finish()
    house.start(house.ask(Request("other", tokens_of(30_000, 500))), "other")
    house.loop.settle()
    owner = Request("owner", own + tokens_of(1, 5))
    house.start(house.ask(owner), "owner")
    house.loop.settle()
    assert house.dispatcher.position(owner) == 1
    for kind in ("reserve", "save", "commit"):
        assert [op.kind for op in house.server.pending] == [kind]
        assert house.dispatcher.position(owner) == 1
        house.server.serve(house.server.pending[0])
        house.loop.settle()
    assert house.dispatcher.position(owner) == 0
    house.finish()
    house.check_nothing_is_left()
