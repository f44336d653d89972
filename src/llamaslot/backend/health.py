"""Decides if a llama-server is there, awake, and likely to answer. ``Watch`` asks it, and finds out that it is down or
another process.

A llama-server is not always there: it unloads its model by itself (``--sleep-idle-seconds``), or llamaslot stops it
and starts it again for the next request, or it is one of the models of a router. A llama-server that may hang, or that
answers with errors, gets requests only if no other backend can take them.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import random
from collections.abc import Awaitable, Callable
from typing import Protocol

from msgspec import Struct

from llamaslot.backend.connect import ServerSession
from llamaslot.backend.leases import Leases
from llamaslot.backend.unassisted_slots import has_idle_slot
from llamaslot.cache.content import NOTHING
from llamaslot.errors import LlamaslotError, NotUnderstood, UpstreamError, is_servers_own
from llamaslot.llama.answers import Props
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotEvent
from llamaslot.tasks import ChangeEvent

log = logging.getLogger(__name__)

# A llama-server that has answered a request within this time is still awake. --sleep-idle-seconds is at least 1, and
# counts from the end of the answer, of which llamaslot may hear late on a busy machine.
_AWAKE_S = 0.5
# The first and the longest pause in which a server that answers with errors is avoided; each pause is twice the last.
_PAUSE_S, _PAUSE_AT_LAST_S = 2.0, 60.0
_WATCH_S = 2.0
_JITTER = 0.2  # part by which a pause varies, so that many backends are not checked at the same moment
_jitter = random.Random()
# A llama-server that does not answer GET /props for SUSPECT_S gets no more requests while another backend can take
# them. It is down if it does not answer for _SILENT_S more, and then not to GET /health within _HEALTH_S.
SUSPECT_S, _SILENT_S, _HEALTH_S = 2.0, 3.0, 2.0
_HEALTH_ONLY_S = 5.0  # as _HEALTH_S, for a server that is the only one


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
        self._answer: asyncio.Future[Props | None] | None = None  # while a request asks

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

    async def ask(self, ask_server: Callable[[], Awaitable[Props]]) -> Props:
        """Return the answer to ``ask_server``, the question for the properties. Requests that come before the answer
        share it: in a burst of 1,000, each asked for itself. If it fails or is canceled, each of them asks again.
        Raises as ``ask_server`` does.
        """
        if (answer := self._answer) is not None:
            props = await asyncio.shield(answer)
            # If the process has died since it answered, another one may have its port already.
            return props if props is not None and props.is_connected() else await ask_server()
        self._answer = answer = asyncio.get_running_loop().create_future()
        props = None
        try:
            props = await ask_server()
        finally:
            self._answer = None
            answer.set_result(props)
        return props

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
        table.take(slot, Request("sleep"), now)
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
            self._leases.backend, pause_s, error.without_text,
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


class Outage(Struct):
    """A time in which llama-server could serve no requests, in seconds since 1970. ``ended``: None while it lasts."""

    began: float
    ended: float | None = None


class Gone(enum.Enum):
    """Why llamaslot must connect to a llama-server again, or wait for it."""

    DOWN = "it does not answer"
    RESTARTED = "it is another process"
    OTHER_PROGRAM = "another program answers at its address now"
    CAN_BE_PROBED = "a slot is idle now in which it can probe llama-server"


class Watch:
    """Watches one connected llama-server, and decides if it is down or another process. It asks for ``/props`` every
    2 s, and at once after ``doubt``.
    """

    def __init__(
        self, api: LlamaServer, leases: Leases, presence: Presence, are_several: Callable[[], bool]
    ) -> None:
        """``are_several()``: True if there are other backends, which can take the requests of one that hangs."""
        self._api, self._leases, self._are_several = api, leases, are_several
        self.suspicion, self.proof = Suspicion(leases), Proof(presence, leases)
        self._is_doubted = asyncio.Event()

    def doubt(self) -> None:
        """Ask at once if the process is still there. Until it has answered, nothing proves that it is."""
        self.proof.clear()
        self.look_now()

    def look_now(self) -> None:
        """End the present pause between two questions."""
        self._is_doubted.set()

    def has_told(self, session: ServerSession, props: Props) -> None:
        """Record that the process of ``session`` has just answered with ``props``."""
        note_sleep(self._leases, props.is_sleeping, self._leases.now())
        if session.table.is_current:
            self.proof.renew(props)

    async def until_gone(self, session: ServerSession, retry_s: float) -> Gone | None:
        """Watch the process of ``session`` until it is gone, and return why. Returns None if the session was ended
        otherwise meanwhile. ``retry_s``: if it was connected to without probes for lack of an idle slot, it is
        connected to again once one is idle, but not before so many seconds. Canceling is safe.
        """
        retry_at = self._leases.now() + retry_s
        while session.table.is_current:
            try:
                async with asyncio.timeout(_WATCH_S * _jitter.uniform(1 - _JITTER, 1 + _JITTER)):
                    await self._is_doubted.wait()
            except TimeoutError:
                pass
            self._is_doubted.clear()
            try:
                props = await self._props()
            except LlamaslotError as error:
                if session.table.is_current and (why := await self._why_silent(session, error)) is not None:
                    return why if session.table.is_current else None
                continue
            if (props.boot_id, props.n_slots) != (session.props.boot_id, session.props.n_slots):
                return Gone.RESTARTED
            self.suspicion.end()
            self.has_told(session, props)
            is_due = session.aside is not None and session.aside.may_end and self._leases.now() >= retry_at
            if is_due and await has_idle_slot(self._api, session.table):
                return Gone.CAN_BE_PROBED
        return None

    async def _props(self) -> Props:
        """Return the answer to ``GET /props``. While it takes more than 2 s, other backends get the requests, if there
        are any. Raises LlamaslotError.
        """
        if not self._are_several():
            return await self._api.props()
        timer = asyncio.get_running_loop().call_later(SUSPECT_S, self._takes_long)
        try:
            return await self._api.props(SUSPECT_S + _SILENT_S)
        finally:
            timer.cancel()

    def _takes_long(self) -> None:
        self.proof.clear()
        self.suspicion.begin()

    async def _why_silent(self, session: ServerSession, error: LlamaslotError) -> Gone | None:
        """``GET /props`` has failed with ``error``: return why the process is gone, None if it is there after all."""
        patience_s = _HEALTH_S if self._are_several() else _HEALTH_ONLY_S
        if await self._api.why_unhealthy(patience_s) is not None:
            return Gone.DOWN
        if isinstance(error, UpstreamError) and is_servers_own(error.status):
            self.suspicion.blame(error)
        elif isinstance(error, NotUnderstood) and session.props.n_slots is not None:
            return Gone.OTHER_PROGRAM
        else:
            self.suspicion.end()
        return None
