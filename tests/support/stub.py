"""Stand-ins for llama-server and the catalog inside the test's own loop: no sockets, no files, no time of their own.

Each call that takes time is an ``Op`` that waits until the test serves it, makes it fail, or lets ``pace`` do so. The
stub knows rules that llama-server does not enforce: nothing may be sent to a slot at work, a restore needs an empty
slot. ``violations`` lists the calls that broke them; ``n_computed`` counts the computed prompt tokens. ``cache_kind``
decides from where a slot can go on: from any token, or only from the end of what it holds or a checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial

from msgspec.structs import replace

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import common, count, head
from llamaslot.cache.namespaces import SHARED, Namespace
from llamaslot.cache.reuse import CHECKPOINT_BACK, CacheKind
from llamaslot.errors import (
    BackendDown,
    OtherConversation,
    SlotActionFailed,
    SnapshotInvalid,
    UpstreamError,
)
from llamaslot.llama.answers import Progress, Props, SlotAction, SlotInfo
from llamaslot.scheduling.request import Request
from llamaslot.store import QuotaExceeded, Reservation, SavedSlot, Snapshot, WithTokens
from llamaslot.store.quota import NoRoomYet, Turnover
from llamaslot.store.restore_file import Given
from llamaslot.store.snapshot import digest_of
from llamaslot.store.snapshot_table import Pin

BYTES_PER_TOKEN = 1000
MODEL = "model"
NEAR = 16  # so far back from its end its slot can go


@dataclass(eq=False)
class Op:
    """A call to the server, or to the disk, that takes time. ``effect`` is what it does once it is served."""

    kind: str
    slot: int | None
    done: asyncio.Future[None]
    effect: Callable[[], None] = lambda: None
    n_tokens: int = 0  # of a prompt that are computed in it

    def __repr__(self) -> str:
        return f"<{self.kind} {self.slot}>"


@dataclass(eq=False)
class StubSlot:
    id: int
    tokens: bytes = b""
    n_used: int = 0  # requests that have begun in it
    is_working: bool = False
    batch: bytes | None = None  # what it holds after the batch that is under way: it cannot be stopped
    n_prompt: int = 0  # tokens of what is computed in it
    checkpoints: tuple[int, ...] = ()
    is_restored: bool = False  # and has computed nothing since: a sliding window has none of it yet
    is_lost: bool = False  # emptied without llamaslot's knowledge; nothing has begun in it since
    namespace: Namespace = SHARED  # where what it holds was computed
    is_mixed: bool = False  # work of an earlier process of llamaslot, or of a stranger


class StubServer:
    """``pace``: seconds that an op takes; None: ops wait for the test."""

    url = "stub"

    def __init__(
        self,
        n_slots: int,
        *,
        batch: int = 128,
        pace: Callable[[Op], float | None] | None = None,
        token_s: float = 0.001,
        cache_kind: CacheKind = CacheKind.DENSE,
    ) -> None:
        self.cache_kind, self.window = cache_kind, 64  # tokens of a sliding one
        self.token_s = token_s  # what the server says that a prompt token took it
        self.action_s = 0.01  # and a save or a restore
        self.batch = batch
        self.pace = pace or (lambda op: None)
        self.pending: list[Op] = []
        self.violations: list[str] = []
        self.files: dict[str, bytes] = {}
        self.checkpoints: dict[bytes, tuple[int, ...]] = {}  # in the file of these tokens
        self.sent: list[tuple[int, int]] = []  # prefills: to which slot, and of how many tokens
        self.guard: Callable[[int], None] = lambda slot: None  # called for what is sent to a slot
        self.guard_landing: Callable[[int], None] = lambda slot: None  # and where the server itself chose it
        self.asker: Callable[[int], Request | None] = lambda slot: (
            None
        )  # who computes in a slot, if that is known
        self.namespaces: dict[str, Namespace] = {}  # of what is in a file
        self.lands: Callable[[list[int]], int] = lambda idle: idle[0]
        self.n_computed = 0
        self.is_down = False
        self.n_boots = 0
        self.slots_: list[StubSlot] = [StubSlot(i) for i in range(n_slots)]
        self._serial = itertools.count(1)

    # -- the test's side -----------------------------------------------------------------------------------------

    def serve(self, op: Op) -> None:
        """Let ``op`` happen."""
        if op in self.pending:
            self.pending.remove(op)
            op.effect()
            if not op.done.done():
                op.done.set_result(None)

    def fail(self, op: Op, error: Exception) -> None:
        """Let ``op`` fail. An op of the server itself (detecting that a client has gone) cannot fail."""
        if op in self.pending and op.kind != "notice":
            self.pending.remove(op)
            if not op.done.done():
                op.done.set_exception(error)

    def restart(self) -> None:
        """Become another process: its slots are empty, and every connection is closed."""
        self.n_boots += 1
        self.slots_ = [StubSlot(slot.id) for slot in self.slots_]
        for op in list(self.pending):
            if op.kind not in _DISK:
                self.fail(op, BackendDown("the connection is gone"))
        self.pending = [op for op in self.pending if op.kind in _DISK]

    def violation(self, text: str) -> None:
        self.violations.append(text)

    def lose(self, slot_id: int) -> None:
        """Empty the slot without telling any client."""
        slot = self.slots_[slot_id]
        slot.tokens, slot.checkpoints, slot.is_lost = b"", (), True

    # -- the server's side ---------------------------------------------------------------------------------------

    async def op(
        self, kind: str, slot: int | None, effect: Callable[[], None] = lambda: None, n_tokens: int = 0
    ) -> None:
        """Wait for one op. Its effect happens when it is served, even if its caller has been cancelled."""
        boot = self.n_boots
        op = self._asked(kind, slot, effect, n_tokens)
        try:
            await op.done
            if boot != self.n_boots and kind not in _DISK:
                raise BackendDown("the connection is gone")  # with the answer in it
        except asyncio.CancelledError:
            if kind in _CONNECTED and op in self.pending:
                self.pending.remove(op)
            raise

    def _asked(self, kind: str, slot: int | None, effect: Callable[[], None], n_tokens: int = 0) -> Op:
        op = Op(kind, slot, asyncio.get_running_loop().create_future(), effect, n_tokens)
        self.pending.append(op)
        if (seconds := self.pace(op)) is not None:
            asyncio.get_running_loop().call_later(seconds, self.serve, op)
        return op

    def _notice(self, slot: StubSlot) -> None:
        """The client of ``slot`` has gone. The server goes on until it detects that, at the end of a batch."""
        n_more = count(slot.batch) - count(slot.tokens) if slot.batch is not None else 0

        def effect() -> None:
            if slot.batch is not None:
                self.n_computed += n_more
                slot.tokens = slot.batch
                if count(slot.batch) == slot.n_prompt:
                    slot.checkpoints += (max(slot.n_prompt - CHECKPOINT_BACK, 0),)
            _rest(slot)

        self._asked("notice", slot.id, effect, n_more)

    def _begin(self, slot_id: int) -> StubSlot:
        slot = self.slots_[slot_id]
        if slot.is_working:
            self.violation(f"a request was sent to slot {slot_id}, which is at work")
            raise UpstreamError(500, b"deferred for ever")
        slot.is_working, slot.is_lost = True, False
        slot.n_used += 1
        return slot

    def _usable(self, slot: StubSlot, tokens: bytes) -> int:
        """How many tokens need not be computed again, because the slot holds them. One token is always computed."""
        limit, n_held = min(common(slot.tokens, tokens), count(tokens) - 1), count(slot.tokens)
        if self.cache_kind is CacheKind.DENSE:
            return limit
        if self.cache_kind is CacheKind.RECURRENT:
            is_there, back = n_held <= limit, 0
        else:  # from near the end of what was computed in the slot, once that fills the window
            is_there, back = self.window < n_held <= limit + NEAR and not slot.is_restored, 1
        if is_there:
            return limit
        return max((at - back for at in slot.checkpoints if back < at <= limit), default=0)

    async def _compute(self, slot: StubSlot, tokens: bytes, by: Request | None) -> AsyncGenerator[Progress]:
        n, n_cache = count(tokens), self._usable(slot, tokens)
        if by is not None:
            if n_cache and slot.namespace not in by.reads:
                self.violation(f"{by} has used {n_cache} tokens of {slot.namespace}")
            slot.namespace = by.namespace
        slot.tokens, slot.is_restored = head(tokens, n_cache), False
        slot.checkpoints = tuple(at for at in slot.checkpoints if at <= n_cache)
        done, slot.n_prompt = n_cache, n
        while done < n:
            upto = min(done + self.batch, n)
            slot.batch = head(tokens, upto)
            yield Progress(n, n_cache, done, (done - n_cache) * self.token_s)
            await self.op("batch", slot.id, n_tokens=upto - done)
            self.n_computed += upto - done
            done, slot.tokens = upto, head(tokens, upto)
        slot.batch = None
        slot.checkpoints += (max(n - CHECKPOINT_BACK, n_cache),)
        yield Progress(n, n_cache, n, (n - n_cache) * self.token_s)

    async def prefill(
        self, slot_id: int, tokens: bytes, lora: str = "", written: bytes | None = None
    ) -> AsyncGenerator[Progress]:
        boot = self.n_boots
        self.guard(slot_id)
        self.sent.append((slot_id, count(tokens)))
        await self.op("send", slot_id)
        slot = self._begin(slot_id)
        try:
            by = self.asker(slot_id)
            if by is not None and by.namespace.lora != lora:
                self.violation(f"{by} is computed with the LoRA scales {lora!r}")
            async with contextlib.aclosing(self._compute(slot, tokens, by)) as events:
                async for event in events:
                    yield event
        except UpstreamError:
            _rest(slot)
            raise
        except BaseException:
            if boot == self.n_boots:
                self._notice(slot)
            raise
        _rest(slot)

    @contextlib.asynccontextmanager
    async def run(
        self,
        slot_id: int,
        tokens: bytes,
        answer: bytes,
        *,
        n_children: int = 0,
        no_cache: bool = False,
        on_found: Callable[[int], None] = lambda n: None,
    ) -> AsyncIterator[Answer]:
        """A client's own request, as a context manager that is entered when the answer begins. ``Answer.rest`` waits
        for its end. ``on_found`` is called with the number of reused tokens before anything is computed; an exception
        in it ends the request.
        """
        self.guard(slot_id)
        await self.op("send", slot_id)
        by = self.asker(slot_id)
        async with self._run(slot_id, tokens, answer, by, n_children, no_cache, on_found) as answered:
            yield answered

    @contextlib.asynccontextmanager
    async def _run(
        self,
        slot_id: int,
        tokens: bytes,
        answer: bytes,
        by: Request | None,
        n_children: int = 0,
        no_cache: bool = False,
        on_found: Callable[[int], None] = lambda n: None,
    ) -> AsyncIterator[Answer]:
        boot = self.n_boots
        slot = self._begin(slot_id)
        children = [other for other in self.slots_ if not other.is_working][:n_children]
        if len(children) < n_children:
            self.violation("not enough idle slots for n > 1")
        for child in children:
            self.guard_landing(child.id)
            child.is_working, child.n_used = True, child.n_used + 1
        if no_cache:
            slot.tokens = b""
        cache: int | None = None
        try:
            async with contextlib.aclosing(self._compute(slot, tokens, by)) as events:
                async for event in events:
                    if cache is None:
                        on_found(event.cache)
                    cache = event.cache
            assert cache is not None
            yield Answer(self, slot, cache, tokens + answer)
        except UpstreamError:
            self._end(slot, children)
            raise
        except BaseException:
            if boot == self.n_boots:
                for child in children:
                    child.tokens = b""
                    self._notice(child)
                self._notice(slot)
            raise
        self._end(slot, children)

    def _end(self, slot: StubSlot, children: list[StubSlot]) -> None:
        for child in children:
            child.tokens = b""
            _rest(child)
        _rest(slot)

    @contextlib.asynccontextmanager
    async def run_unpinned(self, tokens: bytes, by: Request | None = None) -> AsyncIterator[None]:
        """A request for which the server chooses the slot itself."""
        await self.op("send", None)
        idle = [slot.id for slot in self.slots_ if not slot.is_working]
        if not idle:
            self.violation("an unpinned request was sent while no slot was idle")
            raise UpstreamError(500, b"deferred for ever")
        slot_id = self.lands(idle)
        self.guard_landing(slot_id)
        async with self._run(slot_id, tokens, b"", by) as answer:
            await answer.rest()
            yield

    async def save(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)

        def effect() -> None:
            self.files[filename], self.namespaces[filename] = slot.tokens, slot.namespace
            self.checkpoints[slot.tokens] = slot.checkpoints

        await self.op("save", slot_id, effect)
        n = count(self.files[filename])
        return SlotAction(n, n * BYTES_PER_TOKEN, self.action_s)

    async def erase(self, slot_id: int) -> None:
        slot = self._acted(slot_id)

        def effect() -> None:
            slot.tokens, slot.checkpoints, slot.is_lost = b"", (), False

        await self.op("erase", slot_id, effect)

    async def restore(self, slot_id: int, filename: str) -> SlotAction:
        slot = self._acted(slot_id)
        if slot.tokens:
            self.violation(f"a restore into slot {slot_id}, which was not erased")

        def effect() -> None:
            slot.tokens, slot.is_restored = self.files.get(filename, b""), True
            slot.namespace = self.namespaces.get(filename, SHARED)
            slot.checkpoints = self.checkpoints.get(slot.tokens, ())

        await self.op("restore", slot_id, effect)
        if filename not in self.files:
            raise SlotActionFailed("no such file", 400)
        n = count(slot.tokens)
        return SlotAction(n, n * BYTES_PER_TOKEN, self.action_s)

    def _acted(self, slot_id: int) -> StubSlot:
        self.guard(slot_id)
        if self.slots_[slot_id].is_working:
            self.violation(f"an action was sent to slot {slot_id}, which is at work")
        return self.slots_[slot_id]

    async def slots(self) -> list[SlotInfo]:
        await asyncio.sleep(0)
        if self.is_down:
            raise BackendDown("down")
        return [
            SlotInfo(slot.id, slot.is_working, count(slot.tokens) if slot.n_used else None, slot.n_used)
            for slot in self.slots_
        ]

    async def props(self) -> Props:
        await asyncio.sleep(0)
        if self.is_down:
            raise BackendDown("down")
        return Props(len(self.slots_), 10_000, "", f"boot {self.n_boots}")


_CONNECTED = {"send", "batch", "answer"}  # end with their connection; all others are carried out anyway
_DISK = {"commit", "reserve", "verify"}


def _rest(slot: StubSlot) -> None:
    slot.is_working, slot.batch = False, None


@dataclass(eq=False)
class Answer:
    server: StubServer
    slot: StubSlot
    n_cache: int
    holds: bytes

    async def rest(self) -> None:
        await self.server.op("answer", self.slot.id)
        self.slot.tokens = self.holds


@dataclass
class StubCatalog:
    """A catalog in memory with room for ``room`` snapshots, with the part of ``Catalog`` that ``PlanExecutor`` uses."""

    server: StubServer
    room: int = 1000
    on_drop: Callable[[Snapshot], None] = lambda snapshot: None
    snapshots: dict[str, WithTokens] = field(default_factory=dict)
    pins: Counter[str] = field(default_factory=Counter)
    reservations: set[str] = field(default_factory=set)
    pending_delete: set[str] = field(default_factory=set)
    fingerprint: str = MODEL
    is_slow_to_commit: bool = False  # in the background, once the file is known to be what was to be saved
    is_disk_full: bool = False
    has_landing: bool = False
    _serial: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.turnover = Turnover(self.reservations.__len__)

    async def reserve(
        self,
        size_bytes: int,
        keep: Collection[str] = (),
        spare: Collection[str] = (),
        new_bytes: int | None = None,
        *,
        may_wait: Callable[[], bool] = lambda: False,
    ) -> Reservation:
        return await self.turnover.reserve(partial(self._reserve, size_bytes, keep, spare), may_wait=may_wait)

    async def _reserve(self, size_bytes: int, keep: Collection[str], spare: Collection[str]) -> Reservation:
        await self.server.op("reserve", None)
        while len(self.snapshots) + len(self.reservations) >= self.room:
            may_go = [id_ for id_ in self.snapshots if self._may_go(id_, keep)]
            victim = min(may_go, key=lambda id_: id_ in spare, default=None)
            if victim is None:
                raise NoRoomYet("no room")
            self.discard(victim)
        id_ = f"ls-{next(self._serial)}"
        self.reservations.add(id_)
        return Reservation(id_, f"{id_}.part", size_bytes, self.has_landing)

    def _end(self, reservation: Reservation) -> None:
        self.reservations.discard(reservation.id)
        self.turnover.ended()

    def _may_go(self, id_: str, keep: Collection[str]) -> bool:
        return not self.pins[id_] and id_ not in keep and not self.snapshots[id_].is_pinned

    async def commit(self, reservation: Reservation, saved: SavedSlot) -> WithTokens:
        await self.server.op("commit", None)
        tokens = self.server.files.pop(reservation.part_name)
        if not tokens or not tokens.startswith(saved.tokens_expected):
            self._end(reservation)
            raise OtherConversation("holds another conversation")
        if self.is_slow_to_commit:
            saved.on_checked(tokens)
            async with saved.turn:
                await self.server.op("take in", None)
        self._end(reservation)
        if self.is_disk_full:
            raise QuotaExceeded("no room")
        self.server.files[f"{reservation.id}.kv"] = tokens
        self.server.namespaces[f"{reservation.id}.kv"] = was_in = self.server.namespaces.pop(
            reservation.part_name
        )
        if was_in.text != saved.namespace:
            self.server.violation(f"tokens of {was_in} are saved as those of {saved.namespace!r}")
        noted = saved.to_sidecar(reservation.id, 0.0)
        snapshot = noted.snapshot(digest_of(tokens)).with_tokens(tokens)
        self.snapshots[reservation.id] = snapshot
        return snapshot

    async def abandon(self, reservation: Reservation, *, is_refused: bool = False) -> None:
        self._end(reservation)
        self.server.files.pop(reservation.part_name, None)
        await asyncio.sleep(0)

    def pin(self, id_: str) -> Pin:
        snapshot = self.snapshots[id_]
        self.pins[id_] += 1
        return Pin(snapshot, self._unpin)

    def _unpin(self, id_: str) -> None:
        self.pins[id_] -= 1
        if not self.pins[id_] and id_ in self.pending_delete:
            self.pending_delete.remove(id_)
            self.server.files.pop(f"{id_}.kv", None)

    def touch(self, id_: str) -> None:
        if id_ in self.snapshots:
            self.snapshots[id_] = self.snapshots.pop(id_)  # last used last

    def inherit(self, id_: str, from_id: str) -> None: ...

    async def change_kind(
        self, id_: str, kind: SnapshotKind, *, is_pinned: bool, is_prewarmed: bool = False
    ) -> Snapshot:
        pin = {"is_pinned": is_pinned, "is_prewarmed": is_prewarmed}
        self.snapshots[id_] = replace(self.snapshots[id_], kind=kind, **pin)
        await asyncio.sleep(0)
        return self.snapshots[id_]

    async def verify(self, id_: str) -> WithTokens:
        await self.server.op("verify", None)
        if id_ not in self.snapshots:
            raise SnapshotInvalid(f"{id_}: is gone")
        return self.snapshots[id_]

    @contextlib.asynccontextmanager
    async def given_out(
        self, snapshot: Snapshot, n_tokens: int, spare: Collection[str] = ()
    ) -> AsyncIterator[Given]:
        """The whole file of ``snapshot``."""
        yield Given(snapshot.file_name, snapshot.size_bytes, snapshot.n_tokens)

    async def drop(self, id_: str) -> None:
        if id_ in self.snapshots:
            self.discard(id_)
        await asyncio.sleep(0)

    def discard(self, id_: str) -> None:
        """Remove a snapshot from the list at once. The file of a pinned one stays until it is unpinned."""
        snapshot = self.snapshots.pop(id_)
        if self.pins[id_]:
            self.pending_delete.add(id_)
        else:
            self.server.files.pop(f"{id_}.kv", None)
        self.on_drop(snapshot)
