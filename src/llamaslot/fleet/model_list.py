"""Makes the list of models and their states, in the form of ``/v1/models``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llamaslot.backend.backend import Backend
from llamaslot.backend.health import Health
from llamaslot.fleet.pool import Pool


def model_list(
    known: Sequence[Pool],
    backends: Mapping[str, Backend],
    expected: Mapping[str, str],
    aliases: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return the entries of the list. ``known``: the pools whose models are known. ``expected``: names that backends
    will tell once their models are loaded, each with its backend. ``aliases``: configured names, each with its target.
    """
    entries: dict[str, dict[str, Any]] = {}
    for pool in known:
        for name, entry in _entries(pool):
            entries.setdefault(name, entry)
    first = dict[str, str]()  # by backend: the first of its expected names, which is no alias
    for name, backend in expected.items():
        first.setdefault(backend, name)
    for backend, name in first.items():
        if (member := backends[backend]).last_session is None:
            entries.setdefault(name, {**_unknown(), "id": name, "status": {"value": _state([member])}})
    for alias, target in aliases.items():
        if alias in entries:
            continue
        found = entries.get(target)
        if found is None and target in backends:
            told = [entry for pool in known if target in pool.backends for _, entry in _entries(pool)]
            found = told[0] if told else None
        entries[alias] = {**(found or _unknown()), "id": alias}
    return list(entries.values())


def _unknown() -> dict[str, Any]:
    return {"object": "model", "owned_by": "llamacpp", "status": {"value": "unavailable"}}


def _entries(pool: Pool) -> Iterator[tuple[str, dict[str, Any]]]:
    state = _state(pool.once_connected)
    for session in pool.sessions:
        if session.names:
            yield session.names[0], {**session.entry, "status": {"value": state}}


def _state(backends: Sequence[Backend]) -> str:
    """Return the state of a model with these backends, in the words of llama-server's router mode."""
    backends = [backend for backend in backends if not backend.leases.is_drained]
    states = {backend.health for backend in backends}
    if Health.UP in states:
        return "loaded"
    is_loaded = any(backend.health is Health.DOWN and backend.presence.is_coming for backend in backends)
    if Health.CONNECTING in states or is_loaded:
        return "loading"
    return "unloaded" if Health.ASLEEP in states else "unavailable"
