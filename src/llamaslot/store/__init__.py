"""Snapshots on disk."""

from llamaslot.store.catalog import Catalog
from llamaslot.store.directory import DirectoryUnusable, NotShared, prove_shared
from llamaslot.store.drafts import Draft
from llamaslot.store.header import SlotFile, read_slot_file
from llamaslot.store.room import QuotaExceeded
from llamaslot.store.shelf import Prospect
from llamaslot.store.sidecar import Snapshot, WithTokens

__all__ = [
    "Catalog",
    "DirectoryUnusable",
    "Draft",
    "NotShared",
    "Prospect",
    "QuotaExceeded",
    "SlotFile",
    "Snapshot",
    "WithTokens",
    "prove_shared",
    "read_slot_file",
]
