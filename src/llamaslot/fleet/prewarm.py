"""Shared-prefix snapshots that the operator has configured. They are computed while the backends are idle, and never
evicted.

Each chat body of ``prewarm`` is rendered by the present model, and cut where conversations with the same system part
and tools diverge. If a snapshot already ends there, made in an earlier run or by a conversation, it is pinned, and
nothing is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import RetryPlacement
from llamaslot.backend.long_prompt import no_report
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import MIN_SHARED_TOKENS, head
from llamaslot.errors import BackendDown, LlamaslotError, SlotWedged
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.scheduling.request import Request
from llamaslot.store import Catalog, Snapshot
from llamaslot.tasks import TaskOwner
from llamaslot.tokens.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_LOOK_EVERY_S = 0.5
_GIVE_WAY_S = 0.1  # a client waits at most so long until a prewarm stops
_ATTEMPTS = 3  # a prefix is given up after so many failures; stopping for a client is no failure

Bodies = Sequence[tuple[str, Mapping[str, Any]]]


class PrewarmTarget(Struct):
    """A shared prefix to be kept on disk: the first ``n_tokens`` of ``tokens``. ``name``: its file's name, for the
    log.
    """

    name: str
    tokens: bytes
    n_tokens: int
    n_failed: int = 0

    @property
    def trunk(self) -> bytes:
        return head(self.tokens, self.n_tokens)


class Prewarm:
    """Computes the configured prefixes of one pool. ``bodies``: chat bodies, each with its name for the log.
    ``tokenizer``: returns the tokenizer of the present model. ``executor_of``: returns what performs steps on the
    backend of a lease. ``catalog_of``: returns the snapshots of a table's directory.
    """

    def __init__(
        self,
        bodies: Bodies,
        dispatcher: Dispatcher,
        executor_of: Callable[[Lease], PlanExecutor],
        tokenizer: Callable[[], Tokenizer],
        catalog_of: Callable[[SlotTable], Catalog],
        tasks: TaskOwner,
        idle_s: float,
    ) -> None:
        self._bodies, self._dispatcher, self._executor_of = bodies, dispatcher, executor_of
        self._tokenizer, self._catalog_of, self._tasks, self._idle_s = tokenizer, catalog_of, tasks, idle_s
        # By library (one for each directory): the targets that are left to do, and the slot table when they were found.
        self._left_of: dict[int, SlotTable] = {}
        self._left: dict[int, list[PrewarmTarget]] = {}

    def set_bodies(self, bodies: Bodies) -> None:
        self._bodies, self._left_of = bodies, {}

    @property
    def _tables(self) -> list[SlotTable]:
        """One slot table for each snapshot directory. Backends that cannot save are left out, and backends that sleep,
        because a prewarm must not wake them.
        """
        found: dict[int, SlotTable] = {}
        for backend in self._dispatcher.backends.values():
            if backend.table is not None and not backend.is_asleep and backend.table.can_save:
                found.setdefault(id(backend.table.model_snapshots), backend.table)
        return list(found.values())

    async def run(self) -> None:
        """Compute missing prefixes while the backends are idle, until cancelled. A save that is running then is
        completed.
        """
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            if self._dispatcher.idle_s >= self._idle_s:
                await self.do_one()

    async def do_one(self) -> None:
        """Do one thing that is missing, if there is any: read the bodies, or compute one prefix. Canceling is safe."""
        for table in self._tables:
            library = id(table.model_snapshots)
            is_known = table is self._left_of.get(library)
            if table.model_snapshots.n_unread or (is_known and not self._left[library]):
                continue
            try:
                if is_known:
                    await self._warm(table, self._left[library])
                else:
                    targets = await self._targets()
                    await self._unpin_others(table, targets)
                    self._left_of[library] = table
                    self._left[library] = [one for one in targets if one is not None]
            except LlamaslotError as error:
                # It connects with another slot table, for which everything is done again.
                log.debug("prewarm: postponed until llamaslot connects again: %s", error)
            return

    # -- configured prefixes -------------------------------------------------------------------------------------

    async def _targets(self) -> list[PrewarmTarget | None]:
        """Return the prefix of each body; None for a body that cannot be rendered. Raises BackendDown."""
        return [await self._target(name, body) for name, body in self._bodies]

    async def _target(self, name: str, body: Mapping[str, Any]) -> PrewarmTarget | None:
        try:
            prompt, n_tokens = await self._tokenizer().opening(body)
        except BackendDown:
            raise
        except LlamaslotError as error:
            log.warning("prewarm: %s is left out, as its prompt cannot be rendered: %s", name, error)
            return None
        return PrewarmTarget(name, prompt.tokens, n_tokens)

    async def _unpin_others(self, table: SlotTable, targets: Sequence[PrewarmTarget | None]) -> None:
        """Unpin snapshots that are no longer configured, so that they may be evicted. Users' own pins stay."""
        if None in targets:
            return  # a pinned snapshot may be that of a body that cannot be rendered now
        for snapshot in table.prewarmed():
            if not any(
                one is not None
                and table.model_snapshots.snapshot_at(one.trunk, table.settings.public) == snapshot
                for one in targets
            ):
                await self._set_pinned(table, snapshot, is_pinned=False)
                log.info(
                    "prewarm: no configured file needs snapshot %s any more; it may be evicted", snapshot.id
                )

    async def _set_pinned(self, table: SlotTable, snapshot: Snapshot, *, is_pinned: bool) -> None:
        with contextlib.suppress(KeyError):  # it has just been dropped
            catalog = self._catalog_of(table)
            table.kind_changed(
                await catalog.change_kind(
                    snapshot.id, SnapshotKind.TRUNK, is_pinned=is_pinned, is_prewarmed=is_pinned
                )
            )

    # -- one of them ---------------------------------------------------------------------------------------------

    async def _warm(self, table: SlotTable, left: list[PrewarmTarget]) -> None:
        """Go on with the first target in ``left``. If it has a snapshot, pin that. Otherwise compute it, or give it
        up.
        """
        one = left[0]
        if (there := table.model_snapshots.snapshot_at(one.trunk, table.settings.public)) is not None:
            if not there.is_pinned:
                await self._set_pinned(table, there, is_pinned=True)
            log.info(
                "prewarm: the prefix of %s (%d tokens) is saved as snapshot %s",
                one.name, one.n_tokens, there.id,
            )  # fmt: skip
            left.remove(one)
        elif one.n_tokens < MIN_SHARED_TOKENS:
            log.warning(
                "prewarm: %s is left out: computing its %d tokens is faster than reading a snapshot",
                one.name, one.n_tokens,
            )  # fmt: skip
            left.remove(one)
        elif one.n_failed == _ATTEMPTS:
            log.warning(
                "prewarm: %s is given up: %d attempts to compute and save it failed", one.name, _ATTEMPTS
            )
            left.remove(one)
        else:
            await self._compute(table, one)

    async def _compute(self, table: SlotTable, one: PrewarmTarget) -> None:
        """Compute the prefix and save it in the directory of ``table``, until that is done or a client sends a
        request. The computed tokens stay in the slot, and the next attempt resumes there.
        """
        tables = self._dispatcher.tables
        elsewhere = (other.backend for other in tables if other.model_snapshots is not table.model_snapshots)
        request = Request(
            f"prewarm {one.name}",
            head(one.tokens, one.n_tokens + 1),  # the last token of a prompt is never computed ahead
            n_system=one.n_tokens,
            is_prewarm=True,
            namespace=self._dispatcher.settings.public,
            avoids=frozenset(elsewhere),
        )
        working = self._tasks.spawn(self._compute_in_a_slot(request), request.id)
        has_given_way = False
        try:
            while not working.done():
                await asyncio.wait({working}, timeout=_GIVE_WAY_S)
                if self._is_wanted_besides(request) and not working.done():
                    has_given_way = working.cancel()
        finally:
            working.cancel()
            await asyncio.wait({working})
        if not has_given_way and table in self._tables:
            one.n_failed += 1

    def _is_wanted_besides(self, request: Request) -> bool:
        """True if any client's request other than ``request`` has a slot or waits."""
        leased = (lease.request for lease in self._dispatcher.leases if not lease.is_own)
        waiting = (waiting.request for waiting in self._dispatcher.queue)
        return any(other is not request for other in (*leased, *waiting))

    async def _compute_in_a_slot(self, request: Request) -> None:
        executor: PlanExecutor | None = None
        try:
            with await self._dispatcher.lease(request) as lease:
                executor, table, now = self._executor_of(lease), lease.table, self._dispatcher.now()
                trunk = head(request.tokens, request.n_system)
                if table.model_snapshots.snapshot_at(trunk, request.namespace) is None:
                    due_s = table.rates.prefill.seconds(lease.n_done, request.n_system)
                    table.expect_trunk(request, request.n_system, lease.slot_id, now + due_s)
                    await executor.prepare(lease, no_report)
        except SlotWedged as error:
            if executor is not None:
                executor.metrics.wedged.inc()
            log.warning("%s: the prefix of this file of prewarm could not be computed: %s", request.id, error)
        except (LlamaslotError, RetryPlacement) as error:
            log.debug("%s: the prefix of this file of prewarm was not computed: %s", request.id, error)
