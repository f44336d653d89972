"""The backends that serve the same model, and what they share: the model, the users and the snapshots."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path

from llamaslot.backend.backend import Backend, Health
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import Preempted
from llamaslot.cache.namespaces import Namespace
from llamaslot.errors import BackendDown
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.fleet.infill_prompts import InfillPrompts
from llamaslot.fleet.model_context import ModelContext
from llamaslot.fleet.prewarm import Bodies, Prewarm
from llamaslot.fleet.queue import QueueLimits, UserLoad
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.journal import Decision
from llamaslot.observe.metrics import Metrics, UntokenizedRequests
from llamaslot.records import dataclass
from llamaslot.scheduling.eviction import SnapshotStats
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.request import Request, User
from llamaslot.store import Snapshot
from llamaslot.store.model_snapshots import Libraries
from llamaslot.store.quota import beyond_disk
from llamaslot.store.snapshot_store import SnapshotStore
from llamaslot.tasks import TaskOwner
from llamaslot.tokens.conversion_checks import ConversionChecks
from llamaslot.tokens.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Directory:
    """The snapshot directory and its limits."""

    path: Path
    quota_bytes: int
    max_files: int = 10_000
    min_free_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """The configuration of a pool. ``name``: of its files in ``meta_dir``; ``directory``: None without snapshots.
    ``prewarm``: chat bodies whose beginning is kept on disk.
    """

    name: str
    meta_dir: Path
    idle_save_s: float
    rules: Rules = field(default_factory=Rules)
    limits: QueueLimits = field(default_factory=QueueLimits)
    directory: Directory | None = None
    prewarm: Bodies = ()


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """A pool at present. ``n_snapshots``: those that the present model can use; ``size_bytes``: of all snapshots, on
    disk or reserved; ``n_waiting``: requests in the queue.
    """

    n_snapshots: int
    size_bytes: int
    quota_bytes: int
    n_waiting: int
    users: list[UserLoad]


class Pool:
    """One model, its backends, and the requests that wait for a slot of any of them."""

    def __init__(
        self, settings: PoolSettings, metrics: Metrics, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings, self.metrics, self._now = settings, metrics, now
        self.untokenized = UntokenizedRequests(metrics)
        self.tasks = TaskOwner()
        self.backends: dict[str, Backend] = {}
        self.context: ModelContext | None = None  # while no backend on which llamaslot chooses slots is up
        self.dispatcher = Dispatcher(settings.rules, settings.limits, now)
        self.dispatcher.on_prefix_wait = metrics.prefix_wait_s.observe
        self.store = self._store(settings.directory) if settings.directory is not None else None
        self.libraries: Libraries | None = None
        self._prewarm: Prewarm | None = None
        if self.store is not None:
            catalog = self.store.catalog
            self.libraries = Libraries(catalog, self.store.index_directory, self.tasks)
            self._prewarm = Prewarm(
                settings.prewarm, self.dispatcher, self._executor_of, self._tokenizer, catalog, self.tasks,
                settings.idle_save_s,
            )  # fmt: skip

    def _store(self, directory: Directory) -> SnapshotStore:
        return SnapshotStore(
            directory.path,
            self._settings.meta_dir,
            self._settings.name,
            quota_bytes=directory.quota_bytes,
            max_files=directory.max_files,
            min_free_bytes=directory.min_free_bytes,
            on_drop=self._dropped,
            saves_s=self._saves_s,
        )

    def add(self, name: str, api: LlamaServer) -> Backend:
        """Add a llama-server that serves the model of this pool. It is connected to after ``start``."""
        self.backends[name] = Backend(
            name,
            api,
            self.dispatcher.add(name),
            self,
            rules=self._settings.rules,
            metrics=self.metrics.of_backend(name),
            rates_file=self._settings.meta_dir / f"{name}.rates.json",
            idle_save_s=self._settings.idle_save_s,
            catalog=self.store.catalog if self.store is not None else None,
            libraries=self.libraries,
            now=self._now,
        )
        return self.backends[name]

    # -- for requests --------------------------------------------------------------------------------------------

    async def ready(self) -> ModelContext | None:
        """The model as it is served now, by processes that were checked to be alive; None if llama-server chooses
        slots. Raises BackendDown immediately if every backend is down. Waits until every snapshot on disk can be found.
        Canceling is safe.
        """
        await self._any_ready()
        if self.libraries is not None:
            await self.libraries.complete()
        return self.context

    async def _any_ready(self) -> None:
        backends = list(self.backends.values())
        if len(backends) == 1:
            await backends[0].ready()
            return
        found = await asyncio.gather(*(its.ready() for its in backends), return_exceptions=True)
        errors = [error for error in found if isinstance(error, BaseException)]
        others = [error for error in errors if not isinstance(error, BackendDown)]
        if others or len(errors) == len(found):
            raise (others or errors)[0]

    @property
    def is_proved(self) -> bool:
        """Whether all backends are known to be as ``ready`` would find them, without a question to any."""
        return all(its.is_proved for its in self.backends.values())

    async def lease(
        self, request: Request, *, is_back: bool = False, preempted: Preempted | None = None
    ) -> Lease:
        """As ``Dispatcher.lease``."""
        return await self.dispatcher.lease(request, is_back=is_back, preempted=preempted)

    def position(self, request: Request) -> int:
        """1 for the request that is next; 0 if it no longer waits."""
        return self.dispatcher.position(request)

    def takes_long(self, n_tokens: int) -> bool:
        """Whether a prompt of ``n_tokens`` is computed ahead of its request, in turn with those of other requests."""
        tables = self.dispatcher.tables
        return any(table.rates.prefill.seconds(0, n_tokens) > table.long_s for table in tables)

    def backend_of(self, lease: Lease) -> Backend:
        return self.backends[lease.table.backend]

    def any_backend(self) -> Backend:
        """A backend for a request that takes no slot: one that is up, if there is one."""
        backends = self.backends.values()
        return next((its for its in backends if its.health is Health.UP), next(iter(backends)))

    def doubt(self) -> None:
        """A request failed: check immediately whether each llama-server is still there."""
        for backend in self.backends.values():
            backend.doubt()

    def namespace(self, user: User) -> Namespace:
        """The namespace of a request of ``user``."""
        return self._settings.rules.namespace(user)

    # -- for those who operate it --------------------------------------------------------------------------------

    def status(self) -> PoolStatus:
        catalog = self.store.catalog if self.store is not None else None
        return PoolStatus(
            n_snapshots=max(
                (len(table.model_snapshots.snapshots) for table in self.dispatcher.tables), default=0
            ),
            size_bytes=catalog.size_bytes if catalog is not None else 0,
            quota_bytes=catalog.quota_bytes if catalog is not None else 0,
            n_waiting=self.dispatcher.n_waiting,
            users=self.dispatcher.queue.loads(self._now()),
        )

    def latest_decisions(self, n: int) -> Iterator[Decision]:
        """The last ``n`` decisions of the journal, newest first."""
        return self.dispatcher.journal.latest(n)

    # -- called by backends --------------------------------------------------------------------------------------

    def connected(self, backend: Backend, session: ServerSession) -> None:
        if session.is_assisted and self.context is None:
            self.context = self._context(backend, session)
        self.dispatcher.attach(session.table)
        if self.store is not None:
            self.tasks.spawn(self.store.store_learned(), f"{self._settings.name}: keep what was learned")

    def disconnected(self, backend: Backend, error: BackendDown | None) -> None:
        self.dispatcher.detach(backend.name, error)
        if not any(table.is_assisted for table in self.dispatcher.tables):
            self.context = None

    def _context(self, backend: Backend, session: ServerSession) -> ModelContext:
        context: ModelContext | None = None
        infill = InfillPrompts(
            self.dispatcher, self._executor_of, session.props.n_ctx, lambda: self.context is context
        )
        context = ModelContext(
            session.model_name,
            session.table.n_ctx,
            len(session.table.slots),
            self._settings.rules,
            session.table.rewind_model,
            Tokenizer(backend.api),
            ConversionChecks(backend.api.ask),
            infill,
            self.untokenized,
            media_marker=session.props.boot_id,
            modalities=session.props.modalities,
        )
        return context

    def _executor_of(self, lease: Lease) -> PlanExecutor:
        return self.backend_of(lease).executor

    def _tokenizer(self) -> Tokenizer:
        assert self.context is not None, "there are slots whose content is known"
        return self.context.tokenizer

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _dropped(self, snapshot: Snapshot) -> None:
        if self.libraries is not None:
            self.libraries.drop(snapshot.id)
        for table in self.dispatcher.tables:
            table.drop_snapshot(snapshot.id)

    def _saves_s(self, stats: SnapshotStats) -> float:
        """By the rates of the backend connected for the longest time: those of all are similar."""
        for table in self.dispatcher.tables:
            return table.saves_s(stats)
        rates = next(iter(self.backends.values())).rates
        whole_s = rates.prefill.seconds(0, stats.n_tokens)
        return whole_s - rates.restore.seconds(stats.size_bytes)

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the store. Raises LlamaslotError with the remedy if it cannot be used. Warns if its disk is smaller than
        its quota.
        """
        if self.store is not None and (directory := self._settings.directory) is not None:
            await self.store.open()
            limits = (
                directory.quota_bytes,
                directory.min_free_bytes,
                directory.path,
                self.store.catalog.size_bytes,
            )
            if (note := await asyncio.to_thread(beyond_disk, *limits)) is not None:
                log.warning("%s", note)
        for backend in self.backends.values():
            await backend.open()

    def start(self) -> None:
        for backend in self.backends.values():
            backend.start()
        if self._prewarm is not None:
            self.tasks.spawn(self._prewarm.run(), f"{self._settings.name}: prewarm")

    async def close(self, save_s: float) -> None:
        """Save dirty slots, for at most ``save_s`` seconds, and end all tasks."""
        for backend in self.backends.values():
            await backend.save_all(save_s)
        await self.tasks.close()
        for backend in self.backends.values():
            await backend.close()
        if self.store is not None:
            await self.store.close()
