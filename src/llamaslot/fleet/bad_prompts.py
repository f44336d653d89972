"""Remembers prompts that have made llama-servers crash, or that two llama-servers have answered with an error of their
own (5xx).

A request that makes llama-server crash would crash one llama-server after the other if it was sent again each time. So
it is tried on one other llama-server at most, and then refused for five minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import xxhash
from msgspec import Struct

from llamaslot.errors import DeadlyPrompt

_DEADLY = 2  # a prompt is refused once so many llama-servers have ended while they computed it
_KEPT_S = 300.0
_MAX_KEPT = 256


class _Known(Struct):
    at: float
    n_ended: int = 0
    is_refused: bool = False


class BadPrompts:
    """The bad prompts of one model, as hashes. A prompt is forgotten after five minutes, and when it was answered.
    While no bad prompt is known, prompts are not hashed.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._known: dict[bytes, _Known] = {}  # in the order in which they were last noted

    def __len__(self) -> int:
        return len(self._known)

    def check(self, prompt: bytes) -> None:
        """Raise DeadlyPrompt if ``prompt`` must not be sent to any llama-server, because two have ended while they
        computed it.
        """
        known = self._get(prompt)
        if known is not None and known.n_ended >= _DEADLY:
            raise DeadlyPrompt(known.n_ended, known.at + _KEPT_S - self._now())

    def is_refused(self, prompt: bytes) -> bool:
        """True if two backends have answered ``prompt`` with an error of their own, so that a third one would do so
        too.
        """
        known = self._get(prompt)
        return known is not None and known.is_refused

    def has_ended_server(self, prompt: bytes, n_ended: int) -> None:
        """Record that a llama-server has ended while it computed ``prompt``. ``n_ended`` others have ended before
        while they computed the same request. Raises DeadlyPrompt if the prompt must not be sent again.
        """
        known = self._note(prompt)
        known.n_ended = max(known.n_ended, n_ended) + 1
        self.check(prompt)

    def was_refused(self, prompt: bytes) -> None:
        """Record that two backends have answered ``prompt`` with an error of their own."""
        self._note(prompt).is_refused = True

    def was_answered(self, prompt: bytes) -> None:
        if self._known:
            self._known.pop(_key(prompt), None)

    def _get(self, prompt: bytes) -> _Known | None:
        known = self._known.get(_key(prompt)) if self._known else None
        return known if known is not None and self._now() < known.at + _KEPT_S else None

    def _note(self, prompt: bytes) -> _Known:
        key, known = _key(prompt), self._get(prompt) or _Known(0.0)
        known.at = self._now()
        self._known.pop(key, None)
        self._known[key] = known
        while len(self._known) > _MAX_KEPT:
            del self._known[next(iter(self._known))]
        return known


def _key(prompt: bytes) -> bytes:
    return xxhash.xxh3_128_digest(prompt)
