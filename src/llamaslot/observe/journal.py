"""The last decisions and their reasons: in which slot a request was placed, which place was next best, what it waited
for, what was saved. The journal has numbers and names only. Text of prompts is in it only with ``log.prompts``.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from llamaslot.scheduling.plan import Place, Plan, Source, Wait
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import SlotKey
from llamaslot.sizes import readable_size

log = logging.getLogger(__name__)

KEPT = 1000


class Option(Struct, frozen=True):
    """A place that a decision considered: a slot, and where its prefix comes from. ``n_reused``: prompt tokens expected
    to be reused there. ``terms``: the cost in estimated seconds by purpose (wait, save, evict, …), without those that
    are 0.
    """

    slot: SlotKey
    source: str
    n_reused: int
    snapshot: str | None
    terms: dict[str, float]

    @property
    def cost_s(self) -> float:
        return sum(self.terms.values())

    def to_json(self) -> dict[str, Any]:
        told = {"cost_s": self.cost_s, **asdict(self)}
        return {**told, "backend": self.slot.backend, "slot": self.slot.id}


class Waited(Struct):
    """A period in which a request waited in the queue for a place (``what``), because waiting for it was cheaper than
    the best place available at once (``instead``, None if there was none).

    ``expected_s``: estimated seconds of the wait; ``seconds``: actual ones, None until the wait is over.
    """

    what: Option
    instead: Option | None
    expected_s: float
    seconds: float | None = None


class Act(Struct, frozen=True):
    """A step that was performed: a save, erase, restore or prefill. ``is_done``: False if it failed. ``n_tokens``:
    tokens that it saved, restored or computed. ``waited_s``: seconds that it waited for other steps and requests; of
    these, ``paused_s`` for running streams. ``n_interruptions``: how often it stopped for another request.
    """

    step: str
    seconds: float
    is_done: bool
    n_tokens: int = 0
    size_bytes: int = 0
    snapshot: str | None = None
    waited_s: float = 0.0
    paused_s: float = 0.0
    n_interruptions: int = 0


class Decision(Struct):
    """The journal's entry of one request, from its placement to its answer; or of one save that llamaslot made by
    itself.

    ``at``: when the entry began, in seconds since 1970. ``user``: the request's user, empty for llamaslot's own work.
    ``queued_s``: seconds in the queue. ``n_expected``: prompt tokens expected to be reused when all steps were done;
    ``n_reused``: those that llama-server reused. Both are None until llama-server has reported. ``rewrote``: names of
    the rules that changed the system prompt. ``is_assisted``: False if llama-server chose the slot; then ``chosen``,
    ``next_best`` and ``slot`` are None. ``diverged``: where the prompt differs from cached text, if many tokens were
    computed again because of that.
    """

    id: str
    at: float
    n_tokens: int
    chosen: Option | None = None
    next_best: Option | None = None
    slot: SlotKey | None = None
    queued_s: float = 0.0
    n_expected: int | None = None
    n_reused: int | None = None
    waits: list[Waited] = field(default_factory=list)
    acts: list[Act] = field(default_factory=list)
    rewrote: list[str] = field(default_factory=list)
    diverged: dict[str, object] | None = None
    user: str = ""
    is_assisted: bool = True
    since: float = 0.0  # when it began to wait for a place, by the clock of the requests
    act_ends: list[float] = field(default_factory=list)  # of each step, by the same clock
    # ``chosen`` and ``next_best`` are made of it when the journal is read: few entries are.
    plan: Plan | None = None

    def resolved(self) -> Decision:
        if (plan := self.plan) is not None:
            self.plan = None
            self.chosen = _option(Place(plan.slot, plan.source, plan.n_reused, plan.cost, plan.snapshot))
            self.next_best = _option(plan.next_best) if plan.next_best is not None else None
        return self

    def to_json(self) -> dict[str, Any]:
        waits = [
            {
                "what": wait.what.to_json(),
                "instead": wait.instead.to_json() if wait.instead else None,
                "expected_s": wait.expected_s,
                "seconds": wait.seconds,
            }
            for wait in self.waits
        ]
        return {
            "id": self.id,
            "at": self.at,
            "n_tokens": self.n_tokens,
            "user": self.user,
            "backend": self.slot.backend if self.slot is not None else None,
            "slot": self.slot.id if self.slot is not None else None,
            "chosen": self.chosen.to_json() if self.chosen else None,
            "next_best": self.next_best.to_json() if self.next_best else None,
            "queued_s": self.queued_s,
            "n_expected": self.n_expected,
            "n_reused": self.n_reused,
            "waits": waits,
            "acts": [asdict(act) for act in self.acts],
            "rewrote": self.rewrote,
            "diverged": self.diverged,
            "is_assisted": self.is_assisted,
            "text": explain(self),
        }


class Journal:
    """The last ``KEPT`` decisions. ``clock`` returns seconds since 1970."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._decisions: deque[Decision] = deque(maxlen=KEPT)

    def begin(self, id_: str, n_tokens: int, user: str = "") -> Decision:
        """Add and return a new entry; the caller fills it in."""
        decision = Decision(id_, self._clock(), n_tokens, user=user)
        self._decisions.append(decision)
        return decision

    def latest(self, n: int = KEPT) -> Iterator[Decision]:
        """Return the last ``n`` decisions, newest first."""
        return map(Decision.resolved, islice(reversed(self._decisions), n))

    def since(self, at: float) -> Iterator[Decision]:
        """Return the decisions that began after ``at`` (seconds since 1970), newest first. Some may be unfinished."""
        return takewhile(lambda decision: decision.at > at, reversed(self._decisions))

    def __len__(self) -> int:
        return len(self._decisions)


