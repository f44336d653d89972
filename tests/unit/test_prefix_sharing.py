"""Long prompts that begin alike: one of them computes what they share, and nobody waits for it in vain."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import SlotActionFailed
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.settings import QueueLimits
from llamaslot.store import Snapshot
from tests.support.house import SETTINGS, outcome, tokens_of
from tests.support.mainloop import BATCH, Paced, long
from tests.support.stub import BYTES_PER_TOKEN, Op

N, OWN = 2000, 500
EVERY = pytest.mark.parametrize("cache_kind", list(CacheKind))
OTHERS = pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
AGAIN = 8  # tokens that a restored trunk has to compute again, at most


def opening(
    number: int, n_own: int = OWN, *, is_told: bool = False, n: int = N, at: int = 1, **more: Any
) -> Request:
    """The first turn of a conversation. ``is_told``: it is known where its system part, the one at ``at``, ends."""
    more |= {"n_system": n, "boundaries": (n,)} if is_told else {}
    return Request(f"user {number}", tokens_of(at, n) + tokens_of(100_000 * number, n_own), **more)


def house_of(cache_kind: CacheKind, n_slots: int = 4) -> Paced:
    house = Paced(cache_kind, n_slots, answer_s=0.001)
    house.begin()
    return house


def trunks(house: Paced) -> list[Snapshot]:
    return [snapshot for snapshot in house.catalog.snapshots.values() if snapshot.kind is SnapshotKind.TRUNK]


def served(house: Paced, clients: list[asyncio.Task[Any]]) -> list[int]:
    """What each of them has reused, once all are through."""
    house.wait(*clients)
    return [client.result() for client in clients]


# -- computed once -----------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("is_told", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("apart_s", [0.0, 0.6], ids=["at once", "one by one"])
def test_what_several_begin_with_is_computed_once(
    cache_kind: CacheKind, is_told: bool, apart_s: float
) -> None:
    """Whether or not anybody has said where it ends: where they part is seen by comparing them."""
    with house_of(cache_kind) as house:
        clients = []
        for user in (1, 2, 3):
            clients.append(house.come(opening(user, is_told=is_told)))
            house.loop.pass_time(apart_s)
        reused = served(house, clients)
        assert house.server.n_computed <= N + 3 * (OWN + AGAIN)
        assert reused[0] == 0
        assert min(reused[1:]) >= N - AGAIN
        assert len(trunks(house)) == 1
        assert house.now - house.began <= (N + 3 * OWN) / 1000 + 0.6
        assert house.metrics.steps_failed._family._metrics == {}


@EVERY
def test_those_who_wait_are_served_as_soon_as_it_is_there(cache_kind: CacheKind) -> None:
    """The one who computes it has more of its own than the other: it is passed."""
    with house_of(cache_kind) as house:
        waited: list[float] = []
        house.dispatcher.on_prefix_wait = waited.append
        clients = [house.come(opening(1, 5000)), house.come(opening(2, 600))]
        house.wait(*clients)
        assert house.first_s["user 2"] <= 2.0 + 0.6 + 0.5
        assert house.first_s["user 1"] <= 2.0 + 5.0 + 0.6 + 0.6
        assert waited == [pytest.approx(2.0, abs=0.4)]


@EVERY
def test_a_prefix_that_a_request_waits_for_is_what_is_left_of_it(cache_kind: CacheKind) -> None:
    """Of a prompt that goes on for long behind it: nobody with more than that gets ahead. Behind it somebody does."""
    with house_of(cache_kind) as house:
        clients = [house.come(opening(1, 9000)), house.come(opening(2, 400))]
        house.until(0.5)
        clients.append(house.come(long("other", 3000)))
        house.wait(*clients)
        assert house.first_s["user 2"] <= 2.0 + 0.4 + 0.3
        assert house.first_s["other"] <= 2.0 + 0.4 + 3.0 + 0.5


@EVERY
def test_two_groups_share_what_each_of_them_has(cache_kind: CacheKind) -> None:
    """All begin with the same 1,000 tokens, two of them with the same 2,000."""
    with house_of(cache_kind) as house:
        near = [Request(f"near {i}", opening(1).tokens + tokens_of(1_000_000 * i, OWN)) for i in (1, 2)]
        far = Request("far", tokens_of(1, N // 2) + tokens_of(7_000_000, OWN))
        served(house, [house.come(job) for job in (near[0], far, near[1])])
        assert house.server.n_computed <= N + OWN + 2 * OWN + OWN + 3 * AGAIN


# -- too late, or not worth it -----------------------------------------------------------------------------------------


def test_what_was_passed_is_kept_where_it_can_be_cut() -> None:
    """A dense model's snapshot of more than what is shared is as good."""
    with house_of(CacheKind.DENSE) as house:
        clients = [house.come(opening(1, 3000))]
        house.until(2.6)
        clients.append(house.come(opening(2)))
        reused = served(house, clients)
        assert reused[1] == N
        assert house.server.n_computed == N + 3000 + OWN
        assert trunks(house)[0].n_tokens > N


