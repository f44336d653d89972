"""Decides if a llama-server is down, or another process, and which backends are suspect: one that may hang, or that
answers with errors, gets requests only if no other backend can take them.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import math
import random
from collections.abc import Callable

from msgspec import Struct

from llamaslot.backend.connect import ServerSession
from llamaslot.backend.leases import Leases
from llamaslot.backend.process_check import SUSPECT_S, ProcessCheck
from llamaslot.backend.unassisted_slots import has_idle_slot
from llamaslot.errors import LlamaslotError, NotUnderstood, UpstreamError, is_servers_own
from llamaslot.llama.answers import Props
from llamaslot.llama.client import LlamaServer

log = logging.getLogger(__name__)

# The first and the longest pause in which a server that answers with errors is avoided; each pause is twice the last.
_PAUSE_S, _PAUSE_AT_LAST_S = 2.0, 60.0
_WATCH_S = 2.0
_JITTER = 0.2  # part by which a pause varies, so that many backends are not checked at the same moment
_jitter = random.Random()
# A llama-server is down if it does not answer GET /props for _SILENT_S longer than SUSPECT_S, and then not GET /health
# within _HEALTH_S.
_SILENT_S, _HEALTH_S = 3.0, 2.0
_HEALTH_ONLY_S = 5.0  # as _HEALTH_S, for a server that is the only one


class Health(enum.Enum):
    DOWN = "down"
    ASLEEP = "asleep"  # until a request comes for its model
    CONNECTING = "connecting"
    UP = "up"


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
    """The reason why llamaslot must connect to a llama-server again, or wait for it."""

    DOWN = "it does not answer"
    RESTARTED = "it is another process"
    OTHER_PROGRAM = "another program answers at its address now"
    CAN_BE_PROBED = "a slot is idle now in which it can probe llama-server"


class Watch:
    """Watches one connected llama-server, and decides if it is down or another process. It asks for ``/props`` every
    2 s, and at once after ``look_now``.
    """

    def __init__(
        self, api: LlamaServer, leases: Leases, process: ProcessCheck, are_several: Callable[[], bool]
    ) -> None:
        """``are_several()``: True if there are other backends, which can take the requests of one that hangs."""
        self._api, self._leases, self._process, self._are_several = api, leases, process, are_several
        self.suspicion = Suspicion(leases)
        self._is_doubted = asyncio.Event()

    def look_now(self) -> None:
        """End the present pause between two questions."""
        self._is_doubted.set()

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
            self._process.has_told(session, props)
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
        self._process.clear()
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
