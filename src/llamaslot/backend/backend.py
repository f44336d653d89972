"""One llama-server over its whole life: llamaslot connects to it, sends it requests, loses it, and connects again."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Protocol

from llamaslot.backend.abandoned_slots import AbandonedSlots
from llamaslot.backend.cache_miss import CacheMisses
from llamaslot.backend.connect import Handshake, RouterMode, ServerSession
from llamaslot.backend.exclusive import ExclusiveSection
from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.health import Gone, Health, Outage, Watch
from llamaslot.backend.idle_save import Drain, IdleSave
from llamaslot.backend.leases import Leases
from llamaslot.backend.presence import Presence
from llamaslot.backend.process_check import ProcessCheck
from llamaslot.backend.save import Saving
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING
from llamaslot.errors import BackendDown, BackendRestarted
from llamaslot.llama.answers import Props
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.dry_run import DryRuns, RouteAvailability
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import SlotEvent
from llamaslot.store.learned import LearnedFile
from llamaslot.store.snapshot_store import SnapshotStore
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_HEALTH_POLL_S = (0.1, 0.2, 0.3, 0.5, 1.0)  # the last one repeats
_RETRY_S, _RETRY_AT_LAST_S = 1.0, 60.0  # first and longest pause between attempts to probe the server
_RETRY_CONNECT_S = 1.0  # after llamaslot could not connect to a server that is up
_LOOK_AGAIN_S = 600.0  # after slots have lost their content
_CONNECT_WAIT_S = 120.0  # a request waits at most this long for a server that has just restarted


class Members(Protocol):
    """The interface by which a backend tells the fleet about its state."""

    @property
    def are_several(self) -> bool:
        """True if there are several backends, so that another one can take the requests of one that hangs."""
        ...

    async def replace_by_models(self, backend: Backend, max_models: int) -> None:
        """Replace ``backend``, a router with at most ``max_models`` models loaded (0: any number), by one backend for
        each of its models. Raises BackendDown if it has no models."""
        ...

    def check_process(self, backend: Backend, props: Props) -> None:
        """Raise NotReady if ``props``, just told to ``backend``, are those of another backend's process."""
        ...

    def connecting(self, backend: Backend, session: ServerSession) -> None:
        """The model of ``backend`` is known now. Put the backend into the pool of that model."""
        ...

    def connected(self, backend: Backend, session: ServerSession) -> None:
        """llama-server is up. From now on the slots of ``backend`` may be leased."""
        ...

    def disconnected(self, backend: Backend, error: BackendDown | None) -> None:
        """The slots of ``backend`` no longer exist. With ``error`` the backend is down. With None llamaslot connects
        to it again, or llama-server sleeps until a request comes for its model."""
        ...


