"""The requests that are being served: what is known of each while it runs, how an operator cancels one, and what goes
into the history at its end.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import re
import time
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, Protocol

from aiohttp import web
from msgspec import Struct, field

from llamaslot.backend.lease import Lease
from llamaslot.errors import Cancelled, LlamaslotError, UpstreamError
from llamaslot.fleet.pool import Pool
from llamaslot.fleet.registry import Registry
from llamaslot.http.auth import user_of
from llamaslot.llama.routes import Route
from llamaslot.observe.activity import Activity, Outcome, Savings, in_words, stages
from llamaslot.observe.history import History
from llamaslot.observe.journal import Act, Decision
from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.slots import SlotKey

log = logging.getLogger(__name__)

CLIENT_GONE = 499  # nginx's number for a client that has closed its connection
_LONGEST = 200  # characters that are kept of a User-Agent, a model's name or an error
_DIGEST_S = 0.5
_MOVES = ("save", "keep", "restore")
_PLAIN_ID = re.compile(r"[!-~]{1,128}")


class ClientSide(Protocol):
    """The client's side of a request. ``state``: what happens to the request now, as the client is told
    while it waits.
    """

    state: object


class InFlight(Struct, eq=False):
    """A request that takes a slot, while it is served. ``id``: unique among the requests in flight and in the history.

    ``began``: its arrival by the monotonic clock, in seconds; ``at``: the same in seconds since 1970; ``ended``: its
    end by the monotonic clock. ``lease``, ``decisions``: its last lease, and all decisions about its places.
    ``n_reused``, ``n_computed`` and ``n_answered`` are tokens, ``prefill_s`` and ``decode_s`` seconds, all of the
    answers so far. ``first_s``: seconds until the first token, None if that was not detected.
    """

    serial: int
    id: str
    request: web.Request
    route: Route
    began: float
    at: float
    task: asyncio.Task[Any] | None
    model: str = ""
    is_model_known: bool = False  # False: ``model`` is only what the client calls it
    down: ClientSide | None = None
    lease: Lease | None = None
    decisions: list[Decision] = field(default_factory=list)
    is_cancelled: bool = False
    error: LlamaslotError | None = None
    status: int = 0
    ended: float | None = None
    source: str = ""
    n_prompt: int = 0
    n_reused: int | None = None
    n_computed: int = 0
    prefill_s: float = 0.0
    n_answered: int = 0
    decode_s: float = 0.0
    first_s: float | None = None

    @property
    def client(self) -> str:
        return self.request.headers.get("User-Agent", "")[:_LONGEST]

    def answered(
        self, source: str, n_reused: int | None, n_computed: int, prefill_s: float, first_s: float | None
    ) -> None:
        """Add the figures of one answer: to the request itself, or to one of its prompts. ``first_s``: seconds until
        the first token, None if that was not detected.
        """
        self.source = source
        if n_reused is not None:
            self.n_reused = (self.n_reused or 0) + n_reused
        self.n_computed += n_computed
        self.prefill_s += prefill_s
        self.first_s = first_s if self.first_s is None else self.first_s

    def timed(self, timings: Mapping[str, Any], n_predicted: int) -> None:
        """Add llama-server's ``timings`` at the end of an answer. ``n_predicted``: the tokens of the answer, used if
        ``timings`` does not have them.
        """
        self.prefill_s += float(timings.get("prompt_ms", 0.0)) / 1000
        self.n_answered += int(timings.get("predicted_n", n_predicted))
        self.decode_s += float(timings.get("predicted_ms", 0.0)) / 1000


IN_FLIGHT = web.RequestKey("in_flight", InFlight)


def in_flight(request: web.Request) -> InFlight | None:
    """Return what is known of a request while it runs; None if the request takes no slot."""
    found: InFlight | None = request.get(IN_FLIGHT)
    return found


def note_error(request: web.Request, error: LlamaslotError) -> None:
    """Record the error that the client gets, for the history."""
    if (flight := in_flight(request)) is not None:
        flight.error = error


def id_of(request: web.Request) -> str:
    """Return llamaslot's id of ``request``, which must be one that takes a slot."""
    flight: InFlight = request[IN_FLIGHT]
    return flight.id


def begins(request: web.Request, pool: Pool, model: object, down: ClientSide | None = None) -> None:
    """Record that ``pool`` is going to serve the request, and ``down``, its client's side. ``model``: the model that
    the request names, used while the pool's model is not known.
    """
    if (flight := in_flight(request)) is not None:
        name = pool.model.name if pool.model is not None else model
        flight.model, flight.down = name[:_LONGEST] if isinstance(name, str) else "", down
        flight.is_model_known = pool.model is not None


