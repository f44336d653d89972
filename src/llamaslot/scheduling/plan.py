"""The decision for a request: the steps of a plan and its cost, or what the request waits for."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from msgspec import Struct

from llamaslot.scheduling.slots import SlotKey


class Save(Struct, frozen=True):
    """A step: write what the slot holds to disk before it is overwritten."""

    slot: SlotKey


class Erase(Struct, frozen=True):
    slot: SlotKey


class Restore(Struct, frozen=True):
    slot: SlotKey
    snapshot: str


class PrefillTo(Struct, frozen=True):
    """A step: compute the first ``n_tokens`` of the request's tokens in the slot, then stop."""

    slot: SlotKey
    n_tokens: int


Step = Save | Erase | Restore | PrefillTo


class Source(enum.Enum):
    """Where the reused part of a prompt comes from, as reported in ``x-llamaslot-source``."""

    RESIDENT = "resident"
    SNAPSHOT = "snapshot"
    COLD = "cold"
    # llama-server has chosen the slot, and does not tell whether the slot or its RAM cache had the tokens.
    SERVER = "server"


class Cost(Struct, frozen=True):
    """What a place costs in seconds: ``wait_s`` until the slot is available, ``save_s`` and ``eviction_cost_s`` for
    the content lost there, ``restore_s`` and ``prefill_s`` until the first token of the answer.
    """

    wait_s: float = 0.0
    save_s: float = 0.0
    eviction_cost_s: float = 0.0
    restore_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.wait_s + self.eviction_cost_s + self.steps_s

    @property
    def steps_s(self) -> float:
        """Seconds from the lease of the slot to the beginning of the answer."""
        return self.save_s + self.restore_s + self.prefill_s


class Place(Struct, frozen=True):
    """Where a request could run: a slot, and the content that its prompt would resume from there."""

    slot: SlotKey
    source: Source
    n_reused: int
    cost: Cost = field(default_factory=Cost)
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision for a request: the slot, the steps before its own request, and the expected reuse.

    ``next_best``: the cheapest place in any other slot; if there is only one slot, from another source.
    """

    slot: SlotKey
    steps: tuple[Step, ...]
    source: Source
    n_reused: int
    cost: Cost = field(default_factory=Cost)
    snapshot: str | None = None
    next_best: Place | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Wait:
    """No place yet. ``slot``: the request waits for this slot only, and later requests leave it alone. ``for_s``:
    seconds until the next decision.

    ``place`` is what the request waits for; ``instead`` is the cheapest place available now.
    """

    slot: SlotKey | None = None
    for_s: float | None = None
    place: Place | None = field(default=None, compare=False)
    instead: Place | None = field(default=None, compare=False)


class PrefillStats(Struct, frozen=True):
    """Prefill done for a request before llama-server received it. Of the ``n_tokens`` present now ``n_reused`` were
    reused, and the rest took ``seconds``.

    llama-server then reports ``cache_n`` n - 1 and ``prompt_n`` 1; the client must get the figures of its whole
    request. ``n_answers``: the number of answers that use this work (``n``); answers to further prompts do all their
    own work.
    """

    n_reused: int
    n_tokens: int
    seconds: float
    n_answers: int = 1

    def then(self, later: PrefillStats) -> PrefillStats:
        """The sum of this work and ``later`` work for the same request. Tokens that this work left in the slot do
        not count as reused by the later one.
        """
        is_own = self.n_reused <= later.n_reused <= self.n_tokens
        n_reused = self.n_reused if is_own else later.n_reused
        return PrefillStats(n_reused, later.n_tokens, self.seconds + later.seconds, later.n_answers)
