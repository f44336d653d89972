"""The record of one request that has ended, for the page, its history and ``/llamaslot/activity``. It has numbers and
names, and text of prompts only if ``log.prompts`` lets the journal quote it.
"""

from __future__ import annotations

import enum
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from llamaslot.scheduling.prefill_rate import PrefillRate

_LOOK_AGAIN = 64  # requests for which a figure of the same rate holds
_FEW = 3  # prefills: a line through fewer has no distance from them, which says nothing


class Outcome(enum.StrEnum):
    """How a request ended."""

    DONE = "done"
    LEFT = "left"  # its client went away
    CANCELLED = "cancelled"  # by an operator
    REFUSED = "refused"  # a fault of the request, or a limit that its user has reached
    UNSERVED = "unserved"  # llama-server failed or was away, or the wait was too long
    FAULT = "fault"  # llamaslot's own: there should be none


class Stage(Struct, frozen=True):
    """One step of a request: it began ``begin_s`` after the request's arrival and took ``seconds``. ``note``: details
    in words; ``is_done`` is false if the step failed.
    """

    name: str
    begin_s: float
    seconds: float
    note: str = ""
    is_done: bool = True


class Activity(Struct, kw_only=True):
    """A request that has ended. ``at``: when it arrived, in seconds since 1970. ``client``: its User-Agent header.

    Token counts are llama-server's. ``n_prompt``: tokens of the prompt; ``n_reused``: those that llama-server did not
    compute again, None if it did not report that; ``n_computed``: those that it computed, in ``prefill_s`` seconds.
    ``n_answered``: tokens of the answer, which took ``decode_s`` seconds. ``queued_s``: seconds in the queue, all
    placements together. ``first_s`` and ``total_s``: seconds from the arrival to the first token and to the end.
    ``saved_s``: seconds of prefill that the reused tokens would have taken, plus or minus ``saved_error_s``. ``text``:
    why the prompt cost what it did, in words.
    """

    id: str
    at: float
    user: str = ""
    model: str = ""
    client: str = ""
    route: str = ""
    backend: str | None = None
    slot: int | None = None
    status: int = 200
    outcome: Outcome = Outcome.DONE
    error: str = ""
    source: str = ""
    n_prompt: int = 0
    n_reused: int | None = None
    n_computed: int = 0
    n_answered: int = 0
    queued_s: float = 0.0
    first_s: float | None = None
    total_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    saved_s: float = 0.0
    saved_error_s: float = 0.0
    moved_s: float = 0.0  # seconds of saves and restores on its way
    waited_s: float = 0.0  # seconds in which its steps waited for other requests
    text: str = ""
    stages: list[Stage] = field(default_factory=list)
    diverged: dict[str, Any] | None = None
    serial: int = 0  # ascending; unique within this process and its history

    def row(self) -> dict[str, Any]:
        """Return all fields but ``stages`` and ``diverged``, for a row of a table."""
        told = asdict(self)
        del told["stages"], told["diverged"]
        return told

    def to_json(self) -> dict[str, Any]:
        """Return all fields, those of stages included."""
        return {**self.row(), "stages": [asdict(stage) for stage in self.stages], "diverged": self.diverged}


class Savings:
    """Computes the prefill time that reuse saved on one backend, from the backend's learned prefill rate."""

    def __init__(self) -> None:
        self._error, self._n_left = 0.0, 0

    def of(self, rate: PrefillRate, n_reused: int) -> tuple[float, float]:
        """Return the seconds that computing the first ``n_reused`` tokens of a prompt would have taken, and the likely
        error of these seconds (plus or minus). Both are 0 while no prefill was observed.
        """
        if not n_reused or not rate.known:
            return 0.0, 0.0
        if not self._n_left:
            self._error = error_share(rate)
            self._n_left = _LOOK_AGAIN if self._error < 1 else 1
        self._n_left -= 1
        saved_s = rate.long_seconds(0, n_reused)
        return saved_s, saved_s * self._error


def error_share(rate: PrefillRate) -> float:
    """Return how far the observed prefills are from the rate that was fitted to them: the mean relative error of their
    seconds, weighted by tokens. 1 after one or two prefills, 0 after none.

    All errors are assumed to have the same direction. Then the sum of many prefills has the same relative error.
    """
    samples = rate.long_samples
    if 0 < len(samples) < _FEW:
        return 1.0
    off = n_tokens = 0.0
    for start, end, seconds in samples:
        off += (end - start) * min(abs(seconds / max(rate.long_seconds(start, end), 1e-9) - 1), 1.0)
        n_tokens += end - start
    return off / n_tokens if n_tokens else 0.0
