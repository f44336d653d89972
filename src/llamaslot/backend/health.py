"""Tells if a llama-server is there, awake, and likely to answer. ``Backend._until_gone`` in ``backend.py`` watches the
server and decides that it is down.

A llama-server is not always there: it unloads its model by itself (``--sleep-idle-seconds``), or llamaslot stops it
and starts it again for the next request, or it is one of the models of a router. A llama-server that may hang, or that
answers with errors, gets requests only if no other backend can take them.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
from typing import Protocol

from llamaslot.backend.leases import Leases
from llamaslot.cache.content import NOTHING
from llamaslot.errors import UpstreamError
from llamaslot.llama.answers import Props
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotEvent
from llamaslot.tasks import ChangeEvent

log = logging.getLogger(__name__)

# A llama-server that has answered a request within this time is still awake. --sleep-idle-seconds is at least 1, and
# counts from the end of the answer, of which llamaslot may hear late on a busy machine.
_AWAKE_S = 0.5
# The first and the longest pause in which a server that answers with errors is avoided; each pause is twice the last.
_PAUSE_S, _PAUSE_AT_LAST_S = 2.0, 60.0


class Health(enum.Enum):
    DOWN = "down"
    ASLEEP = "asleep"  # until a request comes for its model
    CONNECTING = "connecting"
    UP = "up"


class ModelLoader(Protocol):
    """The interface of what starts and stops backends on demand, by their names."""

    def use_if_loaded(self, name: str) -> bool:
        """True if the model of backend ``name`` is loaded. Then the call counts as a use: the model stays loaded for a
        while.
        """
        ...

    async def serving(self, name: str) -> None:
        """Wait until the model of backend ``name`` is loaded. Raises BackendDown. Canceling is safe."""
        ...


class Presence:
    """Knows if the llama-server process of one backend is there. ``on_demand`` starts and stops this process; None if
    it runs all the time. ``changes`` is notified when the backend's health has changed.
    """

    def __init__(self, backend: str) -> None:
        self._backend, self.changes = backend, ChangeEvent()
        self.on_demand: ModelLoader | None = None
        self.is_replaced = False  # it is a router, and backends for its models have taken its place
        self._is_awake = asyncio.Event()
        self._is_awake.set()

    def use_if_loaded(self) -> bool:
        """True if the model is loaded, as it always is without ``on_demand``. Then this call counts as a use of the
        model.
        """
        return self.on_demand is None or self.on_demand.use_if_loaded(self._backend)

    async def serving(self) -> None:
        """Wait until the model is loaded. Returns at once without ``on_demand``. Raises BackendDown. Canceling is
        safe.
        """
        if self.on_demand is not None:
            await self.on_demand.serving(self._backend)

    @property
    def is_coming(self) -> bool:
        """True if the model is loaded on demand, and is loaded or being loaded now."""
        return self.on_demand is not None and self.is_awake

    @property
    def is_awake(self) -> bool:
        """True if there is a llama-server process to connect to."""
        return self._is_awake.is_set()

    def set(self, *, is_awake: bool) -> None:
        """Record if there is a llama-server process to connect to."""
        if is_awake:
            self._is_awake.set()
        else:
            self._is_awake.clear()

    async def awake(self) -> None:
        """Wait until there is a llama-server process to connect to. Canceling is safe."""
        await self._is_awake.wait()


class Proof:
    """Shows without asking it that the llama-server process of a session is alive and awake: it has told its
    properties less than half a second ago, on a connection that is still open. The kernel closes the connections of a
    dead process.
    """

    def __init__(self, presence: Presence, leases: Leases) -> None:
        self._presence, self._leases = presence, leases
        self._props: Props | None = None
        self._told_at = -math.inf

    def use(self) -> bool:
        """True if the process is known to be alive and awake, and has worked for a client within the last half second,
        so that it has not fallen asleep. If so, this call counts as a use of a model that is loaded on demand.
        """
        props = self._props
        return (
            props is not None
            and self._presence.use_if_loaded()
            and self._leases.now() - self._told_at < _AWAKE_S
            and self._leases.unused_s < _AWAKE_S
            and props.is_connected()
        )

    @property
    def is_same_process(self) -> bool:
        """True if the process that told its properties last is still alive, however long ago it told them."""
        return self._props is not None and self._props.is_connected()

    def renew(self, props: Props) -> None:
        """Record that the process has just told ``props``. No effect if it sleeps."""
        if not props.is_sleeping:
            self._props, self._told_at = props, self._leases.now()

    def clear(self) -> None:
        self._props = None


def note_sleep(leases: Leases, is_asleep: bool, now: float) -> None:
    """Record if llama-server sleeps. A sleeping llama-server has unloaded its model, so its idle slots are marked
    empty (measured).
    """
    leases.is_asleep = is_asleep
    table = leases.table
    if not is_asleep or table is None or not (filled := table.filled()):
        return
    log.info(
        "%s: llama-server has unloaded its model (--sleep-idle-seconds), so its slots are empty; the next request loads"
        " the model again",
        leases.backend,
    )
    for slot in filled:
        table.take(slot, Request("sleep"), now, has_answer=False)
        table.give_back(slot, SlotEvent.EMPTY, NOTHING, now)
    leases.dispatch()


class Suspicion:
    """A circuit breaker: while a backend is suspect, requests go to other backends.

    A backend that is silent is suspect until it answers a question. A backend that has answered with an error is
    suspect for a pause; then a request tries it again, and goes to another backend if that fails too. Each pause is
    twice as long as the last one, until the backend has answered a request.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._n_errors, self._until = 0, -math.inf

    def begin(self) -> None:
        """Suspect the backend, because it may hang. Idempotent."""
        if self._leases.table is not None and not self._leases.is_suspect:
            self._leases.is_suspect = True
            self._leases.dispatch()

    def blame(self, error: UpstreamError) -> None:
        """Suspect the backend for a pause, because it has answered with ``error`` to a request that another backend
        can take, or to a question of llamaslot's own.
        """
        pause_s = min(_PAUSE_S * 2 ** min(self._n_errors, 30), _PAUSE_AT_LAST_S)
        self._n_errors, self._until = self._n_errors + 1, self._leases.now() + pause_s
        log.warning(
            "%s: llama-server answers with errors; for %g s it gets no request that another backend can take: %s",
            self._leases.backend, pause_s, error,
        )  # fmt: skip
        self.begin()

    def has_worked(self) -> None:
        """Record that the backend has answered a request: the next pause is short again."""
        self._n_errors = 0

    def end(self) -> None:
        """Record that the backend has answered a question: it is no longer suspect. No effect during a pause."""
        if self._leases.is_suspect and self._leases.now() >= self._until:
            self._leases.is_suspect = False
            self._leases.dispatch()
