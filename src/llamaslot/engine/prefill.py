"""Computes prompts ahead of the request that they belong to, so that it can be seen, cancelled and cut."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

from llamaslot.core.cost import Rates
from llamaslot.core.reuse import checkpoints_after
from llamaslot.core.slots import NOTHING, Content, Keep, PrefillTo
from llamaslot.core.tokens import count, head
from llamaslot.engine.lease import Lease, Report
from llamaslot.errors import UpstreamError
from llamaslot.llama.api import LlamaServer
from llamaslot.llama.sse import Earlier
from llamaslot.observe.journal import Act

KeepTrunk = Callable[[Lease, Keep], Awaitable[None]]
log = logging.getLogger(__name__)

_FEW = 64  # a progress event for fewer tokens says little about speed


class Prefills:
    """The prefills of one backend: one at a time, first come first served."""

    def __init__(self, api: LlamaServer, rates: Rates, now: Callable[[], float]) -> None:
        self.api, self.rates, self.now = api, rates, now
        self._turn = asyncio.Lock()

    async def run(
        self, lease: Lease, steps: list[PrefillTo | Keep], report: Report, keep: KeepTrunk
    ) -> Earlier:
        """Compute the prompt up to each stop, and ``keep`` what is a trunk. One prefill at a time per backend, for
        llama-server sends progress for the lowest prefilling slot only: of two, the client of the other could not be
        seen to leave."""
        report(f"waiting to prefill {lease.job.n_tokens} tokens")
        n_first: int | None = None
        seconds = 0.0
        async with self._turn:
            for step in steps:
                if isinstance(step, Keep):
                    report("saving")
                    await keep(lease, step)
                    continue
                started = self.now()
                n_reused = await self._prefill_to(lease, step.n_tokens, report)
                n_first = n_reused if n_first is None else n_first
                took_s = self.now() - started
                lease.note.acted(lease.slot_id, Act("prefill", took_s, True, step.n_tokens - n_reused))
                seconds += took_s
        return Earlier(n_first or 0, steps[-1].n_tokens, seconds)

    async def _prefill_to(self, lease: Lease, n_tokens: int, report: Report) -> int:
        """One prefill; the number of tokens that it found in the slot."""
        tokens = head(lease.job.tokens, n_tokens)
        lease.working()
        before = lease.content or NOTHING
        last: tuple[int, float] | None = None
        n_reused = 0
        try:
            async with contextlib.aclosing(self.api.prefill(lease.slot_id, tokens)) as events:
                async for event in events:
                    if last is None:
                        n_reused = event.cache
                        content = prefilled(before, tokens, n_reused)
                        lease.begun(replace(content, is_exact=False))
                    elif event.processed - last[0] >= _FEW:
                        self.rates.prefill.observe(last[0], event.processed, event.seconds - last[1])
                    last = event.processed, event.seconds
                    report(f"prefill {event.processed} of {lease.job.n_tokens}")
        except UpstreamError as error:
            log.warning("prefill in slot %d failed: %s", lease.slot_id, error)
            lease.done(None)
            lease.restored = None  # no fault of the snapshot
            return 0
        lease.done(prefilled(before, tokens, n_reused))
        return n_reused


def prefilled(before: Content, tokens: bytes, n_reused: int) -> Content:
    """What a slot holds after ``tokens`` were computed on ``n_reused`` of what it held before."""
    checkpoints = checkpoints_after(before.checkpoints, n_reused, [count(tokens)])
    return Content(tokens, True, True, checkpoints, before.snapshot)
