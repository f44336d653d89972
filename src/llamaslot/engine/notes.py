"""Writes into the journal what was decided, in the words of ``core``, and says it in the log at debug."""

from __future__ import annotations

import logging
from collections.abc import Callable

from llamaslot.core.slots import Job, Place, Plan, Source, Wait
from llamaslot.observe.journal import Act, Decision, Journal, Option, Waited, explain

log = logging.getLogger(__name__)


class Note:
    """What becomes of one job. Without a decision yet nothing is in the journal: nobody has looked for a place."""

    def __init__(self, journal: Journal, job: Job, now: Callable[[], float]) -> None:
        self._journal, self._job, self._now = journal, job, now
        self._since = self._waits_since = now()
        self.decision: Decision | None = None

    def waits(self, wait: Wait, expected_s: float | None = None) -> None:
        """It waits for something in particular. The same again changes nothing. ``expected_s``: where that is more
        than what the waiting counts for (a prefix that nobody could compute sooner).
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

    def placed(self, plan: Plan) -> None:
        decision = self._begun()
        self.ended()
        decision.queued_s = self._now() - self._since
        if plan.source is Source.SERVER:
            decision.is_assisted = False
            _say(decision)
            return
        place = Place(plan.slot, plan.source, plan.n_reused, plan.cost, plan.snapshot)
        decision.slot, decision.chosen = plan.slot, _option(place)
        decision.next_best = _option(plan.next_best) if plan.next_best is not None else None
        _say(decision)

    def found(self, n_prompt: int, n_reused: int) -> None:
        """llama-server has chosen the slot, and tells these numbers of the prompt."""
        decision = self._begun()
        decision.n_tokens, decision.n_reused = n_prompt, n_reused

    def acted(self, slot: int, act: Act) -> None:
        """A step was taken. One without a plan (a save of llamaslot's own) is a decision of its own."""
        decision = self._begun()
        is_own = decision.chosen is None
        decision.slot = slot
        decision.acts.append(act)
        if is_own:
            _say(decision)

    def reused(self, n_expected: int, n_reused: int) -> None:
        decision = self._begun()
        decision.n_expected, decision.n_reused = n_expected, n_reused

    def rewrote(self, rules: list[str]) -> None:
        """Rules have changed its system prompt before anything else was done."""
        if rules:
            self._begun().rewrote = rules

    def diverged(self, told: dict[str, object]) -> None:
        """It was found out why much had to be computed."""
        self._begun().diverged = told

    def ended(self) -> None:
        """It waits no longer, served or not. Idempotent."""
        if self.decision is not None and self.decision.waits:
            self._end_wait(self.decision.waits[-1])

    def _begun(self) -> Decision:
        if self.decision is None:
            self.decision = self._journal.begin(self._job.id, self._job.n_tokens, self._job.user.id)
        return self.decision

    def _end_wait(self, wait: Waited) -> None:
        if wait.seconds is None:
            wait.seconds = self._now() - self._waits_since


def _option(place: Place) -> Option:
    cost = place.cost
    terms = {
        "wait": cost.wait_s,
        "save": cost.save_s,
        "regret": cost.regret_s,
        "restore": cost.restore_s,
        "prefill": cost.prefill_s,
    }
    taken = {name: seconds for name, seconds in terms.items() if seconds > 0}
    return Option(place.slot, place.source.value, place.n_reused, place.snapshot, taken)


def _say(decision: Decision) -> None:
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s", explain(decision))
