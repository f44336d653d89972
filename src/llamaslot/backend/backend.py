"""One llama-server over its whole life: met, served, lost, met again."""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiofiles
import orjson

from llamaslot.backend.cache_miss import Divergences
from llamaslot.backend.connect import Handshake, Met
from llamaslot.backend.drain import Drains
from llamaslot.backend.exclusive import Turns
from llamaslot.backend.executor import Steps
from llamaslot.backend.feedback import TokenCounts
from llamaslot.backend.slot_table import Pool
from llamaslot.backend.writeback import Writeback
from llamaslot.cache.content import NOTHING
from llamaslot.errors import BackendDown, LlamaslotError
from llamaslot.fleet.dispatcher import Scheduler
from llamaslot.fleet.infill_prompts import Infills
from llamaslot.fleet.prewarm import Bodies, Prewarm
from llamaslot.fleet.queue import QueueLimits
from llamaslot.llama.client import LlamaServer, Offered
from llamaslot.llama.dry_run import DryRuns
from llamaslot.llama.replies import Props
from llamaslot.observe.metrics import Metrics, Unrecognized
from llamaslot.scheduling.cost import Rates
from llamaslot.scheduling.eviction import ByValue, Returns, Standing
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.request import Job
from llamaslot.scheduling.slots import Event
from llamaslot.store import Catalog, Snapshot
from llamaslot.store.model_snapshots import Libraries
from llamaslot.tasks import TaskOwner
from llamaslot.tokens.conversion_checks import Shapes
from llamaslot.tokens.tokenizer import Prompts

log = logging.getLogger(__name__)

_HEALTH_POLL_S = (0.1, 0.2, 0.3, 0.5, 1.0)  # then the last for ever
_WATCH_S = 2.0
# To find out what it can do, where that has failed: each pause twice the last.
_RETRY_S, _RETRY_AT_LAST_S = 1.0, 60.0
_LOOK_AGAIN_S = 600.0  # after slots have lost what they held
_CONNECT_WAIT_S = 120.0  # how long a request waits for a server that has just been seen to restart


class Health(enum.Enum):
    DOWN = "down"
    CONNECTING = "connecting"
    UP = "up"


