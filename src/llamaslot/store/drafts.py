"""Room that is promised to a snapshot which is still being written."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from llamaslot.errors import LlamaslotError
from llamaslot.store.sidecar import WithTokens


@dataclass(frozen=True, slots=True)
class Draft:
    """Room for one snapshot: llama-server saves as ``part_name``, then ``commit`` or ``abandon``."""

    id: str
    part_name: str
    size_bytes: int


@dataclass(slots=True)
class Held:
    """The account of a draft: bytes taken for it, what must stay, and its commit once that has begun."""

    size_bytes: int
    keep: frozenset[str]
    idle_s: float = 0.0
    commit: asyncio.Task[WithTokens | LlamaslotError] | None = None
