"""Tells when llamaslot leaves the choice of slots to llama-server, why, and how the operator can change that.

With *assist* on, llamaslot places each request in a slot, saves, restores and prefills. That helps if slots keep their
content or slot files can be written. If neither is possible, a request that names its slot reuses less than one that
does not: llama-server searches its RAM cache (``--cache-ram``) only if it chooses the slot itself (measured on
xllamacpp 2026.10.11549: 8 users on 4 slots with default flags reuse 1.00 directly, 0.06 to 0.10 where requests name
their slots). Then llamaslot *stands aside*: it passes requests on unchanged, and saves, erases and overwrites no slot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec import Struct

_SERVER_FLAGS = "-np {n} --no-kv-unified --no-cache-idle-slots --cache-ram 0 --slot-save-path DIR"
_SWITCH_ON = (
    "Start it with: llama-server … " + _SERVER_FLAGS + " --metrics, and set its slot_save_path to DIR"
)
_BRINGS = (
    "contexts are then found again after a restart and beyond what RAM holds, and long prompts give way to other"
    " requests"
)
_PASSES = "Its log may tell why. llamaslot looks again when a slot is idle"
_MANY_LOST = 3  # a single loss may be due to a late child of ``n`` > 1, or to another client's request
_LOST_WITHIN_S = 600.0


class StandingAside(Struct, frozen=True):
    """The reason why llamaslot stands aside (assist is off) at one backend.

    ``why``: what llamaslot has found out about llama-server. ``remedy``: the command or setting that switches assist
    on, and its effect. ``may_end``: the cause may pass, so llamaslot probes again when a slot is idle.
    """

    why: str
    remedy: str
    may_end: bool = False

    def __str__(self) -> str:
        return f"{self.why}; llama-server chooses slots by itself. {self.remedy}"


class LostSlots:
    """Counts slots that have lost their content although llamaslot has not touched them. Causes: llama-server was
    restarted with other flags, or its unified KV cache is full. ``on_many`` is called after three losses in ten
    minutes, to probe llama-server again.
    """

    def __init__(self) -> None:
        self._lost_at: deque[float] = deque(maxlen=_MANY_LOST)
        self.on_many: Callable[[], None] = lambda: None

    def count(self, now: float) -> None:
        """Record that a slot had almost nothing of the tokens that it should have."""
        self._lost_at.append(now)
        if len(self._lost_at) == _MANY_LOST and now - self._lost_at[0] <= _LOST_WITHIN_S:
            self._lost_at.clear()
            self.on_many()


def _remedy(n_slots: int | None) -> str:
    return f"{_SWITCH_ON.format(n=n_slots or 4)}: {_BRINGS}"


def clears_idle_slots(n_slots: int) -> StandingAside:
    return StandingAside(
        "llama-server moves idle slots to its RAM cache when another one starts (unified KV cache, its default)",
        _remedy(n_slots),
    )


def has_better_memory(n_slots: int, lacking: str) -> StandingAside:
    """Return the reason to stand aside because llama-server's own RAM cache is better than slots without files.
    ``lacking``: why slot files cannot be used.
    """
    return StandingAside(
        f"llama-server has a RAM cache, and llamaslot has no slot files to use instead ({lacking})",
        _remedy(n_slots),
    )


def no_slots(n_slots: int | None, answer: str) -> StandingAside:
    return StandingAside(
        f"llama-server does not tell what its slots hold ({answer})",
        f"Leave --no-slots out. {_remedy(n_slots)}",
    )


def not_understood(answer: str) -> StandingAside:
    return StandingAside(
        f"what answers is no llama-server with one model, as llamaslot knows it ({answer})",
        "Point its url at a llama-server that was started with a model (-m), not at its router mode or another"
        f" server. {_remedy(None)}",
    )


def no_completions(answer: str) -> StandingAside:
    return StandingAside(
        f"llama-server does not compute prompts as llamaslot asks for them ({answer})",
        "A server for embeddings or reranking has no contexts to keep: nothing is lost",
    )


def wrong_key(answer: str) -> StandingAside:
    return StandingAside(
        f"llama-server refuses llamaslot's API key ({answer})",
        "Set its api_key or api_key_file to the key that llama-server was started with",
    )


def all_at_work() -> StandingAside:
    return StandingAside(
        "other clients use all slots of llama-server",
        "llamaslot looks again when one is idle; no other client should use the same llama-server",
        may_end=True,
    )


def passing_fault(answer: str) -> StandingAside:
    return StandingAside(
        f"llama-server has failed while llamaslot was finding out what it can do ({answer})",
        _PASSES,
        may_end=True,
    )


def silent(error: Exception) -> StandingAside:
    return StandingAside(
        f"a small prompt of llamaslot's own was not computed ({error})",
        _PASSES,
        may_end=True,
    )


def mistake(error: Exception) -> StandingAside:
    return StandingAside(
        f"llamaslot could not find out what llama-server can do ({error!r})",
        "The log has the traceback above this line; please report it. llamaslot looks again when a slot is idle",
        may_end=True,
    )
