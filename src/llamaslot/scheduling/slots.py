"""A slot, and its states as a table of transitions."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

from llamaslot.cache.content import NOTHING, Content


class State(enum.Enum):
    FREE = "FREE"  # holds nothing worth keeping
    HOT = "HOT"  # its tokens are known and kept for reuse
    LEASED = "LEASED"  # one request, save or probe owns it
    DRAINING = "DRAINING"  # its client has gone; the server may still be computing in it
    SUSPECT = "SUSPECT"  # content unknown: erased before its next use


class Event(enum.Enum):
    LEASE = "lease"  # taken by a request
    KEEP = "keep"  # returned, with known tokens
    EMPTY = "empty"  # returned empty
    LEAVE = "leave"  # the client has gone while the server may be computing
    FAIL = "fail"  # a step failed half-way


NEXT: dict[tuple[State, Event], State] = {
    (State.FREE, Event.LEASE): State.LEASED,
    (State.HOT, Event.LEASE): State.LEASED,
    (State.SUSPECT, Event.LEASE): State.LEASED,
    (State.LEASED, Event.KEEP): State.HOT,
    (State.LEASED, Event.EMPTY): State.FREE,
    (State.LEASED, Event.LEAVE): State.DRAINING,
    (State.LEASED, Event.FAIL): State.SUSPECT,
    (State.DRAINING, Event.KEEP): State.HOT,  # /slots says that it is idle, and how much it holds
    (State.DRAINING, Event.EMPTY): State.FREE,
    (State.DRAINING, Event.FAIL): State.SUSPECT,
}


IDLE = frozenset({State.FREE, State.HOT, State.SUSPECT})


class IllegalTransition(Exception):
    """An event that the table does not allow in this state: a bug in llamaslot."""


class SlotKey(NamedTuple):
    """Identifies a slot among those of all backends. ``id``: its number in its llama-server."""

    backend: str
    id: int

    def __str__(self) -> str:
        return f"{self.backend}/{self.id}"


@dataclass(slots=True, eq=False)
class Slot:
    """One slot of one backend. Only the backend changes it, and only through ``become``."""

    backend: str
    id: int
    state: State = State.FREE
    content: Content = NOTHING
    used_at: float = 0.0
    leased_by: str | None = None

    def become(self, event: Event, content: Content | None = None) -> None:
        """Apply one transition of the table. Raises IllegalTransition naming state and event."""
        try:
            self.state = NEXT[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self!r} cannot {event.value}") from None
        if event in (Event.EMPTY, Event.FAIL):
            content = NOTHING
        if content is not None:
            self.content = content

    @property
    def key(self) -> SlotKey:
        return SlotKey(self.backend, self.id)

    @property
    def name(self) -> str:
        """The name in log lines: ``<backend>/<number>``."""
        return str(self.key)

    @property
    def is_idle(self) -> bool:
        # Not `in IDLE`: hashing an enum is a call in Python, and this is asked of every slot at every dispatch.
        return self.state is State.HOT or self.state is State.FREE or self.state is State.SUSPECT

    def __repr__(self) -> str:
        dirty = " dirty" if self.content.is_dirty else ""
        by = f" by {self.leased_by}" if self.leased_by else ""
        return f"<Slot {self.key} {self.state.value} {self.content.n_tokens} tok{dirty}{by}>"
