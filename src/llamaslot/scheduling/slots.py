"""A slot, and its states as a table of transitions."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from llamaslot.cache.content import NOTHING, Content


class SlotState(enum.Enum):
    __hash__ = object.__hash__  # the enum's own is a call in Python

    FREE = "FREE"  # holds nothing worth keeping
    HOT = "HOT"  # its tokens are known and kept for reuse
    LEASED = "LEASED"  # one request, save or probe owns it
    ABANDONED = "ABANDONED"  # its client has gone; the server may still be computing in it
    SUSPECT = "SUSPECT"  # content unknown: erased before its next use


class SlotEvent(enum.Enum):
    __hash__ = object.__hash__  # the enum's own is a call in Python

    LEASE = "lease"  # taken by a request
    KEEP = "keep"  # returned, with known tokens
    EMPTY = "empty"  # returned empty
    LEAVE = "leave"  # the client has gone while the server may be computing
    FAIL = "fail"  # a step failed half-way


NEXT: dict[tuple[SlotState, SlotEvent], SlotState] = {
    (SlotState.FREE, SlotEvent.LEASE): SlotState.LEASED,
    (SlotState.HOT, SlotEvent.LEASE): SlotState.LEASED,
    (SlotState.SUSPECT, SlotEvent.LEASE): SlotState.LEASED,
    (SlotState.LEASED, SlotEvent.KEEP): SlotState.HOT,
    (SlotState.LEASED, SlotEvent.EMPTY): SlotState.FREE,
    (SlotState.LEASED, SlotEvent.LEAVE): SlotState.ABANDONED,
    (SlotState.LEASED, SlotEvent.FAIL): SlotState.SUSPECT,
    (
        SlotState.ABANDONED,
        SlotEvent.KEEP,
    ): SlotState.HOT,  # /slots says that it is idle, and how much it holds
    (SlotState.ABANDONED, SlotEvent.EMPTY): SlotState.FREE,
    (SlotState.ABANDONED, SlotEvent.FAIL): SlotState.SUSPECT,
}


IDLE = frozenset({SlotState.FREE, SlotState.HOT, SlotState.SUSPECT})


class IllegalTransition(Exception):
    """An event that the table ``NEXT`` does not allow in the slot's state. Always a bug in llamaslot."""


class SlotKey(NamedTuple):
    """Identifies a slot among the slots of all backends: the backend's name, and the slot's number in its
    llama-server.
    """

    backend: str
    id: int

    def __str__(self) -> str:
        return f"{self.backend}/{self.id}"


@dataclass(slots=True, eq=False)
class Slot:
    """One slot of one backend, with its state and its content. Only code in ``backend/`` changes it. ``state`` changes
    only in ``become``.
    """

    backend: str
    id: int
    state: SlotState = SlotState.FREE
    content: Content = NOTHING
    used_at: float = 0.0
    leased_by: str | None = None
    key: SlotKey = field(init=False)

    def __post_init__(self) -> None:
        self.key = SlotKey(self.backend, self.id)

    def become(self, event: SlotEvent, content: Content | None = None) -> None:
        """Change the state as the table ``NEXT`` says for ``event``, and set the content: to nothing for ``EMPTY`` and
        ``FAIL``, else to ``content``, which is left as it is for None. Raises IllegalTransition if the table has no
        such transition.
        """
        try:
            self.state = NEXT[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self!r} cannot {event.value}") from None
        if event in (SlotEvent.EMPTY, SlotEvent.FAIL):
            content = NOTHING
        if content is not None:
            self.content = content

    @property
    def name(self) -> str:
        """The slot's name in log lines: ``<backend>/<number>``."""
        return str(self.key)

    @property
    def is_idle(self) -> bool:
        # Not `in IDLE`: hashing an enum is a call in Python, and this is asked of every slot at every dispatch.
        return self.state is SlotState.HOT or self.state is SlotState.FREE or self.state is SlotState.SUSPECT

    def __repr__(self) -> str:
        dirty = " dirty" if self.content.is_dirty else ""
        by = f" by {self.leased_by}" if self.leased_by else ""
        return f"<Slot {self.key} {self.state.value} {self.content.n_tokens} tok{dirty}{by}>"
