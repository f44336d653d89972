"""What ``llamaslot doctor`` learns from the status and the journal of a running llamaslot. No slot is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamaslot.cli.doctor.findings import Finding
from llamaslot.sizes import readable_size

Json = Mapping[str, Any]

_ENOUGH = 20  # decisions from which something follows
_WITHIN_S = 600.0
_WAITED_S, _WAITED_SHARE = 1.0, 0.25
_MISSED_SHARE = 0.2
_LONG_PAUSE_S = 2.0


def of_backend(backend: Json) -> Iterator[Finding]:
    """Yield findings about one backend of the status: its health, whether llamaslot stands aside, and its warnings."""
    name, assist = backend["name"], backend["assist"]
    if backend["health"] not in ("up", "asleep"):
        why = backend.get("why_down") or f"llama-server is {backend['health']}"
        yield Finding(f"{name}: connection", "fault", f"{why}; its requests get 503")
        return
    if assist is not None and not assist["is_on"]:
        told = f"{assist['why']}: llamaslot stands aside, nothing is kept on disk"
        yield Finding(f"{name}: slots", "fault", told, assist["remedy"])
        return
    for warning in backend["warnings"]:
        yield Finding(f"{name}: slot files", "fault", warning)
    if not backend["warnings"]:
        told = (
            f"{len(backend['slots'])} slots of {backend['n_ctx']:,} tokens keep their contexts, and are saved"
        )
        yield Finding(f"{name}: slots", "ok", told if backend["slots"] else backend["health"])


def of_journal(status: Json, decisions: Sequence[Json]) -> Iterator[Finding]:
    """Yield four findings: are there enough slots, are they large enough, are contexts where llamaslot left them, are
    saves and restores fast enough.
    """
    yield _slots(status, decisions)
    yield _context(status)
    yield _found_again(decisions)
    yield _save_and_restore_speed(decisions)


def _slots(status: Json, decisions: Sequence[Json]) -> Finding:
    check = "number of slots"
    n_slots = sum(len(backend["slots"]) for backend in status["backends"])
    asked = [decision for decision in decisions if decision["user"]]
    if len(asked) < _ENOUGH or not n_slots:
        return Finding(
            check, "skipped", f"the journal has too few requests ({len(asked)}): run it again after some use"
        )
    newest = max(decision["at"] for decision in asked)
    recent = [decision for decision in asked if newest - decision["at"] <= _WITHIN_S]
    users = {decision["user"] for decision in recent}
    waited = [decision for decision in recent if decision["queued_s"] >= _WAITED_S]
    if len(users) > n_slots and len(waited) >= _WAITED_SHARE * len(recent):
        longest = max(decision["queued_s"] for decision in waited)
        return Finding(
            check, "warning",
            f"{len(users)} users within ten minutes share {n_slots} slots: {len(waited)} of {len(recent)} requests"
            f" waited, up to {longest:.0f} s",
            f"llama-server -np {len(users)}, if its memory allows (-c is for all slots together: raise it likewise)",
        )  # fmt: skip
    return Finding(check, "ok", f"{n_slots} slots for {len(users)} users within ten minutes")


def _context(status: Json) -> Finding:
    check, refused = "context per slot", status["too_long"]
    if not refused["n"]:
        return Finding(check, "ok", "no prompt was refused as too long")
    n_ctx = max((backend["n_ctx"] or 0 for backend in status["backends"]), default=0)
    n_slots = max((len(backend["slots"]) for backend in status["backends"]), default=0) or 1
    wanted = -(-(refused["n_tokens"] + 4096) // 4096) * 4096  # and room for an answer
    return Finding(
        check, "warning",
        f"{refused['n']} prompts of up to {refused['n_tokens']:,} tokens were refused: a slot has {n_ctx:,}",
        f"llama-server -c {wanted * n_slots} (for {n_slots} slots together), or fewer slots (-np)",
    )  # fmt: skip


def _found_again(decisions: Sequence[Json]) -> Finding:
    """Return a finding: are contexts still in the slots where llamaslot left them? Other clients, a RAM cache and
    context shift remove them.
    """
    check = "contexts found again"
    told = [
        decision
        for decision in decisions
        if decision["n_reused"] is not None and (decision["n_expected"] or 0) >= 256
    ]
    if len(told) < _ENOUGH:
        return Finding(
            check,
            "skipped",
            "the journal has too few requests that continue one: run it again after some use",
        )
    missed = [decision for decision in told if decision["n_reused"] < decision["n_expected"] / 2]
    if len(missed) > _MISSED_SHARE * len(told):
        return Finding(
            check, "fault",
            f"{len(missed)} of {len(told)} contexts were not where llamaslot left them, and were computed again",
            "no other client may use this llama-server; start it with --cache-ram 0 --no-cache-idle-slots, without"
            " --context-shift and --cache-reuse",
        )  # fmt: skip
    return Finding(check, "ok", f"{len(told) - len(missed)} of {len(told)} were where llamaslot left them")


def _save_and_restore_speed(decisions: Sequence[Json]) -> Finding:
    """Return bytes per second of the saves and restores in the journal, and how long they stopped all streams."""
    check = "save and restore"
    acts = [
        act
        for decision in decisions
        for act in decision["acts"]
        if act["is_done"] and act["size_bytes"] and act["seconds"]
    ]
    each = {step: [act for act in acts if act["step"] == step] for step in ("save", "restore")}
    if not each["save"]:
        return Finding(check, "skipped", "the journal has no save yet: run it again after some use")
    told = ", ".join(f"{step} {_rate(found)} ({len(found)})" for step, found in each.items() if found)
    pause_s = max(act["seconds"] for act in acts)
    text = f"{told}; streams stood still for up to {pause_s:.1f} s"
    if pause_s > _LONG_PAUSE_S:
        return Finding(
            check, "warning", text, "slot_save_path on a faster disk, or a larger store.idle_save_s"
        )
    return Finding(check, "ok", text)


def _rate(acts: Sequence[Json]) -> str:
    n_bytes, seconds = sum(act["size_bytes"] for act in acts), sum(act["seconds"] for act in acts)
    return f"{readable_size(n_bytes / seconds)}/s"
