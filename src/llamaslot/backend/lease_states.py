"""The states of a lease, the events between them, and what is known of a request that has lost its slot."""

from __future__ import annotations

import enum
from typing import Literal

from msgspec import Struct

from llamaslot.scheduling.plan import PrefillStats


class LeaseState(enum.Enum):
    __hash__ = object.__hash__  # the enum's own is a call in Python

    PREPARING = "preparing"  # before a step or between two: llama-server does nothing for it in the slot
    ACTING = "acting"  # a save, erase or restore is running; it is completed even if the client leaves
    PREFILLING = "prefilling"  # llamaslot computes a part of the prompt ahead of the request
    WAITING_EXCLUSIVE = "waiting exclusive"  # until llama-server can choose only slots that it may get
    SENT = "sent"  # the request itself is on its way; llama-server may not have begun
    PROCESSING = "processing"  # llama-server computes its prompt, or a non-streamed answer
    DECODING = "decoding"  # the first token of its answer has come
    SETTLED = "settled"  # llama-server is done with it
    RELEASE_PENDING = "release pending"  # released during an action: the slot is free when the action ends
    ABANDONED = "abandoned"  # released while llama-server may be working: free when that ends
    RELEASED = "released"


class LeaseEvent(enum.Enum):
    __hash__ = object.__hash__  # the enum's own is a call in Python

    ACT = "act"
    ACTED = "act no more"
    PREFILL = "prefill"
    PREFILLED = "end a prefill"
    WAIT = "wait for slots of llama-server's choice"
    ADMIT = "end its wait"
    SEND = "be sent"
    CONFIRM = "be processed"
    TOKEN = "decode"
    SETTLE = "settle"
    RELEASE = "be released later"
    GIVE_BACK = "give its slot back"
    LEAVE = "leave llama-server at work"