def placed(request: web.Request, lease: Lease, down: ClientSide | None = None) -> None:
    """Record that the request has got ``lease``: a slot or, while llama-server chooses slots, the right to be sent.
    ``down``: its client's side, None if that is recorded already.
    """
    if (flight := in_flight(request)) is not None:
        flight.lease, flight.down = lease, down or flight.down
        if (decision := lease.recorder.decision) is not None:
            flight.decisions.append(decision)


def by_operator(request: web.Request) -> Cancelled:
    """Called while a CancelledError is handled. If an operator has cancelled the request, return the error for its
    client; the handler then goes on and sends it. If the client has left instead, raise the CancelledError again.
    """
    flight, task = in_flight(request), asyncio.current_task()
    if flight is None or task is None or not flight.is_cancelled or task.uncancel():
        raise  # the CancelledError that the caller handles
    return Cancelled("an operator has cancelled this request")


class Requests:
    """All requests in flight that take a slot, oldest first. Half a second after its end, a request goes to
    ``history``.
    """

    def __init__(self, registry: Registry, history: History) -> None:
        self._registry, self.history = registry, history
        self._serials = itertools.count(1)
        self.running: dict[int, InFlight] = {}
        self._ended: list[InFlight] = []
        self._timer: asyncio.TimerHandle | None = None
        self._savings: dict[str, Savings] = {}
        self.last_users: dict[SlotKey, str] = {}  # the user whose content a slot holds
        self._held_since: dict[SlotKey, float] = {}  # when that user's request was sent
        self._looked_at = 0.0
        self.has_changed = asyncio.Event()  # set when the operator page should look again

    def begin(self, request: web.Request, route: Route) -> InFlight:
        flight = InFlight(
            serial := next(self._serials),
            self._new_id(request.headers.get("X-Request-Id", ""), serial),
            request,
            route,
            time.monotonic(),
            time.time(),
            asyncio.current_task(),
        )
        request[IN_FLIGHT] = self.running[flight.serial] = flight
        self.has_changed.set()
        return flight

    def _new_id(self, given: str, serial: int) -> str:
        """Return the id for a request: ``given`` by its client, if it is valid in logs, headers and sidecars, else a
        new one.

        If another request in flight or in the history has the same id, an ending is added. So cancelling an id ends one
        request only, and each request has its own timeline.
        """
        ending = f"{random.getrandbits(24):06x}"
        if not _PLAIN_ID.fullmatch(given):
            return f"req-{serial}-{ending}"
        is_taken = (
            any(flight.id == given for flight in self.running.values())
            or any(flight.id == given for flight in self._ended)
            or self.history.activity(given) is not None
        )
        return f"{given}~{ending}" if is_taken else given

    def end(self, flight: InFlight, status: int) -> None:
        """Record that the request has ended with HTTP status ``status``; 499 if its client has left."""
        flight.ended, flight.status, flight.task = time.monotonic(), status, None
        del self.running[flight.serial]
        self._ended.append(flight)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_DIGEST_S, self.digest)

    def cancel(self, id_: str) -> bool:
        """Cancel the request with this id: its client gets an error, and its slot is released. Returns False if no
        request in flight has this id.
        """
        flight = next((flight for flight in self.running.values() if flight.id == id_), None)
        if flight is None or flight.task is None:
            return False
        if not flight.is_cancelled:  # a second cancellation would end the handler without an answer
            flight.is_cancelled = True
            flight.task.cancel()
        return True

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self.digest()

    # -- what has ended ------------------------------------------------------------------------------------------

    def digest(self) -> None:
        """Put the requests that have ended into the history: 50 us each, after their clients have their answers."""
        self._timer = None
        ended, self._ended = self._ended, []
        self._find_owners(ended)
        for flight in ended:
            # Otherwise the two would refer to each other, and stay until a garbage collection.
            del flight.request[IN_FLIGHT]
            try:
                is_known = flight.is_model_known or flight.lease is not None
                self.history.add(self._activity(flight), is_model_known=is_known)
            except Exception:  # a fault here must not end a request, nor the history of others
                log.exception(
                    "%s: this request is missing in the history: internal error in llamaslot; please report it",
                    flight.id,
                )
        if ended:
            self.history.stored(self._registry.size_bytes)
            self.has_changed.set()

    def _find_owners(self, ended: Sequence[InFlight]) -> None:
        """Find out which user's content each saved snapshot holds.

        The first step of a request saves what the slot's last user has left there. So the requests, and the saves of
        requests and of llamaslot itself, are gone through in the order in which they happened.
        """
        since, self._looked_at = self._looked_at, time.time()
        flights = [*self.running.values(), *ended]
        decisions = [one for flight in flights for one in flight.decisions]
        for pool in self._registry.pools:
            decisions += (one for one in pool.journal.since(since) if not one.user)
        told = [
            (at, decision.slot, act.snapshot, "")
            for decision in decisions
            for act, at in zip(decision.acts, decision.act_ends, strict=True)
            if decision.slot is not None and act.step == "save"
        ]
        told += [
            (at, slot, None, user_of(flight.request).id)
            for flight in flights
            if flight.lease is not None and (at := flight.lease.sent_at or flight.ended)
            if (slot := _slot_of(flight)) is not None
        ]
        for at, slot, snapshot, user in sorted(told, key=itemgetter(0)):
            if user and at >= self._held_since.get(slot, 0.0):
                self.last_users[slot], self._held_since[slot] = user, at
            elif snapshot and snapshot not in self.history.owners and slot in self.last_users:
                self.history.own(snapshot, self.last_users[slot])

    def _activity(self, flight: InFlight) -> Activity:
        assert flight.ended is not None
        lease, acts = flight.lease, [act for one in flight.decisions for act in one.acts]
        total_s = flight.ended - flight.began
        slot = _slot_of(flight)
        _fill_in(flight, acts)
        activity = Activity(
            id=flight.id,
            at=flight.at,
            user=user_of(flight.request).id,
            model=self.model_of(flight),
            client=flight.client,
            route=flight.route.path,
            backend=lease.table.backend if lease is not None else None,
            slot=slot.id if slot is not None else None,
            status=flight.error.status if flight.error is not None else flight.status,
            outcome=outcome_of(flight),
            error=_wording(flight.error)[:_LONGEST],
            source=flight.source,
            n_prompt=flight.n_prompt,
            n_reused=flight.n_reused,
            n_computed=flight.n_computed,
            n_answered=flight.n_answered,
            queued_s=sum(one.queued_s for one in flight.decisions) if flight.decisions else total_s,
            first_s=flight.first_s,
            total_s=total_s,
            prefill_s=flight.prefill_s,
            decode_s=flight.decode_s,
            moved_s=sum(act.seconds for act in acts if act.step in _MOVES),
            waited_s=sum(act.waited_s for act in acts),
            diverged=next((one.diverged for one in reversed(flight.decisions) if one.diverged), None),
        )
        if lease is not None and flight.n_reused and flight.source != Source.SERVER.value:
            savings = self._savings.setdefault(lease.table.backend, Savings())
            activity.saved_s, activity.saved_error_s = savings.of(lease.table.rates.prefill, flight.n_reused)
        activity.text = in_words(activity, acts)
        sent_at = lease.sent_at if lease is not None and lease.sent_at else None
        activity.stages = stages(flight.decisions, flight.began, sent_at, flight.first_s, total_s)
        return activity

    def model_of(self, flight: InFlight) -> str:
        """Return the name of the model that serves the request; before that is known, the one that the
        request names.
        """
        if flight.lease is not None:
            backend = self._registry.backend_named(flight.lease.table.backend)
            if backend is not None and backend.model_name is not None:
                return backend.model_name
        return flight.model


