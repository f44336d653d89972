"""Requests with a common prefix: one request computes it, and the others wait for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.ids import MIN_SHARED_TOKENS
from llamaslot.cache.reuse import checkpoints_after
from llamaslot.scheduling.placement import BackendView
from llamaslot.scheduling.plan import Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import IDLE
from llamaslot.store.model_snapshots import PendingSave


class PrefixWait(Struct, frozen=True):
    """How long a request may wait until another request has computed their common prefix. It is the time that the
    other request still needs to the end of the prefix, plus the time of this request's own prefill. Without sharing,
    this request would have waited for the other one too, because the prefill with less left goes first.

    Seconds in which llama-server computes prompts meanwhile do not count, because it would not have computed this
    prompt in them: it has more left than the prefix. If they counted, the wait would end while the prefix is almost
    there whenever llama-server is slower than estimated. The first batch of a new server was four times slower than
    the probes had told (0.8 s for 2,048 tokens), and all requests that had begun together computed everything.

    ``maker`` computes a prefix of ``n_trunk`` tokens. Without it this request would reuse ``n_own`` tokens. These are
    tokens, not seconds, because the speed is learned meanwhile. ``prefilled_s``: the seconds that llama-server had
    computed prompts at ``since``. ``at_last``: the wait ends then in any case, because requests that wait too long in
    the queue are refused.
    """

    leases: Leases
    maker: Lease
    since: float
    prefilled_s: float
    n_trunk: int
    n_own: int
    at_last: float

    def lasts(self, request: Request, now: float) -> bool:
        if not self.maker.table.is_current:
            return False
        seconds = self.maker.table.rates.prefill.seconds
        both_s = seconds(self.maker.n_done, self.n_trunk) + seconds(self.n_own, request.n_tokens)
        computed_s = self.leases.prefilled_s - self.prefilled_s
        return now < min(self.since + both_s + computed_s, self.at_last)

    @classmethod
    def of(
        cls, leases: Leases, trunk: PendingSave, wait: Wait, now: float, at_last: float
    ) -> PrefixWait | None:
        """Return the time limit for a request that waits for the shared prefix ``trunk``; None if the request that
        computes it is gone.
        """
        maker = next((lease for lease in leases.held() if lease.slot_key == trunk.slot), None)
        if maker is None:
            return None
        n_own = wait.instead.n_reused if wait.instead is not None else 0
        return cls(leases, maker, now, leases.prefilled_s, trunk.content.n_tokens, n_own, at_last)


def ask_for_trunk(
    request: Request, views: Mapping[str, BackendView], makers: Iterable[Lease], now: float
) -> bool:
    """Ask one of ``makers``, leases with long prefills, to save the prefix that it has in common with ``request``.
    Returns True if one was asked. ``views``: the views of all backends, by name.

    A maker is asked if computing the prefix costs more than saving and restoring it, and no slot or snapshot has it. A
    maker that has passed the end of the prefix can still save it if the model can rewind to any token.
    """
    if request.no_cache:
        return False
    every = views.values()
    idle = (slot.n_usable for view in every for slot in view.slots if slot.state in IDLE)
    n_had = max([0, *idle, *(snapshot.n_usable for view in every for snapshot in view.snapshots)])
    best: tuple[int, Lease] | None = None
    for maker in makers:
        n_shared = views[maker.table.backend].shared.get(maker.slot_id, 0)
        n = min(n_shared, maker.request.n_tokens - 1, request.n_tokens - 1)
        is_ahead = maker.table.rewind_model.is_rewindable or n > maker.n_done
        may_keep = (
            maker.table.can_save
            and maker.can_keep
            and not (maker.request.no_cache or maker.request.is_prewarm)
        )
        if is_ahead and may_keep and n >= MIN_SHARED_TOKENS and (best is None or n > best[0]):
            best = n, maker
    if best is None:
        return False
    n, maker = best
    table = maker.table
    checkpoints = table.rewind_model.in_file(checkpoints_after((), 0, [n]))
    n_usable = table.rewind_model.usable(n, n, checkpoints, request.n_tokens)
    n_written = max(n, maker.n_done)
    cost_s = table.rates.save_s(n_written) + table.rates.restore_s(n_written)
    if table.rates.prefill.seconds(n_had, n_usable) <= cost_s:
        return False
    due_s = table.rates.prefill.seconds(maker.n_done, n)
    table.expect_trunk(maker.request, n, maker.slot_id, now + due_s)
    return True


def prefix_due_s(table: SlotTable, wait: Wait, now: float) -> float | None:
    """Return the seconds until the shared prefix that a request waits for is available; None if the request waits for
    something else.
    """
    trunk = table.expected_trunk(wait.place.snapshot) if wait.place is not None else None
    return max(trunk.until - now, 0.0) + (wait.for_s or 0.0) if trunk is not None else None
