"""Where a job should run: the place that costs least, for this user and for everybody after.

Pure: views of the backends go in, a plan comes out. Every cost is in seconds, and costs are only ever compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llamaslot.cache.namespaces import PUBLIC, SHARED, Space
from llamaslot.cache.prefix_index import Shared
from llamaslot.scheduling.plan import (
    Cost,
    Erase,
    Keep,
    Place,
    Plan,
    PrefillTo,
    Restore,
    Save,
    Source,
    Step,
    Wait,
)
from llamaslot.scheduling.prefill_policy import Sharing
from llamaslot.scheduling.request import Job, Placement, User
from llamaslot.scheduling.slots import SlotKey, State

PrefillSeconds = Callable[[int, int], float]
_FEW_TOKENS = 64  # a boundary so near to what is there already is not worth a step of its own
_TIE_S = 0.001  # costs closer than this are equal: then the slot used longest ago
# Of the time that a prompt takes to compute, what a request of its own may cost: a request that is alone pays that for
# nothing, and one that is not saves others, or its next turn, much more.
_PRICE = 0.05
# Whatever a request costs, nobody waits behind more than this of somebody else's prompt.
_LONG_AT_LAST_S = 1.0
_FORGET_S = 1800.0  # after half an hour unused a context is half as likely to be asked for again


@dataclass(frozen=True, slots=True)
class SlotView:
    """A slot as one job sees it.

    ``n_shared``: tokens in common; ``n_usable``: of those, what need not be computed; ``n_tokens``: what it holds (for
    a leased slot: what it will hold). ``is_other``: another conversation, which only begins as several do.
    ``is_foreign``: computed in a space that the job may not go on from, so the slot is emptied first. ``save_s``: what
    saving it costs, 0 when that is not worth it or not needed. ``regret_s``: what its loss costs the one who comes back
    for it. ``wait_s``: until it is idle.
    """

    key: SlotKey
    state: State
    n_tokens: int = 0
    n_shared: int = 0
    n_usable: int = 0
    save_s: float = 0.0
    is_worth_saving: bool = False
    regret_s: float = 0.0
    wait_s: float = 0.0
    used_at: float = 0.0
    is_other: bool = False
    is_foreign: bool = False


@dataclass(frozen=True, slots=True)
class SnapshotView:
    """A snapshot as one job sees it. ``wait_s``: until it is committed, for one that is just being written."""

    id: str
    n_usable: int
    restore_s: float
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class BackendView:
    """One backend as one job sees it: its slots, the snapshots that it can restore, and what work costs there.
    ``reserved``: slots that jobs before this one wait for, and for how many seconds those will have them.

    ``trunks``: token counts of the job's prompt at which a trunk is worth making; ``is_rewindable``: the model can go
    back to any token. ``can_erase``: slot actions work. Without them what must not be shared rests on ``cache_prompt``
    false alone. ``request_s``: what one request more costs, beside what it computes. ``shared``: for each slot that has
    any tokens in common with the prompt, how many; also for those that are left out of ``slots``.
    """

    slots: tuple[SlotView, ...]
    snapshots: tuple[SnapshotView, ...] = ()
    prefill_s: PrefillSeconds = field(default=lambda start, end: (end - start) / 1000)
    reserved: Mapping[SlotKey, float] = field(default_factory=dict)
    can_erase: bool = True
    trunks: tuple[int, ...] = ()
    is_rewindable: bool = True
    request_s: float = 0.0
    shared: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rules:
    """The settings that placement obeys; see ``routing``, ``prefill`` and ``cache`` in the configuration.

    ``own_above_s``: None to decide by costs what is computed ahead of a request.
    """

    similarity_min: float = 0.85
    small_prompt_tokens: int = 1024
    own_above_s: float | None = None
    sharing: Sharing = field(default_factory=Sharing)
    is_isolated: bool = False  # nobody goes on from what somebody else has computed

    def space(self, user: User, lora: str = "") -> Space:
        """Where a request of ``user`` computes. ``lora``: the scales that it sets."""
        return Space(user.id if self.is_isolated else "", lora)

    def long_s(self, request_s: float) -> float:
        """What takes longer to compute is worth a request of its own, which costs ``request_s``: then it can be shared
        while it is computed, interrupted, and held back for others."""
        return _worth_s(request_s) if self.own_above_s is None else self.own_above_s

    @property
    def public(self) -> Space:
        """Where the operator computes what all may go on from."""
        return PUBLIC if self.is_isolated else SHARED


class _Choice(NamedTuple):
    """A tuple, made in a quarter of the time: each placement makes dozens."""

    view: BackendView
    slot: SlotView
    source: Source
    n_reused: int
    cost_s: float
    wait_s: float
    is_loss: bool  # what the slot holds is lost to its owner, or must be restored for him
    is_match: bool = False  # the slot is gone on from: nothing is lost
    snapshot: SnapshotView | None = None


def place(job: Job, views: Iterable[BackendView], rules: Rules) -> Plan | Wait:
    """The cheapest place for ``job`` among all slots of all backends, or what to wait for. Each backend's own rates
    count.

    An idle slot is taken at once, unless waiting (for a busy slot that holds most of the prompt, behind those who wait
    for it already, or for a snapshot that is just being written) and then computing the rest is cheaper. Of the idle
    slots a small prompt takes one whose loss costs nobody a large context, if there is any.
    """
    choices = [choice for view in views for choice in _choices(job, view, rules)]
    if not choices:
        return Wait()
    best = min(choices, key=_sort_key)
    key: Callable[[_Choice], tuple[float, ...]] = _sort_key
    if job.n_tokens < rules.small_prompt_tokens and best.wait_s == 0:
        # Only among places that can be had at once: what waiting for another one costs is in the sum above.
        choices = [choice for choice in choices if choice.wait_s == 0]
        key = _no_loss_first
        best = min(choices, key=key)
    chosen = _place(best, job)
    if best.wait_s > 0:
        is_busy = best.slot.state not in _TAKEABLE or best.slot.key in best.view.reserved
        instead = min((other for other in choices if other.wait_s == 0), key=key, default=None)
        return Wait(
            best.slot.key if is_busy else None,
            best.wait_s,
            chosen,
            _place(instead, job) if instead else None,
        )
    others = [other for other in choices if other.slot is not best.slot]
    others = others or [other for other in choices if other.source is not best.source]
    second = min(others, key=key, default=None)
    return Plan(
        slot=best.slot.key,
        steps=tuple(_steps(job, best, rules)),
        source=best.source,
        n_reused=best.n_reused,
        cost=chosen.cost,
        snapshot=chosen.snapshot,
        next_best=_place(second, job) if second else None,
    )


def _place(choice: _Choice, job: Job) -> Place:
    """The terms that ``choice.cost_s`` is the sum of. Not kept with each choice: a burst of jobs makes thousands."""
    slot, snapshot = choice.slot, choice.snapshot
    cost = Cost(
        wait_s=choice.wait_s,
        save_s=0.0 if choice.is_match else slot.save_s,
        regret_s=0.0 if choice.is_match else slot.regret_s,
        restore_s=snapshot.restore_s if snapshot else 0.0,
        prefill_s=choice.view.prefill_s(choice.n_reused, job.n_tokens),
    )
    return Place(slot.key, choice.source, choice.n_reused, cost, snapshot.id if snapshot else None)


def is_similar(slot: SlotView, rules: Rules) -> bool:
    """Whether so much of what the slot holds survives that taking it is no loss: never of another conversation, however
    long the system prompt is that both begin with."""
    return not slot.is_other and slot.n_tokens > 0 and slot.n_shared >= rules.similarity_min * slot.n_tokens


def is_other(slot: SlotView | Shared[int], n_alike: int) -> bool:
    """Whether it is another conversation, of which several begin with the same ``n_alike`` tokens."""
    only_begins_alike = slot.n_shared <= n_alike + _FEW_TOKENS
    return n_alike > 0 and only_begins_alike and slot.n_tokens > slot.n_shared + _FEW_TOKENS


class Stranger(NamedTuple):
    """An idle slot that a job would not go on from for what it holds. ``loss_s``: what taking it costs others;
    ``n_shared``: how much of it is of use to the job all the same; ``is_loss``: it is a large context, for somebody."""

    slot: int
    loss_s: float
    used_at: float
    n_shared: int
    is_loss: bool


def worth_a_look(strangers: Collection[Stranger]) -> set[int]:
    """The slots of ``strangers`` that ``place`` may choose: another one costs no less and shares no more than two of
    them. Among 256 slots these are three or four as a rule, and looking at each one closely takes 20 us.

    For the model that can go back to any token: what is shared can be used.
    """
    found = set[int]()
    for is_loss in (False, True):
        best = second = -1  # tokens shared by those that cost less
        alike = (stranger for stranger in strangers if stranger.is_loss is is_loss)
        for stranger in sorted(alike, key=_cheapest_first):
            if stranger.n_shared > second:
                found.add(stranger.slot)
                best, second = max(best, stranger.n_shared), min(best, stranger.n_shared)
    return found


def _cheapest_first(stranger: Stranger) -> tuple[int, float]:
    return round(stranger.loss_s / _TIE_S), stranger.used_at


def is_long(plan: Plan, long_s: float) -> bool:
    """Whether computing what is ahead of the job's own request takes so long that others get their turn meanwhile."""
    return plan.cost.prefill_s > long_s and any(isinstance(step, PrefillTo) for step in plan.steps)