@OTHERS
def test_what_was_passed_elsewhere_is_computed_by_himself(cache_kind: CacheKind) -> None:
    """At once: he waits for nothing that cannot come."""
    with house_of(cache_kind) as house:
        clients = [house.come(opening(1, 9000))]
        house.until(2.6)
        clients.append(house.come(opening(2)))
        house.loop.settle()
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [0, 0]
        assert trunks(house) == []
        assert house.server.n_computed == N + 9000 + N + OWN
        assert house.first_s["user 2"] <= 2.5 + 0.3


@OTHERS
def test_so_it_is_where_the_batch_under_way_passes_it(cache_kind: CacheKind) -> None:
    """The batch that ends it could not be stopped any more: whoever waited for it is told at once."""
    with house_of(cache_kind) as house:
        house.rates.save.latency_s = 1.0  # after which he would look again by himself
        clients = [house.come(opening(1, 9000))]
        house.until(1.95)  # 1,920 tokens are there, the next batch ends with 2,048
        clients.append(house.come(opening(2)))
        house.loop.settle()
        assert house.dispatcher.n_waiting == 1
        house.until(2.2)
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [0, 0]
        assert trunks(house) == []
        assert house.first_s["user 2"] <= 2.5 + 0.5


@OTHERS
def test_one_that_ends_with_a_batch_is_kept_and_of_use(cache_kind: CacheKind) -> None:
    """The prefill is stopped just there. A sliding window has no checkpoint then, without which nothing of the file
    could be used: it goes back by one token first."""
    with house_of(cache_kind) as house:
        n = 16 * BATCH
        clients = [house.come(opening(1, 3000, n=n))]
        house.until(1.95)
        clients.append(house.come(opening(2, n=n)))
        reused = served(house, clients)
        assert [trunk.n_tokens for trunk in trunks(house)] == [n]
        assert reused[1] >= n - AGAIN
        assert house.server.n_computed <= n + 3000 + OWN + AGAIN


@OTHERS
def test_no_request_asks_for_what_its_maker_has_already(cache_kind: CacheKind) -> None:
    """A long follow-up of a conversation waits for its turn: it goes on from the end of what is in its slot, and passes
    no other point on the way."""
    with house_of(cache_kind) as house:
        house.loop.run(house.ask(opening(1, 1000)))
        house.begin()
        house.come(long("another", 1200))
        house.until(0.1)
        follows = Request("follows", opening(1, 1000).tokens + tokens_of(900_000, 3000))
        clients = [house.come(follows)]
        house.until(0.2)
        clients.append(house.come(opening(2)))
        house.loop.settle()
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [N + 1000, 0]
        assert trunks(house) == []


@EVERY
def test_where_saving_costs_more_than_computing_each_computes_its_own(cache_kind: CacheKind) -> None:
    """A slow disk."""
    with house_of(cache_kind) as house:
        house.rates.save.bytes_per_s = house.rates.restore.bytes_per_s = 1e6
        clients = [house.come(opening(user)) for user in (1, 2)]
        house.loop.settle()
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [0, 0]
        assert trunks(house) == []


@EVERY
@pytest.mark.parametrize(
    "more", [{"no_cache": True}, {"namespace": Namespace("anna")}], ids=["cold", "isolated"]
)
@pytest.mark.parametrize("who", [1, 2])
def test_nothing_is_shared_with_a_job_that_may_use_nothing_cached(
    cache_kind: CacheKind, more: dict[str, Any], who: int
) -> None:
    """Neither what it computes nor what others do."""
    with house_of(cache_kind) as house:
        jobs = [opening(user, **(more if user == who else {})) for user in (1, 2)]
        clients = [house.come(job) for job in jobs]
        house.loop.settle()
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [0, 0]
        assert trunks(house) == []
        assert house.server.n_computed == 2 * (N + OWN)


