"""Decides where a request runs: at the place with the smallest cost, for its user and for later requests of all users.

Pure: views of the backends go in, a plan comes out. All costs are in seconds, and are only compared with each other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from msgspec import Struct, field

from llamaslot.cache.ids import NEGLIGIBLE_TOKENS
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
from llamaslot.scheduling.request import Placement, Request
from llamaslot.scheduling.settings import SchedulingSettings, worth_one_request_s
from llamaslot.scheduling.slots import SlotKey, SlotState

PrefillSeconds = Callable[[int, int], float]
TIE_S = 0.001  # smaller differences of cost are ties; then the least recently used slot is taken
_FORGET_S = 1800.0  # after half an hour without use the chance of a hit is halved


class SlotView(NamedTuple):
    """A slot as seen by one request. All token counts refer to the request's prompt.

    ``n_shared``: the tokens that prompt and slot have in common. ``n_usable``: those of them that need not be computed
    again. ``n_tokens``: all tokens in the slot, or, of a leased slot, that it will hold. ``is_other_conversation``:
    the slot holds another conversation, which only begins with the same tokens. ``is_other_namespace``: the request
    may not reuse the content, so the slot is erased first. ``is_worth_saving``: saving the content costs less than
    computing it again. ``save_s``: the seconds of that save, 0 if it is not worth it. ``eviction_cost_s``: the seconds
    that the loss of the content costs its user, if it comes back. ``wait_s``: the seconds until the slot is idle.
    ``used_at``: the time of its last use.
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
    """A snapshot as seen by one request. ``wait_s``: the seconds until it is committed, if it is still being written;
    else 0.
    """

    id: str
    n_usable: int
    restore_s: float
    wait_s: float = 0.0


class BackendView(Struct, frozen=True):
    """One backend as seen by one request: its slots, the snapshots that it can restore, and its speeds.

    ``prefill_s``: a function from two token counts to the seconds of computing the tokens between them. ``reserved``:
    for each slot that earlier requests wait for, the seconds for which they will use it. ``can_erase``: llama-server
    can erase slots; if not, only ``cache_prompt`` false keeps namespaces apart. ``request_s``: the seconds that one
    more request costs, without its computation. ``shared``: for each slot that has tokens in common with the prompt,
    their number; it also has slots that are not in ``slots``. ``branch``: how many tokens the prompt shares with two
    other conversations, 0 if too few for a snapshot.
    """

    slots: tuple[SlotView, ...]
    prefill_s: PrefillSeconds
    snapshots: tuple[SnapshotView, ...] = ()
    reserved: Mapping[SlotKey, float] = field(default_factory=dict)
    can_erase: bool = True
    request_s: float = 0.0
    shared: Mapping[int, int] = field(default_factory=dict)
    branch: int = 0


class _Choice(NamedTuple):
    """A slot and a source of tokens, compared by ``place`` with all other choices. A named tuple is made in a quarter
    of the time of a dataclass, and each placement makes dozens.
    """

    view: BackendView
    slot: SlotView
    source: Source
    n_reused: int
    cost_s: float
    wait_s: float
    is_loss: bool  # the user of the slot's content loses a large context, or must wait for its restore
    is_match: bool = False  # the request continues the slot's content, so no content is lost
    snapshot: SnapshotView | None = None


def place(request: Request, views: Iterable[BackendView], settings: SchedulingSettings) -> Plan | Wait:
    """Return the cheapest place for ``request`` among all slots in ``views``, as a plan, or what the request waits
    for. Each backend has its own speeds.

    There are two cases:

    1. The cheapest place is in an idle slot: the request takes it at once.
    2. Waiting and then computing what is missing is cheaper: the request waits for a busy slot that holds most of its
       prompt (and for the requests that already wait for this slot), or for a snapshot that is still being written.

    Without any slot to choose from, the request waits too. A small prompt prefers idle slots whose loss costs no user
    a large context.
    """
    choices = [choice for view in views for choice in _choices(request, view, settings)]
    if not choices:
        return Wait()
    best = min(choices, key=_sort_key)
    key: Callable[[_Choice], tuple[float, ...]] = _sort_key
    if request.n_tokens < settings.small_prompt_tokens and best.wait_s == 0:
        # Only among places that are available now: the costs above have already decided against waiting.
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
        steps=tuple(_steps(request, best, settings)),
        source=best.source,
        n_reused=best.n_reused,
        cost=chosen.cost,
        snapshot=chosen.snapshot,
        next_best=_place(second, request) if second else None,
        shared=best.view.shared,
        branch=best.view.branch,
    )


