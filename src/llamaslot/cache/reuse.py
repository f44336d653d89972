"""Computes how many tokens of a common prefix llama-server can really reuse, and learns how much of answers it does."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from statistics import median_low
from typing import Any

from msgspec import Struct, field

from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS

# llama-server makes a checkpoint this number of tokens before the end of each prompt that it computes.
CHECKPOINT_BACK = 4
# llama-server keeps 32 checkpoints (--ctx-checkpoints) and creates about three for each turn (a prefill of ours, then
# the request): after nine or ten turns those of the first turn were gone from slot and file (measured with two batch
# sizes).
_N_KEPT = 8
# A sliding window recomputes the token before the checkpoint: of 5,000 tokens 4,995 were reused, 4,996 by a recurrent
# model (measured on xllamacpp 2026.10.11549).
_SWA_BACK = 1
_MOST_WINDOW = 8192  # no known model has a longer one


class CacheKind(enum.Enum):
    """Where a model can rewind to.

    DENSE: any token. RECURRENT: only the exact end of what it holds, or a checkpoint. SWA (sliding window): a
    checkpoint, or a point near the end that its window still reaches.
    """

    __hash__ = object.__hash__  # the enum's own hash is slower: a call in Python

    DENSE = "dense"
    SWA = "swa"
    RECURRENT = "recurrent"


def usable(
    cache_kind: CacheKind,
    n_shared: int,
    n_held: int | None,
    checkpoints: Iterable[int],
    n_prompt: int,
) -> int:
    """The number of tokens that llama-server reuses of a prompt of ``n_prompt`` tokens, if the prompt and the slot's
    content have the first ``n_shared`` tokens in common.

    ``n_held``: the number of tokens in the slot, None if not known exactly. ``checkpoints``: the token counts to which
    a model that cannot rewind freely can return. The last token of a prompt is always computed.
    """
    limit = min(n_shared, n_prompt - 1)
    if limit <= 0:
        return 0
    if cache_kind is CacheKind.DENSE:
        return limit
    # A sliding window cannot surely resume at the exact end: tokens that the window needs may be gone.
    if cache_kind is CacheKind.SWA:
        return max((at - _SWA_BACK for at in checkpoints if _SWA_BACK < at <= limit), default=0)
    if n_held is not None and n_held <= limit:
        return n_held
    return max((at for at in checkpoints if at <= limit), default=0)


def checkpoints_after(kept: Iterable[int], n_reused: int, stops: Iterable[int]) -> tuple[int, ...]:
    """The checkpoints of a slot (token counts, ascending) after llama-server reused ``n_reused`` tokens in it and
    computed prompts that end at each of ``stops``. ``kept``: its checkpoints before.

    Only the ``_N_KEPT`` highest are returned: llama-server may have deleted the others. A checkpoint that is expected
    but missing costs a whole prefill; a start from a shared-prefix snapshot instead costs little.
    """
    made = {stop - CHECKPOINT_BACK for stop in stops if stop - CHECKPOINT_BACK > n_reused}
    return tuple(sorted(made | {at for at in kept if at <= n_reused}))[-_N_KEPT:]


class ReturnedAnswers:
    """Learns how much of an answer comes back in the next prompt.

    The tokens of an answer are unknown until a save reads them back. A follow-up request sends the answer back as text.
    llama-server then finds the whole answer in the slot, unless the template drops a part of it or the text gives other
    tokens.
    """

    KEPT = 16
    LEAST = 3  # answers before their share counts
    SURE = 8  # unchanged answers in a row, after which another one is expected

    def __init__(self) -> None:
        self._n_whole = self.SURE  # number of answers in a row that came back unchanged, at most SURE
        # Of each of the last answers, the share of its tokens that came back.
        self._returned: deque[float] = deque(maxlen=self.KEPT)

    @property
    def are_whole(self) -> bool:
        """True if the next prompt is expected to contain the last answer exactly as it was generated, token for
        token: the last ``SURE`` answers did.
        """
        return self._n_whole >= self.SURE

    def answered(self, n_answer: int, n_returned: int) -> None:
        """Record a follow-up request: of the answer's ``n_answer`` tokens in the slot, its prompt had the first
        ``n_returned``.
        """
        self._n_whole = min(self._n_whole + 1, self.SURE) if n_returned >= n_answer else 0
        self._returned.append(min(max(n_returned / n_answer, 0.0), 1.0))

    def likely(self, n_answer: int) -> int:
        """The number of an answer's ``n_answer`` tokens, from its beginning, that the next prompt is expected to
        contain: by the median share of recent answers, or all tokens while fewer than ``LEAST`` answers are known.
        """
        share = median_low(self._returned) if len(self._returned) >= self.LEAST else 1.0
        return int(share * n_answer)

    def to_json(self) -> dict[str, Any]:
        """What was learned, as JSON: the number of unchanged answers in a row, and the shares of answers that came
        back, the oldest first.
        """
        return {"n_whole": self._n_whole, "returned": list(self._returned)}

    @classmethod
    def from_json(cls, data: object) -> ReturnedAnswers:
        """The inverse of ``to_json``. Invalid parts of ``data`` are ignored."""
        answers = cls()
        parts = data if isinstance(data, Mapping) else {}
        if isinstance(n_whole := parts.get("n_whole"), int):
            answers._n_whole = min(max(n_whole, 0), cls.SURE)
        returned = parts.get("returned")
        for share in returned if isinstance(returned, list) else ():
            if isinstance(share, int | float) and 0 <= share <= 1:
                answers._returned.append(float(share))
        return answers


class ReuseForecast(Struct, frozen=True):
    """How many tokens of a prompt llama-server is expected to reuse, computed before the prompt is sent. All numbers
    are tokens.

    ``n_expected``: what a model of this kind can reuse from the slot. ``n_likely``: ``n_expected``, and the part of the
    last answer that the prompt is likely to contain. ``n_whole``: the reuse if the prompt contains the whole last
    answer, token for token, with its ``n_answer`` tokens; None if the prompt does not continue an answer.
    ``is_rewind``: the slot holds more than ``n_expected``, so llama-server truncates it.
    """

    n_expected: int = 0
    n_likely: int = 0
    n_whole: int | None = None
    n_answer: int = 0
    is_rewind: bool = False


NO_REUSE = ReuseForecast()


class RewindModel(Struct):
    """What is known of one llama-server and its model: where it can rewind to, and whether slot files contain the
    checkpoints of their slots (``keeps_checkpoints``; True if unknown).
    """

    cache_kind: CacheKind = CacheKind.DENSE
    window: int | None = None  # tokens of a sliding window; None if no model file tells
    keeps_checkpoints: bool = True
    returned: ReturnedAnswers = field(default_factory=ReturnedAnswers)

    @property
    def is_rewindable(self) -> bool:
        return self.cache_kind is CacheKind.DENSE

    @property
    def is_rewound(self) -> bool:
        """True if a slot must be rewound to the end of its prompt before it is saved. Where slot files have no
        checkpoints, a recurrent model can resume only at the exact end of the file, so the next prompt must contain
        everything in the file. It surely contains the prompt; the answer may come back changed.
        """
        return self.cache_kind is CacheKind.RECURRENT and not self.keeps_checkpoints

    def in_file(self, checkpoints: tuple[int, ...]) -> tuple[int, ...]:
        """Those ``checkpoints`` of a slot that its file will contain if it is saved: all, or none."""
        return checkpoints if self.keeps_checkpoints else ()

    def usable(self, n_shared: int, n_held: int | None, checkpoints: tuple[int, ...], n_prompt: int) -> int:
        """As the function ``usable`` for this kind of model."""
        return usable(self.cache_kind, n_shared, n_held, checkpoints, n_prompt)

    def of_slot(self, content: Content, n_shared: int, n_prompt: int) -> int:
        """The reuse in tokens to count on, if a prompt of ``n_prompt`` tokens shares ``n_shared`` with the known tokens
        of a slot with this ``content``.

        1. The prompt seems to continue the slot's answer, the model cannot rewind freely, and answers usually come
           back unchanged (``ReturnedAnswers``): all that the slot holds, the answer included.
        2. The prompt continues the slot's exact end: all that the slot holds.
        3. Else a dense model resumes where the prompt diverges, other models at the last checkpoint before that.
        """
        is_behind = not self.is_rewindable and goes_on_behind(content, n_shared, n_prompt)
        if is_behind and self.returned.are_whole:
            return content.n_held
        n_held = content.n_tokens if content.is_exact else None
        # A sliding window resumes at the exact end too, if the slot holds more than the window (measured: 2,560 of
        # 6,000 tokens, window 512).
        window = _MOST_WINDOW if self.window is None else self.window
        least = window if self.cache_kind is CacheKind.SWA else 0
        if n_held is not None and least < n_held <= n_shared and n_held < n_prompt:
            return n_held
        return self.usable(n_shared, n_held, content.checkpoints, n_prompt)

    def likely_of_slot(self, content: Content, n_shared: int, n_prompt: int) -> int:
        """As ``of_slot``, which is the safe figure, plus the part of the slot's answer that the prompt is likely to
        contain: a model that can rewind to any token reuses that part too, although llamaslot does not know its tokens.
        """
        n_usable = self.of_slot(content, n_shared, n_prompt)
        if not (self.is_rewindable and goes_on_behind(content, n_shared, n_prompt)):
            return n_usable
        return n_usable + self.returned.likely(content.n_more)


def goes_on_behind(content: Content, n_shared: int, n_prompt: int) -> bool:
    """True if a prompt may continue the answer in a slot: it has all known tokens of the slot, and is longer than these
    and the answer's unknown tokens together.
    """
    return content.n_more > 0 and n_shared == content.n_tokens and n_prompt > content.n_held


def has_failed(n_predicted: int, n_reused: int) -> bool:
    """True if llama-server reused less than half of the ``n_predicted`` tokens of a restored snapshot, so that the
    snapshot must be faulty. Never true for a prediction of at most ``NEGLIGIBLE_TOKENS``.
    """
    return n_predicted > NEGLIGIBLE_TOKENS and n_reused < n_predicted / 2


class Strikes:
    """Counts how often in a row each snapshot has failed (``has_failed``). The first failure may be an accident: the
    slot held something else. The second one is not.
    """

    OUT = 2

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()

    def count(self, snapshot: str, n_predicted: int, n_reused: int) -> bool:
        """Record how many tokens of a restored snapshot were reused. True if the snapshot has failed ``OUT`` times in a
        row and must be deleted. A success sets its count to 0.
        """
        if not has_failed(n_predicted, n_reused):
            del self._failures[snapshot]
            return False
        self._failures[snapshot] += 1
        if self._failures[snapshot] < self.OUT:
            return False
        del self._failures[snapshot]
        return True