@EVERY
def test_follow_ups_of_conversations_that_begin_alike_share_nothing(cache_kind: CacheKind) -> None:
    """Each has what it goes on from in its own slot."""
    with house_of(cache_kind) as house:
        firsts, latency_s = [opening(user) for user in (1, 2)], house.rates.save.latency_s
        house.rates.save.latency_s = 5.0  # so that the second does not save the first and take its slot
        for job in firsts:
            house.loop.run(house.ask(job))
        assert {slot.content.tokens for slot in house.table.slots} >= {job.tokens for job in firsts}
        house.rates.save.latency_s = latency_s
        house.begin()
        jobs = [Request(f"{job.id} again", job.tokens + tokens_of(5_000_000, 800)) for job in firsts]
        clients = [house.come(job) for job in jobs]
        house.loop.settle()
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [N + OWN] * 2
        assert house.server.n_computed == 2 * 800
        assert trunks(house) == []


# -- makers that fail --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("is_told", [False, True], ids=["unknown", "known"])
@pytest.mark.parametrize("after_s", [0.05, 1.0, 1.9, 2.3])
def test_when_the_maker_leaves_the_next_goes_on_from_there(
    cache_kind: CacheKind, is_told: bool, after_s: float
) -> None:
    """From what is in its slot, or from the trunk if that was made in time."""
    with house_of(cache_kind) as house:
        first = house.come(opening(1, is_told=is_told))
        house.loop.pass_time(0.01)
        clients = [house.come(opening(user, is_told=is_told)) for user in (2, 3)]
        house.until(after_s)
        house.leave(first)
        served(house, clients)
        assert house.server.n_computed <= N + 3 * OWN + 2 * BATCH + 3 * AGAIN
        assert house.now - house.began <= 2.0 + 3 * 0.5 + 3.0


@EVERY
def test_when_the_maker_leaves_while_it_is_saved_it_is_there_all_the_same(cache_kind: CacheKind) -> None:
    """A save is carried out, whoever leaves."""
    with house_of(cache_kind) as house:
        first = house.come(opening(1, 3000))
        house.loop.pass_time(0.01)
        second = house.come(opening(2))
        while not any(op.kind == "save" for op in house.server.pending):
            house.loop.pass_time(0.001)
        house.leave(first)
        assert served(house, [second])[0] >= N - AGAIN
        assert len(trunks(house)) == 1


@EVERY
def test_a_shared_prefix_that_cannot_be_saved_costs_no_answer(cache_kind: CacheKind) -> None:
    """Whoever waited for it computes it himself, and its maker is not asked again."""
    with house_of(cache_kind) as house:
        clients = [house.come(opening(1, 3000)), house.come(opening(2))]
        fails(house, "save", 1)
        house.wait(*clients)
        assert [outcome(client) for client in clients] == [None, None]
        assert house.first_s["user 2"] <= 2.0 + 2.5 + 0.6
        keeps = [act for one in house.dispatcher.journal.latest() for act in one.acts if act.step == "keep"]
        assert [act.is_done for act in keeps] == [False]


def fails(house: Paced, kind: str, n: int) -> None:
    """The next ``n`` of that kind fail as soon as they are asked for."""
    pace, left = house.server.pace, n

    def failing(op: Op) -> float | None:
        nonlocal left
        if op.kind == kind and left:
            left -= 1
            house.loop.call_later(0.001, house.server.fail, op, SlotActionFailed("no", 500))
            return None
        return pace(op)

    house.server.pace = failing


# -- patience ----------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("stalls", ["reserve", "commit"])
def test_who_has_waited_long_enough_computes_it_himself(cache_kind: CacheKind, stalls: str) -> None:
    """So long as the other one and he himself would have taken, one after the other: here room is made on a disk that
    hangs. Whoever waits for that disk does not hold up those who compute."""
    with house_of(cache_kind) as house:
        clients = [house.come(opening(1, 600)), house.come(opening(2))]
        pace = house.server.pace
        house.server.pace = lambda op: 100.0 if op.kind == stalls else pace(op)
        house.until(1.9)
        assert house.dispatcher.n_waiting == 1
        house.wait(clients[1])
        assert clients[1].result() == 0
        assert house.first_s["user 2"] == pytest.approx(2.0 + 2.5 + 2.5, abs=1.2)
        assert not clients[0].done()


