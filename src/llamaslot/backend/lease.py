"""A lease: the right of one job to send things to one slot, and what is known of the slot meanwhile.

``PlanAgain`` ends it where the job wants another place; ``Prefilling`` tells how far the job's prompt is.
"""

from __future__ import annotations

import asyncio
import enum
import math
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from llamaslot.cache.content import NOTHING, Content
from llamaslot.cache.ids import common
from llamaslot.cache.shared_prefix import NEAR_TOKENS
from llamaslot.errors import BackendRestarted, SlotWedged
from llamaslot.llama.sse import Earlier
from llamaslot.scheduling.placement import is_long
from llamaslot.scheduling.plan import Plan
from llamaslot.scheduling.request import Job
from llamaslot.scheduling.slots import Event, Slot, SlotKey, State

if TYPE_CHECKING:
    from llamaslot.backend.leases import Leases
    from llamaslot.backend.slot_table import Pool
    from llamaslot.scheduling.fairness import Charge
    from llamaslot.store import Snapshot


T = TypeVar("T")

# Until its first token, of a request that needs little; longer where prefills are only long later.
_LITTLE_S = 2.0


class PlanAgain(Exception):
    """The place of a job is not what it was taken for, or is needed for something else: ask for a place again.

    No LlamaslotError, for nobody is told: what the slot holds is known, and what was computed stays in it.
    ``earlier``: what was done for the job so far.
    """

    def __init__(self, earlier: Earlier | None) -> None:
        super().__init__("the job wants another place")
        self.earlier = earlier


class Preempted(PlanAgain):
    """Its slot is for a user that has fewer: the job goes back into the queue, where it stood at ``came_at``.

    ``n_times``: how often that has happened to it.
    """

    def __init__(self, earlier: Earlier | None, came_at: float, n_times: int) -> None:
        super().__init__(earlier)
        self.came_at, self.n_times = came_at, n_times


class SlotWanted(Exception):
    """What was done in a slot has been stopped, for another user."""


class Phase(enum.Enum):
    READY = "ready"  # the server does nothing in the slot
    ACTING = "acting"  # a save, erase or restore is carried out, whoever leaves
    WORKING = "working"  # a prefill or an answer: closing its connection ends it, some time later