def _slot_of(flight: InFlight) -> SlotKey | None:
    """Return the slot of the request; None if it has none, or if llama-server has chosen it."""
    lease = flight.lease
    has_slot = lease is not None and lease.table.is_assisted and lease.slot is not None
    return lease.slot_key if lease is not None and has_slot else None


def _wording(error: LlamaslotError | None) -> str:
    if isinstance(error, UpstreamError):
        return error.without_text
    return str(error) if error is not None else ""


def _fill_in(flight: InFlight, acts: list[Act]) -> None:
    """For a request without the figures of an answer, fill in what was computed of its prompt, as far as llama-server
    has reported it.
    """
    lease = flight.lease
    flight.n_prompt = flight.n_prompt or (lease.request.n_tokens if lease is not None else 0)
    # For a list of prompts: the sum over all prompts.
    flight.n_prompt = max(flight.n_prompt, (flight.n_reused or 0) + flight.n_computed)
    if flight.n_reused is not None or flight.n_computed or lease is None:
        return
    prefills = [act for act in acts if act.step == "prefill"]
    flight.n_computed = sum(act.n_tokens for act in prefills)
    flight.prefill_s = sum(act.seconds for act in prefills)
    if lease.is_confirmed and lease.request.n_tokens:
        n_found = lease.forecast.n_expected
        flight.n_computed = max(flight.n_computed, lease.n_done - n_found)


def outcome_of(flight: InFlight) -> Outcome:
    """Return how a request ended. There are five cases:

    1. An operator cancelled it.
    2. It was answered; or its client has left.
    3. llamaslot made a mistake: an error that has no class of its own.
    4. It was refused: a fault of the request, or a limit of its user.
    5. llama-server failed, was away or too slow, or the request waited too long.
    """
    error = flight.error
    if flight.is_cancelled:
        return Outcome.CANCELLED
    if error is None and (flight.status < 400 or flight.status == CLIENT_GONE):
        return Outcome.LEFT if flight.status == CLIENT_GONE else Outcome.DONE
    if type(error) is LlamaslotError:
        return Outcome.FAULT
    status = error.status if error is not None else flight.status
    return Outcome.REFUSED if status < 500 else Outcome.UNSERVED