def explain(decision: Decision) -> str:
    """Return a decision as one line of text. An unfinished one says what the request waits for."""
    who = f"{decision.id} {decision.n_tokens:,} tok"
    if not decision.is_assisted:
        return f"{decision.id} -> llama-server chooses the slot"
    if decision.chosen is not None:
        text = f"{who} -> {_reuse(decision.chosen)}; cost {_sum(decision.chosen)}"
        if decision.next_best is not None:
            text += f"; next best {_name(decision.next_best)} {_seconds(decision.next_best.cost_s)} s"
        return text + (f"; waited {_seconds(decision.queued_s)} s" if decision.waits else "")
    if decision.waits:
        wait = decision.waits[-1]
        text = f"{who} waits for {_reuse(wait.what)}; cost {_sum(wait.what)}"
        if wait.instead is not None:
            text += f"; at once it is {_name(wait.instead)} {_sum(wait.instead)}"
        return text
    return f"{who} in slot {decision.slot}: " + ", ".join(map(_act, decision.acts))


def _name(option: Option) -> str:
    if option.snapshot is None:
        return f"slot {option.slot} {option.source}"
    # a prefix is no snapshot yet: another request is computing it
    kind = "" if option.snapshot.startswith("prefix-") else "snapshot "
    return f"slot {option.slot} from {kind}{option.snapshot}"


def _reuse(option: Option) -> str:
    return f"{_name(option)}: {option.n_reused:,} reused"


def _sum(option: Option) -> str:
    terms = " + ".join(f"{name} {_seconds(seconds)}" for name, seconds in option.terms.items())
    return f"{_seconds(option.cost_s)} s" + (f" = {terms}" if terms else "")


def _act(act: Act) -> str:
    text = act.step + (f" {act.snapshot}" if act.snapshot else "") + ("" if act.is_done else " failed")
    if act.size_bytes:
        text += f", {readable_size(act.size_bytes)}"
    text += f" in {_seconds(act.seconds)} s"
    if act.waited_s >= 0.01:
        text += f" after waiting {_seconds(act.waited_s)} s"
    return text + (f", stopped {act.n_interruptions} times" if act.n_interruptions else "")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 1 else f"{seconds:.2g}"


class DecisionRecorder:
    """Writes the journal's entry of one request. The first call that records something makes the entry."""

    def __init__(self, journal: Journal, request: Request, now: Callable[[], float]) -> None:
        self._journal, self._request, self._now = journal, request, now
        self._since = self._waits_since = now()
        self.decision: Decision | None = None

    def record_wait(self, wait: Wait, expected_s: float | None = None) -> None:
        """Record that the request waits for the place of ``wait``. Nothing is recorded if ``wait`` names no place, or
        the place for which the request already waits. ``expected_s``: estimated seconds of the wait, if they are not
        those in its cost (for a prefix that another request computes).
        """
        if wait.place is None or wait.for_s is None:
            return
        what, decision = _option(wait.place), self._begun()
        last = decision.waits[-1] if decision.waits else None
        if last is not None and last.seconds is None:
            if (last.what.slot, last.what.snapshot) == (what.slot, what.snapshot):
                return
            self._end_wait(last)
        self._waits_since = self._now()
        instead = _option(wait.instead) if wait.instead is not None else None
        decision.waits.append(Waited(what, instead, wait.for_s if expected_s is None else expected_s))
        _say(decision)

    def record_plan(self, plan: Plan) -> None:
        decision = self._begun()
        self.ended()
        decision.queued_s = self._now() - self._since
        if plan.source is Source.SERVER:
            decision.is_assisted = False
            _say(decision)
            return
        decision.slot, decision.plan = plan.slot, plan
        _say(decision)

    def found(self, n_prompt: int, n_reused: int) -> None:
        """Record the token counts of a request for which llama-server chose the slot."""
        decision = self._begun()
        decision.n_tokens, decision.n_reused = n_prompt, n_reused

    def record_step(self, slot: SlotKey, act: Act) -> None:
        """Record a step that ended in ``slot``. Without a plan (a save by llamaslot itself) the entry is logged at
        once.
        """
        decision = self._begun()
        is_own = decision.chosen is None and decision.plan is None
        decision.slot = slot
        decision.acts.append(act)
        decision.act_ends.append(self._now())
        if is_own:
            _say(decision)

    def reused(self, n_expected: int, n_reused: int) -> None:
        decision = self._begun()
        decision.n_expected, decision.n_reused = n_expected, n_reused

    def rewrote(self, rules: list[str]) -> None:
        """Record the names of the rules that have changed the request's system prompt."""
        if rules:
            self._begun().rewrote = rules

    def diverged(self, told: dict[str, object]) -> None:
        """Record where the prompt differs from cached text, so that many tokens were computed again."""
        self._begun().diverged = told

    def ended(self) -> None:
        """Record that the wait of the request has ended: it got its slot, or left the queue. Idempotent."""
        if self.decision is not None and self.decision.waits:
            self._end_wait(self.decision.waits[-1])

    def _begun(self) -> Decision:
        if self.decision is None:
            self.decision = self._journal.begin(
                self._request.id, self._request.n_tokens, self._request.user.id
            )
            self.decision.since = self._since
        return self.decision

    def _end_wait(self, wait: Waited) -> None:
        if wait.seconds is None:
            wait.seconds = self._now() - self._waits_since


def _option(place: Place) -> Option:
    cost = place.cost
    terms = {
        "wait": cost.wait_s,
        "save": cost.save_s,
        "evict": cost.eviction_cost_s,
        "restore": cost.restore_s,
        "prefill": cost.prefill_s,
    }
    taken = {name: seconds for name, seconds in terms.items() if seconds > 0}
    return Option(place.slot, place.source.value, place.n_reused, place.snapshot, taken)


def _say(decision: Decision) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", explain(decision.resolved()))
