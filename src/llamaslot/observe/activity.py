"""The record of one request that has ended, for the page, its history and ``/llamaslot/activity``, and in words why it
cost what it did. It has numbers and names, and text of prompts only if ``log.prompts`` lets the journal quote it.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from llamaslot.observe.journal import Act, Decision, Waited
from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.prefill_rate import PrefillRate
from llamaslot.sizes import readable_seconds, readable_size

_LOOK_AGAIN = 64  # requests for which a figure of the same rate holds
_FEW = 3  # prefills: a line through fewer has no distance from them, which says nothing
_LITTLE = 0.02  # of a prompt: fewer reused tokens than this share are no reason for its cost
_TOLD_S = 0.05  # shorter steps are no reason why a request was slow


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


# -- in words ------------------------------------------------------------------------------------------------------


def in_words(activity: Activity, acts: list[Act]) -> str:
    """Return in words why a request's prompt cost what it did. There are seven cases:

    1. llama-server chose the slot.
    2. The request had no slot.
    3. The prompt differs from cached text early, and that was expensive.
    4. A snapshot was restored.
    5. The slot held a prefix of the prompt.
    6. Nothing was cached, or almost nothing.
    7. llama-server has not told what it reused.
    """
    n, n_reused = activity.n_prompt, activity.n_reused
    if activity.source == Source.SERVER.value:
        told = "llama-server chose the slot"
        return told if n_reused is None else f"{told}: {n_reused:,} of {n:,} tokens reused"
    if activity.slot is None and activity.backend is not None:
        return "llama-server chose the slot"
    if activity.slot is None:
        return "it left the queue" if activity.queued_s >= _TOLD_S else "it needed no slot"
    if activity.diverged:
        return differs(activity.diverged)
    if n_reused is None:
        return f"slot {activity.slot}; its answer had not begun"
    restored = next((act for act in acts if act.step == "restore" and act.is_done), None)
    if restored is not None and n_reused:
        instead = f" instead of {readable_seconds(activity.saved_s)} of prefill" if activity.saved_s else ""
        return (
            f"restored {readable_size(restored.size_bytes)} in {readable_seconds(restored.seconds)}{instead}: "
            f"{n_reused:,} of {n:,} tokens"
        )
    if n_reused >= max(n * _LITTLE, 1):
        return f"slot {activity.slot} held {n_reused:,} of {n:,} tokens"
    if n_reused:
        return f"only {n_reused:,} of its {n:,} tokens were cached"
    return f"nothing of it was cached: all {n:,} tokens computed"


def differs(diverged: Mapping[str, Any]) -> str:
    """Return in words where a prompt differs from cached text: ``differs at token 16,276, in the system
    message: …``.
    """
    lost = diverged.get("n_lost") or 0
    again = f": {lost:,} cached tokens behind it computed again" if lost else ""
    match diverged.get("why"):
        case "went back":
            return f"the conversation went back to token {diverged['at']:,}, in {_place(diverged)}"
        case "checkpoint":
            again = f": this model rewinds to checkpoints only, {lost:,} tokens before it computed again"
        case _:
            pass
    return f"differs at token {diverged['at']:,}, in {_place(diverged)}{again}"


def _place(diverged: Mapping[str, Any]) -> str:
    match diverged.get("where"):
        case "system":
            return "the system message"
        case "tools":
            return "the tools"
        case "message":
            return f"message {diverged.get('message')} ({diverged.get('role')})"
        case _:
            return "the prompt"


def stages(
    decisions: list[Decision], began: float, sent_at: float | None, first_s: float | None, total_s: float
) -> list[Stage]:
    """Return the timeline of a request from its ``decisions``. It arrived at ``began`` and was sent in its last slot at
    ``sent_at`` (None: it was not), both by the clock of the decisions. From ``began``, its first token came after
    ``first_s`` seconds (None: none came), its end after ``total_s``. Steps without duration are left out.
    """
    found: list[Stage] = []

    def add(name: str, begin_s: float, took_s: float, note: str = "", is_done: bool = True) -> None:
        if took_s > 0:
            found.append(Stage(name, round(max(begin_s, 0.0), 4), round(took_s, 4), note, is_done))

    if decisions:
        add("read", 0.0, decisions[0].since - began, "body read, prompt tokenized")
    for one in decisions:
        add("queue", one.since - began, one.queued_s, _waits(one.waits) if one.queued_s >= _TOLD_S else "")
        for act, ended in zip(one.acts, one.act_ends, strict=True):
            begin_s = ended - began - act.seconds - act.waited_s
            if act.waited_s >= _TOLD_S:
                add(
                    "turn",
                    begin_s,
                    act.waited_s,
                    f"before {_NAMES.get(act.step, act.step)}: {_gave_way(act)}",
                )
            add(act.step, begin_s + act.waited_s, act.seconds, _about(act), act.is_done)
    if sent_at is not None and sent_at > began:
        sent_s = sent_at - began
        add(
            "prompt",
            sent_s,
            (total_s if first_s is None else first_s) - sent_s,
            "llama-server reads the prompt",
        )
    if first_s is not None:
        add("answer", first_s, total_s - first_s)
    return sorted(found, key=lambda stage: stage.begin_s)


_NAMES = {"save": "a save", "keep": "a save", "restore": "a restore", "prefill": "its prefill"}


def _about(act: Act) -> str:
    parts = [f"{act.n_tokens:,} tokens"] if act.n_tokens else []
    parts += [readable_size(act.size_bytes)] if act.size_bytes else []
    times = "once" if act.n_interruptions == 1 else f"{act.n_interruptions} times"
    parts += [f"stopped {times} for others"] if act.n_interruptions else []
    return ", ".join(parts) if act.is_done else ", ".join(["failed", *parts])


def _gave_way(act: Act) -> str:
    if act.step != "prefill":
        return "one save or restore runs at a time"
    if act.paused_s >= act.waited_s / 2:
        return "running answers came first"
    return "other prompts and short requests came first"


def _waits(waits: list[Waited]) -> str:
    if not waits:
        return "no slot was free for it"
    what = waits[-1].what
    if what.snapshot is not None and what.snapshot.startswith("prefix-"):
        return "for a prefix that another request computes"
    return f"for slot {what.slot.id} of {what.slot.backend}, which holds {what.n_reused:,} of its tokens"
