"""Where a request runs: the place with the smallest cost, for this user and for later requests of all users.

Pure: views of the backends go in, a plan comes out. Every cost is in seconds, and costs are only compared.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from msgspec import Struct, field

from llamaslot.cache.ids import NEGLIGIBLE_TOKENS
from llamaslot.cache.namespaces import PUBLIC, SHARED, Namespace
from llamaslot.cache.prefix_index import Shared
from llamaslot.scheduling.plan import (
    Cost,
    Erase,
    Place,
    Plan,
    PrefillTo,
    Restore,
    Save,
    Source,
    Step,
    Wait,
)
from llamaslot.scheduling.prefill_policy import PrefillSharing
from llamaslot.scheduling.request import Placement, Request, User
from llamaslot.scheduling.slots import SlotKey, SlotState

PrefillSeconds = Callable[[int, int], float]
SIMILARITY_MIN, SMALL_PROMPT_TOKENS = 0.85, 1024  # the defaults of ``routing``
TIE_S = 0.001  # smaller differences of cost are ties; then the least recently used slot is taken
# The cost of an extra request, as a share of the prefill time, must be below this. An extra request is a loss if the
# server is otherwise idle. It saves other requests, or the next turn, much more if it is not.
_PRICE = 0.05
# Whatever an extra request costs, no request waits behind more than this of another request's prompt.
_LONG_AT_LAST_S = 1.0
_FORGET_S = 1800.0  # after half an hour without use the chance of a hit is halved


class SlotView(NamedTuple):
    """A slot as one request sees it. All token counts concern the request's prompt.

    ``n_shared``: common tokens; ``n_usable``: those that need not be computed; ``n_tokens``: all tokens in the slot
    (for a leased slot: that it will hold). ``is_other_conversation``: it only begins alike. ``is_other_namespace``:
    computed in a namespace that the request may not read, so the slot is erased first. ``is_worth_saving``: a save
    costs less than computing it again; ``save_s``: seconds of that save, else 0. ``eviction_cost_s``: seconds that its
    loss costs the user that returns to it. ``wait_s``: until it is idle. ``used_at``: when it was used last.
    """

    key: SlotKey
    state: SlotState
    n_tokens: int = 0
    n_shared: int = 0
    n_usable: int = 0
    save_s: float = 0.0
    is_worth_saving: bool = False
    eviction_cost_s: float = 0.0
    wait_s: float = 0.0
    used_at: float = 0.0
    is_other_conversation: bool = False
    is_other_namespace: bool = False


class SnapshotView(NamedTuple):
    """A snapshot as one request sees it. ``wait_s``: until it is committed, if it is still being written."""

    id: str
    n_usable: int
    restore_s: float
    wait_s: float = 0.0


class BackendView(Struct, frozen=True):
    """One backend as one request sees it: its slots, the snapshots that it can restore, and what work costs there.

    ``reserved``: slots that earlier requests wait for, and for how many seconds those requests will use them.
    ``can_erase``: slot actions work; otherwise isolation depends on ``cache_prompt`` false alone. ``request_s``:
    seconds that one more request costs, apart from its computation. ``shared``: for each slot with common tokens, their
    number; also for slots that are not in ``slots``.
    """

    slots: tuple[SlotView, ...]
    prefill_s: PrefillSeconds
    snapshots: tuple[SnapshotView, ...] = ()
    reserved: Mapping[SlotKey, float] = field(default_factory=dict)
    can_erase: bool = True
    request_s: float = 0.0
    shared: Mapping[int, int] = field(default_factory=dict)


class Rules(Struct, frozen=True):
    """The settings of placement; see ``routing``, ``prefill`` and ``cache`` in the configuration.

    ``chunk_threshold_s``: prompts that take longer are computed ahead of the request; None: decided by costs.
    """

    similarity_min: float = SIMILARITY_MIN
    small_prompt_tokens: int = SMALL_PROMPT_TOKENS
    chunk_threshold_s: float | None = None
    sharing: PrefillSharing = field(default_factory=PrefillSharing)
    is_isolated: bool = False  # no user may read what another user has computed

    def namespace(self, user: User, lora: str = "") -> Namespace:
        """The namespace of a request of ``user`` with the LoRA scales ``lora``."""
        return Namespace(user.id if self.is_isolated else "", lora)

    def long_s(self, request_s: float) -> float:
        """The prefill time above which computing a prompt ahead, in requests of llamaslot's own, is worth the
        ``request_s`` that each of these costs: such a prefill can be interrupted, shared, and postponed for other
        requests.
        """
        return _worth_s(request_s) if self.chunk_threshold_s is None else self.chunk_threshold_s

    @property
    def public(self) -> Namespace:
        """The namespaces that all users may read, computed by the operator."""
        return PUBLIC if self.is_isolated else SHARED


class _Choice(NamedTuple):
    """A slot and a source of tokens that ``place`` compares with others by cost. A named tuple, which is made in a
    quarter of the time of a dataclass: each placement makes dozens.
    """

    view: BackendView
    slot: SlotView
    source: Source
    n_reused: int
    cost_s: float
    wait_s: float
    is_loss: bool  # what the slot holds is lost to its owner, or must be restored for it
    is_match: bool = False  # the request resumes from the slot's content: nothing is lost
    snapshot: SnapshotView | None = None


def place(request: Request, views: Iterable[BackendView], rules: Rules) -> Plan | Wait:
    """The cheapest place for ``request`` among all slots of all backends, or what to wait for. Each backend has its own
    rates.

    There are two cases:

    1. An idle slot is taken at once.
    2. The request waits, if waiting and then computing the rest is cheaper: for a busy slot that holds most of the
       prompt (after the requests that already wait for it), or for a snapshot that is being written.

    Of the idle slots a small prompt takes one whose loss costs no user a large context, if there is one.
    """
    choices = [choice for view in views for choice in _choices(request, view, rules)]
    if not choices:
        return Wait()
    best = min(choices, key=_sort_key)
    key: Callable[[_Choice], tuple[float, ...]] = _sort_key
    if request.n_tokens < rules.small_prompt_tokens and best.wait_s == 0:
        # Only among places that are available now: the cost of waiting for another one is in the sum above.
        choices = [choice for choice in choices if choice.wait_s == 0]
        key = _no_loss_first
        best = min(choices, key=key)
    chosen = _place(best, request)
    if best.wait_s > 0:
        is_busy = best.slot.state not in _TAKEABLE or best.slot.key in best.view.reserved
        instead = min((other for other in choices if other.wait_s == 0), key=key, default=None)
        return Wait(
            best.slot.key if is_busy else None,
            best.wait_s,
            chosen,
            _place(instead, request) if instead else None,
        )
    others = [other for other in choices if other.slot is not best.slot]
    others = others or [other for other in choices if other.source is not best.source]
    second = min(others, key=key, default=None)
    return Plan(
        slot=best.slot.key,
        steps=tuple(_steps(request, best, rules)),
        source=best.source,
        n_reused=best.n_reused,
        cost=chosen.cost,
        snapshot=chosen.snapshot,
        next_best=_place(second, request) if second else None,
    )


def _place(choice: _Choice, request: Request) -> Place:
    """``choice`` as a ``Place``, with the terms of its cost. The terms are not stored in each choice, as a burst of
    requests makes thousands.
    """
    slot, snapshot = choice.slot, choice.snapshot
    cost = Cost(
        wait_s=choice.wait_s,
        save_s=0.0 if choice.is_match else slot.save_s,
        eviction_cost_s=0.0 if choice.is_match else slot.eviction_cost_s,
        restore_s=snapshot.restore_s if snapshot else 0.0,
        prefill_s=choice.view.prefill_s(choice.n_reused, request.n_tokens),
    )
    return Place(slot.key, choice.source, choice.n_reused, cost, snapshot.id if snapshot else None)


def is_similar(slot: SlotView, rules: Rules) -> bool:
    """Whether the request keeps so much of the slot's content (``routing.similarity_min``) that taking the slot
    loses nothing. Never true if the slot holds another conversation, however long the common system prompt is.
    """
    return (
        not slot.is_other_conversation
        and slot.n_tokens > 0
        and slot.n_shared >= rules.similarity_min * slot.n_tokens
    )


def is_other_conversation(slot: SlotView | Shared[int], n_alike: int) -> bool:
    """Whether a slot holds another conversation than the request's, if several conversations begin with the same
    ``n_alike`` tokens.
    """
    only_begins_alike = slot.n_shared <= n_alike + NEGLIGIBLE_TOKENS
    return n_alike > 0 and only_begins_alike and slot.n_tokens > slot.n_shared + NEGLIGIBLE_TOKENS


Ranked = tuple[int, float, int]
"""An idle slot: milliseconds that its loss costs others, when it was used last, its number. A plain tuple, as there may
be hundreds.
"""


def ranked(loss_s: float, used_at: float, slot: int) -> Ranked:
    """The sort key of a slot by what taking it loses: the smallest loss first, among ties the least recently used
    slot.
    """
    return round(loss_s / TIE_S), used_at, slot


def worth_a_look(
    slots: Iterable[Ranked], shared: Callable[[int], int], most_shared: int, besides: Collection[int]
) -> Iterator[int]:
    """Of ``slots``, sorted by cost, those that ``place`` may choose: any other slot costs no less, and shares no
    more, than two of these. Among 256 slots these are two or three as a rule, and a close look at each takes 20 us.

    ``shared``: a function from a slot to its tokens in common with the prompt; no remaining slot has more than
    ``most_shared``. Slots in ``besides`` are left out. Valid only for a model that can rewind to any token, where
    all shared tokens can be reused, and for slots of the same kind: a small request takes a slot without a large
    context first.
    """
    best = second_best = -1  # tokens shared by those that cost less
    for _, _, slot in slots:
        n_shared = shared(slot)
        if n_shared > second_best and slot not in besides:
            yield slot
            best, second_best = max(best, n_shared), min(best, n_shared)
            if second_best >= most_shared:
                return


def is_long(plan: Plan, long_s: float) -> bool:
    """Whether the prefill ahead of the request's own request takes so long that other requests must be served
    meanwhile."""
    return plan.cost.prefill_s > long_s and any(isinstance(step, PrefillTo) for step in plan.steps)


def return_likelihood(idle_s: float) -> float:
    """The likelihood of another hit, from 1 downwards, by the seconds since the last use."""
    return _FORGET_S / (_FORGET_S + max(idle_s, 0.0))


_TAKEABLE = (SlotState.FREE, SlotState.HOT, SlotState.SUSPECT)


def _choices(request: Request, view: BackendView, rules: Rules) -> Iterator[_Choice]:
    n = request.n_tokens
    for slot in view.slots:
        is_takeable = slot.state in _TAKEABLE and slot.key not in view.reserved
        is_match = is_similar(slot, rules) and slot.n_usable > 0 and not request.no_cache
        if not is_takeable:
            if is_match:
                rest_s = view.prefill_s(slot.n_usable, n)
                # The first of them is asked to save the common beginning as soon as that is computed.
                is_shared = rest_s > rules.long_s(view.request_s)
                behind_s = 0.0 if is_shared else view.reserved.get(slot.key, 0.0)
                wait = max(slot.wait_s + behind_s, TIE_S)
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
        loss_s = slot.save_s + slot.eviction_cost_s
        is_loss = slot.eviction_cost_s > 0 and slot.n_tokens >= rules.small_prompt_tokens
        kept = (
            0
            if request.no_cache or slot.is_other_namespace or slot.state is SlotState.SUSPECT
            else slot.n_usable
        )
        source = Source.RESIDENT if kept else Source.COLD
        yield _Choice(view, slot, source, kept, loss_s + view.prefill_s(kept, n), 0.0, is_loss)
        if request.no_cache:
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
    """The sort key of a choice: the cheapest first; among ties the least recently used slot."""
    return round(choice.cost_s / TIE_S), choice.slot.used_at


def _no_loss_first(choice: _Choice) -> tuple[bool, int, float]:
    """The sort key of a choice for a small request: choices that cost no user a large context come first."""
    return choice.is_loss, *_sort_key(choice)


def _steps(request: Request, choice: _Choice, rules: Rules) -> Iterator[Step]:
    slot, view = choice.slot, choice.view
    is_kept = choice.source is Source.RESIDENT and is_similar(slot, rules)
    if slot.is_worth_saving and not is_kept:
        yield Save(slot.key)
    if choice.snapshot is not None:
        yield Erase(slot.key)
        yield Restore(slot.key, choice.snapshot.id)
    elif view.can_erase and (slot.state is SlotState.SUSPECT or request.no_cache or slot.is_other_namespace):
        yield Erase(slot.key)
    if view.can_erase or not (request.no_cache or slot.is_other_namespace):
        for stop in prefill_stops(request, choice.n_reused, view, rules):
            yield PrefillTo(slot.key, stop)


def prefill_stops(request: Request, n_reused: int, view: BackendView, rules: Rules) -> list[int]:
    """Where the prefill stops: the request's boundaries, then the last token but one. Empty for a short prefill.

    Each stop is one more request. So a boundary is a stop only if recomputing the tokens since the previous stop, for
    a later prompt that diverges there, takes much longer than a request. The end is no stop if the rest is short. The
    last token is left to the client's own request, which always computes one; stopping at n instead would cost a
    recurrent model its last checkpoint. A steered request needs a slot that shares all tokens but that one, and one
    that prewarms is saved there.
    """
    last, long_s = request.n_tokens - 1, rules.long_s(view.request_s)
    is_prepared = request.placement is Placement.STEERED or request.is_prewarm
    if last <= 0 or not (is_prepared or view.prefill_s(n_reused, last) > long_s):
        return []
    stops, begin, worth_s = list[int](), n_reused, _worth_s(view.request_s)
    for at in request.boundaries:
        if begin + NEGLIGIBLE_TOKENS <= at < last and view.prefill_s(begin, at) > worth_s:
            stops.append(at)
            begin = at
    is_end = is_prepared or not stops or view.prefill_s(begin, last) > long_s
    return [*stops, last] if is_end else stops


def _worth_s(request_s: float) -> float:
    """The seconds of work that must be at stake to justify one more request, which costs ``request_s``."""
    return min(request_s / _PRICE, _LONG_AT_LAST_S)
