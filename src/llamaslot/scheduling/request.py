"""A request that needs a slot, and its user."""

from __future__ import annotations

import enum

from msgspec import Struct

from llamaslot.cache.content import Content
from llamaslot.cache.ids import count
from llamaslot.cache.namespaces import PUBLIC, SHARED, Namespace


class User(Struct, frozen=True):
    """The user of a request. ``id``: ``key:<name>`` of an API key, else ``named:<x-llamaslot-user>``, else
    ``at:<address>``. ``max_running``, ``max_waiting``: limits of requests in slots and in the queue; None: as
    configured. ``is_admin``: it may use llamaslot's own endpoints.
    """

    id: str
    max_running: int | None = None
    max_waiting: int | None = None
    is_admin: bool = False


SYSTEM_USER = User("")  # llamaslot itself


class Placement(enum.Enum):
    """Which side chooses the slot of a request, and how."""

    PINNED = "pinned"  # llamaslot: the request names its slot
    STEERED = "steered"  # llama-server, which takes the slot that llamaslot has prepared, because it shares most tokens
    SERVER_CHOSEN = "server chosen"  # llama-server; llamaslot does not know which one it will be


class Request(Struct, frozen=True):
    """One request that needs a slot. ``tokens`` is empty if they are unknown (llamaslot cannot read the body).

    ``boundaries``: token counts at which a prefill should stop on models that need checkpoints. ``n_system``: tokens
    of the system part and tools, with which other conversations begin too; 0 if unknown. ``no_cache``: nothing cached
    may be used (``cache_prompt`` false). ``user``: the user that sent it. ``namespace``: the namespace of what it
    computes. ``max_tokens``: the limit of its answer, if the request has one. ``n_children``: further slots that
    llama-server chooses for ``n`` > 1. ``is_prewarm``: it only makes a snapshot, of all its tokens but the last, which
    is never evicted. ``avoids``: backends that have failed it: others are preferred.
    """

    id: str
    tokens: bytes = b""
    boundaries: tuple[int, ...] = ()
    n_system: int = 0
    no_cache: bool = False
    n_children: int = 0
    placement: Placement = Placement.PINNED
    is_prewarm: bool = False
    user: User = SYSTEM_USER
    max_tokens: int | None = None
    namespace: Namespace = SHARED
    avoids: frozenset[str] = frozenset()

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    @property
    def reads(self) -> tuple[Namespace, ...]:
        """The namespaces from which the request may resume: its own, and the one that the operator has filled for all
        users.
        """
        is_a_users = self.namespace.user and not self.namespace.lora and self.namespace != PUBLIC
        return (self.namespace, PUBLIC) if is_a_users else (self.namespace,)

    def may_use(self, content: Content) -> bool:
        """Whether the request may resume from ``content``; otherwise the slot is erased first. Always true for empty
        content.
        """
        is_nothing = content.is_exact and not content.tokens
        return is_nothing or content.namespace in self.reads

    @property
    def is_exclusive(self) -> bool:
        """Whether llama-server will choose any idle slots, so that no other request may run between two steps."""
        return self.placement is Placement.SERVER_CHOSEN or self.n_children > 0

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.n_tokens} tok>"