def _place(choice: _Choice, request: Request) -> Place:
    """Return ``choice`` as a ``Place`` with all terms of its cost. They are computed only here, because a burst of
    requests makes thousands of choices.
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


def is_similar(slot: SlotView, settings: SchedulingSettings) -> bool:
    """True if the prompt contains at least the part ``routing.similarity_min`` of the slot's tokens, so that the
    request continues the slot's content and no content is lost. False if the slot holds another conversation, however
    long the common system prompt is.
    """
    return (
        not slot.is_other_conversation
        and slot.n_tokens > 0
        and slot.n_shared >= settings.similarity_min * slot.n_tokens
    )


def is_other_conversation(slot: SlotView | Shared[int], n_alike: int) -> bool:
    """True if a slot holds another conversation than the request's, where several conversations begin with the same
    ``n_alike`` tokens: the slot has more tokens than it shares with the prompt, and shares no more than ``n_alike``.
    Differences of ``NEGLIGIBLE_TOKENS`` do not count.
    """
    only_begins_alike = slot.n_shared <= n_alike + NEGLIGIBLE_TOKENS
    return n_alike > 0 and only_begins_alike and slot.n_tokens > slot.n_shared + NEGLIGIBLE_TOKENS


Ranked = tuple[int, float, int]
"""An idle slot: the milliseconds that taking it costs other users, the time of its last use, its number. A plain tuple,
because there may be hundreds.
"""


def ranked(loss_s: float, used_at: float, slot: int) -> Ranked:
    """Return the sort key of a slot that costs other users ``loss_s`` seconds: the slot with the smallest loss comes
    first, among ties the least recently used one.
    """
    return round(loss_s / TIE_S), used_at, slot


def worth_a_look(
    slots: Iterable[Ranked], shared: Callable[[int], int], most_shared: int, besides: Collection[int]
) -> Iterator[int]:
    """Yield those of ``slots`` that ``place`` may choose. ``slots`` must be sorted by ``ranked``. A slot is left out
    if two slots that come before it share at least as many tokens: two, because a plan also names the next best place.
    Of 256 slots usually two or three are yielded. A close look at one slot takes 20 us.

    ``shared`` returns the number of tokens that a slot has in common with the prompt. No slot has more than
    ``most_shared``. Slots in ``besides`` are never yielded. The result is valid only for models that can rewind to any
    token, which can reuse all common tokens. All ``slots`` must be alike in whether a small request costs a user a
    large context there.
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
    """True if ``plan`` computes the prompt ahead of the client's request, and this takes more than ``long_s``. Then
    other requests are served between its chunks.
    """
    return plan.cost.prefill_s > long_s and any(isinstance(step, PrefillTo) for step in plan.steps)


def return_likelihood(idle_s: float) -> float:
    """Return the likelihood that content is used again after ``idle_s`` seconds without use: 1 at 0 seconds, falling
    with time.
    """
    return _FORGET_S / (_FORGET_S + max(idle_s, 0.0))


_TAKEABLE = (SlotState.FREE, SlotState.HOT, SlotState.SUSPECT)


def _choices(request: Request, view: BackendView, settings: SchedulingSettings) -> Iterator[_Choice]:
    n = request.n_tokens
    for slot in view.slots:
        is_takeable = slot.state in _TAKEABLE and slot.key not in view.reserved
        is_match = is_similar(slot, settings) and slot.n_usable > 0 and not request.no_cache
        if not is_takeable:
            if is_match:
                rest_s = view.prefill_s(slot.n_usable, n)
                # The request in the slot saves the common prefix as soon as it is computed, so the requests that wait
                # for this slot need not wait for each other.
                is_shared = rest_s > settings.long_s(view.request_s)
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
        is_loss = slot.eviction_cost_s > 0 and slot.n_tokens >= settings.small_prompt_tokens
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
    """Return the sort key of a choice: the cheapest comes first, among ties the least recently used slot."""
    return round(choice.cost_s / TIE_S), choice.slot.used_at


def _no_loss_first(choice: _Choice) -> tuple[bool, int, float]:
    """Return the sort key of a choice for a small prompt: choices that cost no user a large context come first."""
    return choice.is_loss, *_sort_key(choice)


def _steps(request: Request, choice: _Choice, settings: SchedulingSettings) -> Iterator[Step]:
    slot, view = choice.slot, choice.view
    is_kept = choice.source is Source.RESIDENT and is_similar(slot, settings)
    if slot.is_worth_saving and not is_kept:
        yield Save(slot.key)
    if choice.snapshot is not None:
        yield Erase(slot.key)
        yield Restore(slot.key, choice.snapshot.id)
    elif view.can_erase and (slot.state is SlotState.SUSPECT or request.no_cache or slot.is_other_namespace):
        yield Erase(slot.key)
    if view.can_erase or not (request.no_cache or slot.is_other_namespace):
        for stop in prefill_stops(request, choice.n_reused, view, settings):
            yield PrefillTo(slot.key, stop)


def prefill_stops(
    request: Request, n_reused: int, view: BackendView, settings: SchedulingSettings
) -> list[int]:
    """Return the token counts at which llamaslot's own prefill stops: some of the request's boundaries, then the last
    token but one. The list is empty for a short prefill, which the client's own request computes.

    Each stop costs one more request. So a boundary is a stop only if computing the tokens since the previous stop
    takes much longer than a request; a later prompt that diverges there saves this. Likewise the end is a stop only if
    the prefill up to it is long.

    The last token is left to the client's own request, which always computes one token. A stop behind it would cost a
    recurrent model its last checkpoint. Two kinds of requests are always computed to the end: a steered request,
    because llama-server then chooses the slot that shares most tokens, and a prewarm, because its snapshot is saved
    there.
    """
    last, long_s = request.n_tokens - 1, settings.long_s(view.request_s)
    is_prepared = request.placement is Placement.STEERED or request.is_prewarm
    if last <= 0 or not (is_prepared or view.prefill_s(n_reused, last) > long_s):
        return []
    stops, begin, worth_s = list[int](), n_reused, worth_one_request_s(view.request_s)
    for at in request.boundaries:
        if begin + NEGLIGIBLE_TOKENS <= at < last and view.prefill_s(begin, at) > worth_s:
            stops.append(at)
            begin = at
    is_end = is_prepared or not stops or view.prefill_s(begin, last) > long_s
    return [*stops, last] if is_end else stops
