"""Whether what a slot holds should be written to disk now.

A save is paid once, and what was not saved is paid for each time that its owner comes back: rent and price are weighed
as in the ski-rental problem. Saved as soon as computing again what the disk lacks takes as long as the save, a context
that grows by ``c`` seconds a turn and takes ``s`` to save is saved every ``s / c`` turns, and no turn costs more than a
save. Simulated days in which saves counted 0.5 to 3 times had longer waits.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsaved:
    """What a slot holds and the disk does not, in seconds.

    ``lacking_s``: to compute it again, behind the best that is on disk; ``save_s``: to save the whole context.
    ``gain``: the worth of having it on disk less the worth of all that would be evicted for it, in seconds saved per
    second; below 0 there is no better place for it than where it is.
    """

    lacking_s: float
    save_s: float
    gain: float = 0.0


def is_worth(unsaved: Unsaved) -> bool:
    """Whether to save it now, before its slot is overwritten or while nobody wants anything."""
    return unsaved.gain >= 0 and unsaved.lacking_s > unsaved.save_s
