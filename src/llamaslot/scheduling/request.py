"""A request that wants a slot, and the user who asks."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from llamaslot.cache.content import Content
from llamaslot.cache.ids import count
from llamaslot.cache.namespaces import PUBLIC, SHARED, Space


@dataclass(frozen=True, slots=True)
class User:
    """``id``: ``key:<name>`` of an API key, else ``named:<x-llamaslot-user>``, else ``at:<address>``.

    ``max_running``, ``max_waiting``: requests in slots and in the queue; None where the configuration decides.
    ``is_admin``: llamaslot's own pages are open to it.
    """

    id: str
    max_running: int | None = None
    max_waiting: int | None = None
    is_admin: bool = False


NOBODY = User("")  # llamaslot itself


class Placement(enum.Enum):
    """Who decides in which slot a request runs."""

    PINNED = "pinned"  # llamaslot: the request names its slot
    STEERED = "steered"  # llama-server, which takes the slot that was prepared, for it shares most
    SERVER_CHOSEN = "server chosen"  # llama-server, and llamaslot does not know which it will be


@dataclass(frozen=True, slots=True)
class Job:
    """One request that wants a slot. ``tokens`` is empty when they are not known (a body llamaslot cannot read).

    ``boundaries``: token counts at which a prefill should stop on models that need checkpoints. ``n_system``: tokens of
    system part and tools, with which other conversations begin too; 0 when that is not known.
    ``is_cold``: nothing cached may be used (``cache_prompt`` false). ``user``: who asks. ``space``: what it computes is
    found from there only. ``max_tokens``: of its answer, where it says so.
    ``n_children``: further slots that llama-server takes for ``n`` > 1, of its own choice.
    ``is_prewarm``: it is here to make the trunk of ``n_system`` tokens, which is kept for good.
    """

    id: str
    tokens: bytes = b""
    boundaries: tuple[int, ...] = ()
    n_system: int = 0
    is_cold: bool = False
    n_children: int = 0
    placement: Placement = Placement.PINNED
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
        """Whether llama-server will choose any idle slots, so that no other request may be between two steps."""
        return self.placement is Placement.SERVER_CHOSEN or self.n_children > 0

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.n_tokens} tok>"
