"""Everything that can happen to scheduler, leases, steps and turns at once, one event at a time."""

from __future__ import annotations

import itertools

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from bench.virtual import VirtualLoop
from llamaslot.cache.ids import count, pack
from llamaslot.cache.namespaces import Namespace
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import (
    BackendDown,
    LlamaslotError,
    SlotActionFailed,
    UpstreamError,
)
from llamaslot.scheduling.request import Placement, Request
from tests.support.house import House
from tests.support.stub import Op, StubServer

SYSTEM = pack(range(300))  # enough to be shared
N_SLOTS, N_USERS = 3, 5
SCALES = '[{"id":0,"scale":0.5}]'


class Life(RuleBasedStateMachine):
    """Users ask, leave, and meet faults, restarts and evictions, one event at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = VirtualLoop()
        self.server = StubServer(N_SLOTS)
        self.house = House(self.loop, self.server, room=4)
        self.serial = itertools.count(1000)
        self.is_isolated = False
        self.contexts = [SYSTEM + self.fresh(120) for _ in range(N_USERS)]

    @initialize(cache_kind=st.sampled_from(list(CacheKind)), is_isolated=st.booleans())
    def remember(self, cache_kind: CacheKind, is_isolated: bool) -> None:
        """What the model is, and what llamaslot takes it for; whether users share what they have computed."""
        self.is_isolated = is_isolated
        self.house.cache_kind = self.server.cache_kind = cache_kind
        assert self.house.leases.table is not None
        self.house.leases.table.cache_kind = cache_kind

    def fresh(self, n: int) -> bytes:
        return pack([next(self.serial) for _ in range(n)])

    def namespace(self, user: int, lora: str = "") -> Namespace:
        return Namespace(f"key:{user}" if self.is_isolated else "", lora)

    def pick(self, data: st.DataObject, n: int, what: str) -> int:
        return data.draw(st.integers(0, n - 1), label=what)

    # -- clients

    @rule(
        user=st.integers(0, N_USERS - 1),
        n_new=st.sampled_from([1, 10, 300]),
        n_answer=st.sampled_from([0, 5]),
    )
    def ask(self, user: int, n_new: int, n_answer: int) -> None:
        context = self.contexts[user]
        tokens, answer = context + self.fresh(n_new), self.fresh(n_answer)
        self.contexts[user] = tokens + answer if len(tokens) < 4 * 1500 else SYSTEM + self.fresh(120)
        job = Request(
            f"user {user} at {next(self.serial)}",
            tokens,
            boundaries=(300, count(context)),
            n_system=300,
            namespace=self.namespace(user),
        )
        self.house.start(self.house.ask(job, answer), job.id)

    @rule(user=st.integers(0, N_USERS - 1))
    def begin(self, user: int) -> None:
        """Another conversation with the same system prompt."""
        self.contexts[user] = SYSTEM + self.fresh(120)
        self.ask(user, 10, 5)

    @rule(n=st.integers(2, 3), n_alike=st.sampled_from([300, 500, 900]), is_told=st.booleans())
    def begin_together(self, n: int, n_alike: int, is_told: bool) -> None:
        """Several new conversations that begin alike, of which nobody need have said where they part."""
        alike = self.fresh(n_alike)
        for user in range(n):
            self.contexts[user] = tokens = alike + self.fresh(200)
            boundaries = (n_alike,) if is_told else ()
            job = Request(
                f"user {user} together at {next(self.serial)}",
                tokens,
                boundaries=boundaries,
                n_system=n_alike * is_told,
                namespace=self.namespace(user),
            )
            self.house.start(self.house.ask(job), job.id)

    @precondition(lambda self: self.house.executor.chunked_prefill._longs)
    @rule(data=st.data(), is_settled=st.booleans())
    def come_back(self, data: st.DataObject, is_settled: bool) -> None:
        """A client leaves in the middle of its prefill, and asks the same again."""
        longs = self.house.executor.chunked_prefill._longs
        job = longs[self.pick(data, len(longs), "who leaves and comes back")].lease.request
        for client in [client for client, name in self.house.clients.items() if name == job.id]:
            client.cancel()
        if is_settled:
            self.loop.settle()
        again = replace(job, id=f"{job.id} again")
        self.house.start(self.house.ask(again), again.id)

    @rule(kind=st.sampled_from(["cold", "scaled", "small", "two", "three"]), user=st.integers(0, N_USERS - 1))
    def ask_specially(self, kind: str, user: int) -> None:
        tokens = SYSTEM[:40] + self.fresh(5) if kind == "small" else self.contexts[user] + self.fresh(3)
        job = Request(
            f"{kind} at {next(self.serial)}",
            tokens,
            no_cache=kind == "cold",
            namespace=self.namespace(user, SCALES if kind == "scaled" else ""),
            n_children={"two": 1, "three": 2}.get(kind, 0),
        )
        self.house.start(self.house.ask(job, self.fresh(3)), job.id)

    @rule(user=st.integers(0, N_USERS - 1), whose=st.none() | st.integers(0, N_USERS - 1))
    def ask_unpinned(self, user: int, whose: int | None) -> None:
        """With a prompt that is somebody's: the server finds it wherever it is."""
        job = Request(
            f"unpinned at {next(self.serial)}",
            placement=Placement.SERVER_CHOSEN,
            namespace=self.namespace(user),
        )
        tokens = self.contexts[whose] + self.fresh(3) if whose is not None else self.fresh(70)
        self.house.start(self.house.ask_unpinned(job, tokens), job.id)

    @precondition(lambda self: self.house.clients)
    @rule(data=st.data(), is_settled=st.booleans())
    def leave(self, data: st.DataObject, is_settled: bool) -> None:
        clients = list(self.house.clients)
        clients[self.pick(data, len(clients), "who leaves")].cancel()
        if is_settled:
            self.loop.settle()

    # -- the server

    @precondition(lambda self: self.server.pending)
    @rule(data=st.data(), is_settled=st.booleans())
    def serve(self, data: st.DataObject, is_settled: bool) -> None:
        self.server.serve(self.server.pending[self.pick(data, len(self.server.pending), "what is done")])
        if is_settled:
            self.loop.settle()

    @rule()
    def serve_all(self) -> None:
        for op in list(self.server.pending):
            self.server.serve(op)
        self.loop.settle()

    @precondition(lambda self: self.server.pending)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        op = self.server.pending[self.pick(data, len(self.server.pending), "what fails")]
        if (error := fault_of(op)) is not None:
            if op.kind == "restore":
                self.server.slots_[op.slot or 0].tokens = b""
            self.server.fail(op, error)

    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        choice = self.pick(data, N_SLOTS, "where an unpinned request lands")
        self.server.lands = lambda idle: idle[choice % len(idle)]

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """A slot is emptied behind everybody's back (a unified KV cache does that)."""
        slots = [slot.id for slot in self.server.slots_ if not slot.is_working]
        if slots:
            self.server.lose(slots[self.pick(data, len(slots), "which slot is emptied")])

    @rule()
    def restart(self) -> None:
        self.house.restart()

    @precondition(lambda self: self.house.is_unnoticed and self.house.leases.table is not None)
    @rule(is_down=st.booleans())
    def notice(self, is_down: bool) -> None:
        self.house.notice(is_down=is_down)

    @precondition(lambda self: self.house.leases.table is None)
    @rule()
    def meet(self) -> None:
        self.loop.run(self.house.meet())

    # -- time and the store

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0, 9.0]))
    def pass_time(self, seconds: float) -> None:
        self.loop.pass_time(seconds)

    @rule()
    def write_back(self) -> None:
        self.house.start(self.house.idle_save.save_all(), "idle save")

    @precondition(lambda self: self.house.catalog.snapshots)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        ids = list(self.house.catalog.snapshots)
        self.house.catalog.discard(ids[self.pick(data, len(ids), "which snapshot goes")])

    # -- what always holds

    @rule()
    def settle(self) -> None:
        self.loop.settle()

    @invariant()
    def holds(self) -> None:
        self.house.check()

    def teardown(self) -> None:
        try:
            if self.house.is_unnoticed or self.house.leases.table is None:
                self.house.notice(is_down=False)
                self.loop.run(self.house.meet())
            self.house.finish()
            self.house.check_nothing_is_left()
        finally:
            self.house.close()


def fault_of(op: Op) -> LlamaslotError | None:
    """How an op of this kind can fail while its server goes on."""
    if op.kind in ("save", "erase", "restore"):
        return SlotActionFailed("no", 500)
    if op.kind == "batch":
        return UpstreamError(500, b"{}")
    return BackendDown("no connection") if op.kind == "send" else None


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