class Lease:
    """Made by the scheduler only. ``release`` is synchronous and idempotent, and safe in every phase.

    ``content`` is what the slot holds as far as its holder knows at this moment; None when that is unknown.
    """

    def __init__(self, scheduler: Leases, pool: Pool, slot: Slot | None, job: Job, plan: Plan | None) -> None:
        """Raises KeyError, and takes nothing, when the plan's snapshot is gone."""
        self.scheduler, self.pool, self.slot, self.job, self.plan = scheduler, pool, slot, job, plan
        self.content: Content | None = slot.content if slot is not None else NOTHING
        if slot is not None and slot.state is State.SUSPECT:
            self.content = None
        self.before = self.content  # what it held when the job's own request was sent
        self.phase = Phase.READY
        self.is_begun = False  # the server has begun with what was sent last
        self.is_answering = False  # the job's own request has been sent
        self.is_started = False
        self.is_talking = False  # the first token of its answer has come
        self.is_released = False
        self.is_clearing = False  # it waits until llama-server would choose its slot
        # Whether a long prefill comes before its own request, to be computed in turn with those of others.
        self.is_long = plan is not None and is_long(plan, pool.long_s)
        self._has_left_line = False  # its first turn has come, or it needs none
        # Whoever computes its prompt looks at ``is_preempted``, and gives the slot up when that is set.
        self.can_stop = False
        self.is_preempted = False
        self.came_at, self.n_preempted = scheduler.now(), 0  # of its job; the scheduler knows better
        self.can_keep = True  # a trunk on the way; until one could not be saved
        self.charge: Charge | None = None  # to its user, for what the queue has given away
        self.sent_at = 0.0  # when the job's own request was
        self.acting_at = 0.0  # when its last action began
        self.is_left_at_work = False  # that has ended, but what it had the server compute perhaps has not
        # Tokens of its prompt that are there, while that is computed; as far as that is known.
        self.n_done = plan.n_reused if plan is not None else 0
        self.restored: Snapshot | None = None  # what its steps have read into the slot
        # Tokens of the prompt, set by Steps when the slot actions are through:
        self.n_usable = 0  # reusable by the kind of model
        self.n_whole: int | None = None  # reusable if the old answer comes back token for token
        self.n_answer = 0  # of these, the tokens of that answer
        self.n_expected = 0  # reusable as this server has behaved so far
        self.n_likely = 0  # the same with what is likely to come back of an answer
        self.is_going_back = False  # the slot holds more than n_expected, which is dropped
        self.note = scheduler.note(job)  # in the journal
        # Asked just before a save: whether somebody has come for whom the server should be free.
        self.must_give_way: Callable[[], bool] = lambda: False
        self.held = ExitStack()  # what else is given back with the slot: the pin of a snapshot
        self.leaving = None
        if plan is not None and plan.snapshot is not None:
            self.held.enter_context(scheduler.pin(plan.snapshot))  # first: it is what may fail
        if slot is not None:
            self.leaving = pool.take(slot, job, scheduler.now(), plan, has_answer=plan is not None)

    def __repr__(self) -> str:
        return f"<Lease {self.slot!r} {self.phase.value} {self.job!r}>"

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, SlotWedged):
            self.content = None
        self.release()

    @property
    def is_own(self) -> bool:
        """Whether it serves llamaslot itself (a save, a probe) and no client."""
        return self.plan is None and self.slot is not None and not self.job.is_exclusive

    @property
    def comes_first(self) -> bool:
        """Whether its first token is only a little work away: nobody's long prefill may stand in its way.

        One that waits until all others are at work does not hold them up by that, and one whose answer does not begin
        for a while is not that little. Of a long one only its slot actions: each would wait for a batch of another's.
        """
        if self.is_talking or self.is_released or self.is_clearing:
            return False
        is_sent = self.is_answering or self.is_started
        is_acting = self.phase is Phase.ACTING and self.plan is not None
        since = self.acting_at if is_acting else self.sent_at if is_sent else math.inf
        if self.scheduler.now() - since > max(2 * self.pool.long_s, _LITTLE_S):
            return False
        if is_acting or self.is_long:
            return is_acting
        return is_sent if self.job.is_exclusive else self.plan is not None

    @property
    def slot_id(self) -> int:
        return self.slot_key.id

    @property
    def slot_key(self) -> SlotKey:
        assert self.slot is not None, "a turn has no slot of its own"
        return self.slot.key

    @property
    def slot_name(self) -> str:
        """Of its slot, as log lines name it: ``<backend>/<number>``."""
        assert self.slot is not None, "a turn has no slot of its own"
        return self.slot.name

    # -- phases --------------------------------------------------------------------------------------------------

    def still_holds(self) -> None:
        """Raises BackendRestarted when the slot is one of a process that is gone: the number may be another's now."""
        if not self.pool.is_current:
            raise BackendRestarted

    def acting(self) -> None:
        """A save, erase or restore begins. Raises BackendRestarted."""
        self.still_holds()
        self.phase, self.acting_at, self.is_left_at_work = Phase.ACTING, self.scheduler.now(), False
        self.scheduler.bell.ring()

    def acted(self) -> None:
        """The save, erase or restore has ended. If the client has left meanwhile, the slot goes back now."""
        self.phase = Phase.WORKING if self.is_left_at_work else Phase.READY
        if self.is_released:
            self._give_back()

    def working(self) -> None:
        """A prefill or the job itself is being sent.

        Until the server confirms that it has begun, only what old and new tokens have in common is sure.
        Raises BackendRestarted.
        """
        self.still_holds()
        self.phase, self.is_begun = Phase.WORKING, False
        if self.content is not None:
            is_ours = self.job.may_use(self.content)
            n = common(self.content.tokens, self.job.tokens) if is_ours else 0
            if n < self.content.n_tokens:
                # What only begins alike is another conversation: its snapshot is none of this one.
                is_other = n <= self.job.n_system + NEAR_TOKENS < self.content.n_tokens
                snapshot = None if is_other else self.content.snapshot
                self.content = replace(self.content.head(n), is_dirty=True, snapshot=snapshot)
            self.content = replace(self.content, space=self.job.space)

    def sent(self) -> None:
        """The job's own request is being sent."""
        self.before = self.content
        self.working()
        self.is_answering, self.sent_at = True, self.scheduler.now()

    def begun(self, content: Content) -> None:
        """The server works: what the slot holds is at most ``content``."""
        self.content, self.is_begun = replace(content, space=self.job.space), True

    def started(self) -> None:
        """The job itself runs in the slot: it is no longer between two steps."""
        if not (self.is_answering or self.is_started):
            self.sent_at = self.scheduler.now()  # by llama-server's choice, in a turn
        self.is_started = True
        if self.slot is not None:
            self.pool.answering(self.slot, self.scheduler.now())

    def talks(self) -> None:
        """The first token of the answer has come. Idempotent."""
        if not self.is_talking:
            self.is_talking = True
            self.goes_on()
            self.scheduler.bell.ring()

    def goes_on(self) -> None:
        """It cannot be stopped any more: if it should have been, another one may be."""
        self.can_stop = False
        if self.is_preempted:
            self.is_preempted = False
            self.scheduler.dispatch()

    async def unless_preempted(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``. When the slot is wanted for another user cancels it, and raises SlotWanted."""
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)

        def look() -> None:
            if self.is_preempted and not limit.expired():
                limit.reschedule(loop.time())

        self.can_stop = True
        try:
            async with limit:
                with self.scheduler.bell.calling(look):
                    look()
                    return await work
        except TimeoutError:
            if not limit.expired():
                raise
            raise SlotWanted from None

    @property
    def is_in_line(self) -> bool:
        """Whether its long prefill waits for its first turn."""
        return self.is_long and not (self._has_left_line or self.is_released)

    def leaves_line(self) -> None:
        """It waits for its first turn no longer: another long one may have a slot to wait in. Idempotent."""
        if not self._has_left_line:
            self._has_left_line = True
            if self.scheduler.n_waiting:  # not at once: whoever calls this is about to send it
                asyncio.get_running_loop().call_soon(self.scheduler.dispatch)

    def yield_slot(self, earlier: Earlier | None) -> None:
        """Raises Preempted when the slot is wanted for another user. Nothing may be at work in it."""
        if self.is_preempted:
            raise Preempted(earlier, self.came_at, self.n_preempted + 1)

    def done(self, content: Content | None) -> None:
        """The server is through, and the slot holds ``content``."""
        self.phase, self.content = Phase.READY, content

    # -- the end -------------------------------------------------------------------------------------------------

    def release(self) -> None:
        if self.is_released:
            return
        self.is_released = True
        if self.phase is not Phase.ACTING:
            self._give_back()

    def _give_back(self) -> None:
        self.held.close()
        if self.slot is not None:
            if self.leaving is not None:
                self.pool.left(self.leaving)
            now = self.scheduler.now()
            if self.phase is Phase.WORKING:
                self.pool.give_back(self.slot, Event.LEAVE, self.content or NOTHING, now)
                self.scheduler.leases.pop(self, None)
                self.scheduler.on_drain(self)
            elif self.content is None:
                self.pool.give_back(self.slot, Event.FAIL, NOTHING, now)
            else:
                self.pool.give_back(self.slot, Event.KEEP, self.content, now)
        self.scheduler.released(self)


@dataclass(frozen=True, slots=True)
class Prefilling:
    """How far a prompt of ``n_tokens`` is: ``n_done`` tokens are there, of which ``n_reused`` were before, after
    ``seconds`` of computing."""

    n_done: int
    n_tokens: int
    n_reused: int
    seconds: float

    def __str__(self) -> str:
        return f"prefill {self.n_done} of {self.n_tokens}"


Report = Callable[[object], None]  # what happens now: a text, or what has one


def no_report(_: object) -> None:
    """Where nobody asks what happens."""
