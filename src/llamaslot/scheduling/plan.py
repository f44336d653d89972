"""The decision for a request: a plan with its steps and its cost, or a wait and what the request waits for."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from msgspec import Struct

from llamaslot.scheduling.slots import SlotKey


class Save(Struct, frozen=True):
    """A step: llama-server writes the slot's content to disk, before a later step overwrites the slot."""

    slot: SlotKey


class Erase(Struct, frozen=True):
    """A step: llama-server empties the slot."""

    slot: SlotKey


class Restore(Struct, frozen=True):
    """A step: llama-server reads the snapshot with the id ``snapshot`` from disk into the slot, which is empty."""

    slot: SlotKey
    snapshot: str


class PrefillTo(Struct, frozen=True):
    """A step: compute the first ``n_tokens`` of the request's tokens in the slot, then stop."""

    slot: SlotKey
    n_tokens: int


Step = Save | Erase | Restore | PrefillTo


class Source(enum.Enum):
    """Where the reused tokens of a prompt come from. Clients see it in the header ``x-llamaslot-source``."""

    RESIDENT = "resident"
    SNAPSHOT = "snapshot"
    COLD = "cold"
    # llama-server has chosen the slot, and does not tell whether the slot or its RAM cache had the tokens.
    SERVER = "server"


class Cost(Struct, frozen=True):
    """The seconds that a place costs. ``wait_s``: until the slot is available. ``save_s``: for saving the slot's
    present content. ``eviction_cost_s``: what the loss of that content costs its user later. ``restore_s`` and
    ``prefill_s``: for the restore and the prefill of the request.
    """

    wait_s: float = 0.0
    save_s: float = 0.0
    eviction_cost_s: float = 0.0
    restore_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def steps_s(self) -> float:
        """Seconds from the lease of the slot to the first token of the answer."""
        return self.save_s + self.restore_s + self.prefill_s


class Place(Struct, frozen=True):
    """Where a request could run: a slot, and the source from which it would reuse the first ``n_reused`` tokens of its
    prompt. ``snapshot`` is the id of that source if it is a snapshot, else None.
    """

    slot: SlotKey
    source: Source
    n_reused: int
    cost: Cost = field(default_factory=Cost)
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision that a request gets a slot now.

    ``slot``: the slot. ``steps``: what llamaslot does in it, in this order, before it sends the client's request.
    ``source`` and ``snapshot``: from where the first ``n_reused`` tokens of the prompt are to be reused, as in
    ``Place``. ``cost``: what this place costs. ``next_best``: the place that would have been taken if this one did not
    exist, for the journal: the cheapest one in another slot, or, with only one slot, from another source; None if there
    is neither. ``shared`` and ``branch``: what the prompt has in common with slots and conversations of this backend,
    see ``BackendView``.
    """

    slot: SlotKey
    steps: tuple[Step, ...]
    source: Source
    n_reused: int
    cost: Cost = field(default_factory=Cost)
    snapshot: str | None = None
    next_best: Place | None = field(default=None, compare=False)
    shared: Mapping[int, int] = field(default_factory=dict, compare=False)
    branch: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Wait:
    """The decision that a request gets no slot yet.

    ``slot``: the busy slot that the request waits for, which later requests may not take; None if it waits for no
    particular slot. ``for_s``: the seconds after which the request is placed again; None if only an event can change
    the decision. ``place``: the place that the request waits for. ``instead``: the cheapest place that it could have
    had at once.
    """

    slot: SlotKey | None = None
    for_s: float | None = None
    place: Place | None = field(default=None, compare=False)
    instead: Place | None = field(default=None, compare=False)


class PrefillStats(Struct, frozen=True):
    """The prefill that llamaslot has done for a request before it sent the client's own request. The slot then has
    ``n_tokens`` of the prompt. ``n_reused`` of them were reused; computing all others took ``seconds``.

    llama-server reports only the client's own request, as if all tokens but one had been reused (``cache_n`` n - 1,
    ``prompt_n`` 1). With these figures llamaslot tells the client what the whole request took. ``n_answers`` is the
    number of answers to the prompt that was computed ahead (``n``). Each further prompt of the request computes its
    own tokens, and its figures stay as they are.
    """

    n_reused: int
    n_tokens: int
    seconds: float
    n_answers: int = 1

    def then(self, later: PrefillStats) -> PrefillStats:
        """Return the sum of this work and of ``later`` work for the same request. Tokens that ``later`` found in the
        slot only because this work had left them there count as computed, not as reused.
        """
        is_own = self.n_reused <= later.n_reused <= self.n_tokens
        n_reused = self.n_reused if is_own else later.n_reused
        return PrefillStats(n_reused, later.n_tokens, self.seconds + later.seconds, later.n_answers)
