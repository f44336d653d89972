"""What the status page tells of a backend."""

from __future__ import annotations

from typing import Any

from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.leases import Leases
from llamaslot.backend.slot_table import SlotTable


def status_of(backend: Backend) -> dict[str, Any]:
    """Model, slots and warnings at present, as JSON for ``/llamaslot/status``; ``http.openapi`` describes it. No
    content of slots.
    """
    session, table = backend.session, backend.leases.table
    return {
        "name": backend.name,
        "health": backend.health.value,
        "drain": backend.drain.state,
        "model": session.model_name if session else None,
        "n_ctx": table.n_ctx if table else None,
        "cache_kind": table.cache_kind.value if table else None,
        "warnings": list(session.warnings) if session else [],
        "assist": _assist_status(session) if session else None,
        "slots": _slot_status(backend.leases, table) if table and table.is_assisted else [],
    }


def _slot_status(every: Leases, table: SlotTable) -> list[dict[str, Any]]:
    # Those with a slot: an exclusive request has none until llama-server has chosen.
    leases = {its.slot_id: its for its in every.leases if its.table is table and its.slot is not None}
    prefills = {
        slot_id: {"n_done": lease.n_done, "n_tokens": lease.request.n_tokens}
        for slot_id, lease in leases.items()
        if lease.is_long
    }
    return [
        {
            "id": slot.id,
            "state": slot.state.value,
            "n_tokens": slot.content.n_tokens,
            "is_dirty": slot.content.is_dirty,
            "is_worth_saving": table.worth.is_worth_saving(slot),
            "prefill": prefills.get(slot.id),
            "user": (leases[slot.id].request.user.id or None) if slot.id in leases else None,
        }
        for slot in table.slots
    ]


def _assist_status(session: ServerSession) -> dict[str, Any]:
    """Whether llamaslot chooses slots, and if not, why and how to change that."""
    if session.aside is None:
        return {"is_on": True, "why": None, "remedy": None}
    return {"is_on": False, "why": session.aside.why, "remedy": session.aside.remedy}