class Backend:
    """One llama-server over its whole life: its slots, its learned rates, and its tasks."""

    def __init__(
        self,
        name: str,
        api: LlamaServer,
        leases: Leases,
        members: Members,
        *,
        settings: SchedulingSettings,
        metrics: BackendMetrics,
        rates_file: Path,
        idle_save_s: float,
        store: SnapshotStore | None,
    ) -> None:
        """``store``: the snapshots in the directory that llama-server shares with llamaslot; None without one."""
        self.name, self.api, self.leases, self.metrics = name, api, leases, metrics
        self.now = time.monotonic
        self._members, self._settings = members, settings
        self.store = store
        self._catalog = catalog = store.catalog if store is not None else None
        self.tasks = TaskOwner()
        self.rates_file = LearnedFile(name, rates_file)
        self.rates = Rates()
        self.executor = PlanExecutor(Saving(api, catalog, self.rates, metrics, self.tasks, leases))
        self.route_availability, self.dry_runs = RouteAvailability(api), DryRuns(api)
        self.exclusive = ExclusiveSection(api, leases, self.executor, self.tasks)
        self.idle_save = IdleSave(leases, self.executor, idle_save_s)
        self.drain = Drain(name, leases, self.idle_save, self.tasks)
        self.cache_misses = CacheMisses(api, metrics, self.tasks)
        self.abandoned_slots = AbandonedSlots(api, leases, self.now)
        leases.on_abandoned = self.abandoned_slots.add
        if catalog is not None:
            leases.pin = catalog.pin
        self.health = Health.DOWN
        self._look_again_at, self._n_retries = -math.inf, 0  # consecutive attempts to probe the server
        self.n_failed_connects = 0  # since ``wake``, to a server that is up
        self.streams_are_known = True  # True if answers can be assembled from the events of a stream
        self.session: ServerSession | None = None
        self.last_session: ServerSession | None = None  # the present session, or else the last one
        self._why_down = "has not answered yet"
        leases.down = self._is_down()  # no request waits for one that a reload adds, until it is connected to
        self.outage: Outage | None = None  # the present one, or else the last one
        self._is_settled = asyncio.Event()  # set unless it is being connected to
        self._is_settled.set()
        self.presence = Presence(name)
        self.process = ProcessCheck(api, leases, self.presence, self)
        self._watch = Watch(api, leases, self.process, lambda: members.are_several)
        self.suspicion = self._watch.suspicion

    @property
    def model_name(self) -> str | None:
        """The name of the model that llama-server serves, or served last; None before the first connection."""
        return self.last_session.model_name if self.last_session is not None else None

    @property
    def why_down(self) -> str | None:
        """The reason why the backend serves no requests, for users to read; None unless it is down."""
        return f"llama-server at {self.api.url} {self._why_down}" if self.health is Health.DOWN else None

    @property
    def is_unloaded(self) -> bool:
        """True if the model is not loaded now, but llamaslot will load it for the next request."""
        return self.presence.on_demand is not None and self.session is None

    # -- for requests --------------------------------------------------------------------------------------------

    async def ready(self) -> ServerSession:
        """Return the session with llama-server, once it is connected and its process is known to be alive. Raises
        BackendDown at once if llama-server is down, and after two minutes if it has not come back from a restart.

        So a restart is noticed before anything is planned. Canceling is safe."""
        if self.session is None and self.leases.is_drained:
            raise BackendDown(self.leases.why_not or "")
        await self.presence.serving()
        while (session := self.session) is not None:
            if await self.process.is_alive(session):
                return session
        if self.health is Health.DOWN:
            raise self._is_down()
        try:
            async with asyncio.timeout(_CONNECT_WAIT_S):
                await self._is_settled.wait()
        except TimeoutError:
            raise BackendDown(f"llama-server at {self.api.url} has restarted and is not ready yet") from None
        if self.session is None:  # llama-server is down, perhaps after it was up for a moment
            raise BackendRestarted if self.presence.is_replaced else self._is_down()
        return self.session

    async def settled(self) -> None:
        """Wait until the backend is either connected or down. Canceling is safe."""
        await self._is_settled.wait()

    def lost(self, table: SlotTable) -> None:
        """llama-server has restarted, so ``table`` is of another process: connect again. Queued requests wait."""
        if self.session is not None and self.session.table is table:
            log.warning("%s: llama-server has restarted, its slots are empty; reconnecting", self.name)
            self.metrics.restarts.inc()
            self._is_away("has restarted")
            self._forget(Health.CONNECTING)
        self._watch.look_now()

    def changed(self, why: str) -> None:
        """Connect again for the reason ``why``: what llamaslot knows of this process is no longer valid."""
        if self.session is not None:
            log.info("%s: llamaslot reconnects to llama-server, because %s", self.name, why)
            self._forget(Health.CONNECTING)
        self._watch.look_now()

    def sleep(self, why_down: str = "") -> None:
        """Record that llama-server is stopped until ``wake``. Queued requests wait, or fail with ``why_down`` if
        given."""
        self.presence.set(is_awake=False)
        if why_down:
            self._is_away(why_down)
        else:
            self._why_down = "is asleep: the next request for its model starts it"
        self._forget(Health.DOWN if why_down else Health.ASLEEP)
        self._watch.look_now()

    def wake(self) -> None:
        """Record that llama-server is being started, and connect to it."""
        self.n_failed_connects = 0
        self._set(Health.DOWN)
        self.presence.set(is_awake=True)

    def _slots_were_lost(self) -> None:
        """Connect again, to probe why slots have lost their content. At most once in ten minutes."""
        if self.now() >= self._look_again_at:
            self._look_again_at = self.now() + _LOOK_AGAIN_S
            self.changed("its slots have lost contexts three times in ten minutes")

    def doubt(self) -> None:
        """A request to llama-server has failed: check at once if the process is still there. Until it has answered,
        nothing proves that it is."""
        self.process.clear()
        self._watch.look_now()

    def suspect(self) -> None:
        """Check at once if the process is still there. Until llama-server has answered a question, other backends get
        the requests, if there are any."""
        self.doubt()
        self.suspicion.begin()

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Read the learned rates from disk. The catalog must be open. Canceling is safe."""
        if (rates := await self.rates_file.read()) is not None:
            self.rates.take_over(Rates.from_json(rates))
        if self._catalog is not None:
            listed = self._catalog.snapshots.values()
            self.rates.size.observe_each([each.read_size for each in listed])

    def start(self) -> None:
        self.abandoned_slots.on_failure = self.doubt
        self.tasks.spawn(self._live(), f"{self.name}: life")
        self.tasks.spawn(self.abandoned_slots.run(), f"{self.name}: abandoned slots")
        self.tasks.spawn(self.idle_save.run(), f"{self.name}: idle save")

    async def save_all(self, save_s: float) -> None:
        """Save dirty slots for at most ``save_s`` seconds, if the backend is up. Canceling is safe."""
        if self.health is Health.UP and save_s > 0:
            await self.idle_save.save_before_stop(save_s)

    async def close(self) -> None:
        """End all tasks of the backend, and write the learned rates to disk."""
        await self.tasks.close()
        await self.rates_file.write(self.rates.to_json())
        await self.api.close()

    async def _live(self) -> None:
        """Connect to llama-server, watch it until it is gone, and repeat. Returns only if it is a router."""
        complaint = ""
        is_retry = False
        while True:
            await self.presence.awake()
            if not await self._is_healthy():
                continue
            if self.health is Health.DOWN:
                self._set(Health.CONNECTING)
            try:
                session = await self._connect(is_retry=is_retry)
                if isinstance(session, RouterMode):
                    return await self._members.replace_by_models(self, session.max_models)
            except (BackendDown, BackendRestarted) as error:
                if not self.presence.is_awake:
                    continue  # it was unloaded meanwhile
                if str(error) != complaint:
                    log.warning(
                        "%s: connecting to llama-server failed, repeated each second: %s", self.name, error
                    )
                complaint = str(error)
                self._is_away(f"is not ready: {complaint}")
                self.n_failed_connects += 1
                self._forget(Health.DOWN)
                await asyncio.sleep(_RETRY_CONNECT_S)
                continue
            complaint = ""
            self._serve(session)
            await self.rates_file.write(self.rates.to_json())
            await self._until_gone(session)
            is_retry = session.aside is not None and session.aside.may_end
            self._n_retries = self._n_retries + 1 if is_retry else 0

    async def _connect(self, *, is_retry: bool) -> ServerSession | RouterMode:
        """Identify the model and probe what llama-server can do. Raises BackendDown and BackendRestarted."""
        check = partial(self._members.check_process, self)
        handshake = Handshake(self.name, self.api, self.store, self.rates, self._settings, check)
        try:
            return await handshake.run(self.now(), is_retry=is_retry)
        except (BackendDown, BackendRestarted):
            raise
        except Exception as error:  # a bug in llamaslot must not prevent answers
            log.exception(
                "%s: internal error in llamaslot while connecting, so llama-server chooses the slots (assist is off);"
                " please report it",
                self.name,
            )
            return handshake.give_up(error)

    async def _is_healthy(self) -> bool:
        """Wait until llama-server can serve. False if it sleeps before that."""
        polls, is_told = iter(_HEALTH_POLL_S), False
        while (why := await self.api.why_unhealthy()) is not None and self.presence.is_awake:
            self._is_away(why)
            if self.health is not Health.DOWN:
                self._forget(Health.DOWN)
            pause_s = next(polls, None)
            if pause_s is None and not is_told:
                is_told = True
                log.info("%s: waiting until llama-server at %s is ready; it %s", self.name, self.api.url, why)
            await asyncio.sleep(pause_s or _HEALTH_POLL_S[-1])
        return self.presence.is_awake

    def _serve(self, session: ServerSession) -> None:
        self._members.connecting(self, session)
        self.session, self.streams_are_known = session, not session.streams_differ
        self.last_session = session
        for slot in session.found_busy:
            session.table.take(slot, Request("left over"), self.now())
            session.table.give_back(slot, SlotEvent.LEAVE, NOTHING, self.now())
            self.abandoned_slots.add_slot(session.table, slot, NOTHING)
        if self._catalog is not None and session.table.can_save:  # snapshots may have gone while connecting
            session.table.keep_only(self._catalog.snapshots)
        for known in (self.route_availability, self.dry_runs):
            known.forget()
        session.table.lost_slots.on_many = self._slots_were_lost
        self._set(Health.UP)
        self.metrics.serves(session.model_name)
        self.metrics.assist.set(session.is_assisted)
        self._members.connected(self, session)
        if session.aside is not None:
            log.warning("%s: assist is off (llama-server chooses the slots): %s", self.name, session.aside)
            return
        library = session.table.model_snapshots
        log.info(
            "%s: connected to llama-server: model %s, %d slots of %d tokens each, cache kind %s, %d usable snapshots",
            self.name, session.model_name, len(session.table.slots), session.table.n_ctx,
            session.table.cache_kind.value, library.n_unread + len(library.snapshots),
        )  # fmt: skip

    async def _until_gone(self, session: ServerSession) -> None:
        retry_s = min(_RETRY_S * 2**self._n_retries, _RETRY_AT_LAST_S)
        match await self._watch.until_gone(session, retry_s):
            case Gone.DOWN:
                self._is_away("does not answer")
                log.warning(
                    "%s: llama-server does not answer; requests get 503, unless another backend takes them",
                    self.name,
                )
                self._forget(Health.DOWN)
            case Gone.RESTARTED:
                self.lost(session.table)
            case (Gone.OTHER_PROGRAM | Gone.CAN_BE_PROBED) as why:
                self.changed(why.value)

    def _forget(self, health: Health) -> None:
        self.session = None
        self.metrics.assist.set(0)
        self.process.clear()
        self._set(health)
        # Before its first connection it is in the pool of another model, whose requests must not wait for it.
        is_down = health is Health.DOWN or self.last_session is None
        self._members.disconnected(self, self._is_down() if is_down else None)

    def _is_down(self) -> BackendDown:
        why = f"llama-server at {self.api.url} {self._why_down}"
        return BackendDown(f"{why}; requests are served again once it is up")

    def _is_away(self, why: str) -> None:
        """Record why requests cannot be served now, as the end of a sentence. It is the beginning of an outage, unless
        there is one already, or the model is being loaded on demand."""
        self._why_down = why
        if not self.presence.is_coming and (self.outage is None or self.outage.ended is not None):
            self.outage = Outage(time.time())

    def _set(self, health: Health) -> None:
        self.health = health
        if self.outage is not None and health in (Health.UP, Health.ASLEEP):
            self.outage.ended = self.outage.ended or time.time()
        self.presence.changes.notify()
        self.metrics.is_up.set(health in (Health.UP, Health.ASLEEP))
        if health is Health.CONNECTING:
            self.leases.down = None
            self._is_settled.clear()
        else:
            self._is_settled.set()
