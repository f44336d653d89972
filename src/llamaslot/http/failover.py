"""Sends a request to another backend when the first one fails, as long as no byte of an answer has reached its client.

An answer begins with llama-server's status, headers or events. The comments of a waiting stream, and the status 200
before them, are llamaslot's own and the same for every backend: they do not count.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from msgspec import Struct

from llamaslot.backend.backend import Backend
from llamaslot.fleet.pool import Pool

log = logging.getLogger(__name__)


class Failover(Struct, frozen=True):
    """``is_answered``: whether any byte of an answer was sent. ``id``: of the request, for the log."""

    id: str
    is_answered: Callable[[], bool]

    def may_move(self, pool: Pool, failed: Backend) -> bool:
        """Whether another backend of ``pool`` can take the request."""
        return not self.is_answered() and pool.may_try_elsewhere(failed)

    def moves(self, pool: Pool, failed: Backend, error: Exception) -> bool:
        """As ``may_move``. If so, no request is sent to ``failed`` any more until it has answered a question."""
        if not self.may_move(pool, failed):
            return False
        failed.suspect()
        failed.metrics.failovers.inc()
        log.warning("%s: %s has failed, another backend takes the request: %s", self.id, failed.name, error)
        return True

    @contextlib.asynccontextmanager
    async def kept(self, pool: Pool, backend: Callable[[], Backend | None]) -> AsyncIterator[None]:
        """The block is cancelled if ``backend``, on which the request depends, goes down without closing its
        connections, and another one can take the request. Raises the error of the backend.
        """
        if len(pool.backends) < 2:
            yield
            return
        limit, down = asyncio.timeout(None), list[Exception]()

        def went_down(which: Backend, error: Exception) -> None:
            if which is backend() and not down and self.may_move(pool, which):
                down.append(error)
                limit.reschedule(asyncio.get_running_loop().time())

        try:
            with pool.calls_when_down(went_down):
                async with limit:
                    yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise type(down[0])(str(down[0])) from None
