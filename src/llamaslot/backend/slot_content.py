"""What a slot holds after a prompt was computed in it or stopped on the way, and whether that is less than expected."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from llamaslot.backend.lease import Lease
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import common, count
from llamaslot.cache.reuse import checkpoints_after
from llamaslot.errors import BackendDown, LlamaslotError, UpstreamError
from llamaslot.llama.client import LlamaServer

_IDLE_POLL_S = 0.02  # llama-server answers between two batches, so it is asked about once for each
_FEW_TOKENS = 64  # slack: builds reuse up to this many tokens less than computed


def prefilled(before: Content, tokens: bytes, n_reused: int) -> Content:
    """What a slot holds after ``tokens`` were computed on ``n_reused`` of what it held before."""
    checkpoints = checkpoints_after(before.checkpoints, n_reused, [count(tokens)])
    return Content(tokens, True, True, checkpoints, before.snapshot, space=before.space)


async def wait_until_idle(
    api: LlamaServer, lease: Lease, content: Content, now: Callable[[], float]
) -> Content:
    """What is there of ``content`` when the server is idle, after a connection was closed on the way.

    The server cannot write its event for the batch that is running, and that ends the work: to ask for ``/slots`` does
    not keep it alive. How long it takes is learned. Raises BackendDown and BackendRestarted.
    """
    closed = now()
    while True:
        try:
            infos = {info.id: info for info in await api.slots()}
        except UpstreamError as error:  # no refusal of the prefill: the slot may still be at work
            raise BackendDown(f"llama-server does not answer /slots: {error}") from error
        lease.check_current()
        if (info := infos.get(lease.slot_id)) is None or not info.is_processing:
            break
        await asyncio.sleep(_IDLE_POLL_S)
    lease.pool.rates.interruption.observe(now() - closed)
    n = min(info.n_tokens or 0, content.n_tokens) if info is not None else 0
    return replace(content.head(n), is_exact=True) if n else NOTHING


async def is_untouched(api: LlamaServer, lease: Lease, before: Content | None) -> bool:
    """Whether the slot of ``lease``, which held ``before``, still does after llama-server has refused what was sent
    there. It says how many tokens are in it. Those that a request would have left there are as many only where these
    are the same ones, or by a rare chance, which costs time: llama-server compares tokens by itself.
    """
    try:
        infos = {info.id: info for info in await api.slots()}
    except LlamaslotError:
        return False
    info = infos.get(lease.slot_id)
    if before is None or info is None or info.is_processing or not lease.pool.is_current:
        return False
    n_now = info.n_tokens or 0
    if before.is_exact or before.n_more:
        return n_now == before.n_held
    n_kept = common(before.tokens, lease.request.tokens)  # of what is sure, whatever was done
    return n_now >= before.n_tokens and (n_kept == before.n_tokens or n_now > lease.request.n_tokens)


def is_far_off(lease: Lease, n_expected: int, n_found: int) -> bool:
    """Whether so much less is in the slot than was believed that it makes a long prefill of its own, and more than
    stopping here and going somewhere else costs."""
    pool = lease.pool
    lost_s = pool.rates.prefill.seconds(n_found, n_expected)
    return n_expected - n_found > _FEW_TOKENS and lost_s > max(pool.long_s, pool.rates.interruption.seconds)
