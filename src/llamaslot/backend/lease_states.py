"""The states of a lease, the events between them, and the exceptions by which a holder gives up a lease."""

from __future__ import annotations

import enum
from typing import Literal

from llamaslot.llama.sse import PrefillStats


class State(enum.Enum):
    PREPARING = "preparing"  # before a step or between two: nothing of it runs in the slot
    ACTING = "acting"  # a save, erase or restore is running; it is completed even if the client leaves
    PREFILLING = "prefilling"  # llamaslot computes a part of the prompt ahead of the request
    WAITING_EXCLUSIVE = "waiting exclusive"  # until llama-server can choose only the right slots for it
    SENT = "sent"  # the request itself is on its way; llama-server may not have begun
    PROCESSING = "processing"  # llama-server computes its prompt, or a non-streamed answer
    DECODING = "decoding"  # the first token of its answer has come
    SETTLED = "settled"  # llama-server is done with it
    RELEASE_PENDING = "release pending"  # released during an action: the slot is free when the action ends
    DRAINING = "draining"  # released while llama-server may be working: free when that ends
    RELEASED = "released"


class Event(enum.Enum):
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


NEXT: dict[tuple[State, Event], State] = {
    (State.PREPARING, Event.ACT): State.ACTING,
    (State.PREPARING, Event.PREFILL): State.PREFILLING,
    (State.PREPARING, Event.WAIT): State.WAITING_EXCLUSIVE,
    (State.PREPARING, Event.SEND): State.SENT,
    (State.PREPARING, Event.SETTLE): State.SETTLED,  # a slot that llama-server could have chosen, but did not
    (State.PREPARING, Event.GIVE_BACK): State.RELEASED,
    (State.PREPARING, Event.LEAVE): State.DRAINING,  # a save has failed while it rewound the slot
    (State.ACTING, Event.ACTED): State.PREPARING,
    (State.ACTING, Event.RELEASE): State.RELEASE_PENDING,
    (State.PREFILLING, Event.PREFILLED): State.PREPARING,
    (State.PREFILLING, Event.LEAVE): State.DRAINING,
    (State.WAITING_EXCLUSIVE, Event.ADMIT): State.PREPARING,
    (State.WAITING_EXCLUSIVE, Event.GIVE_BACK): State.RELEASED,
    (State.WAITING_EXCLUSIVE, Event.LEAVE): State.DRAINING,
    (State.SENT, Event.CONFIRM): State.PROCESSING,
    (State.SENT, Event.TOKEN): State.DECODING,  # without a slot of its own it is seen running only later
    (State.SENT, Event.SETTLE): State.SETTLED,  # refused
    (State.SENT, Event.GIVE_BACK): State.RELEASED,  # without a slot of its own
    (State.SENT, Event.LEAVE): State.DRAINING,
    (State.PROCESSING, Event.TOKEN): State.DECODING,
    (State.PROCESSING, Event.SETTLE): State.SETTLED,
    (State.PROCESSING, Event.GIVE_BACK): State.RELEASED,  # without a slot of its own
    (State.PROCESSING, Event.LEAVE): State.DRAINING,
    (State.DECODING, Event.SETTLE): State.SETTLED,
    (State.DECODING, Event.GIVE_BACK): State.RELEASED,  # without a slot of its own
    (State.DECODING, Event.LEAVE): State.DRAINING,
    (State.SETTLED, Event.ACT): State.ACTING,  # saved before its slot is given back
    (State.SETTLED, Event.GIVE_BACK): State.RELEASED,
    (State.RELEASE_PENDING, Event.GIVE_BACK): State.RELEASED,
    (State.RELEASE_PENDING, Event.LEAVE): State.DRAINING,
}

# Tuples: hashing an enum is a call in Python.
ENDED = (State.RELEASE_PENDING, State.DRAINING, State.RELEASED)
RUNNING = (State.PROCESSING, State.DECODING)
OWN_REQUEST = (State.SENT, *RUNNING)
AT_WORK = (State.PREFILLING, *OWN_REQUEST)
NEVER_FIRST = (State.DECODING, State.WAITING_EXCLUSIVE, State.SETTLED, *ENDED)


class LongPrefill(enum.Enum):
    """A prefill ahead of the request that is so long that it is computed in turn with those of other requests."""

    NONE = "none"
    WAITING = "waiting"  # for its first turn
    RUNNING = "running"  # it has had its first turn


class Preemption(enum.Enum):
    FORBIDDEN = "forbidden"
    ALLOWED = "allowed"  # its slot can be taken for another user's request
    REQUESTED = "requested"  # its slot is to be taken: the prefill stops


class Stopped(enum.Enum):
    """What ``unless_preempted`` returns instead of a result."""

    STOPPED = "stopped"


STOPPED: Literal[Stopped.STOPPED] = Stopped.STOPPED


class RetryPlacement(Exception):
    """The request needs another place: its slot is not as expected, or is needed for another purpose.

    The slot's content is known, and computed tokens stay in it. ``prefill_stats``: what was done for the request so
    far. It is an exception because it ends the steps of a plan at any depth, through context managers that release what
    they hold; as a result it would have to pass four callers that can do nothing with it. Not a LlamaslotError: no
    client sees it.
    """

    def __init__(self, prefill_stats: PrefillStats | None) -> None:
        super().__init__("the request needs another place")
        self.prefill_stats = prefill_stats


class Preempted(RetryPlacement):
    """Its slot is for a user that has fewer: the request returns to its place in the queue, by ``came_at``.

    ``n_times``: how often it was preempted. An exception for the same reason as ``RetryPlacement``.
    """

    def __init__(self, prefill_stats: PrefillStats | None, came_at: float, n_times: int) -> None:
        super().__init__(prefill_stats)
        self.came_at, self.n_times = came_at, n_times
