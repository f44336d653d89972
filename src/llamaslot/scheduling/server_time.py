"""Whose requests the server has worked for while those of other users had to wait for it.

Pure. A slot is one thing that users share, and the server's time is another: a user with many short requests in its
slots may hold another one's long prompt back by them, but not beyond its part of the time.
"""

from __future__ import annotations

from collections.abc import Collection

from llamaslot.scheduling.fairness import Shares


class ServerTime:
    """Seconds by user, as far as others waited. Requests of llamaslot itself, which has no name, count for nothing."""

    def __init__(self) -> None:
        self._shares = Shares()

    def took(self, users: Collection[str], seconds: float, waiting: Collection[str]) -> bool:
        """``users`` had it, in equal parts, while ``waiting`` wanted it, too; whether anybody else did."""
        others = {user for user in waiting if user}
        for user in users:
            if user:
                self._shares.granted(user, seconds / len(users), others | set(users) - {""}, ())
        return bool(others - set(users))

    def owed_s(self, user: str) -> float:
        """What it has had less than its part; negative for more."""
        return self._shares.deficit_s(user)

    def may_hold_back(self, user: str, other: str, grace_s: float) -> bool:
        """Whether requests of ``user`` that need little may come before a long one of ``other``: until it has had
        ``grace_s`` more than that one."""
        is_one = user == other or not (user and other)
        return is_one or self.owed_s(user) >= self.owed_s(other) - grace_s

    def keep(self, users: Collection[str]) -> None:
        """All others are gone."""
        self._shares.keep(users, users)
