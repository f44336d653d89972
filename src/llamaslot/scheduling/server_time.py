"""Which users the server has worked for while requests of other users waited.

Pure. Users share slots, and they share the server's time: a user with many short requests in its slots may delay
another user's long prompt, but only up to its part of the time.
"""

from __future__ import annotations

from collections.abc import Collection

from llamaslot.scheduling.fairness import Shares


class ServerTime:
    """Seconds by user, counted only while others waited. Requests of llamaslot itself (no name) are not counted."""

    def __init__(self) -> None:
        self._shares = Shares()

    def took(self, users: Collection[str], seconds: float, waiting: Collection[str]) -> bool:
        """Record that ``users`` used ``seconds`` in equal parts while ``waiting`` waited. Returns whether another
        user waited.
        """
        others = {user for user in waiting if user}
        for user in users:
            if user:
                self._shares.granted(user, seconds / len(users), others | set(users) - {""}, ())
        return bool(others - set(users))

    def owed_s(self, user: str) -> float:
        """The seconds that it has received less than its part; negative for more."""
        return self._shares.deficit_s(user)

    def may_hold_back(self, user: str, other: str, grace_s: float) -> bool:
        """Whether requests with a short prefill of ``user`` may delay a long one of ``other``: until ``user`` has
        received ``grace_s`` more than ``other``.
        """
        is_one = user == other or not (user and other)
        return is_one or self.owed_s(user) >= self.owed_s(other) - grace_s

    def keep(self, users: Collection[str]) -> None:
        """Forget all other users."""
        self._shares.keep(users, users)
