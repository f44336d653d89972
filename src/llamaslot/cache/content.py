"""What a slot or a snapshot holds."""

from __future__ import annotations

import enum

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import count, head
from llamaslot.cache.namespaces import SHARED, Namespace


class SnapshotKind(enum.StrEnum):
    """What a snapshot holds: one conversation, or a prefix that several conversations share."""

    LEAF = "leaf"  # a conversation, up to the moment of the save
    TRUNK = "trunk"  # only the common beginning of several conversations


class Content(Struct, frozen=True):
    """The known content of a slot.

    ``tokens``: the known prefix of what the slot holds; the tokens of an answer are unknown until a save reads them
    back. ``is_exact``: nothing follows ``tokens``. Otherwise ``n_more`` tokens follow, 0 if their number is unknown.
    ``checkpoints``: token counts to which a model that cannot rewind freely can return. ``snapshot``: the snapshot of
    the same conversation, if there is one. ``is_dirty``: the slot holds more than that snapshot. ``namespace``: the
    namespace in which the content was computed. ``has_media``: a medium (image, audio) follows ``tokens``; such
    content is never saved.
    """

    tokens: bytes = b""
    is_exact: bool = True
    is_dirty: bool = False
    checkpoints: tuple[int, ...] = ()
    snapshot: str | None = None
    n_more: int = 0
    namespace: Namespace = SHARED
    has_media: bool = False

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)

    @property
    def n_held(self) -> int:
        """The number of tokens in the slot: the known ones and the ``n_more`` behind them. Too small if the number of
        the latter is unknown.
        """
        return self.n_tokens + self.n_more

    def may_hold(self, n_tokens: int) -> bool:
        """True if the slot holds ``n_tokens`` tokens, unknown ones included, or may hold them because it is unknown
        how many tokens follow the known ones.
        """
        return self.n_held >= n_tokens or not (self.is_exact or self.n_more)

    def followed_by(self, n_more: int) -> Content:
        """The same content with ``n_more`` unknown tokens behind its known ones."""
        # ``replace`` would take five times as long.
        return Content(
            self.tokens, False, self.is_dirty, self.checkpoints, self.snapshot, n_more, self.namespace, self.has_media
        )  # fmt: skip

    def cut_back(self, n_tokens: int, snapshot: str | None, namespace: Namespace) -> Content:
        """What the slot surely holds after llama-server has begun another prompt in it: the first ``n_tokens``, which
        both prompts share. What follows is unknown, and counts as not saved. ``snapshot`` and ``namespace``: those of
        the new content.
        """
        kept = self.checkpoints and tuple(at for at in self.checkpoints if at <= n_tokens)
        return Content(head(self.tokens, n_tokens), False, True, kept, snapshot, 0, namespace, self.has_media)

    def head(self, n_tokens: int) -> Content:
        """The content after the slot was truncated to its first ``n_tokens``; what follows them is unknown."""
        kept = tuple(at for at in self.checkpoints if at <= n_tokens)
        return replace(self, tokens=head(self.tokens, n_tokens), checkpoints=kept, is_exact=False, n_more=0)


NOTHING = Content()
