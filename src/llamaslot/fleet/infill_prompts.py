"""What bodies of /infill become on the llama-server at hand: found out when the first one comes."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from llamaslot.backend.executor import Steps
from llamaslot.backend.lease import Lease
from llamaslot.backend.long_prompt import no_report
from llamaslot.backend.slot_content import until_idle
from llamaslot.cache.content import NOTHING
from llamaslot.errors import OpaquePrompt, Reason
from llamaslot.fleet.dispatcher import Scheduler
from llamaslot.formats.infill import Infill, learn
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.request import Job
from llamaslot.tokens.tokenizer import Prompt

log = logging.getLogger(__name__)

_LEARNING_S = 120.0  # some dozen questions, each of which waits for the batch that is running
_AGAIN_S = 600.0  # after it took longer: so long /infill is served without knowing its tokens


class Infills:
    """The layout of /infill of one model, and the prompts that its bodies become. ``is_current`` tells whether it
    is still served by a process that was there at the beginning."""

    def __init__(
        self,
        scheduler: Scheduler,
        steps_of: Callable[[Lease], Steps],
        n_ctx: int,
        is_current: Callable[[], bool],
    ) -> None:
        self._scheduler, self._steps_of, self._n_ctx = scheduler, steps_of, n_ctx
        self._is_current = is_current
        self._learning = asyncio.Lock()
        self._known: Infill | OpaquePrompt | None = None
        self._known_until = math.inf

    def miscounted(self) -> None:
        """The server has counted other tokens in a body than were thought: no more is known until it is met again."""
        self._known = OpaquePrompt("/infill was not as it was thought to be", Reason.MISCOUNTED)

    async def prompt(self, body: Mapping[str, Any], whose: str) -> Prompt:
        """The tokens of ``body``. Raises OpaquePrompt, BackendDown, BackendRestarted, QueueFull. Cancelling is safe."""
        async with self._learning:
            if self._known is None or self._scheduler.now() >= self._known_until:
                self._known_until = math.inf
                self._known = await self._learned()
            known = self._known
        if isinstance(known, OpaquePrompt):
            # A new one: each raise adds its frames to an exception.
            raise OpaquePrompt(str(known), known.reason)
        return Prompt(await known.tokens(body, whose))

    async def _learned(self) -> Infill | OpaquePrompt:
        """In a slot of its own: whatever it held is saved, if that is worth it. A slot in which it takes too long is
        given up, and it is tried again later."""
        with await self._scheduler.lease(Job("infill: how is it put together")) as lease:
            if not self._is_current():
                raise OpaquePrompt("llama-server has restarted", Reason.INFILL)  # and may be learned anew
            steps = self._steps_of(lease)
            await steps.prepare(lease, no_report)
            lease.begin_request()
            try:
                async with asyncio.timeout(_LEARNING_S):
                    known = await self._tried_out(lease, steps.api)
                    await until_idle(steps.api, lease, NOTHING, self._scheduler.now)
            except TimeoutError:
                steps.metrics.wedged.inc()
                self._known_until = self._scheduler.now() + _AGAIN_S
                log.warning(
                    "%s: probing /infill took more than %g s in slot %s; tried again in ten minutes",
                    lease.pool.backend, _LEARNING_S, lease.slot_name,
                )  # fmt: skip
                # The slot drains: llama-server may be at work in it.
                return OpaquePrompt("it took too long", Reason.INFILL)
            lease.finish(None)
            return known

    async def _tried_out(self, lease: Lease, api: LlamaServer) -> Infill | OpaquePrompt:
        try:
            return Infill(api, await learn(api, lease.slot_id, self._n_ctx))
        except OpaquePrompt as error:
            log.info("%s: how /infill prompts are built is unknown: %s", lease.pool.backend, error)
            return error
