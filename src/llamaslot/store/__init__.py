"""Snapshots on disk: writing, finding, reading, evicting and repairing them."""

from llamaslot.store.catalog import Catalog
from llamaslot.store.commit import Reservation, SavedSlot
from llamaslot.store.directory_check import NotShared, prove_shared
from llamaslot.store.directory_lock import DirectoryUnusable
from llamaslot.store.quota import QuotaExceeded
from llamaslot.store.slot_file import SlotFile, read_slot_file
from llamaslot.store.snapshot import Snapshot, WithTokens

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
