"""A request that needs a slot, and its user."""

from __future__ import annotations

import enum

from msgspec import Struct

from llamaslot.cache.content import Content
from llamaslot.cache.ids import count
from llamaslot.cache.namespaces import PUBLIC, SHARED, Namespace


class User(Struct, frozen=True):
    """The user of a request. ``id``: ``key:<name>`` with an API key, else ``named:<x-llamaslot-user>``, else
    ``at:<address>``. ``max_running`` and ``max_waiting``: how many of the user's requests may have slots, and may wait
    in the queue; None: as in the configuration. ``is_admin``: the user may call llamaslot's own endpoints.
    """

    id: str
    max_running: int | None = None
    max_waiting: int | None = None
    is_admin: bool = False


SYSTEM_USER = User("")  # llamaslot itself


class Placement(enum.Enum):
    """Which side chooses the slot of a request."""

    PINNED = "pinned"  # llamaslot: the request names its slot
    # llama-server, by common tokens. llamaslot first computes the prompt in one slot, so that llama-server takes it.
    STEERED = "steered"
    SERVER_CHOSEN = "server chosen"  # llama-server; llamaslot does not know beforehand which slot it will be


class Request(Struct, frozen=True):
    """A request that needs a slot. ``tokens``: its prompt; empty if llamaslot cannot tell the tokens of the body.

    ``boundaries``: token counts at which a prefill should stop, so that models that cannot rewind freely get a
    checkpoint there. ``n_system``: the number of tokens of system part and tools, with which other conversations begin
    too; 0 if unknown. ``no_cache``: the request may not reuse anything (``cache_prompt`` false). ``namespace``: the
    namespace of the content that the request computes. ``max_tokens``: the limit of its answer; None is no limit.
    ``n_children``: the number of slots that llama-server chooses for it besides the first (``n`` > 1). ``is_prewarm``:
    it has no answer; llamaslot computes all tokens but the last one and saves them as a snapshot that is never
    evicted. ``avoids``: names of backends that have failed this request; a backend not among them is preferred.
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
        """The namespaces whose content the request may reuse: its own, and for a user in isolation also the one that
        the operator has prewarmed for all users.
        """
        is_a_users = self.namespace.user and not self.namespace.lora and self.namespace != PUBLIC
        return (self.namespace, PUBLIC) if is_a_users else (self.namespace,)

    def may_use(self, content: Content) -> bool:
        """True if the request may reuse ``content``, or if ``content`` is empty. If False, the slot must be erased
        before the request runs in it.
        """
        is_nothing = content.is_exact and not content.tokens
        return is_nothing or content.namespace in self.reads

    @property
    def is_exclusive(self) -> bool:
        """True if llama-server chooses a slot for the request, and may take any idle one. So no other request may then
        be between two steps, with its slot idle.
        """
        return self.placement is Placement.SERVER_CHOSEN or self.n_children > 0

    def __repr__(self) -> str:
        return f"<Request {self.id} {self.n_tokens} tok>"
