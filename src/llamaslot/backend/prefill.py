"""Chunked prefill: llamaslot computes long prompts ahead of the clients' requests, one at a time, with other requests
between two chunks.

llama-server fills its batches by slot number, and gives a prompt everything until the prompt is done. So a long prompt
is never sent as a whole. ``ChunkedPrefill`` sends it in chunks. It delays the next chunk for requests whose first
token is near, for the share of running streams, and for another long prefill that is first now
(``scheduling.prefill_policy`` decides). If the model can rewind to any token, each chunk is a part of the prompt. On
other models the end of each part would leave checkpoints in memory and in the slot file. There the whole prompt is
sent, and interrupted. So is a prompt that is alone on the server, if a batch is short: each part costs one request,
and no other request would profit."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Awaitable, Callable, Sequence

from msgspec.structs import replace

from llamaslot.backend.feedback import Feedback
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import RetryPlacement
from llamaslot.backend.leases import Leases
from llamaslot.backend.long_prompt import Chunk, LongPrompt, Prefilling, Report
from llamaslot.backend.slot_content import is_far_off, is_untouched, prefilled, wait_until_idle
from llamaslot.cache.content import NOTHING
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, head
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import UpstreamError
from llamaslot.formats.comments import Comment
from llamaslot.llama.answers import Progress
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.journal import Act
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.scheduling.plan import PrefillStats
from llamaslot.scheduling.prefill_policy import Pending, ServerTime, chunk_end, next_up, pause_s
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.settings import PrefillSettings
from llamaslot.tasks import ChangeEvent

KeepTrunk = Callable[[Lease, int], Awaitable[None]]
log = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5  # a request whose answer does not begin loses its priority without a notification
_SURELY_S = 8.0  # seconds of computing after which a prefill makes room for an exclusive request


class _Why(enum.Enum):
    """The reason why a long prefill does not go on now, for users to read."""

    OTHER_PREFILL = "another prompt"
    SHORT_PREFILL = "a request that answers soon"
    STREAMS = "running answers"


class ChunkedPrefill:
    """Computes the long prefills of one backend in chunks."""

    def __init__(
        self, api: LlamaServer, rates: Rates, metrics: BackendMetrics, leases: Leases, feedback: Feedback
    ) -> None:
        self.api, self.rates, self.metrics = api, rates, metrics
        self.leases, self.feedback = leases, feedback
        self._longs: list[LongPrompt] = []
        self._current: LongPrompt | None = None  # whose chunk is running now
        self._last: LongPrompt | None = None  # whose chunk ran last
        self._stopped_at = float("-inf")
        self._pause_s = 0.0  # still owed to streams for the last chunk
        self._time = ServerTime()

    @property
    def _changes(self) -> ChangeEvent:
        return self.leases.changes

    def now(self) -> float:
        return self.leases.now()

    def gives_way_to(self, lease: Lease) -> str:
        """Return the reason why the long prefill of ``lease`` waits now, in words; empty if it does not wait."""
        return next((long.gives_way_to for long in self._longs if long.lease is lease), "")

    async def run(
        self, lease: Lease, stops: Sequence[int], report: Report, keep: KeepTrunk, *, may_replan: bool = False
    ) -> PrefillStats | None:
        """Compute the prompt of ``lease`` up to the last of ``stops``, and stop at the others too, so that the model
        keeps checkpoints there. Where other requests wait for a shared prefix of this prompt, ``keep`` is called to
        save it. Returns the tokens reused and computed. Returns None if llama-server refused a part; then the client's
        own request shows why.

        Raises Preempted between two chunks, BackendDown and BackendRestarted. Raises RetryPlacement if an exclusive
        request (one for which llama-server chooses the slot) has waited long enough. With ``may_replan`` also raises
        it if the slot holds much less than expected; then almost nothing was computed. Canceling is safe: the chunk is
        closed and its slot is abandoned."""
        rewind_model = lease.table.rewind_model
        n_window = (rewind_model.window or 0) if rewind_model.cache_kind is CacheKind.SWA else 0
        long = LongPrompt(
            lease, stops, report, may_replan, lease.forecast.n_likely, self.now(), no_stop_before=n_window + 1
        )
        lease.set_progress(long.at)
        if lease.is_long:
            self._longs.append(long)
            self._time.keep({other.request.user.id for other in self.leases.leases} | self._users_waiting())
            self._changes.notify()  # its saves, erases and restores are over
        try:
            while True:
                lease.raise_if_preempted(long.so_far)
                if long.has_begun and self._is_trunk_due(long):
                    report(Comment.SAVING)
                    long.is_keeping = True
                    await keep(lease, long.at)
                    long.is_keeping = False
                    self._changes.notify()
                elif long.has_begun and long.at >= long.last:
                    break
                else:
                    if lease.is_long:
                        await self._until_next(long)
                    if not await self._compute_chunk(long):
                        return None
                    self._make_room(long)
        finally:
            if lease.is_long:
                self._longs.remove(long)
            lease.end_prefill()
            self._changes.notify()
            self._note(long)
        return long.prefill_stats

    # -- turns ---------------------------------------------------------------------------------------------------

    async def _until_next(self, long: LongPrompt) -> None:
        lease, began = long.lease, self.now()
        while (waits := self._waits(long)) is not None:
            why, seconds = waits
            long.gives_way_to = why.value
            if why is not _Why.STREAMS and not long.has_begun:
                long.report(Comment.WAITING_TO_PREFILL.format(n_tokens=lease.request.n_tokens))
            since, ahead = self.now(), self._users_ahead(long) if why is _Why.SHORT_PREFILL else []
            await self._changes.wait(seconds)
            self._time.took(ahead, self.now() - since, self._users_waiting())
            lease.raise_if_preempted(long.so_far)
            long.paused_s += self.now() - since if why is _Why.STREAMS else 0.0
            lease.check_current()
            if seconds is not None and self._next() is not long:
                self._changes.notify()  # wakes another prefill, which is first by now
        # No await from here to the chunk.
        self._current, long.gives_way_to = long, ""
        lease.take_prefill_turn()
        long.waited_s += self.now() - began

    def _waits(self, long: LongPrompt) -> tuple[_Why, float | None] | None:
        """Return why the prefill must wait, and for how many seconds at most (None: until a change). Return None if it
        may go on."""
        if self._current is not None or self._next() is not long:
            return _Why.OTHER_PREFILL, None
        now, settings = self.now(), _settings(long)
        # At most the time of this prefill itself: a prefill of a tenth of a second is not delayed by two seconds.
        whole_s = long.seconds + self.rates.prefill.seconds(long.at, long.last)
        held_s = max(self._stopped_at, long.came_at) + min(settings.max_yield_s, whole_s) - now
        if held_s > 0 and self._users_ahead(long):
            return _Why.SHORT_PREFILL, min(held_s, _LOOK_AGAIN_S)
        pause_s = self._stopped_at + self._pause_s - now
        if pause_s > 0 and self._n_streams(long):
            return _Why.STREAMS, pause_s
        return None

    def _next(self) -> LongPrompt:
        now = self.now()
        longs = [long for long in self._longs if not long.is_keeping]
        last = self._current or self._last
        current = longs.index(last) if last in longs else None
        pendings, settings = [self._pending(long, now) for long in longs], _settings(longs[0])
        # The seconds that a user has received above its share count as work that is left before its prefill.
        owed_s = [self._owed_s(long) for long in longs]
        pendings = [
            replace(one, left_s=one.left_s + max(owed_s) - own_s)
            for one, own_s in zip(pendings, owed_s, strict=True)
        ]
        return longs[next_up(pendings, current, self.rates.interruption.seconds, settings.starvation_s)]

    def _owed_s(self, long: LongPrompt) -> float:
        """Return by how many seconds the prefill's user is behind its share. Users that wait for a shared prefix from
        this prefill would compute the prefix themselves, so the largest number of all these users counts."""
        owed_s = (self._time.owed_s(user) for user in long.users - {long.user})
        return max([self._time.owed_s(long.user) + long.counted_s, *owed_s])

    def _pending(self, long: LongPrompt, now: float) -> Pending:
        """Return the prefill in the form that the policy compares. If requests wait for a shared prefix, only the work
        up to its end counts."""
        shared = [at for at in long.lease.table.expected_trunks(long.lease.slot_id) if at > long.at]
        left_s = self.rates.prefill.seconds(long.lease.n_done, min([long.last, *shared]))
        computed_s = long.seconds + (now - long.chunk.since if long.chunk is not None else 0.0)
        return Pending(left_s, max(now - long.came_at - computed_s, 0.0), long.came_at)

    def _others(self, long: LongPrompt) -> list[Lease]:
        leases = self.leases.leases
        return [lease for lease in leases if lease.table is long.lease.table and lease is not long.lease]

    def _users_ahead(self, long: LongPrompt) -> list[str]:
        """Return the users of requests with a short prefill that may delay ``long`` now."""
        may, grace_s = self._time.may_hold_back, _settings(long).chunk_s
        users = {lease.request.user.id for lease in self._others(long) if lease.is_latency_sensitive}
        return sorted(user for user in users if may(user, long.user, grace_s))

    def _users_waiting(self) -> set[str]:
        """Return the users of long prompts, of requests with a short prefill, and of requests that wait for a shared
        prefix."""
        leases = self.leases.leases if self._longs else ()
        short = {lease.request.user.id for lease in leases if lease.is_latency_sensitive}
        return short.union(*(long.users for long in self._longs))

    def _n_streams(self, long: LongPrompt) -> int:
        return sum(lease.is_decoding for lease in self._others(long))

    def _make_room(self, long: LongPrompt) -> None:
        """Raise RetryPlacement if an exclusive request waits, and this prefill has run long enough with more to go."""
        left_s = self.rates.prefill.seconds(long.at, long.last)
        is_long_enough = long.seconds >= _SURELY_S and left_s > _settings(long).max_yield_s
        if is_long_enough and self.leases.is_exclusive_waiting(long.lease):
            raise RetryPlacement(long.prefill_stats)

    # -- a chunk -------------------------------------------------------------------------------------------------

    async def _compute_chunk(self, long: LongPrompt) -> bool:
        """Compute one chunk of ``long``, and set ``long.at`` to the number of tokens that the slot has then. Returns
        False if llama-server refused it. Raises RetryPlacement as ``run`` does."""
        lease = long.lease
        before = lease.content
        chunk = long.chunk = self._next_chunk(long)
        self.leases.prefill_began()
        try:
            lease.set_progress(long.at)
            lease.begin_prefill()
            with self._changes.subscribed(self._reconsider):
                is_misplaced = await self._compute(long, chunk)
        except UpstreamError as error:
            log.warning(
                "%s: llama-server did not compute the prompt ahead in slot %s, the request is sent without that: %s",
                lease.request.id, lease.slot_name, error,
            )  # fmt: skip
            is_kept = not lease.is_confirmed and await is_untouched(self.api, lease, before)
            lease.finish(before if is_kept else None)
            lease.clear_restored()
            return False
        finally:
            took_s, long.chunk = self.now() - chunk.since, None
            long.seconds += took_s
            self.leases.prefill_ended()
            if self._current is long:
                self._ended(long, took_s)
        lease.table.set_ready_in(lease.slot_id, self.rates.prefill.seconds(long.at, long.last), self.now())
        if is_misplaced:
            raise RetryPlacement(long.prefill_stats)
        return True

    def _ended(self, long: LongPrompt, took_s: float) -> None:
        """Record that the chunk of ``long`` is over, so that another prefill may be next."""
        self._current, self._last = None, long
        if self._time.took([long.user], took_s, self._users_waiting()):
            long.counted_s += took_s
        self._stopped_at = self.now()
        self._pause_s = pause_s(took_s, self._n_streams(long), _settings(long).decode_share)
        self._changes.notify()

    def _next_chunk(self, long: LongPrompt) -> Chunk:
        end = long.target
        if is_cut := self._is_cut(long):
            start, n_whole = long.at, long.lease.forecast.n_whole
            if not long.has_begun and n_whole is not None:
                # If a chunk ended within the answer in the slot, llama-server would cut the answer off there.
                start = max(start, n_whole)
            end = chunk_end(start, end, self.rates.prefill, _settings(long).chunk_s)
        return Chunk(end, is_cut, long.lease.is_long and bool(self._users_ahead(long)), self.now())

    def _is_cut(self, long: LongPrompt) -> bool:
        """True if only a part of the prompt is sent as the next chunk, so that the chunk ends by itself. False if it
        runs until it is interrupted. An interruption takes up to two batches. Both must fit into the time of a chunk,
        because a request may come meanwhile."""
        lease = long.lease
        if not (lease.is_long and lease.table.rewind_model.is_rewindable):
            return False
        if self.leases.n_waiting or self._others(long):
            return True
        n_batch, end = lease.table.n_batch, long.target
        batches_s = 2 * self.rates.prefill.seconds(max(end - n_batch, 0), end)
        return not n_batch or batches_s > _settings(long).chunk_s

    async def _compute(self, long: LongPrompt, chunk: Chunk) -> bool:
        """Have llama-server compute the chunk. The slot's content is known afterwards, however the chunk ends. Returns
        True if it was stopped because the slot had much less than expected."""
        lease = long.lease
        tokens, before = head(lease.request.tokens, chunk.end), lease.content or NOTHING
        last: Progress | None = None
        n_found, is_over, is_misplaced = 0, False, False
        limit = asyncio.timeout(None)
        written = await long.tokens.written(tokens)
        try:
            async with (
                limit,
                contextlib.aclosing(
                    self.api.prefill(lease.slot_id, tokens, lease.request.namespace.lora, written)
                ) as events,
            ):
                async for event in events:
                    if last is None:
                        n_found = event.cache
                        lease.confirm(replace(prefilled(before, tokens, n_found), is_exact=False))
                        if is_misplaced := self._take_found(long, n_found):
                            break
                    else:
                        self.feedback.progressed(lease.table, last, event, chunk.end)
                    last = event
                    lease.set_progress(event.processed)
                    long.report(self._state_after(long, n_found, event))
                    chunk.limit = limit
                    self._reconsider()
                else:
                    is_over = True
        except TimeoutError:
            if not limit.expired():
                raise
            long.n_stopped += 1
        content = prefilled(before, tokens, n_found)
        if not is_over:
            content = await wait_until_idle(self.api, lease, content)
        elif last is not None:
            more_s = self.now() - chunk.since - last.seconds
            self.feedback.piece_ended(lease.table, more_s, is_alone=not self._others(long))
        lease.finish(content)
        if not long.has_begun:
            long.has_begun, long.n_reused = True, n_found
        long.at = content.n_tokens
        lease.set_progress(long.at)
        if is_misplaced:
            self.feedback.misplaced(lease, n_found)
        return is_misplaced

    @staticmethod
    def _take_found(long: LongPrompt, n_found: int) -> bool:
        """Go on from the ``n_found`` tokens that llama-server has found in the slot. Returns True if they are so few
        that the request is placed again."""
        if not long.has_begun:
            return is_far_off(long.lease, long.lease.forecast.n_expected, n_found) and long.may_replan
        if n_found < long.at - NEGLIGIBLE_TOKENS:
            # The interruption has lost tokens, and the next one may too. So the prefill is not interrupted again
            # before it has twice as many tokens: then it surely gets on.
            long.no_stop_before, long.at = 2 * long.at, n_found
        return False

    def _state_after(self, long: LongPrompt, n_found: int, event: Progress) -> Prefilling:
        """Return how far the prompt is computed in all its chunks, for the client. ``event``: llama-server's progress
        in the present chunk, for which it has found ``n_found`` tokens in the slot."""
        n_reused = long.n_reused if long.has_begun else n_found
        return Prefilling(
            event.processed, long.lease.request.n_tokens, n_reused, long.seconds + event.seconds
        )

    # -- interruption --------------------------------------------------------------------------------------------

    def _reconsider(self) -> None:
        """Something has changed: compute again when the running chunk must be interrupted."""
        long = self._current
        chunk = long.chunk if long is not None else None
        if long is None or chunk is None or chunk.limit is None or chunk.limit.expired():
            return
        when, loop = self._must_stop_at(long, chunk), asyncio.get_running_loop()
        chunk.limit.reschedule(None if when is None else max(when - self.now(), 0.0) + loop.time())

    def _must_stop_at(self, long: LongPrompt, chunk: Chunk) -> float | None:
        """Return the time at which the running ``chunk`` must be interrupted; None if never, or if it ends by itself
        as soon."""
        settings, now, n_done = _settings(long), self.now(), long.lease.n_done
        is_nearly_through = self.rates.prefill.seconds(n_done, chunk.end) <= self.rates.interruption.seconds
        if is_nearly_through or n_done < long.no_stop_before:
            return None
        # A chunk that ends by itself is interrupted only if it takes twice as long as it should.
        soonest = chunk.since + (2 * settings.chunk_s if chunk.is_cut else 0.0)
        by_right = chunk.since + settings.chunk_s if chunk.is_by_right else soonest
        if long.lease.is_preempted:
            return max(now, soonest)
        if self._users_ahead(long):
            return max(by_right, soonest)
        if self._next() is not long or self._is_trunk_ahead(long, chunk):
            return max(now, soonest)
        if (
            self.leases.is_exclusive_waiting(long.lease)
            and self.rates.prefill.seconds(n_done, long.last) > settings.max_yield_s
        ):
            return max(chunk.since + max(_SURELY_S - long.seconds, 0.0), soonest)
        if self._n_streams(long) and settings.decode_share > 0:
            return max(chunk.since + settings.chunk_s, soonest)
        return None

    @staticmethod
    def _is_trunk_ahead(long: LongPrompt, chunk: Chunk) -> bool:
        """True if other requests wait for a shared prefix that ends before ``chunk`` ends by itself. If the prefill
        has passed that end, the prefix can only be saved if the model can rewind to it."""
        if chunk.is_cut or long.target >= chunk.end:
            return False
        return long.lease.n_done < long.target or long.lease.table.rewind_model.is_rewindable

    # -- trunks --------------------------------------------------------------------------------------------------

    def _is_trunk_due(self, long: LongPrompt) -> bool:
        """True if the slot has a shared prefix that requests wait for. If the model cannot rewind to its end any more,
        ends the wait and returns False."""
        lease, table = long.lease, long.lease.table
        due = [at for at in table.expected_trunks(lease.slot_id) if at <= long.at]
        if due and not table.rewind_model.is_rewindable and due[-1] < long.at:
            table.end_expected_trunks(lease.slot_id, long.at)
            self.leases.dispatch()
            return False
        return bool(due)

    # -- journal -------------------------------------------------------------------------------------------------

    def _note(self, long: LongPrompt) -> None:
        n_computed = max(long.at - long.n_reused, 0) if long.has_begun else 0
        is_done = long.has_begun and long.at >= long.last
        self.metrics.prefilled(long.n_stopped, long.waited_s, long.paused_s)
        long.lease.recorder.record_step(
            long.lease.slot_key,
            Act(
                "prefill",
                long.seconds,
                is_done,
                n_computed,
                waited_s=long.waited_s,
                paused_s=long.paused_s,
                n_interruptions=long.n_stopped,
            ),
        )


def _settings(long: LongPrompt) -> PrefillSettings:
    return long.lease.table.settings.prefill