@EVERY
def test_no_request_is_refused_for_having_waited_for_another(cache_kind: CacheKind) -> None:
    """There is a slot for him: before he would have waited in the queue for too long he takes it."""
    with house_of(cache_kind) as house:
        house.dispatcher.queue.limits = QueueLimits(max_wait_s=5.0)
        clients = [house.come(opening(user, n=12_000)) for user in (1, 2)]
        house.until(2.4)
        assert house.dispatcher.n_waiting == 1
        house.until(4.9)
        assert house.dispatcher.n_waiting == 0
        assert served(house, clients) == [0, 0]


@EVERY
def test_what_is_computed_meanwhile_does_not_use_patience_up(cache_kind: CacheKind) -> None:
    """A shared prefix that takes its time, for it is long, is waited for to its end."""
    with house_of(cache_kind) as house:
        clients = [house.come(opening(user, n=12_000)) for user in (1, 2)]
        reused = served(house, clients)
        assert reused[1] >= 12_000 - AGAIN
        assert house.server.n_computed <= 12_000 + 2 * OWN + AGAIN


@EVERY
@pytest.mark.parametrize("n_batch", [BATCH, 1024], ids=["small batches", "large batches"])
@pytest.mark.parametrize("is_known", [False, True], ids=["never measured", "slow just now"])
def test_nor_does_a_server_that_is_slower_than_expected(
    cache_kind: CacheKind, n_batch: int, is_known: bool
) -> None:
    """Six times, in a batch that tells nothing before its end, or as a stall that teaches nothing."""
    with Paced(cache_kind, 4, batch=n_batch, answer_s=0.001) as house:
        if is_known:
            house.loop.run(house.ask(long("before", 8 * N)))
        house.server.token_s *= 6
        house.begin()
        clients = [house.come(opening(user, is_told=True)) for user in (1, 2, 3)]
        reused = served(house, clients)
        assert min(reused[1:]) >= N - AGAIN
        assert house.server.n_computed <= N + 3 * (OWN + AGAIN)


@EVERY
@pytest.mark.parametrize("n_batch", [BATCH, 1024], ids=["small batches", "large batches"])
def test_nor_does_another_group_that_is_computed_first(cache_kind: CacheKind, n_batch: int) -> None:
    """Of two agents five conversations each, on a server that is slower than expected."""
    with Paced(cache_kind, 10, batch=n_batch, answer_s=0.001) as house:
        house.server.token_s *= 6
        house.begin()
        jobs = [opening(user, is_told=True, at=at) for user in range(1, 6) for at in (1, 50_000_000)]
        served(house, [house.come(job) for job in jobs])
        assert house.server.n_computed <= 2 * (N + 5 * (OWN + AGAIN))


@EVERY
def test_the_first_long_prompt_of_all_is_shared(cache_kind: CacheKind) -> None:
    """Of the speed only probes tell, by which it is no long one."""
    with house_of(cache_kind) as house:
        house.dispatcher.settings = house.table.settings = replace(SETTINGS, chunk_threshold_s=None)
        house.rates.prefill.observe(10, 50, 0.001)
        house.rates.size.observe(50, 50 * BYTES_PER_TOKEN)
        assert house.rates.prefill.seconds(0, N + OWN) < house.table.settings.long_s(
            house.rates.request.seconds
        )
        reused = served(house, [house.come(opening(user, is_told=True)) for user in (1, 2, 3)])
        assert min(reused[1:]) >= N - AGAIN
        assert house.server.n_computed <= N + 3 * (OWN + AGAIN)


@EVERY
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_prefix_is_computed_as_soon_as_its_most_urgent_request(
    cache_kind: CacheKind, is_shared: bool
) -> None:
    """Its maker's user has received more than its share. That of the one who waits has not, and waits no longer than if
    it had computed everything itself."""
    greedy, other, new = User("greedy"), User("other"), User("new")
    with Paced(cache_kind, 12, answer_s=0.001) as house:
        house.begin()
        for i in range(2):
            house.come(long(f"greedy {i}", 3000, at=i, user=greedy))
        house.come(long("other", 9000, at=9, user=other))
        house.until(5.0)
        house.come(opening(1, 600, is_told=True, n=3000, user=greedy))
        for i in range(4):
            house.come(long(f"other {i}", 3000, at=10 + i, user=other))
        house.until(5.1)
        house.come(opening(2, is_told=True, n=3000, at=1 if is_shared else 50_000_000, user=new))
        house.drive()
        assert house.first_s["user 2"] <= 10.5
        assert house.first_s["other 3"] > house.first_s["user 2"]
