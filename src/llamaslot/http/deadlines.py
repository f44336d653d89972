"""The time limits of a request (``Deadlines``), and of llama-server's silence (``Watchdog``), as the operator
configures them. By default only the watchdog is active.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from msgspec import Struct

from llamaslot.errors import DeadlinePassed, LlamaslotError, SlotWedged
from llamaslot.tasks import TaskOwner

_NO_LIMIT = contextlib.nullcontext()
_LOOKS = 4  # calls of ``look`` within ``silence_s``


@dataclass(slots=True)
class Deadlines:
    """The time limits of one request in seconds; None is no limit. They begin with the block of ``kept``.

    ``first_token_s``: until the first token of the answer; None also where llamaslot cannot detect that token.
    ``total_s``: until the end of the answer.
    """

    first_token_s: float | None
    total_s: float | None
    _first: asyncio.Timeout | None = field(default=None, init=False)

    def kept(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A context manager. When a limit has passed, it cancels its block and raises DeadlinePassed."""
        if self.first_token_s is None and self.total_s is None:
            return _NO_LIMIT
        return self._kept()

    @contextlib.asynccontextmanager
    async def _kept(self) -> AsyncIterator[None]:
        first, total = asyncio.timeout(self.first_token_s), asyncio.timeout(self.total_s)
        self._first = first
        try:
            async with total, first:
                yield
        except TimeoutError as error:
            if first.expired():
                raise DeadlinePassed(
                    f"the answer has not begun within {self.first_token_s:g} s; try again later"
                ) from error
            if total.expired():
                raise DeadlinePassed(f"the answer has not ended within {self.total_s:g} s") from error
            raise

    def begin_answer(self) -> None:
        """From now on only the total time is limited: the answer has begun, or llamaslot cannot detect its
        beginning.
        """
        if self._first is not None and not self._first.expired():
            self._first.reschedule(None)


class Watchdog(Struct, frozen=True):
    """Watches a request for which llama-server sends no progress events, by polling ``look``.

    ``silence_s``: the longest time without progress, None for no limit. ``look`` returns the progress as any comparable
    value; None while the request runs in no slot, which counts as progress.
    """

    silence_s: float | None
    look: Callable[[], Awaitable[object]]

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """A context manager. After ``silence_s`` without progress it cancels its block and raises SlotWedged."""
        if self.silence_s is None:
            yield
            return
        limit = asyncio.timeout(None)
        try:
            async with limit:
                # The task ends with the block.
                watching = TaskOwner().spawn(self._watch(limit, self.silence_s), "watchdog")
                try:
                    yield
                finally:
                    watching.cancel()
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise SlotWedged(
                f"llama-server has sent nothing for {self.silence_s:g} s; its slot is given up"
            ) from error

    async def _watch(self, limit: asyncio.Timeout, silence_s: float) -> None:
        now = asyncio.get_running_loop().time
        last, since = None, now()
        while now() < since + silence_s:
            await asyncio.sleep(silence_s / _LOOKS)
            with contextlib.suppress(LlamaslotError, TimeoutError):  # no answer: no progress is known
                async with asyncio.timeout(silence_s / _LOOKS):
                    seen = await self.look()
                if seen is None or seen != last:
                    last, since = seen, now()
        limit.reschedule(now())