NEXT: dict[tuple[LeaseState, LeaseEvent], LeaseState] = {
    (LeaseState.PREPARING, LeaseEvent.ACT): LeaseState.ACTING,
    (LeaseState.PREPARING, LeaseEvent.PREFILL): LeaseState.PREFILLING,
    (LeaseState.PREPARING, LeaseEvent.WAIT): LeaseState.WAITING_EXCLUSIVE,
    (LeaseState.PREPARING, LeaseEvent.SEND): LeaseState.SENT,
    # A slot that llama-server could have chosen, but did not.
    (LeaseState.PREPARING, LeaseEvent.SETTLE): LeaseState.SETTLED,
    (LeaseState.PREPARING, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,
    # A save has failed while it rewound the slot.
    (LeaseState.PREPARING, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.ACTING, LeaseEvent.ACTED): LeaseState.PREPARING,
    (LeaseState.ACTING, LeaseEvent.RELEASE): LeaseState.RELEASE_PENDING,
    (LeaseState.PREFILLING, LeaseEvent.PREFILLED): LeaseState.PREPARING,
    (LeaseState.PREFILLING, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.WAITING_EXCLUSIVE, LeaseEvent.ADMIT): LeaseState.PREPARING,
    (LeaseState.WAITING_EXCLUSIVE, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,
    (LeaseState.WAITING_EXCLUSIVE, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.SENT, LeaseEvent.CONFIRM): LeaseState.PROCESSING,
    # A request without a slot of its own is seen in a slot only later.
    (LeaseState.SENT, LeaseEvent.TOKEN): LeaseState.DECODING,
    (LeaseState.SENT, LeaseEvent.SETTLE): LeaseState.SETTLED,  # refused
    (LeaseState.SENT, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,  # without a slot of its own
    (LeaseState.SENT, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.PROCESSING, LeaseEvent.TOKEN): LeaseState.DECODING,
    (LeaseState.PROCESSING, LeaseEvent.SETTLE): LeaseState.SETTLED,
    (LeaseState.PROCESSING, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,  # without a slot of its own
    (LeaseState.PROCESSING, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.DECODING, LeaseEvent.SETTLE): LeaseState.SETTLED,
    (LeaseState.DECODING, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,  # without a slot of its own
    (LeaseState.DECODING, LeaseEvent.LEAVE): LeaseState.ABANDONED,
    (LeaseState.SETTLED, LeaseEvent.ACT): LeaseState.ACTING,  # saved before its slot is given back
    (LeaseState.SETTLED, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,
    (LeaseState.RELEASE_PENDING, LeaseEvent.GIVE_BACK): LeaseState.RELEASED,
    (LeaseState.RELEASE_PENDING, LeaseEvent.LEAVE): LeaseState.ABANDONED,
}

ENDED = (LeaseState.RELEASE_PENDING, LeaseState.ABANDONED, LeaseState.RELEASED)
RUNNING = (LeaseState.PROCESSING, LeaseState.DECODING)
OWN_REQUEST = (LeaseState.SENT, *RUNNING)
AT_WORK = (LeaseState.PREFILLING, *OWN_REQUEST)
COMPUTING = (LeaseState.PREFILLING, LeaseState.SENT, LeaseState.PROCESSING)  # a prompt, or perhaps its answer
NEVER_FIRST = (LeaseState.DECODING, LeaseState.WAITING_EXCLUSIVE, LeaseState.SETTLED, *ENDED)


class LongPrefill(enum.Enum):
    """The phase of a long prefill ahead of the client's request. Long prefills of one backend are computed in turns."""

    NONE = "none"
    WAITING = "waiting"  # for its first turn
    RUNNING = "running"  # it has had its first turn


class Preemption(enum.Enum):
    FORBIDDEN = "forbidden"
    ALLOWED = "allowed"  # its slot can be taken for another user's request
    REQUESTED = "requested"  # its slot is to be taken: the prefill stops


class Stopped(enum.Enum):
    """The type of ``STOPPED``, which ``Lease.unless_preempted`` returns if it has cancelled the work."""

    STOPPED = "stopped"


STOPPED: Literal[Stopped.STOPPED] = Stopped.STOPPED


class RetryPlacement(Exception):
    """Raised when a request must be placed again: its slot holds less than expected, or is needed for another purpose.
    The slot's content is known, and computed tokens stay in it. ``prefill_stats``: the prefill done for the request so
    far.

    It is an exception because it ends the steps of a plan at any depth, through context managers that release leases
    and locks. A return value would have to pass through four callers that can do nothing with it. It is not a
    LlamaslotError, because no client sees it.
    """

    def __init__(self, prefill_stats: PrefillStats | None) -> None:
        super().__init__("the request needs another place")
        self.prefill_stats = prefill_stats


class Preempted(RetryPlacement):
    """Raised when a request loses its slot to a user with fewer slots. It returns to its place in the queue, by
    ``came_at``. ``n_times``: how often this has happened to it. An exception for the same reason as
    ``RetryPlacement``.
    """

    def __init__(self, prefill_stats: PrefillStats | None, came_at: float, n_times: int) -> None:
        super().__init__(prefill_stats)
        self.came_at, self.n_times = came_at, n_times


MAX_REPLANS = 2  # so often a request may be placed again because its slot holds less than expected


class EarlierPlaces(Struct):
    """The places that a request has had and lost. ``prefill_stats``: the prefill done for it at all of them.
    ``preempted``: the exception of its last preemption, None without one. ``is_back``: it lost its last place for
    another reason than preemption. ``n_replans``: how often that has happened.
    """

    prefill_stats: PrefillStats | None = None
    preempted: Preempted | None = None
    is_back: bool = False
    n_replans: int = 0

    @property
    def may_replan(self) -> bool:
        """True if the request may lose its next place too if the slot is not as expected."""
        return self.n_replans < MAX_REPLANS

    def lost(self, prefill_stats: PrefillStats | None, preempted: Preempted | None = None) -> None:
        """Record that the request has lost another place, where the prefill ``prefill_stats`` was done for it.
        ``preempted``: the exception, if it lost its place by preemption.
        """
        if self.prefill_stats is not None and prefill_stats is not None:
            prefill_stats = self.prefill_stats.then(prefill_stats)
        self.prefill_stats = prefill_stats or self.prefill_stats
        self.preempted, self.is_back = preempted or self.preempted, preempted is None
        self.n_replans += self.is_back
