"""What is decided for a request: the steps of a plan, its cost, or what it waits for."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from llamaslot.scheduling.slots import SlotKey


@dataclass(frozen=True, slots=True)
class Save:
    """Write what the slot holds to disk before it is overwritten."""

    slot: SlotKey


@dataclass(frozen=True, slots=True)
class Erase:
    slot: SlotKey


@dataclass(frozen=True, slots=True)
class Restore:
    slot: SlotKey
    snapshot: str


@dataclass(frozen=True, slots=True)
class PrefillTo:
    """Compute the first ``n_tokens`` of the job's tokens in the slot, and stop."""

    slot: SlotKey
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Save what the slot holds now, exactly the first ``n_tokens`` of the job's tokens, as a trunk, and go on."""

    slot: SlotKey
    n_tokens: int


Step = Save | Erase | Restore | PrefillTo | Keep


class Source(enum.Enum):
    """Where the reused part of a prompt comes from, as ``x-llamaslot-source`` says it."""

    RESIDENT = "resident"
    SNAPSHOT = "snapshot"
    COLD = "cold"
    # llama-server has chosen the slot, and does not tell whether it held it or its RAM cache.
    SERVER = "server"


@dataclass(frozen=True, slots=True)
class Cost:
    """What a place costs, in seconds: ``wait_s`` until it can be had, ``save_s`` and ``regret_s`` for what is lost
    there, ``restore_s`` and ``prefill_s`` until the first token of the job's answer."""

    wait_s: float = 0.0
    save_s: float = 0.0
    regret_s: float = 0.0
    restore_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def total_s(self) -> float:
        return self.wait_s + self.regret_s + self.steps_s

    @property
    def steps_s(self) -> float:
        """Until the answer begins, once the slot is leased."""
        return self.save_s + self.restore_s + self.prefill_s


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job could run: a slot, and what its prompt would go on from there."""

    slot: SlotKey
    source: Source
    n_reused: int
    cost: Cost = Cost()
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will do: the slot, the steps before its own request, and what is expected to be reused.

    ``next_best``: the cheapest place in any other slot, or from another source where there is but one slot.
    """

    slot: SlotKey
    steps: tuple[Step, ...]
    source: Source
    n_reused: int
    cost: Cost = Cost()
    snapshot: str | None = None
    next_best: Place | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing yet. With ``slot``: for that one only, which later jobs then leave alone. ``for_s``: until a look
    again is worth it.

    ``place`` is what is waited for, and ``instead`` the cheapest of those that could be had at once.
    """

    slot: SlotKey | None = None
    for_s: float | None = None
    place: Place | None = field(default=None, compare=False)
    instead: Place | None = field(default=None, compare=False)
