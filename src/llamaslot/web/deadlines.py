"""How long a request may take. Both limits are the operator's; without them it may take as long as it does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from llamaslot.errors import DeadlinePassed


@dataclass(frozen=True, slots=True)
class Timeouts:
    """In seconds; None is no limit. ``first_token_s`` counts to the first token of the answer, where that is told."""

    first_token_s: float | None = None
    total_s: float | None = None


@dataclass(slots=True)
class Deadlines:
    """Of one request, from its arrival on."""

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
