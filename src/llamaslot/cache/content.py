"""What a slot or a snapshot holds."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from llamaslot.cache.ids import count, head
from llamaslot.cache.namespaces import SHARED, Space


class Kind(enum.StrEnum):
    """What a snapshot is cut for."""

    LEAF = "leaf"  # a conversation, as far as it has gone
    TRUNK = "trunk"  # exactly what several conversations begin with


@dataclass(frozen=True, slots=True)
class Content:
    """What a slot holds, as far as it is known.

    ``tokens`` is a prefix of the truth: the tokens of an answer are not known until a save tells them.
    ``is_exact`` says that nothing follows; else ``n_more`` tokens do, 0 when not even their number is known.
    ``checkpoints``: token counts to which a model that cannot rewind can go back. ``snapshot``: the snapshot of the
    same conversation, if any; ``is_dirty``: the slot holds more than it. ``space``: where all this was computed.
    ``has_media``: what follows the tokens begins with a medium, so it is never saved.
    """

    tokens: bytes = b""
    is_exact: bool = True
    is_dirty: bool = False
    checkpoints: tuple[int, ...] = ()
    snapshot: str | None = None
    n_more: int = 0
    space: Space = SHARED
    has_media: bool = False

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    @property
    def n_held(self) -> int:
        """What a save would write, in tokens."""
        return self.n_tokens + self.n_more

    def may_hold(self, n_tokens: int) -> bool:
        """Whether there may be so many, the unknown ones included."""
        return self.n_held >= n_tokens or not (self.is_exact or self.n_more)

    def head(self, n_tokens: int) -> Content:
        """What is left when only the first ``n_tokens`` are sure: whatever follows them is unknown."""
        kept = tuple(at for at in self.checkpoints if at <= n_tokens)
        return replace(self, tokens=head(self.tokens, n_tokens), checkpoints=kept, is_exact=False, n_more=0)


NOTHING = Content()
