"""Whether a llama-server is there, awake and to be trusted. ``Backend._until_gone`` in ``backend.py`` watches the
server and decides that it is down.

A server is not there all the time: it unloads its model by itself (``--sleep-idle-seconds``), or llamaslot stops it
and starts it again when a request comes for its model, or it is one model of a router. A server that may hang, or
answers with errors, gets requests only if no other can take them.
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

# A server that has answered a request within this time has not fallen asleep: --sleep-idle-seconds is 1 at least, and
# counts from when llama-server has finished, of which a busy machine hears late.
_AWAKE_S = 0.5
# For which a server that answers with errors is avoided: each pause is twice the last.
_PAUSE_S, _PAUSE_AT_LAST_S = 2.0, 60.0


class Health(enum.Enum):
    DOWN = "down"
    ASLEEP = "asleep"  # until a request comes for its model
    CONNECTING = "connecting"
    UP = "up"


class ModelLoader(Protocol):
    """Starts and stops backends on demand, by their names."""

    def use_if_loaded(self, name: str) -> bool:
        """Whether the model is loaded. If so, it is used for a request now, and stays loaded for a while."""
        ...

    async def serving(self, name: str) -> None:
        """Wait until the model is loaded. Raises BackendDown. Canceling is safe."""
        ...


class Presence:
    """Whether a backend's process is there. ``on_demand``: what starts and stops this backend; None if it is always
    there. ``changes`` is notified when the backend's health has changed.
    """

    def __init__(self, backend: str) -> None:
        self._backend, self.changes = backend, ChangeEvent()
        self.on_demand: ModelLoader | None = None
        self.is_replaced = False  # by the models of the router that it is
        self._is_awake = asyncio.Event()
        self._is_awake.set()

    def use_if_loaded(self) -> bool:
        """As ``ModelLoader.use_if_loaded``."""
        return self.on_demand is None or self.on_demand.use_if_loaded(self._backend)

    async def serving(self) -> None:
        """As ``ModelLoader.serving``."""
        if self.on_demand is not None:
            await self.on_demand.serving(self._backend)

    @property
    def is_coming(self) -> bool:
        """Whether the backend is being loaded on demand, or was."""
        return self.on_demand is not None and self.is_awake

    @property
    def is_awake(self) -> bool:
        """Whether there is a llama-server process to connect to."""
        return self._is_awake.is_set()

    def set(self, *, is_awake: bool) -> None:
        """Record whether there is a llama-server process to connect to."""
        if is_awake:
            self._is_awake.set()
        else:
            self._is_awake.clear()

    async def awake(self) -> None:
        """Wait until there is a llama-server process to connect to. Canceling is safe."""
        await self._is_awake.wait()


class Proof:
    """Shows without a question whether the process of a session is alive and awake: it told its properties a moment
    ago, on a connection that is still open.
    """

    def __init__(self, presence: Presence, leases: Leases) -> None:
        self._presence, self._leases = presence, leases
        self._props: Props | None = None
        self._told_at = -math.inf

    def use(self) -> bool:
        """Whether the backend is known to be alive and awake. If so, it is used for a request now."""
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
        """Whether the process that told its properties last is alive, however long ago that was."""
        return self._props is not None and self._props.is_connected()

    def renew(self, props: Props) -> None:
        """Record that the process has just told ``props``; no proof if it sleeps."""
        if not props.is_sleeping:
            self._props, self._told_at = props, self._leases.now()

    def clear(self) -> None:
        self._props = None


def note_sleep(leases: Leases, is_asleep: bool, now: float) -> None:
    """Record whether llama-server sleeps. If it does, it has unloaded its model, and the content of its idle slots is
    gone (measured).
    """
    leases.is_asleep = is_asleep
    table = leases.table
    if not is_asleep or table is None or not (filled := table.filled()):
        return
    log.info(
        "%s: llama-server has unloaded its model (--sleep-idle-seconds): its slots are empty", leases.backend
    )
    for slot in filled:
        table.take(slot, Request("sleep"), now, has_answer=False)
        table.give_back(slot, SlotEvent.EMPTY, NOTHING, now)
    leases.dispatch()


class Suspicion:
    """A circuit breaker: while a backend is suspect, requests go to other backends.

    A silent one is suspect until it answers a question; one that has failed, for a pause. Then a request tries it
    again, and goes to another backend if that fails too. Each pause is twice the last, until a request was answered.
    """

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._n_errors, self._until = 0, -math.inf

    def begin(self) -> None:
        """Suspect the backend: it may hang. Idempotent."""
        if self._leases.table is not None and not self._leases.is_suspect:
            self._leases.is_suspect = True
            self._leases.dispatch()

    def blame(self, error: UpstreamError) -> None:
        """Suspect the backend for a pause: it has failed at a request that another one can take, or at a question of
        llamaslot's own.
        """
        pause_s = min(_PAUSE_S * 2 ** min(self._n_errors, 30), _PAUSE_AT_LAST_S)
        self._n_errors, self._until = self._n_errors + 1, self._leases.now() + pause_s
        log.warning(
            "%s: answers with errors, and gets no requests for %g s while another backend can take them: %s",
            self._leases.backend, pause_s, error,
        )  # fmt: skip
        self.begin()

    def has_worked(self) -> None:
        """The backend has answered a request: the next pause is short again."""
        self._n_errors = 0

    def end(self) -> None:
        """The backend has answered a question: trust it again. No effect during a pause."""
        if self._leases.is_suspect and self._leases.now() >= self._until:
            self._leases.is_suspect = False
            self._leases.dispatch()
