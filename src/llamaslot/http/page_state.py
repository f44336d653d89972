"""What goes on in llamaslot now, for the operator page. The state is a flat object whose keys change independently, so
that only changes are sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from datetime import date, datetime
from typing import Any

from msgspec import Struct

from llamaslot import __version__
from llamaslot.backend.backend import Backend
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import LeaseState
from llamaslot.backend.long_prompt import Prefilling
from llamaslot.fleet.queue import QueuePosition
from llamaslot.fleet.registry import Registry
from llamaslot.formats.comments import Comment
from llamaslot.http.admin import slots_of, without_slots
from llamaslot.http.auth import user_of
from llamaslot.http.client_stream import Writer
from llamaslot.http.in_flight import InFlight, Requests
from llamaslot.observe.series import Sums
from llamaslot.sizes import readable_size
from llamaslot.tasks import in_slices

State = dict[str, Any]

_FRESH_S = 10.0  # the sums of today are computed again after so long, and when a request has ended
_ENDED = 32  # ended requests that one look reports; a page asks for more by itself
_READS = (LeaseState.PREFILLING, LeaseState.SENT, LeaseState.PROCESSING)


class _Speed(Struct):
    """The tokens of a request's prompt or answer (``what``) at the last look, at the time ``at``, and their speed per
    second.
    """

    what: str
    n_tokens: int
    at: float
    per_s: float = 0.0


class PageState:
    """Makes the state that the operator page shows. Nothing is computed while no page is open."""

    def __init__(self, registry: Registry, requests: Requests) -> None:
        self._registry, self._requests = registry, requests
        self._speeds: dict[int, _Speed] = {}
        self._headline: State = {}
        self._headline_at, self._n_seen = -_FRESH_S, -1
        self._headline_turn = asyncio.Lock()
        self._ended: list[State] = []

    async def state(self) -> AsyncGenerator[tuple[str, Any]]:
        """Yield the state as JSON by key: ``about``, ``headline``, ``store``, ``backend:NAME``, ``flight:SERIAL``, and
        ``ended``, the requests that have ended last, newest first.

        All pages get it from one look: twenty pages that asked for the parts separately held up all streams. The caller
        lets other tasks run between the parts: in one piece, all of it took 1 ms with 20 slots. Canceling is safe.
        """
        requests, now = self._requests, time.monotonic()
        requests.digest()
        await asyncio.sleep(0)
        self._speeds = {serial: speed for serial, speed in self._speeds.items() if serial in requests.running}
        yield "about", self._about()
        yield "headline", await self.headline(now)
        yield "store", self._store()
        if ended := self._latest():
            yield "ended", ended
        for backend in self._registry.backends:
            yield f"backend:{backend.name}", await self._backend(backend, now)
        for serial, flight in list(requests.running.items()):
            if serial in requests.running:
                yield f"flight:{serial}", self.flight(flight, now)

    def _about(self) -> State:
        return {
            "version": __version__,
            "began": self._requests.history.began,
            "queue": sum(pool.n_waiting for pool in self._registry.pools),
        }

    async def headline(self, now: float) -> State:
        """Return the sums of today, and those since the history began. They are computed at most every 10 s, and when a
        request has ended. Canceling is safe.
        """
        async with self._headline_turn:
            history = self._requests.history
            n_seen = history.latest[-1].serial if history.latest else 0
            if n_seen != self._n_seen or now - self._headline_at >= _FRESH_S:
                midnight = datetime.combine(date.today(), datetime.min.time()).timestamp()
                today = Sums()
                async for part in in_slices(history.series.since(midnight)):
                    today.add(part)
                self._headline = {
                    "today": _figures(today),
                    "ever": _figures(history.series.ever),
                    "midnight": midnight,
                    "is_kept": history.is_kept,
                }
                self._n_seen, self._headline_at = n_seen, now
        return self._headline

    def _latest(self) -> list[State]:
        """Return the requests that have ended since the last look at which any had ended, newest first, 32 at most."""
        last = self._ended[0]["serial"] if self._ended else 0
        new: list[State] = []
        for activity in reversed(self._requests.history.latest):
            if activity.serial <= last or len(new) == _ENDED:
                break
            new.append(activity.row())
        self._ended = new or self._ended
        return self._ended

    def _store(self) -> State:
        registry = self._registry
        return {
            "n": registry.n_snapshots,
            "size_bytes": registry.size_bytes,
            "quota_bytes": registry.quota_bytes,
        }

    async def _backend(self, backend: Backend, now: float) -> State:
        slots: list[State] = []
        told = {**without_slots(backend), "last_model": backend.model_name, "slots": slots}
        async for slot, own, lease in in_slices(slots_of(backend)):
            slots.append(slot)
            if lease is None:
                slot["n_tokens"] = own.content.n_held  # including its last answer
            slot["snapshot"] = own.content.snapshot
            slot["last_user"] = self._requests.last_users.get(own.key)
            slot["used_at"] = round(time.time() - (now - own.used_at)) if own.used_at else None
            slot["does"] = _does(backend, lease) if lease is not None else None
        return told

    def flight(self, flight: InFlight, now: float) -> State:
        """Return one request in flight, as the page shows it. ``now``: the monotonic time in seconds."""
        lease = flight.lease
        backend = self._registry.backend_named(lease.table.backend) if lease is not None else None
        is_reading = lease is not None and (lease.is_long or lease.state in _READS)
        gives_way_to = (
            backend.executor.chunked_prefill.gives_way_to(lease)
            if backend is not None and lease is not None and lease.is_long
            else ""
        )
        n_done = lease.n_done if lease is not None and is_reading else None
        n_answered = _n_answered(flight)
        return {
            "id": flight.id,
            "at": round(flight.at, 3),
            "user": user_of(flight.request).id,
            "model": self._requests.model_of(flight),
            "client": flight.client,
            "route": flight.route.path,
            "backend": backend.name if backend is not None else None,
            "slot": lease.slot_id if lease is not None and lease.table.is_assisted and lease.slot else None,
            "stage": stage_of(flight),
            "position": _position(flight),
            "n_done": n_done,
            "n_tokens": lease.request.n_tokens if lease is not None else None,
            "n_answered": n_answered,
            "tokens_per_s": self._tokens_per_s(flight, now, n_done if is_reading else n_answered, is_reading),
            "gives_way_to": gives_way_to,
        }

    def _tokens_per_s(
        self, flight: InFlight, now: float, n_tokens: int | None, is_reading: bool
    ) -> float | None:
        """Return the tokens per second of a request's prompt (``is_reading``), else of its answer, measured between two
        calls at least 0.9 s apart. ``n_tokens``: how many there are now, None if unknown. Returns None at the first
        call, and if ``n_tokens`` is unknown.
        """
        what = "prompt" if is_reading else "answer"
        last = self._speeds.get(flight.serial)
        if n_tokens is None:
            return None
        if last is None or last.what != what or n_tokens < last.n_tokens:
            self._speeds[flight.serial] = _Speed(what, n_tokens, now)
            return None
        if now - last.at >= 0.9:
            last.per_s = (n_tokens - last.n_tokens) / (now - last.at)
            last.n_tokens, last.at = n_tokens, now
        return round(last.per_s, 1) if last.per_s else None


def _figures(sums: Sums) -> State:
    n_prompt = sums.n_reused + sums.n_computed
    return {**sums.to_json(), "share_reused": round(sums.n_reused / n_prompt, 4) if n_prompt else None}


def _n_answered(flight: InFlight) -> int | None:
    """Return about how many tokens a stream has sent so far, by its events; None if the request is not being answered,
    or has no stream.
    """
    writer = flight.request.writer
    is_decoding = flight.lease is not None and flight.lease.is_decoding
    return writer.n_put if is_decoding and isinstance(writer, Writer) and writer.n_put else None


def _does(backend: Backend, lease: Lease) -> str:
    """Return in words what a slot is leased for."""
    if lease.is_own:
        return "saving" if lease.state is LeaseState.ACTING else "llamaslot's own"
    if lease.is_long and (waits := backend.executor.chunked_prefill.gives_way_to(lease)):
        return f"gives way to {waits}"
    match lease.state:
        case LeaseState.ACTING:
            return "saving or restoring"
        case LeaseState.PREFILLING | LeaseState.SENT | LeaseState.PROCESSING:
            return "reading the prompt"
        case LeaseState.DECODING:
            return "answering"
        case LeaseState.WAITING_EXCLUSIVE:
            return "waiting for its turn"
        case _:
            return "preparing"


def stage_of(flight: InFlight) -> str:
    """Return in words what happens to a request now. There are six cases:

    1. It waits for a slot: its place in the queue, if that is known.
    2. llama-server decodes its answer.
    3. Its prompt is computed, or waits for that.
    4. A snapshot is restored for it: the snapshot's size.
    5. It waits for something else: the words that its client gets as a comment.
    6. llama-server runs it, and reports nothing meanwhile.
    """
    lease, state = flight.lease, flight.down.state if flight.down is not None else None
    if isinstance(state, QueuePosition):
        position = _position(flight)
        return f"queued {_ordinal(position)}" if position else "queued"
    if lease is None:
        return str(state or "waiting for a slot")
    if lease.is_decoding:
        return "answering"
    n_tokens = lease.request.n_tokens
    if isinstance(state, Prefilling) or (lease.state is LeaseState.PROCESSING and n_tokens):
        return f"prefill {lease.n_done:,} of {n_tokens:,}"
    if lease.is_in_line:
        held = f", has {lease.n_done:,} of them" if lease.n_done else ""
        return f"waits to prefill {n_tokens:,} tokens{held}"
    if state is Comment.RESTORING and (restored := _restored(lease)) is not None:
        return f"restoring {readable_size(restored)}"
    return str(state) if state is not None else "running"


def _restored(lease: Lease) -> int | None:
    """Return the bytes of the snapshot that the request's plan restores; None if it restores none."""
    id_ = lease.plan.snapshot if lease.plan is not None else None
    snapshot = lease.table.model_snapshots.snapshots.get(id_) if id_ is not None else None
    return snapshot.restored_bytes() if snapshot is not None else None


def _position(flight: InFlight) -> int | None:
    """Return the place of a request in the queue, from 1; None if it does not wait there."""
    state = flight.down.state if flight.down is not None else None
    return (state.position() or None) if isinstance(state, QueuePosition) else None


def _ordinal(n: int) -> str:
    ending = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{ending}"
