"""The nouns of llamaslot, and a slot's life as a table of transitions."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from llamaslot.core.spaces import PUBLIC, SHARED, Space
from llamaslot.core.tokens import count, head
from llamaslot.core.users import NOBODY, User


class State(enum.Enum):
    FREE = "FREE"  # nothing worth keeping in it
    HOT = "HOT"  # its tokens are known and kept for someone
    LEASED = "LEASED"  # one request, save or probe owns it
    DRAINING = "DRAINING"  # its client has gone, the server may still be working in it
    SUSPECT = "SUSPECT"  # contents unknown: erased before its next use


class Event(enum.Enum):
    LEASE = "lease"  # taken by a job
    KEEP = "keep"  # given back, holding known tokens
    EMPTY = "empty"  # given back, holding nothing
    LEAVE = "leave"  # the client has gone while the server may be working
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


class Kind(enum.StrEnum):
    """What a snapshot is cut for."""

    LEAF = "leaf"  # a conversation, as far as it has gone
    TRUNK = "trunk"  # exactly what several conversations begin with


IDLE = frozenset({State.FREE, State.HOT, State.SUSPECT})


class IllegalTransition(Exception):
    """A slot was told to do what its state does not allow: a bug in llamaslot."""


@dataclass(frozen=True, slots=True)
class Content:
    """What a slot holds, as far as it is known.

    ``tokens`` is a prefix of the truth: the tokens of an answer are not known until a save tells them.
    ``is_exact`` says that nothing follows; else ``n_more`` tokens do, 0 when not even their number is known.
    ``checkpoints``: token counts to which a model that cannot rewind can go back. ``snapshot``: the snapshot of the
    same conversation, if any; ``is_dirty``: the slot holds more than it. ``space``: where all this was computed.
    ``has_media``: what follows the tokens begins with a medium, so it is never saved.
    """

    tokens: bytes = b""
    is_exact: bool = True
    is_dirty: bool = False
    checkpoints: tuple[int, ...] = ()
    snapshot: str | None = None
    n_more: int = 0
    space: Space = SHARED
    has_media: bool = False

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    @property
    def n_held(self) -> int:
        """What a save would write, in tokens."""
        return self.n_tokens + self.n_more

    def may_hold(self, n_tokens: int) -> bool:
        """Whether there may be so many, the unknown ones included."""
        return self.n_held >= n_tokens or not (self.is_exact or self.n_more)

    def head(self, n_tokens: int) -> Content:
        """What is left when only the first ``n_tokens`` are sure: whatever follows them is unknown."""
        kept = tuple(at for at in self.checkpoints if at <= n_tokens)
        return replace(self, tokens=head(self.tokens, n_tokens), checkpoints=kept, is_exact=False, n_more=0)


NOTHING = Content()


@dataclass(slots=True, eq=False)
class Slot:
    """One slot of one backend. Only the engine changes it, and only through ``become``."""

    backend: str
    id: int
    state: State = State.FREE
    content: Content = NOTHING
    used_at: float = 0.0
    leased_by: str | None = None

    def become(self, event: Event, content: Content | None = None) -> None:
        """Go through one line of the table. Raises IllegalTransition naming state and event."""
        try:
            self.state = NEXT[self.state, event]
        except KeyError:
            raise IllegalTransition(f"{self!r} cannot {event.value}") from None
        if event in (Event.EMPTY, Event.FAIL):
            content = NOTHING
        if content is not None:
            self.content = content

    @property
    def name(self) -> str:
        """As log lines name it: ``<backend>/<number>``."""
        return f"{self.backend}/{self.id}"

    @property
    def is_idle(self) -> bool:
        # Not `in IDLE`: hashing an enum is a call in Python, and this is asked of every slot at every dispatch.
        return self.state is State.HOT or self.state is State.FREE or self.state is State.SUSPECT

    def __repr__(self) -> str:
        dirty = " dirty" if self.content.is_dirty else ""
        by = f" by {self.leased_by}" if self.leased_by else ""
        return f"<Slot {self.name} {self.state.value} {self.content.n_tokens} tok{dirty}{by}>"


@dataclass(frozen=True, slots=True)
class Job:
    """One request that wants a slot. ``tokens`` is empty when they are not known (a body llamaslot cannot read).

    ``boundaries``: token counts at which a prefill should stop on models that need checkpoints. ``n_system``: tokens of
    system part and tools, with which other conversations begin too; 0 when that is not known.
    ``is_cold``: nothing cached may be used (``cache_prompt`` false). ``user``: who asks. ``space``: what it computes is
    found from there only. ``max_tokens``: of its answer, where it says so.
    ``n_children``: further slots that llama-server takes for ``n`` > 1.
    ``is_placed_by_server``: llama-server chooses the slot, whichever that is. ``is_steered``: it chooses the slot, and
    that is the one that was prepared, for it shares most.
    ``is_prewarm``: it is here to make the trunk of ``n_system`` tokens, which is kept for good.
    """

    id: str
    tokens: bytes = b""
    boundaries: tuple[int, ...] = ()
    n_system: int = 0
    is_cold: bool = False
    n_children: int = 0
    is_placed_by_server: bool = False
    is_steered: bool = False
    is_prewarm: bool = False
    user: User = NOBODY
    max_tokens: int | None = None
    space: Space = SHARED

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    @property
    def reads(self) -> tuple[Space, ...]:
        """The spaces of which it may go on: its own, and what the operator has computed for all users."""
        is_a_users = self.space.user and not self.space.lora and self.space != PUBLIC
        return (self.space, PUBLIC) if is_a_users else (self.space,)

    def may_use(self, content: Content) -> bool:
        """Whether it may go on from there; else the slot is emptied first. Of nothing at all anybody may."""
        is_nothing = content.is_exact and not content.tokens
        return is_nothing or content.space in self.reads

    @property
    def is_exclusive(self) -> bool:
        """Whether llama-server will choose slots by itself, so that nobody may be between two steps."""
        return self.is_placed_by_server or self.n_children > 0

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.n_tokens} tok>"


@dataclass(frozen=True, slots=True)
class Save:
    """Write what the slot holds to disk before it is overwritten."""

    slot: int


@dataclass(frozen=True, slots=True)
class Erase:
    slot: int


@dataclass(frozen=True, slots=True)
class Restore:
    slot: int
    snapshot: str


@dataclass(frozen=True, slots=True)
class PrefillTo:
    """Compute the first ``n_tokens`` of the job's tokens in the slot, and stop."""

    slot: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Keep:
    """Save what the slot holds now, exactly the first ``n_tokens`` of the job's tokens, as a trunk, and go on."""

    slot: int
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

    slot: int
    source: Source
    n_reused: int
    cost: Cost = Cost()
    snapshot: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will do: the slot, the steps before its own request, and what is expected to be reused.

    ``next_best``: the cheapest place in any other slot, or from another source where there is but one slot.
    """

    slot: int
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

    slot: int | None = None
    for_s: float | None = None
    place: Place | None = field(default=None, compare=False)
    instead: Place | None = field(default=None, compare=False)
