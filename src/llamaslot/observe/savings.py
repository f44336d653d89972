"""How much prefill reused tokens have saved, by the learned rate, and how sure that is."""

from __future__ import annotations

from llamaslot.scheduling.cost import PrefillRate

_LOOK_AGAIN = 64  # requests for which a figure of the same rate holds


class Savings:
    """The savings of one backend by its learned rate of prefill."""

    def __init__(self) -> None:
        self._error, self._n_left = 0.0, 0

    def of(self, rate: PrefillRate, n_reused: int) -> tuple[float, float]:
        """The seconds that ``n_reused`` tokens at the beginning of a prompt would have taken, and how far off that may
        be. Nothing is claimed while no prefill was seen.
        """
        if not n_reused or not rate.known:
            return 0.0, 0.0
        if not self._n_left:
            self._error, self._n_left = error_share(rate), _LOOK_AGAIN
        self._n_left -= 1
        saved_s = rate.seconds(0, n_reused)
        return saved_s, saved_s * self._error


def error_share(rate: PrefillRate) -> float:
    """The mean distance of the observed prefills from the line fitted to them, as a share, weighted by tokens. Errors
    of single prefills are taken as all in the same direction: that of a sum is no smaller.
    """
    off = n_tokens = 0.0
    for start, end, seconds, _ in rate.to_json()["samples"]:
        off += (end - start) * min(abs(seconds / max(rate.seconds(start, end), 1e-9) - 1), 1.0)
        n_tokens += end - start
    return off / n_tokens if n_tokens else 0.0
