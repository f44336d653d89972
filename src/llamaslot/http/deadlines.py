"""How long a request may take (``Deadlines``), and how long llama-server may tell nothing of it (``Watchdog``). The
limits are the operator's; without them it may take as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from llamaslot.errors import DeadlinePassed, LlamaslotError, SlotWedged
from llamaslot.tasks import TaskOwner

_LOOKS = 4  # in the time that llama-server may be silent


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds; None is no limit. ``first_token_s`` counts to the first token of the answer, where that is told."""

    first_token_s: float | None = None
    total_s: float | None = None


@dataclass(slots=True)
class Deadlines:
    """The limits of one request, from its arrival on."""

    timeouts: Timeouts
    _first: asyncio.Timeout | None = field(default=None, init=False)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """The block is cancelled when one of them has passed. Raises DeadlinePassed."""
        first, total = asyncio.timeout(self.timeouts.first_token_s), asyncio.timeout(self.timeouts.total_s)
        self._first = first
        try:
            async with total, first:
                yield
        except TimeoutError as error:
            if first.expired():
                raise DeadlinePassed(
                    f"the answer has not begun within {self.timeouts.first_token_s:g} s; try again later"
                ) from error
            if total.expired():
                raise DeadlinePassed(
                    f"the answer has not ended within {self.timeouts.total_s:g} s"
                ) from error
            raise

    def answering(self) -> None:
        """The answer has begun, or nothing will tell when it does: from now on only the whole is limited."""
        if self._first is not None and not self._first.expired():
            self._first.reschedule(None)


@dataclass(frozen=True, slots=True)
class Watchdog:
    """Watches a request of whose prompt llama-server tells nothing by itself, so that it has to be asked how far it is.

    ``look`` says that in whatever can be compared; None while the request is not at work in any slot.
    """

    silence_s: float | None
    look: Callable[[], Awaitable[object]]

    @contextlib.asynccontextmanager
    async def kept(self, tasks: TaskOwner) -> AsyncIterator[None]:
        """The block is cancelled when it has been at the same point for too long. Raises SlotWedged."""
        if self.silence_s is None:
            yield
            return
        limit = asyncio.timeout(None)
        try:
            async with limit:
                watching = tasks.spawn(self._watch(limit, self.silence_s), "watchdog")
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
            with contextlib.suppress(LlamaslotError, TimeoutError):  # no answer is no news
                async with asyncio.timeout(silence_s / _LOOKS):
                    seen = await self.look()
                if seen is None or seen != last:
                    last, since = seen, now()
        limit.reschedule(now())
