"""Converts bodies of /infill to prompts. The way in which llama-server builds these prompts (their layout) is probed
with the first request.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from llamaslot.backend.executor import PlanExecutor
from llamaslot.backend.lease import Lease
from llamaslot.backend.long_prompt import no_report
from llamaslot.backend.slot_content import wait_until_idle
from llamaslot.cache.content import NOTHING
from llamaslot.errors import PromptNotTokenizable, Reason
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.formats.infill import Infill, learn
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.request import Request
from llamaslot.tokens.tokenizer import Prompt

log = logging.getLogger(__name__)

_LEARNING_S = 120.0  # the probe makes some dozen requests, each of which waits for the running batch
_AGAIN_S = 600.0  # for so long after a timeout /infill is served without known tokens


class InfillPrompts:
    """The /infill layout of one model. ``is_current`` returns False once no process that was there at the beginning
    serves the model any more.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        executor_of: Callable[[Lease], PlanExecutor],
        n_ctx: int,
        is_current: Callable[[], bool],
    ) -> None:
        self._dispatcher, self._executor_of, self._n_ctx = dispatcher, executor_of, n_ctx
        self._is_current = is_current
        self._learning = asyncio.Lock()
        self._known: Infill | PromptNotTokenizable | None = None
        self._known_until = math.inf

    def miscounted(self) -> None:
        """Record that llama-server has counted another number of tokens in a body than llamaslot. The layout then
        counts as unknown until the next connection.
        """
        self._known = PromptNotTokenizable(
            "llama-server counted other tokens in an /infill prompt than llamaslot", Reason.MISCOUNTED
        )

    async def prompt(self, body: Mapping[str, Any], whose: str) -> Prompt:
        """Return the tokens of ``body``. Raises PromptNotTokenizable, BackendDown, BackendRestarted and QueueFull.
        Canceling is safe.
        """
        async with self._learning:
            if self._known is None or self._dispatcher.now() >= self._known_until:
                self._known_until = math.inf
                self._known = await self._learned()
            known = self._known
        if isinstance(known, PromptNotTokenizable):
            # A new exception, because each raise would add its frames to the stored one.
            raise PromptNotTokenizable(str(known), known.reason)
        return Prompt(await known.tokens(body, whose))

    async def _learned(self) -> Infill | PromptNotTokenizable:
        """Probe the layout in a leased slot, whose content is saved first if that is worth it. If the probe takes too
        long, release the slot, and probe again later.
        """
        with await self._dispatcher.lease(Request("infill-probe")) as lease:
            if not self._is_current():  # the layout of the new process may be another one
                raise PromptNotTokenizable("llama-server has restarted", Reason.INFILL)
            executor = self._executor_of(lease)
            await executor.prepare(lease, no_report)
            lease.begin_request()
            try:
                async with asyncio.timeout(_LEARNING_S):
                    known = await self._tried_out(lease, executor.api)
                    await wait_until_idle(executor.api, lease, NOTHING)
            except TimeoutError:
                executor.metrics.wedged.inc()
                self._known_until = self._dispatcher.now() + _AGAIN_S
                log.warning(
                    "%s: llamaslot could not find out within %g s, in slot %s, how llama-server builds /infill prompts;"
                    " it tries again in ten minutes",
                    lease.table.backend, _LEARNING_S, lease.slot_name,
                )  # fmt: skip
                # The slot is abandoned: llama-server may be working in it.
                return PromptNotTokenizable("the probe took too long", Reason.INFILL)
            lease.finish(None)
            return known

    async def _tried_out(self, lease: Lease, api: LlamaServer) -> Infill | PromptNotTokenizable:
        try:
            return Infill(api, await learn(api, lease.slot_id, self._n_ctx))
        except PromptNotTokenizable as error:
            log.info(
                "%s: llamaslot does not know how llama-server builds /infill prompts, and finds no cached prefix for"
                " them: %s",
                lease.table.backend, error,
            )  # fmt: skip
            return error
