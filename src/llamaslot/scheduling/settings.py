"""The settings of scheduling, and the defaults of ``routing``, ``prefill`` and ``queue`` in the configuration."""

from __future__ import annotations

import sys

from msgspec import Struct, field

from llamaslot.cache.namespaces import PUBLIC, SHARED, Namespace
from llamaslot.scheduling.request import User

# An extra request may cost at most this part of the prefill that it divides. It is a loss if llama-server is otherwise
# idle. If not, other requests or the next turn save much more.
_PRICE = 0.05
# A prefill of more seconds is always long, so no other request must wait for all of it.
_LONG_AT_LAST_S = 1.0


class PrefillSettings(Struct, frozen=True):
    """The settings of long prefills; see ``prefill`` in the configuration.

    ``decode_share``: the share of the time that goes to streams while any answer is decoded. ``chunk_s``: the seconds
    of a chunk, after which another prefill may be next. ``starvation_s``: once a prefill has waited for so many
    seconds, no later prefill overtakes it. ``max_yield_s``: the seconds for which requests with a short prefill may
    delay the next chunk.
    """

    decode_share: float = 0.1
    chunk_s: float = 0.5
    starvation_s: float = 120.0
    max_yield_s: float = 2.0


class QueueLimits(Struct, frozen=True):
    """The settings ``queue`` of the configuration. None is no limit.

    ``max_waiting``: the most requests that may wait. ``max_wait_s``: the longest wait of a request in seconds.
    ``user_max_running`` and ``user_max_waiting``: the requests of each user that may have slots, and that may wait; an
    API key may set other limits. ``small_request_max_overtake_s``: the seconds of slot time by which small requests may
    overtake a waiting request. ``return_grace_s``: for so many seconds after its last request or answer a user is
    expected back, and users above their share leave a slot free for it.
    """

    max_waiting: int = sys.maxsize
    max_wait_s: float | None = None
    user_max_running: int | None = None
    user_max_waiting: int | None = None
    small_request_max_overtake_s: float = 10.0
    return_grace_s: float = 10.0

    @property
    def retry_after_s(self) -> float:
        return min(max(1.0, (self.max_wait_s or 300.0) / 10), 30.0)


class SchedulingSettings(Struct, frozen=True):
    """The settings of placement; see ``routing``, ``prefill`` and ``cache`` in the configuration.

    ``chunk_threshold_s``: a prefill of more seconds is long: llamaslot computes it ahead, before it sends the client's
    request. None: ``long_s`` decides by costs.
    """

    similarity_min: float = 0.85
    small_prompt_tokens: int = 1024
    chunk_threshold_s: float | None = None
    prefill: PrefillSettings = field(default_factory=PrefillSettings)
    is_isolated: bool = False  # no user may read what another user has computed

    def namespace(self, user: User, lora: str = "") -> Namespace:
        """Return the namespace of a request of ``user`` with the LoRA scales ``lora``."""
        return Namespace(user.id if self.is_isolated else "", lora)

    def long_s(self, request_s: float) -> float:
        """Return the seconds above which a prefill is long. llamaslot computes a long prefill ahead in requests of its
        own, which can be interrupted, share their prefix, and make room for other requests. Each of these requests
        costs ``request_s``.
        """
        return worth_one_request_s(request_s) if self.chunk_threshold_s is None else self.chunk_threshold_s

    @property
    def public(self) -> Namespace:
        """The namespace of content that the operator has prewarmed, and that all users may reuse."""
        return PUBLIC if self.is_isolated else SHARED


def worth_one_request_s(request_s: float) -> float:
    """Return the seconds of computing that must be at stake to justify one more request, which costs ``request_s``."""
    return min(request_s / _PRICE, _LONG_AT_LAST_S)