def weight(idle_s: float) -> float:
    """How likely a context is asked for again, from 1 downwards, by how long nobody has used it."""
    return _FORGET_S / (_FORGET_S + max(idle_s, 0.0))


_TAKEABLE = (State.FREE, State.HOT, State.SUSPECT)


def _choices(job: Job, view: BackendView, rules: Rules) -> Iterator[_Choice]:
    n = job.n_tokens
    for slot in view.slots:
        is_takeable = slot.state in _TAKEABLE and slot.key not in view.reserved
        is_match = is_similar(slot, rules) and slot.n_usable > 0 and not job.is_cold
        if not is_takeable:
            if is_match:
                rest_s = view.prefill_s(slot.n_usable, n)
                # Whoever gets it first is asked to keep what both begin with, as soon as it computes that.
                is_shared = rest_s > rules.long_s(view.request_s)
                behind_s = 0.0 if is_shared else view.reserved.get(slot.key, 0.0)
                wait = max(slot.wait_s + behind_s, _TIE_S)
                cost = wait + rest_s
                yield _Choice(
                    view, slot, Source.RESIDENT, slot.n_usable, cost, wait, is_loss=False, is_match=True
                )
            continue
        if is_match:
            rest_s = view.prefill_s(slot.n_usable, n)
            yield _Choice(
                view, slot, Source.RESIDENT, slot.n_usable, rest_s, 0.0, is_loss=False, is_match=True
            )
        loss_s = slot.save_s + slot.regret_s
        is_loss = slot.regret_s > 0 and slot.n_tokens >= rules.small_prompt_tokens
        kept = 0 if job.is_cold or slot.is_foreign or slot.state is State.SUSPECT else slot.n_usable
        source = Source.RESIDENT if kept else Source.COLD
        yield _Choice(view, slot, source, kept, loss_s + view.prefill_s(kept, n), 0.0, is_loss)
        if job.is_cold:
            continue
        for snapshot in view.snapshots:
            cost = loss_s + snapshot.wait_s + snapshot.restore_s + view.prefill_s(snapshot.n_usable, n)
            yield _Choice(
                view,
                slot,
                Source.SNAPSHOT,
                snapshot.n_usable,
                cost,
                snapshot.wait_s,
                is_loss,
                snapshot=snapshot,
            )


