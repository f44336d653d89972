"""Owners who ask for their contexts just while these are being saved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.virtual import VirtualLoop
from llamaslot.backend.lease import Lease
from llamaslot.cache.ids import count, pack
from llamaslot.scheduling.request import Request
from tests.support.house import House, tokens_of
from tests.support.stub import StubServer

SYSTEM = tokens_of(0, 80)


class Team:
    """Users with a context each, more of them than slots, who ask again and again."""

    def __init__(self, house: House, n_users: int, rng: random.Random, system: bytes = b"") -> None:
        self.house, self.rng = house, rng
        self.serial = itertools.count(1000)
        self.contexts = {user: system + self.fresh(rng.randrange(300, 900)) for user in range(n_users)}
        self.n_known = dict.fromkeys(self.contexts, 0)  # tokens of each context that somebody has computed
        self.n_new = 0  # tokens asked for that nobody has computed before
        self.n_turns = 0
        self.asking: set[int] = set()

    def fresh(self, n: int) -> bytes:
        return pack([next(self.serial) for _ in range(n)])

    def ask(self, user: int) -> None:
        if user not in self.asking:
            self.asking.add(user)
            self.house.start(self._turn(user), f"user {user}")

    async def _turn(self, user: int) -> None:
        """Ask with all that was said so far and something new; remember the answer."""
        tokens = self.contexts[user] + self.fresh(self.rng.randrange(1, 80))
        answer = self.fresh(self.rng.randrange(20))
        self.n_new += count(tokens) - self.n_known[user]
        self.n_turns += 1
        await self.house.ask(Request(f"user {user} at {count(tokens)}", tokens), answer)
        self.contexts[user] = tokens + answer
        self.n_known[user] = count(self.contexts[user])
        self.asking.remove(user)

    def owners(self) -> list[int]:
        """Those whose contexts are being saved right now."""
        table, kinds = self.house.leases.table, ("reserve", "save", "commit")
        assert table is not None
        if not any(op.kind in kinds for op in self.house.server.pending):
            return []
        held = [entry.content.tokens for entry in table._pending._entries.values()]
        held += [
            lease.content.tokens for lease in self.house.dispatcher.leases if lease.is_own and lease.content
        ]
        return [
            user for user, context in self.contexts.items() if any(context.startswith(one) for one in held)
        ]


@given(seed=st.integers(0, 2**32), n_slots=st.integers(1, 4), has_system=st.booleans())
@settings(max_examples=12, deadline=None)
def test_owners_who_ask_while_they_are_saved_recompute_nothing(
    seed: int, n_slots: int, has_system: bool
) -> None:
    """Contexts come and go, and each owner asks again just while his is being saved: he waits for the commit, or for
    the slot. What is computed is what nobody has computed before."""
    rng = random.Random(seed)
    server = StubServer(n_slots, token_s=1.0)  # so dear that waiting is always cheaper
    house = House(VirtualLoop(), server)
    house.rates.prefill.observe(0, 1000, 1000.0)
    try:
        team = Team(house, n_slots + 3, rng, system=SYSTEM if has_system else b"")
        for _ in range(150):
            if (owners := team.owners()) and rng.random() < 0.7:
                team.ask(rng.choice(owners))
            act = rng.random()
            if act < 0.15:
                team.ask(rng.choice(list(team.contexts)))
            elif act < 0.2:
                house.start(house.idle_save.save_all(), "idle save")
            elif act < 0.25:
                house.loop.pass_time(rng.choice([0.001, 0.3]))
            elif server.pending:
                server.serve(rng.choice(server.pending))
            if rng.random() < 0.7:
                house.loop.settle()
            house.check()
        house.finish()
        house.check_nothing_is_left()
        # A prefill to a point that the slot holds already computes one token, whatever it finds.
        assert server.n_computed <= team.n_new + team.n_turns
        assert has_system or server.n_computed >= team.n_new
    finally:
        house.close()


def test_a_save_is_tried_again_if_the_request_that_it_gave_way_to_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It came while space was reserved, and was served in another slot before that was given back."""
    server = StubServer(1, token_s=1.0, pace=lambda op: 0.1)
    house = House(VirtualLoop(), server)
    house.loop.run_until_complete(house.ask(Request("first turn", tokens_of(1000, 300))))
    [slot] = house.idle_save.worth_saving()
    lease, is_wanted = house.idle_save._lease(slot), iter([True, False])
    assert lease is not None

    async def save_now(_: Lease, must_give_way: Callable[[], bool]) -> None:
        assert must_give_way()

    with monkeypatch.context() as patch:
        patch.setattr(house.idle_save._executor, "save_now", save_now)
        house.loop.run_until_complete(house.idle_save._save(lease, lambda: next(is_wanted)))
    assert house.idle_save._next() is slot
    house.close()


def test_what_a_queued_request_needs_is_not_evicted_for_an_earlier_one() -> None:
    """One slot, room for two snapshots: the older of them is wanted by the second in the queue when the first one's
    victim needs room."""
    server = StubServer(1, token_s=1.0, pace=lambda op: 0.1)
    house = House(VirtualLoop(), server, room=2)
    contexts = {name: tokens_of(1000 * i, 300) for i, name in enumerate(("old", "newer", "victim"), 1)}
    for tokens in contexts.values():  # each is saved when the next one takes the slot
        house.loop.run_until_complete(house.ask(Request("first turn", tokens)))
    n_computed = server.n_computed
    house.start(house.ask(Request("blocks", contexts["victim"] + tokens_of(9000, 40))), "blocks")
    house.loop.settle()
    stranger = Request("stranger", tokens_of(5000, 300))
    back = Request("back", contexts["old"] + tokens_of(6000, 40))
    for job in (stranger, back):
        house.start(house.ask(job), job.id)
        house.loop.settle()
    house.finish()
    assert server.n_computed - n_computed <= 40 + 300 + 40 + 1, "his context was computed again"
    house.check_nothing_is_left()
    house.close()
