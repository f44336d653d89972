"""Decisions and numbers in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamaslot.observe.activity import Activity, Stage
from llamaslot.observe.journal import Act, Decision, Waited
from llamaslot.scheduling.plan import Source
from llamaslot.sizes import readable_size

_LITTLE = 0.02  # of a prompt: fewer reused tokens than this share are no reason for its cost
_TOLD_S = 0.05  # shorter steps are no reason why a request was slow


def seconds(value: float) -> str:
    """Return a time span as text: ``4 ms``, ``0.62 s``, ``71 s``, ``12 min``, ``3.4 h``."""
    if value < 0.1:
        return f"{value * 1000:.0f} ms"
    if value < 10:
        return f"{value:.2g} s" if value < 1 else f"{value:.1f} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def decision(activity: Activity, acts: list[Act]) -> str:
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
        instead = f" instead of {seconds(activity.saved_s)} of prefill" if activity.saved_s else ""
        return (
            f"restored {readable_size(restored.size_bytes)} in {seconds(restored.seconds)}{instead}: "
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
