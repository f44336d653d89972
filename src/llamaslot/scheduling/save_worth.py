"""Whether the content of a slot should be saved to disk now.

A save is paid once; missing content is paid for at each return of its owner: rent and price, as in the ski-rental
problem. A slot is saved as soon as recomputing what the disk lacks takes as long as the save. So a context that grows
by ``c`` seconds a turn and takes ``s`` to save is saved every ``s / c`` turns, and no turn costs more than a save.

Simulated (60 users on 4 slots, a day): saving after every answer writes twice as much and makes all requests wait a
fifth longer, for half of the recomputed tokens. Counting a save 1.5 times writes a fifth less, twice a third less,
for 2 and 6 % longer waits. Not saving what is worth less than what would be evicted for it recomputes more and writes
no less.
"""

from __future__ import annotations

from msgspec import Struct


class Unsaved(Struct, frozen=True):
    """The content of a slot that the disk lacks, in seconds.

    ``lacking_s``: to recompute it from the best snapshot on disk; ``save_s``: to save the whole context.
    """

    lacking_s: float
    save_s: float


def is_worth(unsaved: Unsaved) -> bool:
    """Whether to save it now: before its slot is overwritten, or while the server is idle."""
    return unsaved.lacking_s > unsaved.save_s