class Backend:
    """Owns all that concerns one llama-server: its slots, snapshots, rates, and the tasks that look after them."""

    def __init__(
        self,
        name: str,
        api: LlamaServer,
        *,
        rules: Rules,
        limits: QueueLimits,
        metrics: Metrics,
        meta_dir: Path,
        idle_save_s: float,
        slot_save_path: Path | None,
        quota_bytes: int,
        prewarm: Bodies = (),
        max_files: int = 10_000,
        min_free_bytes: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.api, self.metrics, self.now = name, api, metrics, now
        self.rules = rules
        self.tasks = TaskOwner()
        self.order = ByValue()
        self.order.saves_s = self._saves_s
        self.catalog = (
            Catalog(
                slot_save_path,
                quota_bytes,
                max_files=max_files,
                min_free_bytes=min_free_bytes,
                now=time.time,
                on_drop=self._dropped,
                order=self.order,
                register=meta_dir / f"{name}.sidecars",
            )
            if slot_save_path
            else None
        )
        self.libraries = (
            Libraries(self.catalog, meta_dir / f"{name}.index", self.tasks) if self.catalog else None
        )
        self._rates_file, self._returns_file = (
            meta_dir / f"{name}.{what}.json" for what in ("rates", "returns")
        )
        self._writing = threading.Lock()
        self.rates = Rates()
        self.prompts = Prompts(api)
        self.scheduler = Scheduler(rules, limits, now)
        self.leases = self.scheduler.add(name)
        self.steps = Steps(api, self.catalog, self.rates, metrics, self.tasks, self.leases)
        self.infills = Infills(api, self.scheduler, self.steps)
        self.offered, self.shapes = Offered(api), Shapes(api.ask)
        self.dry_runs = DryRuns(api)
        self.unrecognized = Unrecognized(metrics)
        self.token_counts = TokenCounts(self.prompts, self.shapes, self.unrecognized, self.infills.miscounted)
        self.turns = Turns(api, self.leases, self.steps, self.tasks)
        self.writeback = Writeback(self.leases, self.steps, idle_save_s)
        self.prewarm = (
            Prewarm(prewarm, self.scheduler, self.steps, self.prompts, self.catalog, self.tasks, idle_save_s)
            if self.catalog is not None
            else None
        )
        self.divergences = Divergences(api, metrics, self.tasks)
        self.drains = Drains(api, self.leases, now)
        self.leases.on_drain = self.drains.add
        self.scheduler.on_prefix_wait = metrics.prefix_wait_s.observe
        if self.catalog is not None:
            self.leases.pin = self.catalog.pin
        self.health = Health.DOWN
        self._look_again_at = -math.inf
        self._n_retries = 0  # in a row, of finding out what the server can do
        self.streams_are_known = True  # answers can be put together from the events of a stream
        self.met: Met | None = None
        self._why_down = "has not answered yet"
        self._doubt = asyncio.Event()
        self._met_or_down = asyncio.Event()  # set unless a meeting is under way
        self._met_or_down.set()

    # -- for requests --------------------------------------------------------------------------------------------

    async def ready(self) -> Met:
        """The server as it is now, known to be the same process as before. Raises BackendDown at once when it is down.

        ``/props`` carries a mark that is random for each process, so a restart is noticed before anything is planned.
        Cancelling is safe.
        """
        while (met := self.met) is not None:
            if not met.is_assisted:
                return met  # nothing is believed of its slots, so nothing has to be checked
            try:
                props = await self.api.props()
            except BackendDown:
                self._doubt.set()
                raise
            if props.boot_id == met.props.boot_id:
                self._forget_if_asleep(props)
                return met
            self.lost(met)
        if self.health is Health.DOWN:
            raise self._is_down()
        try:
            async with asyncio.timeout(_CONNECT_WAIT_S):
                await self._met_or_down.wait()
        except TimeoutError:
            raise BackendDown(f"llama-server at {self.api.url} has restarted and is not ready yet") from None
        if self.met is None:  # down, perhaps after it was up for a moment
            raise self._is_down()
        return self.met

    def lost(self, met: Met) -> None:
        """The server is another process than ``met``: forget its slots, and meet it again. Jobs in the queue wait."""
        if self.met is met:
            log.warning("%s: llama-server has restarted: its slots are empty", self.name)
            self.metrics.restarts.inc()
            self._forget(Health.CONNECTING)
        self._doubt.set()

    def changed(self, why: str) -> None:
        """The process is the same, but nothing that was computed before is valid any more."""
        if self.met is not None:
            log.info("%s: %s; reconnecting to llama-server", self.name, why)
            self._forget(Health.CONNECTING)
        self._doubt.set()

    def _forget_if_asleep(self, props: Props) -> None:
        """A server that sleeps has unloaded its model: what its idle slots held is gone (seen running)."""
        pool = self.leases.table
        if props.is_sleeping and pool is not None and (filled := pool.filled()):
            log.info(
                "%s: llama-server has unloaded its model (--sleep-idle-seconds): its slots are empty",
                self.name,
            )
            for slot in filled:
                pool.take(slot, Job("sleep"), self.now(), has_answer=False)
                pool.give_back(slot, Event.EMPTY, NOTHING, self.now())
            self.scheduler.dispatch()

    def _slots_were_lost(self) -> None:
        """Find out again what llama-server does with its slots, not more than once in a while."""
        if self.now() >= self._look_again_at:
            self._look_again_at = self.now() + _LOOK_AGAIN_S
            self.changed("slots have lost their contexts three times in ten minutes")

    def doubt(self) -> None:
        """Something went wrong with the server: look at once whether it is still there."""
        self._doubt.set()

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open the store. Raises LlamaslotError with what to do when it cannot be used."""
        await self._load_learned()
        if self.catalog is not None:
            await self.catalog.open()
            for snapshot in self.catalog.snapshots.values():
                self.rates.size.observe(snapshot.n_tokens, snapshot.size_bytes)

    def start(self) -> None:
        self.drains.on_failure = self.doubt
        self.tasks.spawn(self._live(), f"{self.name}: life")
        self.tasks.spawn(self.drains.run(), f"{self.name}: drains")
        self.tasks.spawn(self.writeback.run(), f"{self.name}: writeback")
        if self.prewarm is not None:
            self.tasks.spawn(self.prewarm.run(), f"{self.name}: prewarm")

    async def close(self, save_s: float) -> None:
        """Save dirty slots, for at most ``save_s`` seconds, and end all tasks."""
        if self.health is Health.UP and save_s > 0:
            try:
                async with asyncio.timeout(save_s):
                    n_saved = await self.writeback.save_all()
                log.info("%s: %d slots saved before stopping", self.name, n_saved)
            except TimeoutError:
                log.warning("%s: not every slot was saved within shutdown.save_s (%g s)", self.name, save_s)
        await self.tasks.close()
        await self._store_learned()
        if self.catalog is not None:
            await self.catalog.settle()
            await self.catalog.write_register()
            self.catalog.close()
        await self.api.close()

    async def _live(self) -> None:
        """Meet the server, watch it until it is gone, and again."""
        complaint = ""
        is_retry = False
        while True:
            await self._until_healthy()
            if self.health is Health.DOWN:
                self._set(Health.CONNECTING)
            try:
                met = await self._connect(is_retry=is_retry)
            except BackendDown as error:
                if str(error) != complaint:
                    log.warning("%s: %s", self.name, error)
                complaint = str(error)
                self._why_down = f"is not ready: {complaint}"
                self._forget(Health.DOWN)
                await asyncio.sleep(1.0)
                continue
            complaint = ""
            self._serve(met)
            await self._store_learned()
            await self._until_gone(met)
            is_retry = met.aside is not None and met.aside.may_end
            self._n_retries = self._n_retries + 1 if is_retry else 0

    async def _connect(self, *, is_retry: bool) -> Met:
        """Find out what the server is, and what it can do. Raises BackendDown."""
        handshake = Handshake(self.name, self.api, self.catalog, self.libraries, self.rates, self.rules)
        try:
            return await handshake.run(self.now(), is_retry=is_retry)
        except BackendDown:
            raise
        except Exception as error:  # a mistake of llamaslot's own must not keep requests from being answered
            log.exception("%s: llamaslot failed while connecting; it stands aside", self.name)
            return handshake.give_up(error)

    async def _until_healthy(self) -> None:
        polls, is_told = iter(_HEALTH_POLL_S), False
        while (why := await self.api.why_unhealthy()) is not None:
            self._why_down = why
            if self.health is not Health.DOWN:
                self._forget(Health.DOWN)
            pause_s = next(polls, None)
            if pause_s is None and not is_told:
                is_told = True
                log.info("%s: waiting for llama-server at %s, which %s", self.name, self.api.url, why)
            await asyncio.sleep(pause_s or _HEALTH_POLL_S[-1])

    def _serve(self, met: Met) -> None:
        self.met, self.streams_are_known = met, True
        self.steps.fingerprint, self.steps.boot_id = met.fingerprint, met.props.boot_id
        for slot in met.found_busy:
            met.pool.take(slot, Job("left over"), self.now(), has_answer=False)
            met.pool.give_back(slot, Event.LEAVE, NOTHING, self.now())
            self.drains.add_slot(met.pool, slot, NOTHING)
        if self.catalog is not None and met.pool.can_save:  # some went while the server was met
            met.pool.agree(self.catalog.snapshots)
        for known in (self.prompts, self.infills, self.offered, self.shapes, self.dry_runs):
            known.forget()
        met.pool.lost_slots.on_many = self._slots_were_lost
        self._set(Health.UP)
        self.metrics.assist.set(met.is_assisted)
        self.scheduler.attach(met.pool)
        if met.aside is not None:
            log.warning("%s: %s", self.name, met.aside)
            return
        log.info(
            "%s: connected to llama-server: %s with %d slots of %d tokens, %s; %d snapshots can be used",
            self.name, met.model_name, len(met.pool.slots), met.pool.n_ctx, met.pool.memory.value,
            len(met.pool.library.snapshots),
        )  # fmt: skip

    async def _until_gone(self, met: Met) -> None:
        retry_at = self.now() + min(_RETRY_S * 2**self._n_retries, _RETRY_AT_LAST_S)
        while self.health is Health.UP:
            try:
                async with asyncio.timeout(_WATCH_S):
                    await self._doubt.wait()
            except TimeoutError:
                pass
            self._doubt.clear()
            try:
                props = await self.api.props()
            except LlamaslotError:
                if await self.api.why_unhealthy() is None:
                    continue
                self._why_down = "does not answer"
                log.warning("%s: llama-server does not answer; requests get 503 until it does", self.name)
                self._forget(Health.DOWN)
                return
            if (props.boot_id, props.n_slots) != (met.props.boot_id, met.props.n_slots):
                self.lost(met)
                continue
            self._forget_if_asleep(props)
            is_due = met.aside is not None and met.aside.may_end and self.now() >= retry_at
            if is_due and await self._is_any_idle(met.pool):
                self.changed("a slot is idle now")

    async def _is_any_idle(self, pool: Pool) -> bool:
        """Whether llama-server has an idle slot, with all that was sent to it at work in others."""
        try:
            infos = await self.api.slots()
        except LlamaslotError:
            return False
        n_at_work = sum(info.is_processing for info in infos)
        n_sent = sum(not slot.is_idle for slot in pool.slots)
        return n_sent <= n_at_work and any(not info.is_processing for info in infos)

    def _forget(self, health: Health) -> None:
        self.met = None
        self._set(health)
        self.scheduler.detach(self.name, self._is_down() if health is Health.DOWN else None)

    def _is_down(self) -> BackendDown:
        why = f"llama-server at {self.api.url} {self._why_down}"
        return BackendDown(f"{why}; requests are served again once it is up")

    def _set(self, health: Health) -> None:
        self.health = health
        self.metrics.is_up.set(health is Health.UP)
        if health is Health.CONNECTING:
            self._met_or_down.clear()
        else:
            self._met_or_down.set()

    def _dropped(self, snapshot: Snapshot) -> None:
        if self.libraries is not None:
            self.libraries.drop(snapshot.id)
        if self.leases.table is not None:
            self.leases.table.drop_snapshot(snapshot.id)

    def _saves_s(self, standing: Standing) -> float:
        if self.leases.table is not None:
            return self.leases.table.saves_s(standing)
        whole_s = self.rates.prefill.seconds(0, standing.n_tokens)
        return whole_s - self.rates.restore.seconds(standing.size_bytes)

    # -- what was learned ----------------------------------------------------------------------------------------

    async def _load_learned(self) -> None:
        if (rates := await _read(self._rates_file)) is not None:
            self.rates.take_over(Rates.from_json(rates))
        self.order.returns = Returns.from_json(await _read(self._returns_file))

    async def _store_learned(self) -> None:
        """Cancelling is safe: the files are written to their end all the same."""
        learned = {self._rates_file: self.rates.to_json(), self._returns_file: self.order.returns.to_json()}
        for file, data in learned.items():
            try:
                await asyncio.to_thread(self._write, file, orjson.dumps(data))
            except OSError as error:
                log.warning(
                    "%s: cannot write %s (learned rates): %s", self.name, file, error.strerror or error
                )

    def _write(self, file: Path, data: bytes) -> None:
        partial = file.with_suffix(".tmp")
        with self._writing:  # the thread of one that was cancelled may still be at it
            partial.write_bytes(data)
            partial.replace(file)


async def _read(file: Path) -> Any:
    """What is in a file of ours; None when there is none that can be read."""
    try:
        async with aiofiles.open(file, "rb") as opened:
            return orjson.loads(await opened.read())
    except (OSError, orjson.JSONDecodeError):
        return None
