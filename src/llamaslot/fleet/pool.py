"""The backends that serve the same model, and what they share: the model, the users and the snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from msgspec import Struct, field

from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.health import Health
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import Preempted
from llamaslot.backend.long_prompt import Report, no_report
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.namespaces import Namespace
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError, UpstreamError
from llamaslot.fleet.bad_prompts import BadPrompts
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.fleet.infill_prompts import InfillPrompts
from llamaslot.fleet.model_context import ConversionChecks, ModelContext
from llamaslot.fleet.pool_server import PoolServer
from llamaslot.fleet.prewarm import Bodies, Prewarm
from llamaslot.fleet.queue import QueuePosition, UserLoad
from llamaslot.llama.identity import Identity
from llamaslot.observe.journal import Journal
from llamaslot.observe.metrics import Metrics, UntokenizedRequests
from llamaslot.scheduling.request import Request, User
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.store import Catalog
from llamaslot.tasks import TaskOwner, outcome
from llamaslot.tokens.tokenizer import Tokenizer

T = TypeVar("T")
DownCall = Callable[[Backend, BackendDown], None]


class PoolSettings(Struct, frozen=True):
    """The settings that each pool has for itself. ``prewarm``: chat bodies whose first part is kept as a snapshot on
    disk.
    """

    idle_save_s: float
    scheduling: SchedulingSettings = field(default_factory=SchedulingSettings)
    limits: QueueLimits = field(default_factory=QueueLimits)
    prewarm: Bodies = ()


class PoolStatus(Struct, frozen=True):
    """The present state of a pool. ``n_snapshots``: the snapshots that its model can use. ``n_waiting``: the requests
    in its queue. ``n_too_long``: the prompts that were refused so far because no slot has room for them.
    ``longest_refused``: the tokens of the longest of these.
    """

    n_snapshots: int
    n_waiting: int
    users: list[UserLoad]
    n_too_long: int
    longest_refused: int


class PoolModel(Struct, frozen=True):
    """What identifies the model of a pool. ``identity`` is None if llamaslot stands aside (llama-server chooses
    slots); then only ``name`` counts. ``template``: the hash of the chat template, because it decides on the tokens of
    a body.
    """

    name: str
    identity: Identity | None
    template: str

    @classmethod
    def of(cls, session: ServerSession) -> PoolModel:
        return cls(session.model_name, session.identity, session.props.template)

    def is_same(self, other: PoolModel) -> bool:
        if self.identity is None or other.identity is None:
            return self.identity is other.identity and self.name == other.name
        return self.template == other.template and self.identity.is_same(other.identity)


class Pool:
    """One model, its backends, and the requests that wait for a slot on any of them.

    ``model`` is None until a backend has been connected. Backends that have not been connected yet may also be in the
    pool, because they may serve its model.
    """

    def __init__(self, settings: PoolSettings, metrics: Metrics, fleet: Mapping[str, Backend]) -> None:
        """``fleet`` has the backends of all pools."""
        self._settings, self.metrics, self._fleet = settings, metrics, fleet
        self._untokenized = UntokenizedRequests(metrics)
        self._tasks = TaskOwner()
        self.model: PoolModel | None = None
        self.backends: dict[str, Backend] = {}
        self.context: ModelContext | None = None  # None while no assisted backend is up
        self.dispatcher = Dispatcher(settings.scheduling, settings.limits, time.monotonic)
        self.dispatcher.on_prefix_wait = metrics.prefix_wait_s.observe
        self.bad_prompts = BadPrompts(self.dispatcher.now)
        self._down_calls: dict[DownCall, None] = {}
        self._n_too_long = self._longest_refused = 0
        self._prewarming: asyncio.Task[None] | None = None
        self._prewarm = Prewarm(
            settings.prewarm, self.dispatcher, self._executor_of, self._tokenizer, self._catalog_of, self._tasks,
            settings.idle_save_s,
        )  # fmt: skip

    def configure(self, settings: PoolSettings) -> None:
        """Use the settings of the pool's model from now on. A request that waits already keeps its ``max_wait_s``."""
        if settings.prewarm is not self._settings.prewarm:
            self._prewarm.set_bodies(settings.prewarm)
        self._settings, self.dispatcher.queue.limits = settings, settings.limits
        self.dispatcher.dispatch()  # more requests may be allowed to run now

    def __repr__(self) -> str:
        return f"<Pool {self.model.name if self.model is not None else None} {list(self.backends)}>"

    @property
    def name(self) -> str:
        """The pool's name in log lines: the name of its model, or the names of its backends."""
        return self.model.name if self.model is not None else ", ".join(self.backends)

    def join(self, backend: Backend) -> None:
        """Add a backend that is not connected, and that serves the model of this pool or may serve it."""
        self.backends[backend.name] = backend
        self.dispatcher.join(backend.leases)

    def remove(self, backend: Backend) -> None:
        """Remove a backend that is not connected, because it belongs to another pool now. If it was the last one,
        waiting requests get BackendRestarted.
        """
        del self.backends[backend.name]
        self.dispatcher.remove(backend.name)

    # -- for requests --------------------------------------------------------------------------------------------

    async def ready(self) -> ModelContext | None:
        """Return the model as it is served now; None if llama-server chooses slots. Waits until a backend is up and
        all snapshots on disk are in the index. Raises BackendDown at once if every backend is down. Canceling is safe.

        A single backend is asked if its process is alive. Several backends are not asked, because one that hangs would
        delay all requests. ``confirm`` asks the backend that a request has got.
        """
        backends = self._members()
        if not backends:
            raise BackendRestarted("no backend serves this model any more")
        if len(backends) == 1:
            await backends[0].ready()
        elif not any(backend.session is not None for backend in backends):
            await self._any_ready(backends)
        for store in dict.fromkeys(backend.store for backend in self.backends.values()):
            if store is not None:
                await store.libraries.complete()
        return self.context

    async def _any_ready(self, backends: Sequence[Backend]) -> None:
        """Wait until any backend is ready. Raises the error of one backend if all are down."""
        waits = [
            self._tasks.spawn(outcome(backend.ready, BackendDown), f"{backend.name}: ready")
            for backend in backends
        ]
        try:
            for ended in asyncio.as_completed(waits):
                if not isinstance(answer := await ended, BackendDown):
                    return
        finally:
            for wait in waits:
                wait.cancel()
        assert isinstance(answer, BackendDown), "a pool has backends"
        raise answer

    @property
    def once_connected(self) -> list[Backend]:
        """The backends that have been connected with the pool's model. Others may turn out to serve another model."""
        return [backend for backend in self.backends.values() if backend.last_session is not None]

    @property
    def sessions(self) -> list[ServerSession]:
        """The current or most recent session of each backend that is known to serve the pool's model."""
        return [each.last_session for each in self.backends.values() if each.last_session is not None]

    def media_markers(self) -> set[str]:
        """Return the placeholders of media in plain prompts: each llama-server process has its own."""
        return {session.props.boot_id for session in self.sessions}

    def _members(self) -> list[Backend]:
        """Return the backends that serve the pool's model. If none is known to, return those that may. A backend that
        is loaded on demand is not loaded only to find out.
        """
        every = self.backends.values()
        known = [
            backend
            for backend in every
            if backend.last_session is not None or backend.presence.on_demand is None
        ]
        return known or list(every)

    def _is_single(self) -> bool:
        """True if only one backend serves the model, so that no other one can take its requests."""
        return len(self._members()) == 1

    def _use_if_proved(self) -> bool:
        """True if it is known, without asking llama-server, that ``ready`` would return at once. Then this call counts
        as a use of the model.
        """
        if any(table.model_snapshots.n_unread for table in self.dispatcher.tables):
            return False
        members = self._members()
        if len(members) == 1:
            return members[0].process.use_if_proved()
        return any(backend.session is not None for backend in members)

    async def ready_with(
        self, parse: Callable[[ModelContext], Coroutine[Any, Any, T]]
    ) -> tuple[ModelContext, T] | tuple[None, None]:
        """Return the model, and the result of ``parse`` for it. The processes that serve it were checked to be alive.
        Returns None for both if llama-server chooses slots. Raises as ``ready`` and ``parse`` do. Canceling is safe if
        canceling ``parse`` is.

        If the process is known to be the same and awake, the check comes after ``parse``, and is usually left out then.
        Otherwise it comes first: what ``parse`` asks wakes a sleeping llama-server, which would then tell that it is
        awake, and not that its slots are empty.
        """
        context = self.context
        if context is not None and self._use_if_proved():
            try:
                parsed = await parse(context)
            except LlamaslotError:
                if self.context is context and self._use_if_proved():
                    raise
            else:
                if self.context is context and (self._use_if_proved() or await self.ready() is context):
                    return context, parsed
        context = await self.ready()
        return (context, await parse(context)) if context is not None else (None, None)

    async def has_route(self, path: str) -> bool:
        """True if llama-server has this route. Also True if llamaslot stands aside: then llama-server itself refuses
        the request. Raises as ``ready`` does. Canceling is safe.
        """
        return await self.ready() is None or await self.any_backend().route_availability.has(path)

    async def confirm(self, lease: Lease) -> None:
        """Check that the process of ``lease`` is alive, if there are several backends: the request may have waited,
        and the model may be another one now. Raises BackendRestarted and BackendDown. Canceling is safe.
        """
        if len(self._fleet) > 1:
            await self.backend_of(lease).process.confirm(lease.table, self._is_single)

    def check_process(self, lease: Lease) -> Awaitable[None] | None:
        """``ProcessCheck.at_connection`` for the process of ``lease``."""
        return self.backend_of(lease).process.at_connection(lease.table, self._is_single)

    def may_try_elsewhere(self, backend: Backend) -> bool:
        """True if another backend can take a request that ``backend`` has failed, now or soon."""
        others = (other.leases for other in self.backends.values() if other is not backend)
        return any(leases.is_open or leases.is_coming for leases in others)

    def has_healthy_besides(self, backend: Backend) -> bool:
        """True if a backend other than ``backend`` can take a request now and is not suspect."""
        others = (other.leases for other in self.backends.values() if other is not backend)
        return any(leases.is_open and not leases.is_suspect for leases in others)

    def blame(self, backend: str, error: UpstreamError) -> None:
        """Suspect a backend that has answered with ``error`` where another backend has answered without one."""
        self._fleet[backend].suspicion.blame(error)

    @contextlib.contextmanager
    def calls_when_down(self, call: DownCall) -> Iterator[None]:
        """During the block, call ``call`` for each backend that goes down."""
        self._down_calls[call] = None
        try:
            yield
        finally:
            del self._down_calls[call]

    async def lease(
        self,
        request: Request,
        report: Report = no_report,
        *,
        is_back: bool = False,
        preempted: Preempted | None = None,
    ) -> Lease:
        """Wait for a slot on any backend, and return its lease; see ``Dispatcher.lease``. ``report`` gets a
        ``QueuePosition``, whose text has the position at the time when it is formatted.
        """
        report(QueuePosition(partial(self.dispatcher.position, request)))
        return await self.dispatcher.lease(request, is_back=is_back, preempted=preempted)

    def takes_long(self, n_tokens: int) -> bool:
        """True if the prefill of ``n_tokens`` is long on some backend: it is computed ahead of its request, in turns
        with others.
        """
        tables = self.dispatcher.tables
        return any(table.rates.prefill.seconds(0, n_tokens) > table.long_s for table in tables)

    def backend_of(self, lease: Lease) -> Backend:
        return self._fleet[lease.table.backend]

    def any_backend(self, avoids: frozenset[str] = frozenset()) -> Backend:
        """Return a backend for a request that takes no slot, preferably one that is up and not in ``avoids``."""
        every = self.backends.values() or self._fleet.values()
        return max(every, key=lambda backend: (backend.name not in avoids, _usability(backend)))

    def doubt(self) -> None:
        """A request has failed: check at once if each llama-server is still there."""
        for backend in self.backends.values():
            backend.doubt()

    def namespace(self, user: User) -> Namespace:
        """Return the namespace of a request of ``user``."""
        return self._settings.scheduling.namespace(user)

    # -- for those who operate it --------------------------------------------------------------------------------

    @property
    def n_waiting(self) -> int:
        """The number of requests in the pool's queue."""
        return self.dispatcher.n_waiting

    def status(self) -> PoolStatus:
        libraries = {id(table.model_snapshots): table.model_snapshots for table in self.dispatcher.tables}
        return PoolStatus(
            n_snapshots=sum(len(library.snapshots) for library in libraries.values()),
            n_waiting=self.n_waiting,
            users=self.dispatcher.queue.loads(self.dispatcher.now()),
            n_too_long=self._n_too_long,
            longest_refused=self._longest_refused,
        )

    def refused_too_long(self, n_tokens: int) -> None:
        """Count a prompt for which no slot has room, and keep the largest ``n_tokens`` of all such prompts."""
        self._n_too_long += 1
        self._longest_refused = max(self._longest_refused, n_tokens)

    @property
    def journal(self) -> Journal:
        """The placement decisions for this pool's requests."""
        return self.dispatcher.journal

    # -- called for backends -------------------------------------------------------------------------------------

    def connected(self, session: ServerSession) -> None:
        """Record that a backend of the pool is connected, and serves the pool's model."""
        if session.is_assisted:
            if self.context is None:
                self.context = self._context(session)
            self.context.n_ctx = max(self.context.n_ctx, session.table.n_ctx)
        self.dispatcher.attach(session.table)

    def disconnected(self, backend: Backend, error: BackendDown | None) -> None:
        self.dispatcher.detach(backend.name, error)
        if error is not None:
            for call in list(self._down_calls):
                call(backend, error)
        if not any(table.is_assisted for table in self.dispatcher.tables):
            self.context = None

    def _context(self, session: ServerSession) -> ModelContext:
        context: ModelContext | None = None
        infill = InfillPrompts(
            self.dispatcher, self._executor_of, session.props.n_ctx, lambda: self.context is context
        )
        server = PoolServer(self._that_answer, self._tasks)
        context = ModelContext(
            session.model_name,
            session.table.n_ctx,
            len(session.table.slots),
            self._settings.scheduling,
            session.table.rewind_model,
            Tokenizer(server),
            ConversionChecks(server.ask),
            infill,
            self._untokenized,
            media_markers=self.media_markers,
            modalities=session.props.modalities,
        )
        return context

    def _that_answer(self) -> list[Backend]:
        """Return the backends that are up, suspect ones last. Return all backends if none is up."""
        backends = sorted(self.backends.values(), key=_usability, reverse=True)
        if not backends:
            raise BackendRestarted("no backend serves this model any more")
        return [
            backend for backend in backends if backend.session is not None and backend.session.is_assisted
        ] or backends

    def _executor_of(self, lease: Lease) -> PlanExecutor:
        return self.backend_of(lease).executor

    def _catalog_of(self, table: SlotTable) -> Catalog:
        store = self._fleet[table.backend].store
        assert store is not None, "what can save has a directory"
        return store.catalog

    def _tokenizer(self) -> Tokenizer:
        assert self.context is not None, "there are slots whose content is known"
        return self.context.tokenizer

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._prewarming = self._tasks.spawn(self._prewarm.run(), f"{self.name}: prewarm")

    def retire(self) -> None:
        """End the pool, because its last backend has left. Running requests go on to their end."""
        if self._prewarming is not None:
            self._prewarming.cancel()

    async def close(self) -> None:
        """End all tasks of the pool."""
        await self._tasks.close()


def _usability(backend: Backend) -> tuple[bool, bool, bool]:
    """Return the sort key of a backend; the one with the greatest key is asked first."""
    return backend.health is Health.UP, not backend.leases.is_suspect, not backend.leases.is_drained
