"""Tells what a slot holds after a prefill that was completed or stopped, and whether that is less than expected."""

from __future__ import annotations

import asyncio

from msgspec.structs import replace

from llamaslot.backend.lease import Lease
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, common, count
from llamaslot.cache.reuse import checkpoints_after
from llamaslot.errors import BackendDown, LlamaslotError, UpstreamError
from llamaslot.llama.client import LlamaServer
from llamaslot.store import WithTokens

_IDLE_POLL_S = 0.02  # llama-server answers between two batches, so there is about one poll for each batch


def prefilled(before: Content, tokens: bytes, n_reused: int) -> Content:
    """Return the content of a slot after a prefill to exactly ``tokens``. The slot held ``before``, and llama-server
    reused the first ``n_reused`` tokens of it.
    """
    checkpoints = checkpoints_after(before.checkpoints, n_reused, [count(tokens)])
    return Content(tokens, True, True, checkpoints, before.snapshot, namespace=before.namespace)


async def wait_until_idle(api: LlamaServer, lease: Lease, content: Content) -> Content:
    """Wait until llama-server is idle in the slot of ``lease``, after the connection was closed during a prefill.
    Returns the part of ``content`` that the slot has then.

    llama-server notices the closed connection when it cannot write the event of the running batch. Polling ``/slots``
    does not prolong the work. The time is learned as the cost of an interruption. Raises BackendDown and
    BackendRestarted.
    """
    closed = lease.now()
    while True:
        try:
            infos = {info.id: info for info in await api.slots()}
        except UpstreamError as error:  # the prefill may still be running in the slot
            raise BackendDown(f"llama-server does not answer /slots: {error}") from error
        lease.check_current()
        if (info := infos.get(lease.slot_id)) is None or not info.is_processing:
            break
        await asyncio.sleep(_IDLE_POLL_S)
    lease.table.rates.interruption.observe(lease.now() - closed)
    n = min(info.n_tokens or 0, content.n_tokens) if info is not None else 0
    return replace(content.head(n), is_exact=True) if n else NOTHING


async def is_untouched(api: LlamaServer, lease: Lease, before: Content | None) -> bool:
    """Return True if the slot of ``lease`` still holds ``before`` after llama-server has refused a request to it.
    False if that is not certain.

    llama-server reports only the slot's number of tokens. If the request has run and left the same number, its tokens
    are usually the same too. The rare exception only costs time, because llama-server compares tokens itself.
    """
    try:
        infos = {info.id: info for info in await api.slots()}
    except LlamaslotError:
        return False
    info = infos.get(lease.slot_id)
    if before is None or info is None or info.is_processing or not lease.table.is_current:
        return False
    n_now = info.n_tokens or 0
    if before.is_exact or before.n_more:
        return n_now == before.n_held
    n_kept = common(before.tokens, lease.request.tokens)  # known tokens that the slot has in either case
    return n_now >= before.n_tokens and (n_kept == before.n_tokens or n_now > lease.request.n_tokens)


def is_far_off(lease: Lease, n_expected: int, n_found: int) -> bool:
    """True if the slot holds so few of the ``n_expected`` tokens that computing the others is a long prefill of its
    own, and costs more than stopping here and placing the request again.
    """
    table = lease.table
    lost_s = table.rates.prefill.seconds(n_found, n_expected)
    return n_expected - n_found > NEGLIGIBLE_TOKENS and lost_s > max(
        table.long_s, table.rates.interruption.seconds
    )


def goes_on(held: Content, saved: WithTokens, holder: Lease | None, similarity_min: float) -> bool:
    """True if a slot that was saved as ``saved`` still holds that conversation. ``held``: the slot's content now.
    ``holder``: the lease of the slot; None if the slot is idle. In an idle slot all saved tokens must be there,
    because the length of its system part is not known any more.
    """
    n_common = common(held.tokens, saved.tokens)
    if holder is None:
        return n_common == saved.n_tokens
    is_other = holder.is_other_conversation(n_common, saved.n_tokens)
    return n_common >= similarity_min * saved.n_tokens and not is_other
