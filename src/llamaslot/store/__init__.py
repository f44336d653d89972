"""Snapshots on disk: writing, finding, reading, evicting and repairing them."""

from llamaslot.store.acceptance import Reservation, SavedSlot
from llamaslot.store.catalog import Catalog
from llamaslot.store.directory import DirectoryUnusable, NotShared, prove_shared
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.sidecar import Snapshot, WithTokens
from llamaslot.store.slot_file import SlotFile, read_slot_file

__all__ = [
    "Catalog",
    "DirectoryUnusable",
    "NotShared",
    "QuotaExceeded",
    "Reservation",
    "SavedSlot",
    "SlotFile",
    "Snapshot",
    "WithTokens",
    "prove_shared",
    "read_slot_file",
]
