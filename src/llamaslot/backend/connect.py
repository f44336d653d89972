"""Connects to a llama-server: identifies its model, probes what it can do, and adopts the content of its slots.

Slots that are not empty were filled before llamaslot connected. llama-server saves each of them, and llamaslot reads
the tokens from the file's header. The probes need an empty slot. If there is none, the slot with the fewest tokens is
saved and erased for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from llamaslot.backend.assist import (
    StandingAside,
    all_at_work,
    clears_idle_slots,
    has_better_memory,
    mistake,
    no_completions,
    no_slots,
    not_understood,
    passing_fault,
    silent,
    wrong_key,
)
from llamaslot.backend.probes import Probes
from llamaslot.backend.slot_table import SlotTable
from llamaslot.backend.unassisted_slots import UnassistedSlots
from llamaslot.cache.content import NOTHING
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import (
    LlamaslotError,
    NotReady,
    NotUnderstood,
    SlotActionFailed,
    SlotWedged,
    SnapshotInvalid,
    UpstreamError,
    is_servers_own,
)
from llamaslot.llama.answers import Props, SlotAction, SlotInfo
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.identity import Identity
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import SchedulingSettings
from llamaslot.scheduling.slots import Slot, SlotEvent
from llamaslot.store import (
    QuotaExceeded,
    Reservation,
    SavedSlot,
    Snapshot,
    WithTokens,
    read_slot_file,
)
from llamaslot.store.model_snapshots import content_of
from llamaslot.store.snapshot import digest_of
from llamaslot.store.snapshot_store import SnapshotStore

log = logging.getLogger(__name__)

# Slots in use by clients of a llamaslot that has crashed become idle within so many polls.
_SETTLE_POLL_S = 1.5
_SETTLE_POLLS = 4

_NO_ISOLATION_ASIDE = (
    "cache.isolation is per_user, and llamaslot cannot keep it with this llama-server: %s. Mend that, or set"
    " cache.isolation to shared"
)
_NO_ISOLATION = (
    "cache.isolation is per_user, and this llama-server cannot empty a slot before another user gets it, for it runs"
    " without --slot-save-path. Start it with --slot-save-path DIR, or set cache.isolation to shared"
)


class RouterMode(Struct, frozen=True):
    """The result of connecting to a router, which has no model of its own. ``max_models``: the number of models that
    it can have loaded at a time, 0 for any number."""

    max_models: int


_NO_SERVER = (
    "what answers is no llama-server: %s; llama-server tells total_slots and its model there. Is url right (host, port,"
    " path), and does no other program listen on that port?"
)


class ServerSession(Struct, frozen=True):
    """The result of connecting: the model of llama-server, and its slots as they are now."""

    table: SlotTable
    props: Props
    model_name: str
    identity: Identity | None = None  # None if llamaslot stands aside, so that it need not know the model
    names: tuple[str, ...] = ()  # all names of the model that llama-server tells
    entry: Mapping[str, Any] = field(default_factory=dict)  # the model's entry in /v1/models
    found_busy: tuple[Slot, ...] = ()  # slots that were at work while llamaslot connected
    warnings: tuple[str, ...] = ()
    # The reason why llamaslot stands aside: llama-server chooses slots, and the slot table only counts requests.
    aside: StandingAside | None = None
    streams_differ: bool = False  # so that no answer can be assembled from a stream

    @property
    def is_assisted(self) -> bool:
        return self.aside is None


class Handshake:
    """One attempt to connect to a llama-server.

    Its coroutines raise BackendDown, and NotReady while the model loads or if users cannot be isolated as configured.
    Canceling is safe: the next attempt starts over."""

    def __init__(
        self,
        name: str,
        api: LlamaServer,
        store: SnapshotStore | None,
        rates: Rates,
        settings: SchedulingSettings,
        check_process: Callable[[Props], None],
    ) -> None:
        """``store``: the snapshot directory; None without one. ``check_process`` is called with the first properties;
        it raises NotReady if another backend has the same process."""
        self.name, self.api, self.store, self.rates, self.settings = name, api, store, rates, settings
        self.catalog = store.catalog if store is not None else None
        self.check_process = check_process
        self.probes = Probes(api, self.catalog, rates)
        self.probes.has_others_files = store is not None and store.n_backends > 1
        self._identity: Identity | None = None
        self._is_usable = dict[str, bool]()  # by the text of the fingerprint
        self._model: Mapping[str, Any] = {}
        # Reservations that are not committed at the end are abandoned on every path.
        self._reservations = contextlib.AsyncExitStack()

    async def run(self, now: float, *, is_retry: bool = False) -> ServerSession | RouterMode:
        """Connect, and return the session, or ``RouterMode`` if the server is a router. ``is_retry``: the last attempt
        found no idle slot for the probes, and now there is one, so this attempt does not wait for other slots to
        become idle."""
        async with self._reservations:
            props = None
            try:
                props = await self.api.props()
                self.check_process(props)
                if props.max_models is not None:
                    return RouterMode(props.max_models)
                if props.n_slots is None:
                    return await self._another_kind("GET /props names no total_slots", props)
                return await self._probe(props, props.n_slots, now, is_retry)
            except NotUnderstood as error:
                return await self._another_kind(str(error), props)
            except UpstreamError as error:
                if props is None and is_servers_own(error.status):
                    raise NotReady(f"GET /props: {error}") from error
                if props is None and error.status not in (401, 403):
                    return await self._another_kind(str(error), props)
                return self._stand_aside(_reason(error), props)
            except SlotWedged as error:
                return self._stand_aside(silent(error), props)

    async def _another_kind(self, why: str, props: Props | None) -> ServerSession:
        """Return the session with another kind of server; llamaslot stands aside there. Raises NotReady if the server
        names no model, because then any program may have answered."""
        try:
            self._model = self._model or await self.api.model_info()
        except (NotUnderstood, UpstreamError):
            seen = [await self.api.glimpse(path) for path in ("/props", "/v1/models")]
            raise NotReady(_NO_SERVER % ", ".join(seen)) from None
        return self._stand_aside(not_understood(why), props)

    def give_up(self, error: Exception) -> ServerSession:
        """Return the session after a bug in llamaslot (``error``) has prevented the connection; llamaslot stands
        aside. Raises NotReady if users are isolated."""
        return self._stand_aside(mistake(error), None)

    def _stand_aside(self, reason: StandingAside, props: Props | None) -> ServerSession:
        """Return a session in which llamaslot stands aside for ``reason``: it has no usable slots, and only what the
        server reports. Raises NotReady if users are isolated."""
        if self.settings.is_isolated:
            raise NotReady(_NO_ISOLATION_ASIDE % reason.why)
        props = props or Props(None, 0, "", "")
        table = UnassistedSlots(
            self.name, props.n_slots, props.n_ctx, settings=self.settings, rates=self.rates
        )
        return ServerSession(
            table, props, _name(self._model), names=_names(self._model), entry=self._model, aside=reason
        )

    async def _probe(self, props: Props, n_slots: int, now: float, is_retry: bool) -> ServerSession:
        model = self._model = await self.api.model_info()
        try:
            infos = await (self.api.slots() if is_retry else self._settled())
        except UpstreamError as error:
            if error.status not in (404, 501):
                raise
            return self._stand_aside(no_slots(n_slots, str(error)), props)
        idle = sorted((info for info in infos if not info.is_processing), key=lambda info: info.n_tokens or 0)
        if not idle:
            return self._stand_aside(all_at_work(), props)
        table = SlotTable(self.name, len(infos), props.n_ctx, settings=self.settings, rates=self.rates)
        table.boot_id = props.boot_id
        first, others = idle[0], idle[1:]
        if first.n_tokens and not await self.probes.has_room(first.n_tokens):
            # The quota has no room for the slot's content, so the content is lost: the probes will overwrite it.
            await self._erased(first.id)
            first = replace(first, n_tokens=0)
        can_save = await self.probes.can_save(first.id, first.n_tokens or 0)
        if self.settings.is_isolated and not self.probes.can_erase:
            raise NotReady(_NO_ISOLATION)
        if not can_save and await self.probes.has_ram_cache():
            return self._stand_aside(has_better_memory(n_slots, self.probes.warnings[-1]), props)
        lora = await self.api.lora_adapters()
        # Which LoRA scales and which user a context belongs to is recorded nowhere.
        can_adopt = can_save and not (lora or self.settings.is_isolated)
        written = await self._written(first) if first.n_tokens and can_adopt else None
        streams_differ = await self.probes.moves_reasoning(first.id)
        table.cache_kind = await self.probes.cache_kind(first.id, props)
        table.is_cache_kind_sure = self.probes.is_cache_kind_sure
        table.rewind_model.window = self.probes.window
        identity = await self.probes.identity(first.id, props, model, lora)
        table.fingerprint = identity.to_text()
        empty = next((info.id for info in others if not info.n_tokens), None)
        if await self._were_emptied(others) or (
            empty is not None and await self.probes.is_unified(first.id, empty)
        ):
            return self._stand_aside(clears_idle_slots(n_slots), props)
        table.can_save, table.can_erase = can_save, self.probes.can_erase
        self._forget_rates_of_others(identity)
        table.rewind_model.returned = self.rates.returned
        if self.catalog is not None and can_save:
            table.fingerprint = await self._admit(table, identity)
            table.can_save = can_save = await self._probe_files(table, first.id)
            if not can_save and await self.probes.has_ram_cache():
                return self._stand_aside(has_better_memory(n_slots, self.probes.warnings[-1]), props)
        for slot in (first.id, empty):
            if slot is not None:
                await self._empty(table, slot, now, is_shared=True)
        if written is not None and can_save:
            await self._commit(table, written)
        for info in others:
            if info.n_tokens:
                adopted = can_adopt and can_save and await self._adopt(table, info, now)
                if not adopted:
                    await self._empty(table, info.id, now, is_shared=not (lora or self.settings.is_isolated))
        for warning in self.probes.warnings:
            log.warning("%s: llamaslot can do less with this llama-server: %s", self.name, warning)
        busy = tuple(table.slots[info.id] for info in infos if info.is_processing)
        return ServerSession(
            table, props, _name(model), identity, _names(model), model, busy, tuple(self.probes.warnings),
            streams_differ=streams_differ,
        )  # fmt: skip

    async def _probe_files(self, table: SlotTable, slot: int) -> bool:
        """Find out what slot files of this model contain. Returns True if snapshots can be used."""
        await self.probes.size(slot)
        if table.cache_kind is CacheKind.DENSE:
            return True
        files = await self.probes.checkpoints(slot)
        table.rewind_model.keeps_checkpoints = files.keep_checkpoints
        if files.cache_kind is not None and not table.is_cache_kind_sure:
            table.cache_kind = files.cache_kind
        return files.are_usable

    async def _were_emptied(self, others: list[SlotInfo]) -> bool:
        """True if slots in ``others`` had tokens and have become empty while another slot was probed. With two slots
        this is the only sign of a unified KV cache, because no empty slot is left for ``Probes.is_unified``."""
        held = {info.id for info in others if info.n_tokens}
        return bool(held) and any(info.id in held and not info.n_tokens for info in await self.api.slots())

    async def _settled(self) -> list[SlotInfo]:
        infos = await self.api.slots()
        for _ in range(_SETTLE_POLLS):
            if not any(info.is_processing for info in infos):
                break
            await asyncio.sleep(_SETTLE_POLL_S)
            infos = await self.api.slots()
        return infos

    async def _empty(self, table: SlotTable, slot: int, now: float, *, is_shared: bool) -> None:
        """Erase a slot of unknown content. If that fails, the slot is marked SUSPECT.

        If llama-server cannot erase slots at all, content in the shared namespace (``is_shared``) stays in the slot.
        That is harmless, because llama-server compares tokens itself."""
        if not await self._erased(slot) and (self.probes.can_erase or not is_shared):
            log.warning("%s: slot %d could not be erased; its unknown content is not reused", self.name, slot)
            table.take(table.slots[slot], Request("adoption"), now)
            table.give_back(table.slots[slot], SlotEvent.FAIL, NOTHING, now)

    async def _erased(self, slot: int) -> bool:
        try:
            await self.api.erase(slot)
        except SlotActionFailed as error:  # 501 without --slot-save-path
            log.debug("%s: llama-server did not erase slot %d: %s", self.name, slot, error)
            return False
        return True

    # -- adoption ------------------------------------------------------------------------------------------------

    async def _written(self, info: SlotInfo) -> tuple[Reservation, SlotAction] | None:
        """Have llama-server save a slot of unknown content to a reserved file. Returns None if that failed, and logs
        why."""
        assert self.catalog is not None
        reservation = None
        try:
            reservation = await self.catalog.reserve(self.rates.size_bytes(info.n_tokens or 0))
            # No effect on a committed reservation.
            self._reservations.push_async_callback(self.catalog.abandon, reservation)
            saved = await self.api.save(info.id, reservation.part_name)
        except (QuotaExceeded, SnapshotInvalid, SlotActionFailed) as error:
            log.info(
                "%s: what slot %d held before llamaslot connected is lost, as it could not be saved: %s",
                self.name, info.id, error,
            )  # fmt: skip
            if reservation is not None:
                await self.catalog.abandon(reservation)
            return None
        self.rates.size.observe(saved.n_tokens, saved.n_bytes)
        return reservation, saved

    async def _commit(self, table: SlotTable, written: tuple[Reservation, SlotAction]) -> WithTokens | None:
        """Make the saved file a snapshot, with the tokens in its header, and return it. If a snapshot with the same
        tokens exists, return that one and drop the file. Returns None if the file is not usable, and logs why."""
        assert self.catalog is not None
        reservation, saved = written
        try:
            file = await read_slot_file(self.catalog.slot_files / reservation.part_name)
            if (same := self._listed(file.tokens)) is not None:
                await self.catalog.abandon(reservation)
                table.add_snapshot(same)  # perhaps it is still to be read
                return same
            adopted = SavedSlot(
                tokens_expected=b"",
                n_saved=saved.n_tokens,
                n_written=saved.n_bytes,
                fingerprint=table.fingerprint,
                checkpoints=self._guessed_checkpoints(table, saved.n_tokens),
                source="adopted",
            )
            snapshot = await self.catalog.commit(reservation, adopted)
        except LlamaslotError as error:
            await self.catalog.abandon(reservation)
            log.info(
                "%s: what a slot held before llamaslot connected is lost, as its saved file cannot be used: %s",
                self.name, error,
            )  # fmt: skip
            return None
        table.add_snapshot(snapshot)
        return snapshot

    def _listed(self, tokens: bytes) -> WithTokens | None:
        """Return the snapshot of this model in the shared namespace that has exactly ``tokens``; None if there is
        none."""
        assert self.catalog is not None
        digest = digest_of(tokens)
        for snapshot in self.catalog.snapshots.values():
            if snapshot.digest == digest and not snapshot.namespace and self._is_ours(snapshot):
                return snapshot.with_tokens(tokens)
        return None

    def _guessed_checkpoints(self, table: SlotTable, n_tokens: int) -> tuple[int, ...]:
        """Return a guess at the last checkpoint of an adopted context: near the end of its last prompt, whose length
        is unknown because an answer follows. A guess that is too early costs a little computing; one that is too late
        shows at the first reuse."""
        if table.cache_kind is CacheKind.DENSE:
            return ()
        n_answer = min(int(2 * self.rates.answer.n_tokens), n_tokens // 2)
        return (n_tokens - n_answer,)

    async def _adopt(self, table: SlotTable, info: SlotInfo, now: float) -> bool:
        """Learn the content of a slot by saving it, and keep the slot for reuse. Returns False if the slot cannot be
        saved."""
        written = await self._written(info)
        snapshot = await self._commit(table, written) if written is not None else None
        if snapshot is None:
            return False
        slot = table.slots[info.id]
        table.take(slot, Request("adoption"), now)
        table.give_back(slot, SlotEvent.KEEP, content_of(snapshot), now)
        log.info(
            "%s: slot %d adopted: requests can reuse the %d tokens that it held before llamaslot connected",
            self.name, slot.id, snapshot.n_tokens,
        )  # fmt: skip
        return True

    def _forget_rates_of_others(self, current: Identity) -> None:
        """Reset the learned rates if they were learned with another model."""
        if not current.is_same_as(self.rates.model):
            self.rates.forget()
            self.rates.model = current.to_text()

    async def _admit(self, table: SlotTable, current: Identity) -> str:
        """Add the snapshots of this model to the index. Returns the fingerprint under which new snapshots are saved:
        that of the newest existing one, or else the present one."""
        assert self.catalog is not None
        assert self.store is not None
        snapshots = sorted(self.catalog.snapshots.values(), key=lambda snapshot: snapshot.created_at)
        self._identity = current
        admitted = [snapshot for snapshot in snapshots if self._is_ours(snapshot)]
        self.rates.size.observe_each([each.read_size for each in admitted])
        fingerprint = admitted[-1].fingerprint if admitted else current.to_text()
        self._is_usable[fingerprint] = True
        self.catalog.serve(self.name, fingerprint)
        served = self.catalog.fingerprints
        if n_others := sum(
            not (snapshot.fingerprint in served or self._is_ours(snapshot)) for snapshot in snapshots
        ):
            log.warning(
                "%s: %d snapshots on disk belong to another model and are not used", self.name, n_others
            )
        table.use_snapshots(await self.store.libraries.of(self.name, current, self._is_ours))
        return fingerprint

    def _is_ours(self, snapshot: Snapshot) -> bool:
        """True if ``snapshot`` is of the connected model."""
        text = snapshot.fingerprint
        if text not in self._is_usable:
            self._is_usable[text] = self._identity is not None and self._identity.is_same_as(text)
        return self._is_usable[text]


def _name(model: Mapping[str, Any]) -> str:
    return str(model.get("id", ""))


def _names(model: Mapping[str, Any]) -> tuple[str, ...]:
    """Return all names of the model in ``model``, its entry of /v1/models."""
    aliases = model.get("aliases")
    names = [model.get("id"), *(aliases if isinstance(aliases, list) else ())]
    return tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name))


def _reason(error: UpstreamError) -> StandingAside:
    """Return why llamaslot stands aside at a server that has answered with ``error``. Raises NotReady while the server
    loads its model."""
    if error.status == 503:
        raise NotReady(str(error)) from error
    if error.status in (401, 403):
        return wrong_key(str(error))
    if error.status >= 500 and error.status != 501:
        return passing_fault(str(error))
    return no_completions(str(error))
