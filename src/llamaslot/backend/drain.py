"""Takes a backend out of service without losing contexts: no request begins, running answers end, then slots are
saved.
"""

from __future__ import annotations

import asyncio
import logging

from llamaslot.backend.idle_save import IdleSave
from llamaslot.backend.leases import Leases
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)


class Drain:
    """The switch that takes one backend out of service. It stays as it is when llama-server restarts. A restart of
    llamaslot ends it.
    """

    def __init__(self, backend: str, leases: Leases, idle_save: IdleSave, tasks: TaskOwner) -> None:
        self._backend, self._leases, self._idle_save, self._tasks = backend, leases, idle_save, tasks
        self._running: asyncio.Task[None] | None = None
        self._is_saved = False

    @property
    def unsaved(self) -> list[int]:
        """The numbers of the slots that could not be saved; empty while ``state`` is not ``drained``."""
        return [slot.id for slot in self._idle_save.worth_saving()] if self.state == "drained" else []

    @property
    def state(self) -> str | None:
        """``draining`` while requests run or slots are being saved, then ``drained``; None in normal service."""
        if not self._leases.is_drained:
            return None
        return "drained" if self._is_saved else "draining"

    def begin(self) -> None:
        """Let no request begin at this backend, and save its slots once the running requests have ended. If that has
        been done already, try again to save the slots that could not be saved.
        """
        if self._leases.is_drained and not self.unsaved:
            return
        log.info(
            "%s: draining: running requests go on, and no request begins at this backend until 'llamaslot undrain %s'",
            self._backend, self._backend,
        )  # fmt: skip
        self._leases.is_drained, self._is_saved = True, False
        self._running = self._tasks.spawn(self._run(), f"{self._backend}: drain")
        self._leases.dispatch()

    def end(self) -> None:
        """Let requests begin at this backend again. Idempotent."""
        if not self._leases.is_drained:
            return
        log.info("%s: undrained: requests may begin at this backend again", self._backend)
        if self._running is not None:
            self._running.cancel()
        self._leases.is_drained = self._is_saved = False
        self._leases.dispatch()

    async def _run(self) -> None:
        while self._leases.is_at_work:
            await self._leases.changes.wait()
        n_saved = await self._idle_save.save_all()
        self._is_saved = True
        log.info(
            "%s: drained: no request runs at this backend, and %d slots were saved to disk",
            self._backend, n_saved,
        )  # fmt: skip
        if unsaved := self.unsaved:
            log.warning(
                "%s: drained, but some slots could not be saved: %s; their contexts are lost when llama-server stops;"
                " 'llamaslot drain %s' tries to save them again",
                self._backend, unsaved, self._backend,
            )  # fmt: skip
