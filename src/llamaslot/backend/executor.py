"""Performs the steps of a plan in a leased slot. If a step fails, the request goes on without it, or is placed again.
A failed step never fails the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple, TypeVar, assert_never

from msgspec.structs import replace

from llamaslot.backend.feedback import Feedback, ReportedCounts
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import RetryPlacement
from llamaslot.backend.long_prompt import Report
from llamaslot.backend.prefill import ChunkedPrefill
from llamaslot.backend.save import Saving, never
from llamaslot.backend.slot_content import is_untouched, prefilled, wait_until_idle
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import common, head
from llamaslot.cache.reuse import ReuseForecast, goes_on_behind
from llamaslot.errors import BackendDown, BackendRestarted, LlamaslotError, SnapshotInvalid, UpstreamError
from llamaslot.formats.comments import Comment
from llamaslot.llama.answers import SlotAction
from llamaslot.observe.journal import Act
from llamaslot.observe.recurring_faults import Recurring
from llamaslot.scheduling.placement import prefill_stops
from llamaslot.scheduling.plan import Erase, Plan, PrefillStats, PrefillTo, Restore, Save, Source
from llamaslot.store import Catalog, WithTokens
from llamaslot.store.landing import NoLanding
from llamaslot.store.model_snapshots import content_of
from llamaslot.store.restore_file import Given, is_passing
from llamaslot.tasks import outcome

log = logging.getLogger(__name__)
_NOT_RESTORED = "%s: snapshot %s could not be restored, the request goes on without it: %s"
_SET_ASIDE_S = 10.0  # no request gets a snapshot for so long that could not be restored for a passing reason
T = TypeVar("T")


class _Answer(NamedTuple):
    """llama-server's answer to a restore. ``seconds``: from the request to the answer. ``waited_s``: the wait for
    other saves and restores before that. ``prepared_s``: reading and copying the file, before that wait.
    """

    result: SlotAction
    seconds: float
    waited_s: float
    prepared_s: float


class PlanExecutor:
    """Performs the steps of plans on one backend. ``saving`` saves the slots of this backend."""

    def __init__(self, saving: Saving) -> None:
        self.saving = saving
        self.api, self.catalog, self.rates = saving.api, saving.catalog, saving.rates
        self.metrics, self.tasks, self.now = saving.metrics, saving.tasks, saving.now
        self._leases = saving.leases
        self.feedback = Feedback(self.catalog, self.rates, self.metrics, self.tasks, self.now)
        self.chunked_prefill = ChunkedPrefill(self.api, self.rates, self.metrics, self._leases, self.feedback)
        self._failures = Recurring(log, f"{self._leases.backend}: snapshots are restored again", now=self.now)

    async def prepare(
        self, lease: Lease, report: Report, *, may_replan: bool = False, can_stop: bool = False
    ) -> PrefillStats | None:
        """Perform the steps of the plan of ``lease``. Returns the tokens that its prefill has reused and computed;
        None without a prefill.

        Raises BackendDown and BackendRestarted. Raises RetryPlacement if an exclusive request (one for which
        llama-server chooses the slot) needs the place of a long prefill. With ``may_replan`` also raises it if the
        slot holds much less than expected, or a restore has failed; then the request can be placed where it reuses
        more. With ``can_stop`` raises Preempted between two steps if the slot is wanted for another user. Canceling is
        safe: a running save, erase or restore is carried out, and then the slot is given back; a prefill is closed,
        and its slot is abandoned.
        """
        assert lease.plan is not None
        if can_stop and not lease.request.is_exclusive:
            lease.allow_preemption()
        prefill_stats = await self._prepare(lease, lease.plan, report, may_replan)
        lease.raise_if_preempted(prefill_stats)
        lease.forbid_preemption()
        # If a shared prefix was not saved, requests that wait for it are placed again now. After an exception they are
        # placed again when the slot is released, because they may resume from what it holds by then.
        if lease.table.end_expected_trunks(lease.slot_id):
            self._leases.dispatch()
        return prefill_stats

    async def _prepare(
        self, lease: Lease, plan: Plan, report: Report, may_replan: bool
    ) -> PrefillStats | None:
        stops = await self._perform(lease, plan, report, may_replan)
        if self.catalog is not None:
            _record_hit(self.catalog, lease)
        if lease.content is not None and not lease.request.may_use(lease.content):
            lease.set_content(None)  # llama-server cannot erase it
        if lease.content is None or (lease.request.no_cache and lease.content != NOTHING):
            lease.plan_prefill(is_long=False)
            return None  # the slot's content must not be used: the request's own request computes everything
        lease.set_forecast(self._forecast(lease, lease.content))
        n_reused = lease.forecast.n_likely
        if n_reused != plan.n_reused:
            view = lease.table.view(lease.request, self.now(), {})
            stops = prefill_stops(lease.request, n_reused, view, lease.table.settings)
        if not stops:
            lease.plan_prefill(is_long=False)
            return None
        prefill_s = self.rates.prefill.seconds(n_reused, stops[-1])
        lease.plan_prefill(is_long=prefill_s > lease.table.long_s)
        return await self.chunked_prefill.run(lease, stops, report, self._keep, may_replan=may_replan)

    async def _perform(self, lease: Lease, plan: Plan, report: Report, may_replan: bool) -> list[int]:
        """Carry out the saves, erases and restores of the plan. Returns the token counts at which its prefill stops."""
        stops = list[int]()
        restored = {step.slot for step in plan.steps if isinstance(step, Restore)}
        for step in plan.steps:
            match step:
                case PrefillTo():
                    stops.append(step.n_tokens)
                case Save() | Erase() | Restore():
                    lease.raise_if_preempted(None)
                    report(_comment(step, is_restored=step.slot in restored))
                    if isinstance(step, Erase) and restored:
                        await self._carry_out(lease, partial(self._take_scales, lease))
                    if not await self._carry_out(lease, partial(self._act, lease, step)):
                        self.metrics.steps_failed.labels(type(step).__name__.lower()).inc()
                        if may_replan and isinstance(step, Restore) and lease.content == NOTHING:
                            raise RetryPlacement(None)  # plans no longer offer that snapshot
                case _:
                    assert_never(step)
        return stops

    @staticmethod
    def _forecast(lease: Lease, content: Content) -> ReuseForecast:
        """Return the expected reuse of ``content``, which the slot holds after save, erase and restore. It equals the
        plan's number unless one of these steps has failed.
        """
        request, rewind_model = lease.request, lease.table.rewind_model
        n_shared = common(content.tokens, request.tokens)
        is_behind = goes_on_behind(content, n_shared, request.n_tokens)
        if lease.restored is not None:
            n_held = content.n_tokens if content.is_exact else None
            n_expected = rewind_model.usable(n_shared, n_held, content.checkpoints, request.n_tokens)
            n_likely = n_expected
        else:
            n_expected = rewind_model.of_slot(content, n_shared, request.n_tokens)
            n_likely = rewind_model.likely_of_slot(content, n_shared, request.n_tokens)
        return ReuseForecast(
            n_expected,
            n_likely,
            n_whole=content.n_held if is_behind else None,
            n_answer=content.n_more if is_behind else 0,
            is_rewind=n_expected < content.n_tokens,
        )

    async def _keep(self, lease: Lease, n_tokens: int) -> None:
        if not await self._carry_out(lease, partial(self.saving.keep, lease, n_tokens)):
            self.metrics.steps_failed.labels("keep").inc()

    async def _carry_out(self, lease: Lease, action: Callable[[], Awaitable[T]]) -> T:
        """Run a slot action to its end, even if the client leaves meanwhile. Raises what the action raises."""
        lease.begin_action()
        acting = outcome(action, LlamaslotError)  # as a result: the client may have left
        task = self.tasks.spawn(acting, f"{lease.request.id} acts on slot {lease.slot_id}")
        task.add_done_callback(lambda _: lease.end_action())
        result = await asyncio.shield(task)
        if isinstance(result, LlamaslotError):
            raise result
        return result

    async def _act(self, lease: Lease, step: Save | Erase | Restore) -> bool:
        """Perform one slot action of the plan. Returns True if it succeeded. Expected failures are logged; BackendDown
        and BackendRestarted are raised.
        """
        match step:
            case Save():
                return await self.saving.save(lease) is not None
            case Erase():
                return await self.erase(lease)
            case Restore():
                return await self._restore(lease, step.snapshot)
            case _:
                assert_never(step)

    # -- save ----------------------------------------------------------------------------------------------------

    async def save_now(
        self, lease: Lease, must_give_way: Callable[[], bool] = never
    ) -> asyncio.Task[WithTokens | None] | None:
        """Save a slot that was leased only to be saved. Returns and raises as ``Saving.save`` does. Canceling is safe:
        the save is completed.
        """
        return await self._carry_out(lease, partial(self.saving.save, lease, must_give_way))

    # -- erase and restore ---------------------------------------------------------------------------------------

    async def erase(self, lease: Lease) -> bool:
        try:
            lease.check_current()
            await self.api.erase(lease.slot_id)
        except LlamaslotError as error:
            log.warning(
                "%s: slot %s could not be erased, so its content counts as unknown: %s",
                lease.request.id, lease.slot_name, error,
            )  # fmt: skip
            lease.set_content(None)
            return False
        lease.set_content(NOTHING)
        return True

    async def _take_scales(self, lease: Lease) -> None:
        """Give the slot the LoRA scales of the request, before it is erased and restored. llama-server empties a slot
        at a request that sets other scales than those of the request before, and a file holds no scales: of 1,500
        restored tokens all were computed again. A request that sets none empties no slot, so it does not matter that a
        slot of unknown content counts as one without scales. Raises LlamaslotError, unless llama-server refuses.
        """
        scales, content = lease.request.namespace.lora, lease.content
        if scales == (content.namespace.lora if content is not None else ""):
            return
        lease.set_content(None)
        lease.check_current()
        first = self.api.prefill(lease.slot_id, head(lease.request.tokens, 1), scales)
        with contextlib.suppress(UpstreamError):  # the request's own error tells more
            async with contextlib.aclosing(first) as events:
                async for _ in events:
                    pass

    async def erase_now(self, lease: Lease) -> bool:
        """Erase a slot that was leased only to be erased. Returns True if that succeeded. Canceling is safe: the erase
        is completed.
        """
        return await self._carry_out(lease, partial(self.erase, lease))

    async def _restore(self, lease: Lease, snapshot_id: str) -> bool:
        """Restore a snapshot into the slot, which the previous step has erased. Returns False if it failed, or
        restored only a part; the lease knows the content of the slot in each case. Raises BackendDown and
        BackendRestarted.
        """
        assert self.catalog is not None
        if lease.content != NOTHING:
            return False  # the erase failed: never restore into a slot that is not empty
        try:
            snapshot, given, answer = await self._give(lease, snapshot_id)
        except (BackendDown, BackendRestarted):
            lease.set_content(None)
            raise
        except (LlamaslotError, KeyError, OSError) as error:  # KeyError: it has just been evicted
            self._not_restored(lease, snapshot_id, error)
            return False
        lease.set_content(None)  # unknown until it is certain that this process has restored the snapshot
        if (await self.api.props()).boot_id != lease.table.boot_id:
            raise BackendRestarted
        self._learn(given, answer)
        n_tokens = answer.result.n_tokens
        is_whole = n_tokens == given.n_tokens
        act = Act(
            "restore", answer.seconds, is_done=is_whole, n_tokens=n_tokens, size_bytes=given.size_bytes,
            snapshot=snapshot.id, waited_s=answer.waited_s,
        )  # fmt: skip
        lease.recorder.record_step(lease.slot_key, act)
        if not is_whole:
            log.warning(
                "%s: snapshot %s was restored in part (%d of %d tokens), the request goes on without it",
                lease.request.id, snapshot_id, n_tokens, given.n_tokens,
            )  # fmt: skip
            return False
        restored = snapshot.cut(given.n_tokens)
        checkpoints = lease.table.rewind_model.in_file(restored.checkpoints)
        lease.set_restored(snapshot, replace(content_of(restored), checkpoints=checkpoints))
        self.catalog.touch(snapshot.id)
        self._failures.succeeded()
        return True

    async def _give(self, lease: Lease, snapshot_id: str) -> tuple[WithTokens, Given, _Answer]:
        """Have llama-server restore those tokens of a snapshot that the request needs. Raises LlamaslotError, KeyError
        if the snapshot was evicted, and OSError.
        """
        assert self.catalog is not None
        began = self.now()
        snapshot = await self.catalog.verify(snapshot_id)
        n_needed, spare = _n_needed(snapshot, lease), self._leases.snapshots_in_demand()
        async with self.catalog.given_out(snapshot, n_needed, spare) as given:
            asked_at = self.now()
            async with self.saving.in_turn(lease, self.rates.restore.seconds(given.size_bytes)):
                started = self.now()
                lease.check_current()  # reading and copying has taken a while
                result = await self.api.restore(lease.slot_id, given.name)
                seconds = self.now() - started
        return snapshot, given, _Answer(result, seconds, started - asked_at, asked_at - began)

    def _learn(self, given: Given, answer: _Answer) -> None:
        result = answer.result
        self.rates.restore.observe(given.size_bytes, (result.seconds or answer.seconds) + answer.prepared_s)
        if result.seconds:  # a save would have waited as long; without any its delay would stay what it was
            self.rates.save_delay.observe(max(answer.seconds - result.seconds, 0.0))
        self.metrics.restored(given.size_bytes, answer.seconds)

    def _not_restored(self, lease: Lease, snapshot_id: str, error: Exception) -> None:
        """Offer the snapshot to no request after a failed restore: for ``_SET_ASIDE_S`` if the reason may pass, else
        never again.
        """
        if is_passing(error):
            if not isinstance(error, NoLanding):  # the landing place has logged why
                self._failures.failed(error, _NOT_RESTORED, lease.request.id, snapshot_id, error)
            lease.table.model_snapshots.set_aside[snapshot_id] = self.now() + _SET_ASIDE_S
        else:
            log.warning(_NOT_RESTORED, lease.request.id, snapshot_id, error)
            lease.table.drop_snapshot(snapshot_id)  # the file stays
        lease.recorder.record_step(lease.slot_key, Act("restore", 0.0, is_done=False, snapshot=snapshot_id))

    async def refused(self, lease: Lease, status: int) -> None:
        """Record that llama-server has refused the client's own request, so that the slot holds the same as before.

        After a 4xx this is certain. A 500 may be a refusal too (llama-server uses it for some faults of clients), or a
        failure in the slot. Then llama-server is asked how many tokens the slot has. If the number has changed, the
        content is unknown.
        """
        is_sure = status < 500 or await is_untouched(self.api, lease, lease.before)
        lease.finish(lease.before if is_sure else None)

    async def stopped(self, lease: Lease, n_found: int, *, is_misplaced: bool = True) -> None:
        """Record what the slot holds after the client's own request was cancelled before its first token. llama-server
        had found ``n_found`` of its tokens in the slot. This waits until llama-server is idle there. ``is_misplaced``:
        the request was cancelled because ``n_found`` was much less than expected.
        """
        content = prefilled(
            lease.content or Content(namespace=lease.request.namespace), lease.request.tokens, n_found
        )
        lease.finish(await wait_until_idle(self.api, lease, content))
        if is_misplaced:
            self.feedback.misplaced(lease, n_found)

    def settle(
        self, lease: Lease, reported: ReportedCounts, prefill_stats: PrefillStats | None, left: bytes
    ) -> None:
        """The request was answered: learn from its figures, and record what the slot holds now.

        ``prefill_stats``: what llamaslot computed ahead of the request in this slot. ``left``: the tokens of the
        prompt that ran last; empty if unknown.
        """
        before = lease.content or Content(namespace=lease.request.namespace)
        self.feedback.answered(lease, reported, prefill_stats)
        after = prefilled(before, left, reported.n_found or 0) if left else None
        n_more = max(reported.n_predicted - 1, 0)  # the last token is sampled and sent, but never computed
        lease.finish(after.followed_by(n_more) if after is not None else None)


def _n_needed(snapshot: WithTokens, lease: Lease) -> int:
    """Return how many of the snapshot's tokens must be restored for the request of ``lease``: those that it shares
    with the prompt.

    For a model that cannot rewind these are the tokens up to the snapshot's last state within the common prefix, or
    all tokens if the snapshot is one whole file. Raises SnapshotInvalid if there are none.
    """
    n_shared = common(snapshot.tokens, lease.request.tokens)
    states = [part.end for part in snapshot.parts if part.is_state]
    if states:
        limit = min(n_shared, lease.request.n_tokens - 1)
        n_shared = max((at for at in states if at <= limit), default=0)
    elif not lease.table.rewind_model.is_rewindable:
        n_shared = snapshot.n_tokens
    if not n_shared:
        raise SnapshotInvalid(f"{snapshot.id}: has nothing that the prompt can resume from")
    return n_shared


def _record_hit(catalog: Catalog, lease: Lease) -> None:
    """Record a hit of a snapshot if the request resumes from a slot that holds the snapshot's content, although
    nothing is restored. A restore records its own hit when it has succeeded.
    """
    plan, content, request = lease.plan, lease.content, lease.request
    if plan is None or content is None or content.snapshot is None or request.no_cache:
        return
    snapshot = lease.table.model_snapshots.snapshots.get(content.snapshot)
    if plan.source is not Source.RESIDENT or snapshot is None:
        return
    if plan.n_reused >= lease.table.settings.similarity_min * snapshot.n_tokens:
        catalog.touch(snapshot.id)


def _comment(step: Save | Erase | Restore, *, is_restored: bool) -> Comment:
    """Return the comment that tells the client of a step. ``is_restored``: the plan restores a snapshot into the slot
    of this step, so that an erase is only the first part of the restore.
    """
    if isinstance(step, Save):
        return Comment.SAVING
    return Comment.RESTORING if is_restored else Comment.CLEARING