def _sort_key(choice: _Choice) -> tuple[int, float]:
    """The cheapest comes first; then the slot used longest ago."""
    return round(choice.cost_s / _TIE_S), choice.slot.used_at


def _no_loss_first(choice: _Choice) -> tuple[bool, int, float]:
    """Whatever costs nobody a large context comes before all that does."""
    return choice.is_loss, *_sort_key(choice)


def _steps(job: Job, choice: _Choice, rules: Rules) -> Iterator[Step]:
    slot, view = choice.slot, choice.view
    is_kept = choice.source is Source.RESIDENT and is_similar(slot, rules)
    if slot.is_worth_saving and not is_kept:
        yield Save(slot.key)
    if choice.snapshot is not None:
        yield Erase(slot.key)
        yield Restore(slot.key, choice.snapshot.id)
    elif view.can_erase and (slot.state is State.SUSPECT or job.is_cold or slot.is_foreign):
        yield Erase(slot.key)
    if view.can_erase or not (job.is_cold or slot.is_foreign):
        yield from prefill_steps(job, slot.key, choice.n_reused, view, rules)


def prefill_steps(
    job: Job, slot: SlotKey, n_reused: int, view: BackendView, rules: Rules
) -> Iterator[PrefillTo | Keep]:
    """What is computed ahead of the job's own request, and what of it is kept as a trunk on the way.

    A trunk is made by the job that computes the tokens around its end, so that none is computed for it alone: one that
    has more of the prompt already passes it by. Where the model can go back to any token a few more do not matter: the
    trunk then ends with them.
    """
    slack = _FEW_TOKENS if view.is_rewindable else 0
    last = job.n_tokens - 1
    keeps = {max(at, n_reused) for at in view.trunks if n_reused - slack <= at < last and not job.is_cold}
    for stop in sorted({*prefill_stops(job, n_reused, view, rules), *keeps}):
        yield PrefillTo(slot, stop)
        if stop in keeps:
            yield Keep(slot, stop)


def prefill_stops(job: Job, n_reused: int, view: BackendView, rules: Rules) -> list[int]:
    """Where to stop on the way: the job's boundaries, then the last token but one. Empty for a short prefill.

    Each stop is a request more. So a boundary is one if computing again what lies between it and the stop before, which
    a next prompt that parts there would have to, takes much longer than that; and the end is none if what is left is
    short. The last token is left to the client's own request, which always computes one; stopping at n instead costs a
    recurrent model its last checkpoint. A job that is steered needs a slot that shares all but that one.
    """
    last, long_s = job.n_tokens - 1, rules.long_s(view.request_s)
    if last <= 0 or not (job.placement is Placement.STEERED or view.prefill_s(n_reused, last) > long_s):
        return []
    stops, begin, worth_s = list[int](), n_reused, _worth_s(view.request_s)
    for at in job.boundaries:
        if begin + _FEW_TOKENS <= at < last and view.prefill_s(begin, at) > worth_s:
            stops.append(at)
            begin = at
    is_end = job.placement is Placement.STEERED or not stops or view.prefill_s(begin, last) > long_s
    return [*stops, last] if is_end else stops


def _worth_s(request_s: float) -> float:
    """What has to be at stake, in seconds, for a request that costs ``request_s``."""
    return min(request_s / _PRICE, _LONG_AT_LAST_S)
