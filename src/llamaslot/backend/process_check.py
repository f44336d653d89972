"""Decides whether llama-server must be asked for its properties (``/props``) before something is done that relies on
its process. Another process, perhaps with another model, may have taken its place at any moment. The properties have a
random mark for each process.

1. Before a request is placed (``is_alive``), and before the first step in its slot (``confirm``), llama-server is not
   asked if it has told its properties less than half a second ago, on a connection that is still open, and has worked
   for a client since, so that it has not fallen asleep.
2. When the connection for a request in a leased slot is open (``at_connection``), it is not asked if any older
   connection on which it has told its properties is still open: the kernel closes those of a dead process.

Nothing here waits until a model is loaded: a model that is being unloaded waits for the end of all leases.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

from llamaslot.backend.connect import ServerSession
from llamaslot.backend.leases import Leases
from llamaslot.backend.presence import Presence, note_sleep
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, BackendRestarted
from llamaslot.llama.answers import Props
from llamaslot.llama.client import LlamaServer

# A llama-server that has answered a request within this time is still awake. --sleep-idle-seconds is at least 1, and
# counts from the end of the answer, of which llamaslot may hear late on a busy machine.
_AWAKE_S = 0.5
# A llama-server that does not answer GET /props for so long gets no more requests while another backend can take them.
SUSPECT_S = 2.0


class Owner(Protocol):
    """The backend whose process is checked."""

    session: ServerSession | None

    def lost(self, table: SlotTable) -> None: ...

    def doubt(self) -> None: ...

    def suspect(self) -> None: ...


class ProcessCheck:
    """Keeps the last properties that the llama-server process of one backend has told, and asks for them again if they
    are too old to prove that it is still the same process.
    """

    def __init__(self, api: LlamaServer, leases: Leases, presence: Presence, owner: Owner) -> None:
        self._api, self._leases, self._presence, self._owner = api, leases, presence, owner
        self._props: Props | None = None
        self._told_at = -math.inf
        self._answer: asyncio.Future[Props | None] | None = None  # while a request asks

    # -- what was told -------------------------------------------------------------------------------------------

    def has_told(self, session: ServerSession, props: Props) -> None:
        """Record that the process of ``session`` has just answered with ``props``."""
        note_sleep(self._leases, props.is_sleeping, self._leases.now())
        if session.table.is_current and not props.is_sleeping:
            self._props, self._told_at = props, self._leases.now()

    def clear(self) -> None:
        """Forget what was told: until the process tells it again, nothing proves that it is alive."""
        self._props = None

    # -- for requests --------------------------------------------------------------------------------------------

    def use_if_proved(self) -> bool:
        """True if the process is known to be alive and awake without a question. Then this call also counts as a use
        of the model, which keeps it loaded.
        """
        props = self._props
        return (
            props is not None
            and self._presence.use_if_loaded()
            and self._leases.now() - self._told_at < _AWAKE_S
            and self._leases.unused_s < _AWAKE_S
            and props.is_connected()
        )

    async def is_alive(self, session: ServerSession) -> bool:
        """True if the process of ``session`` is alive. False if another one has taken its place; then llamaslot
        connects to that one. Raises BackendDown. Canceling is safe.
        """
        if self._needs_no_question(session):
            return True
        try:
            props = await self.ask()
        except BackendDown:
            self._owner.doubt()
            raise
        if props.boot_id != session.props.boot_id:
            self._owner.lost(session.table)
            return False
        self.has_told(session, props)
        return True

    async def confirm(self, table: SlotTable, is_only: Callable[[], bool]) -> None:
        """Check that the process of ``table`` is alive. The caller has a lease of one of its slots.

        Raises BackendRestarted if another process has taken its place, and BackendDown if llama-server is down. No
        answer for 2 s counts as down too, unless ``is_only()``: no other backend can take the request. Canceling is
        safe.
        """
        session = self._owner.session
        if session is None or session.table is not table:
            raise BackendRestarted
        if self._needs_no_question(session):
            return
        try:
            async with asyncio.timeout(None if is_only() else SUSPECT_S):
                if not await self.is_alive(session):
                    raise BackendRestarted
        except TimeoutError:
            self._owner.suspect()
            raise BackendDown(f"llama-server at {self._api.url} does not answer") from None

    def _needs_no_question(self, session: ServerSession) -> bool:
        return not session.is_assisted or self.use_if_proved()  # standing aside, llamaslot assumes nothing

    def at_connection(self, table: SlotTable, is_only: Callable[[], bool]) -> Awaitable[None] | None:
        """Check, when the connection for a request in a slot of ``table`` is open, that it leads to the process of
        ``table``. Returns None if it does, else an awaitable that asks, and raises as ``confirm`` does. Without this
        check, a process that has taken the port within milliseconds after ``confirm`` would answer.
        """
        is_same = table.is_current and self._props is not None and self._props.is_connected()
        return None if is_same else self.confirm(table, is_only)

    async def ask(self) -> Props:
        """Ask for the properties, and return them. Requests that come before the answer share it: in a burst of 1,000,
        each asked for itself. If the question fails or is canceled, each of them asks again. Raises BackendDown.
        """
        if (answer := self._answer) is not None:
            props = await asyncio.shield(answer)
            # If the process has died since it answered, another one may have its port already.
            return props if props is not None and props.is_connected() else await self._api.props()
        self._answer = answer = asyncio.get_running_loop().create_future()
        props = None
        try:
            props = await self._api.props()
        finally:
            self._answer = None
            answer.set_result(props)
        return props
