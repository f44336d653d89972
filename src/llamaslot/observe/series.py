"""Sums over the requests of each minute, of each hour and of all time, for each backend and model: tokens reused,
seconds saved, seconds waited. This module has no clock and no file; times are given in seconds since 1970.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from msgspec import Struct, field

from llamaslot.observe.activity import Activity, Outcome

MINUTE, HOUR, EVER = 60, 3600, 0
#: For how long sums of each step are kept: a day and an hour, 400 days, for ever.
KEPT_S = {MINUTE: 25 * 3600, HOUR: 400 * 86400, EVER: math.inf}
#: What is shown at a time: seconds back, and between two points.
SPANS = {"hour": (3600, 60), "day": (86400, 900), "month": (30 * 86400, 4 * 3600)}
_NARROW = math.log(1.15)  # classes of a histogram of seconds: a value is known within 7 %
_LEAST_S = 0.001


class Key(NamedTuple):
    """Names the sums of one period, backend and model. The period begins ``at`` (seconds since 1970) and lasts ``step``
    seconds (0: for ever).
    """

    step: int
    at: int
    backend: str
    model: str


class Sums(Struct):
    """The sums over the requests of one period. The fields that ``Activity`` has too are added up. ``n``: requests;
    ``n_faults`` and ``n_unserved``: those that ended so. ``first``: a histogram of the seconds to the first token: the
    number of requests in each class (``class_of``). ``disk_bytes``: the bytes of snapshots on disk; 0: unknown.
    """

    n: int = 0
    n_faults: int = 0  # llamaslot's own
    n_unserved: int = 0
    n_prompt: int = 0
    n_reused: int = 0
    n_computed: int = 0
    n_answered: int = 0
    saved_s: float = 0.0
    saved_error_s: float = 0.0
    moved_s: float = 0.0
    queued_s: float = 0.0
    longest_queued_s: float = 0.0
    disk_bytes: int = 0
    first: dict[int, int] = field(default_factory=dict)

    def count(self, activity: Activity) -> None:
        self.n += 1
        self.n_faults += activity.outcome is Outcome.FAULT
        self.n_unserved += activity.outcome is Outcome.UNSERVED
        if activity.n_reused is not None:  # else its prompt is not known to have been read
            self.n_prompt += activity.n_reused + activity.n_computed
            self.n_reused += activity.n_reused
        self.n_computed += activity.n_computed
        self.n_answered += activity.n_answered
        self.saved_s += activity.saved_s
        self.saved_error_s += activity.saved_error_s
        self.moved_s += activity.moved_s
        self.queued_s += activity.queued_s
        self.longest_queued_s = max(self.longest_queued_s, activity.queued_s)
        if activity.first_s is not None:
            class_ = class_of(activity.first_s)
            self.first[class_] = self.first.get(class_, 0) + 1

    def add(self, other: Sums) -> None:
        """Add ``other`` to these sums. The fields are written out: a loop over their names takes five times as long,
        and a day has thousands of sums.
        """
        self.n += other.n
        self.n_faults += other.n_faults
        self.n_unserved += other.n_unserved
        self.n_prompt += other.n_prompt
        self.n_reused += other.n_reused
        self.n_computed += other.n_computed
        self.n_answered += other.n_answered
        self.saved_s += other.saved_s
        self.saved_error_s += other.saved_error_s
        self.moved_s += other.moved_s
        self.queued_s += other.queued_s
        self.longest_queued_s = max(self.longest_queued_s, other.longest_queued_s)
        self.disk_bytes = max(self.disk_bytes, other.disk_bytes)
        for class_, n in other.first.items():
            self.first[class_] = self.first.get(class_, 0) + n

    def first_s(self, share: float) -> float | None:
        """Return the seconds within which a fraction ``share`` (0 to 1) of the requests had their first token, with an
        error of at most 7 %. None if no request had a first token.
        """
        left = share * sum(self.first.values())
        for class_ in sorted(self.first):
            left -= self.first[class_]
            if left <= 0:
                return _LEAST_S * math.exp((class_ + 0.5) * _NARROW)
        return None

    def to_json(self) -> dict[str, Any]:
        told = {name: round(getattr(self, name), 3) for name in _ADDED}
        return {
            **told,
            "longest_queued_s": round(self.longest_queued_s, 3),
            "disk_bytes": (0 if self.disk_bytes == _EMPTY else self.disk_bytes) if self.disk_bytes else None,
            "first_p50_s": _rounded(self.first_s(0.5)),
            "first_p95_s": _rounded(self.first_s(0.95)),
        }


_EMPTY = 1  # ``disk_bytes`` of an empty disk; 0 is not known
_ADDED = [name for name in Sums.__struct_fields__ if name not in ("longest_queued_s", "disk_bytes", "first")]


def class_of(seconds: float) -> int:
    return math.floor(math.log(max(seconds, _LEAST_S) / _LEAST_S) / _NARROW)


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def total(parts: Iterable[Sums]) -> Sums:
    found = Sums()
    for part in parts:
        found.add(part)
    return found


class Series:
    """All sums, by length of the period, its beginning, backend and model. ``dirty``: the keys of the sums that have
    changed since the last ``take_dirty``.
    """

    def __init__(self) -> None:
        self._sums: dict[int, dict[int, dict[tuple[str, str], Sums]]] = {step: {} for step in KEPT_S}
        self.dirty: set[Key] = set()
        self._swept_at = 0.0

    def __len__(self) -> int:
        return sum(len(period) for periods in self._sums.values() for period in periods.values())

    def count(self, activity: Activity, model: str | None = None) -> None:
        """Add a request to the minute and the hour in which it ended, and to the sums of all time. ``model``: the name
        to count it for; None: that of ``activity``.
        """
        at = activity.at + activity.total_s
        for step in KEPT_S:
            self._of(step, at, activity.backend or "", activity.model if model is None else model).count(
                activity
            )

    def stored(self, at: float, size_bytes: int) -> None:
        """Record that snapshots took ``size_bytes`` on disk at the time ``at``."""
        for step in (MINUTE, HOUR):
            sums = self._of(step, at, "", "")
            sums.disk_bytes = size_bytes or _EMPTY

    def _of(self, step: int, at: float, backend: str, model: str) -> Sums:
        key = Key(step, int(at // step * step) if step else 0, backend, model)
        self.dirty.add(key)
        period = self._sums[step].setdefault(key.at, {})
        if (sums := period.get((backend, model))) is None:
            sums = period[backend, model] = Sums()
        return sums

    def load(self, rows: Iterable[tuple[Key, Sums]]) -> None:
        """Add the sums that an earlier process has written to the file."""
        for key, sums in rows:
            period = self._sums[key.step].setdefault(key.at, {})
            if (mine := period.get((key.backend, key.model))) is not None:
                mine.add(sums)
                self.dirty.add(key)
            else:
                period[key.backend, key.model] = sums

    def take_dirty(self) -> list[tuple[Key, Sums]]:
        """Return the sums that have changed since the last call, with their keys: those that the file lacks."""
        keys, self.dirty = self.dirty, set()
        found = ((key, self._sums[key.step].get(key.at, {}).get((key.backend, key.model))) for key in keys)
        return [(key, sums) for key, sums in found if sums is not None]

    def sweep(self, now: float) -> None:
        """Forget the sums that are older than ``KEPT_S``. Does something at most once an hour."""
        if now - self._swept_at < HOUR:
            return
        self._swept_at = now
        for step, periods in self._sums.items():
            for at in [at for at in periods if at < now - KEPT_S[step]]:
                del periods[at]

    # -- questions -----------------------------------------------------------------------------------------------

    def since(self, at: float) -> list[Sums]:
        """Return the sums of each minute from that of ``at`` until the next full hour, and of each hour after that. To
        add them up takes 2 ms for a day of three backends, and with minutes alone 34 ms.
        """
        hour = math.ceil(at / HOUR) * HOUR
        minutes = [its for began, its in self._sums[MINUTE].items() if at - MINUTE < began < hour]
        hours = [its for began, its in self._sums[HOUR].items() if began >= hour]
        return [sums for period in (*minutes, *hours) for sums in period.values()]

    @property
    def ever(self) -> Sums:
        return total(self._sums[EVER].get(0, {}).values())

    def names(self) -> tuple[list[str], list[str]]:
        """Return the names of the backends, and those of the models, that have any sums, both sorted."""
        keys = self._sums[EVER].get(0, {})
        return sorted({backend for backend, _ in keys} - {""}), sorted({model for _, model in keys} - {""})

    def points(self, span: str, now: float, backend: str = "", model: str = "") -> Iterator[tuple[int, Sums]]:
        """Yield the beginning and the sums of each point of a plot, oldest first. ``span``: a key of ``SPANS``, which
        ends ``now``. ``backend``, ``model``: only theirs; empty: of all. A point without requests is left out. Each
        point is computed when the iterator comes to it: a day takes 30 ms in all.
        """
        back_s, step = SPANS[span]
        periods = self._sums[MINUTE if step < HOUR else HOUR]
        parts: dict[int, list[int]] = {}
        for at in sorted(at for at in periods if at > now - back_s - step):
            parts.setdefault(at // step * step, []).append(at)
        for began, ats in parts.items():
            its = [
                sums
                for at in ats
                for (of_backend, of_model), sums in periods.get(at, {}).items()
                if not (of_backend or of_model)  # the disk's
                or (backend in ("", of_backend) and model in ("", of_model))
            ]
            if its:
                yield began, total(its)
