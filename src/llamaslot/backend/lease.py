"""A lease: the right of one request to one slot, with its states as a table. A lease changes only by its own methods.
It tells its ``Owner`` when it changes and when it ends."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol, TypeVar

from msgspec.structs import replace

from llamaslot.backend.lease_states import (
    AT_WORK,
    COMPUTING,
    ENDED,
    NEVER_FIRST,
    NEXT,
    OWN_REQUEST,
    RUNNING,
    STOPPED,
    LeaseEvent,
    LeaseState,
    LongPrefill,
    Preempted,
    Preemption,
    Stopped,
)
from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, common
from llamaslot.cache.reuse import NO_REUSE, ReuseForecast
from llamaslot.errors import BackendRestarted, SlotWedged
from llamaslot.observe.journal import DecisionRecorder
from llamaslot.scheduling.placement import is_long
from llamaslot.scheduling.plan import Plan, PrefillStats, Step
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import IllegalTransition, Slot, SlotEvent, SlotKey, SlotState
from llamaslot.store import Snapshot, WithTokens
from llamaslot.store.snapshot_table import Pin

T = TypeVar("T")

_LITTLE_S = 2.0  # a request has priority for so long; for longer if a prefill counts as long only above that


class Owner(Protocol):
    """The interface of the object that grants leases. Its methods must not await, nor change the lease."""

    def on_change(self, lease: Lease) -> None:
        """The lease has changed: from now on long prefills must let its request go first, or need no longer do so."""

    def on_long(self, lease: Lease) -> None:
        """``lease.is_long`` has changed."""

    def on_look_again(self, lease: Lease) -> None:
        """The lease has changed so that waiting requests may now get a slot, or a better one: place them again soon."""

    def on_end(self, lease: Lease) -> None:
        """The lease has ended. Its slot is free (RELEASED), or llama-server may still work in it (ABANDONED)."""


class Lease:
    """The right of one request to one slot. ``release`` is idempotent and allowed in every state; leaving a ``with``
    block calls it.

    ``plan``: None for llamaslot's own work, and if llama-server chooses the slot. ``slot``: None until llama-server
    has chosen it. ``content``: what the slot holds; None if unknown. ``before``: what it held when the client's own
    request was sent. ``restored``: the snapshot that was restored into the slot. ``n_done``: the number of prompt
    tokens that the slot has. ``sent_at``: when the client's own request was sent. ``came_at``: since when the request
    waits. ``n_preempted``: how often it has lost a slot to another user. ``was_computing``: the lease was released
    while llama-server computed the prompt."""

    def __init__(
        self,
        owner: Owner,
        table: SlotTable,
        slot: Slot | None,
        request: Request,
        plan: Plan | None,
        *,
        now: Callable[[], float],
        recorder: DecisionRecorder,
        pin: Pin | None = None,
        came_at: float | None = None,
        n_preempted: int = 0,
    ) -> None:
        """``pin`` protects the plan's snapshot from eviction until the slot is released."""
        self._owner, self.now = owner, now
        self.table, self.slot, self.request, self.recorder = table, slot, request, recorder
        self.came_at = now() if came_at is None else came_at
        self.n_preempted, self.plan = n_preempted, plan
        is_unknown = slot is not None and slot.state is SlotState.SUSPECT
        self.content = None if is_unknown else slot.content if slot is not None else NOTHING
        self.before = self.content
        self.state = LeaseState.PREPARING
        self._is_confirmed = False  # llama-server has begun to work on the last thing sent to it
        self._is_left_at_work = False  # an action has ended, but llama-server may still compute for it
        self.is_long = plan is not None and is_long(plan, table.long_s)  # until its own prefill is over
        self._long_prefill = LongPrefill.WAITING if self.is_long else LongPrefill.NONE
        self._preemption = Preemption.FORBIDDEN
        self._stop: Callable[[], None] | None = None  # stops the present work on preemption
        self.can_keep, self.was_computing = True, False
        self.sent_at = self._acting_at = 0.0
        self.n_done = plan.n_reused if plan is not None else 0
        self.restored: Snapshot | None = None
        self.forecast = NO_REUSE
        self._pin = pin
        # The content that the plan saves first. Other requests can wait for its snapshot from now on.
        self._leaving = None
        if slot is not None:
            self._leaving = table.take(slot, request, now(), plan)

    def __repr__(self) -> str:
        return f"<Lease {self.slot!r} {self.state.value} {self.request!r}>"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, SlotWedged):
            self.content = None
        self.release()

    def _become(self, event: LeaseEvent) -> None:
        """Change the state as ``NEXT`` says for ``event``. Raises IllegalTransition if it has no such transition."""
        try:
            self.state = NEXT[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self!r} cannot {event.value}") from None

    # -- questions -----------------------------------------------------------------------------------------------

    @property
    def slot_id(self) -> int:
        return self.slot_key.id

    @property
    def slot_key(self) -> SlotKey:
        assert self.slot is not None, "it has no slot of its own"
        return self.slot.key

    @property
    def slot_name(self) -> str:
        """The name of the leased slot in log lines: ``<backend>/<number>``."""
        return str(self.slot_key)

    @property
    def is_released(self) -> bool:
        """True once ``release`` was called, even if the slot is not free yet."""
        return self.state in ENDED

    @property
    def is_at_work(self) -> bool:
        """True if llama-server may be working in the slot. It stops some time after the connection was closed."""
        return self.slot is not None and (self.state in AT_WORK or self._is_left_at_work)

    @property
    def is_confirmed(self) -> bool:
        """True if llama-server has begun with the last prefill or request sent to it for this lease."""
        return self._is_confirmed

    @property
    def is_running(self) -> bool:
        """True if llama-server has begun with the client's own request, the last step."""
        return self.state in RUNNING

    @property
    def is_decoding(self) -> bool:
        return self.state is LeaseState.DECODING

    @property
    def is_own(self) -> bool:
        """True if the lease is for llamaslot's own work (a save, a probe), not for a client's request."""
        return self.plan is None and self.slot is not None and not self.request.is_exclusive

    @property
    def is_in_line(self) -> bool:
        """True if the request has a long prefill that has not had its first turn yet."""
        return self._long_prefill is LongPrefill.WAITING and not self.is_released

    @property
    def can_stop(self) -> bool:
        """True if the request may lose its slot to another user's request now."""
        return self._preemption is not Preemption.FORBIDDEN

    @property
    def is_preempted(self) -> bool:
        """True if the request must give its slot to another user's request."""
        return self._preemption is Preemption.REQUESTED

    @property
    def is_latency_sensitive(self) -> bool:
        """True while long prefills must let this request go first, because its first token is expected soon.

        It is so from the lease to the first token, but not while the request waits for an exclusive section, nor from
        2 s after its last step began (later if only longer prefills are long). Of a request with a long prefill only
        its saves, erases and restores count, because each would wait for a batch of another prefill. llamaslot's own
        work never counts.
        """
        if self.state in NEVER_FIRST:
            return False
        is_sent = self.state in OWN_REQUEST
        is_acting = self.state is LeaseState.ACTING and self.plan is not None
        if is_acting or is_sent:
            since = self._acting_at if is_acting else self.sent_at
            if self.now() - since > max(2 * self.table.long_s, _LITTLE_S):
                return False
        if is_acting or self.is_long:
            return is_acting
        return is_sent if self.request.is_exclusive else self.plan is not None

    def check_current(self) -> None:
        """Raise BackendRestarted if the llama-server process is gone: the slot number is another slot's now."""
        if not self.table.is_current:
            raise BackendRestarted

    # -- what the slot holds -------------------------------------------------------------------------------------

    def set_content(self, content: Content | None) -> None:
        """Record what the slot holds; None for unknown content."""
        self.content = content

    def set_restored(self, snapshot: WithTokens, content: Content) -> None:
        """Record that ``snapshot`` was restored into the slot, as far as ``content`` has its tokens."""
        is_other = self.is_other_conversation(content.n_tokens, snapshot.n_tokens)
        self.restored = snapshot.cut(content.n_tokens)
        self.content = replace(content, snapshot=None) if is_other else content

    def clear_restored(self) -> None:
        """Let a failure of reuse no longer count against the restored snapshot."""
        self.restored = None

    def set_forecast(self, forecast: ReuseForecast) -> None:
        """Record the expected reuse, after the last save, erase or restore."""
        self.forecast = forecast

    def end_pending_save(self) -> None:
        """Record that the save at the beginning of the plan has ended, successful or not. Idempotent."""
        if self._leaving is not None:
            self.table.end_pending_save(self._leaving)

    def stop_keeping(self) -> None:
        """Save no more shared-prefix snapshots for this request, because one could not be saved."""
        self.can_keep = False

    def set_progress(self, n_done: int) -> None:
        """Record that the slot has the first ``n_done`` tokens of the prompt."""
        self.n_done = n_done

    def replace_steps(self, steps: tuple[Step, ...]) -> None:
        """Replace the steps of the plan, before the first of them has begun."""
        assert self.plan is not None, "it has a plan"
        self.plan = dataclasses.replace(self.plan, steps=steps)

    # -- slot actions and prefills -------------------------------------------------------------------------------

    def begin_action(self) -> None:
        """Record that a save, erase or restore begins. Raises BackendRestarted."""
        self.check_current()
        self._become(LeaseEvent.ACT)
        self._acting_at, self._is_left_at_work = self.now(), False
        self._owner.on_change(self)

    def end_action(self) -> None:
        """Record that the save, erase or restore has ended. If the lease was released meanwhile, release the slot."""
        if self.state is LeaseState.RELEASE_PENDING:
            self._give_back()
        else:
            self._become(LeaseEvent.ACTED)

    def lose_track(self) -> None:
        """During a slot action: record that the content is unknown, and that llama-server may work on after it."""
        self.content, self._is_left_at_work = None, True

    def plan_prefill(self, *, is_long: bool) -> None:
        """Record that saves, erases and restores are over. ``is_long``: a long prefill comes next."""
        if not is_long:
            self.end_prefill()
        elif self._long_prefill is LongPrefill.NONE:
            self._long_prefill, self.is_long = LongPrefill.WAITING, True
            self._owner.on_long(self)

    def take_prefill_turn(self) -> None:
        """Record that the long prefill has its turn. After its first turn another long prompt may get a slot."""
        self._leave_line(LongPrefill.RUNNING)

    def end_prefill(self) -> None:
        """Record that the prefill ahead of the client's request is over."""
        self._leave_line(LongPrefill.NONE)

    def _leave_line(self, after: LongPrefill) -> None:
        before, self._long_prefill = self._long_prefill, after
        self.is_long = after is not LongPrefill.NONE
        self._owner.on_long(self)
        if before is LongPrefill.WAITING:
            self._owner.on_look_again(self)

    def begin_prefill(self) -> None:
        """Record that a part of the prompt is being sent. Raises BackendRestarted."""
        self.check_current()
        self._become(LeaseEvent.PREFILL)
        self._cut_back()

    # -- the request itself --------------------------------------------------------------------------------------

    def begin_wait(self) -> None:
        """Record that the request waits until llama-server can choose only slots that the request may get."""
        self._become(LeaseEvent.WAIT)

    def end_wait(self) -> None:
        """Record that this wait is over. No effect if the lease was released meanwhile."""
        if not self.is_released:
            self._become(LeaseEvent.ADMIT)

    def begin_request(self) -> None:
        """Record that the client's own request is being sent. Raises BackendRestarted."""
        self.check_current()
        self.before = self.content
        self._become(LeaseEvent.SEND)
        self.sent_at = self.now()
        if self.slot is not None:
            self._cut_back()

    def _cut_back(self) -> None:
        """Reduce the content to what it shares with the prompt: only that is certain before llama-server has begun."""
        self._is_confirmed = False
        if (content := self.content) is None:
            return
        n = common(content.tokens, self.request.tokens) if self.request.may_use(content) else 0
        if n < content.n_tokens:
            is_other = self.is_other_conversation(n, content.n_tokens)
            self.content = content.cut_back(n, None if is_other else content.snapshot, self.request.namespace)
        else:
            self.content = self._in_its_space(content)

    def is_other_conversation(self, n_common: int, n_tokens: int) -> bool:
        """True if the request shares no more than its system part (``n_common``) with a content of ``n_tokens``."""
        return n_common <= self.request.n_system + NEGLIGIBLE_TOKENS < n_tokens

    def _in_its_space(self, content: Content) -> Content:
        namespace = self.request.namespace
        return content if content.namespace == namespace else replace(content, namespace=namespace)

    def land(self, *, is_confirmed: bool) -> None:
        """Record that llama-server has chosen this slot for the request (``is_confirmed``), or may have. Its content
        is unknown from now on."""
        if self.state is LeaseState.PREPARING:
            self._become(LeaseEvent.SEND)
            self.sent_at, self._is_confirmed = self.now(), False
        self.content = NOTHING
        if self.slot is not None:
            self.table.expect_unknown_content(self.slot, self.request.namespace)
        if is_confirmed:
            self.mark_processing()

    def mark_processing(self) -> None:
        """Record that llama-server has begun with the client's own request. No effect if known, or after the end."""
        if self.state is LeaseState.SENT:
            self._become(LeaseEvent.CONFIRM)
            self._is_confirmed = True
            if self.slot is not None:
                self.table.begin_answer(self.slot, self.now())

    def confirm(self, content: Content) -> None:
        """Record that llama-server has begun with what was sent, and that the slot holds at most ``content``."""
        self.content, self._is_confirmed = self._in_its_space(content), True
        self.mark_processing()

    def mark_decoding(self) -> None:
        """Record that the first token of the answer has come. Idempotent."""
        if self.state is not LeaseState.DECODING:
            self._become(LeaseEvent.TOKEN)
            self.forbid_preemption()
            self._owner.on_change(self)

    def finish(self, content: Content | None) -> None:
        """Record that llama-server has finished what was sent, and that the slot holds ``content`` (None: unknown)."""
        self._become(LeaseEvent.PREFILLED if self.state is LeaseState.PREFILLING else LeaseEvent.SETTLE)
        self.content, self._is_left_at_work = content, False

    # -- preemption ----------------------------------------------------------------------------------------------

    def allow_preemption(self) -> None:
        if self._preemption is Preemption.FORBIDDEN:
            self._preemption = Preemption.ALLOWED

    def forbid_preemption(self) -> None:
        """Do not let the request lose its slot any more. If it was about to, another request may be chosen for that."""
        was_preempted, self._preemption = self.is_preempted, Preemption.FORBIDDEN
        if was_preempted:
            self._owner.on_look_again(self)

    def preempt(self, *, is_wanted: bool) -> None:
        """Ask a request that can be stopped to give up its slot. ``is_wanted`` False withdraws that."""
        if self._preemption is not Preemption.FORBIDDEN:
            self._preemption = Preemption.REQUESTED if is_wanted else Preemption.ALLOWED
            if is_wanted and self._stop is not None:
                self._stop()

    async def unless_preempted(self, work: Coroutine[Any, Any, T]) -> T | Literal[Stopped.STOPPED]:
        """Return the result of ``work``. If the slot is wanted for another user, cancel ``work`` and return STOPPED.
        Canceling this cancels ``work``."""
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)
        self.allow_preemption()
        try:
            async with limit:
                self._stop = lambda: None if limit.expired() else limit.reschedule(loop.time())
                if self.is_preempted:
                    self._stop()
                return await work
        except TimeoutError:
            if not limit.expired():
                raise
            return STOPPED
        finally:
            self._stop = None

    def raise_if_preempted(self, prefill_stats: PrefillStats | None) -> None:
        """Raise Preempted if the slot is wanted for another user. llama-server must not be working in it."""
        if self.is_preempted:
            raise Preempted(prefill_stats, self.came_at, self.n_preempted + 1)

    # -- the end -------------------------------------------------------------------------------------------------

    def release(self) -> None:
        """Release the slot: at once, when the running slot action ends, or when llama-server has stopped working in
        it. Idempotent."""
        if self.is_released:
            return
        if self.state is LeaseState.ACTING:
            self._become(LeaseEvent.RELEASE)
        else:
            self._give_back()

    def _give_back(self) -> None:
        self.was_computing = self.state in COMPUTING
        self._become(LeaseEvent.LEAVE if self.is_at_work else LeaseEvent.GIVE_BACK)
        if self._pin is not None:
            self._pin.release()
        if self.slot is not None:
            self.end_pending_save()
            if self.state is LeaseState.ABANDONED:
                event, content = SlotEvent.LEAVE, self.content or NOTHING
            elif self.content is None:
                event, content = SlotEvent.FAIL, NOTHING
            else:
                event, content = SlotEvent.KEEP, self.content
            self.table.give_back(self.slot, event, content, self.now())
        self._owner.on_end(self)
