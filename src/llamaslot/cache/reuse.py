"""How much of a common prefix llama-server can really use."""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

from llamaslot.cache.content import Content

# llama-server makes a checkpoint this many tokens before the end of each prompt that it computes.
CHECKPOINT_BACK = 4
# It keeps 32 of them (--ctx-checkpoints) and makes about three for each turn (a prefill of ours, then the request):
# after nine or ten turns those of the first were gone, from slot and file (seen running, two sizes of batches).
_N_KEPT = 8
# A sliding window needs the token before the checkpoint again: of 5,000 tokens 4,995 were reused, 4,996 by a recurrent
# model (seen running on xllamacpp 2026.10.11549).
_SWA_BACK = 1
_MOST_WINDOW = 8192  # no model is known to have a longer one


class Memory(enum.Enum):
    """How a model remembers.

    DENSE can go back to any token. RECURRENT can only go on from the exact end of what it holds, or from a checkpoint;
    SWA (sliding window) from a checkpoint, and from near the end as far as its window reaches.
    """

    DENSE = "dense"
    SWA = "swa"
    RECURRENT = "recurrent"


def usable(
    memory: Memory,
    n_shared: int,
    n_held: int | None,
    checkpoints: Iterable[int],
    n_prompt: int,
) -> int:
    """Tokens of a prompt of ``n_prompt`` that need not be computed, where ``n_shared`` are common with what is held.

    ``n_held`` is how much is held, None when that is not known exactly. One token of a prompt is always computed.
    """
    limit = min(n_shared, n_prompt - 1)
    if limit <= 0:
        return 0
    if memory is Memory.DENSE:
        return limit
    # The exact end is no sure place to go on from: what the window still needs may be gone.
    if memory is Memory.SWA:
        return max((at - _SWA_BACK for at in checkpoints if _SWA_BACK < at <= limit), default=0)
    if n_held is not None and n_held <= limit:
        return n_held
    return max((at for at in checkpoints if at <= limit), default=0)


def checkpoints_after(kept: Iterable[int], n_reused: int, stops: Iterable[int]) -> tuple[int, ...]:
    """The checkpoints of a slot after prompts ending at each of ``stops`` were computed on ``n_reused`` tokens.

    Only the latest are counted on: to start from a trunk costs nothing, to find a checkpoint gone costs a prefill.
    """
    made = {stop - CHECKPOINT_BACK for stop in stops if stop - CHECKPOINT_BACK > n_reused}
    return tuple(sorted(made | {at for at in kept if at <= n_reused}))[-_N_KEPT:]


@dataclass(slots=True)
class Tally:
    """Of the prompts that had something to reuse: how many there were, and the tokens predicted and reused."""

    n: int = 0
    n_predicted: int = 0
    n_reused: int = 0


class Predictions:
    """What was predicted to be reused and what was, by the kind of memory and the source: what ``usable`` does not know
    of the build that is running.

    A build that always reuses a few tokens less (n - 5 where n - 1 was predicted) is taken at its word: the usual
    shortfall of the last few is subtracted. Half of them must fall short, and by no more than ``MOST`` tokens: what
    falls far short was not there, and says nothing about the build.
    """

    KEPT = 16
    LEAST = 3  # samples before anything is corrected
    MOST = 64
    SURE = 8  # after an answer that did not come back as it was generated, so many must before that is counted on

    def __init__(self) -> None:
        self._short: dict[tuple[Memory, str], deque[int]] = {}
        self._back: dict[tuple[Memory, str], int] = {}
        self._n_whole = self.SURE  # answers in a row that came back whole
        # Of each of the last answers, which share came back.
        self._returned: deque[float] = deque(maxlen=self.KEPT)
        self.tallies: dict[tuple[Memory, str], Tally] = {}

    def correct(self, memory: Memory, source: str, n_usable: int) -> int:
        """``n_usable`` as ``usable`` gives it, less what this build usually falls short of it."""
        return max(n_usable - self._back.get((memory, source), 0), 0)

    def observe(self, memory: Memory, source: str, n_usable: int, n_reused: int) -> None:
        """Of ``n_usable`` tokens, not corrected, ``n_reused`` were reused."""
        if n_usable <= 0:
            return
        key = memory, source
        tally = self.tallies.setdefault(key, Tally())
        tally.n += 1
        tally.n_predicted += self.correct(memory, source, n_usable)
        tally.n_reused += n_reused
        short = max(n_usable - n_reused, 0)
        if short > self.MOST:
            return
        last = self._short.setdefault(key, deque(maxlen=self.KEPT))
        last.append(short)
        self._back[key] = median_low(last) if len(last) >= self.LEAST else 0

    @property
    def do_answers_return(self) -> bool:
        """Whether an answer is taken to come back in the next prompt just as it was generated, token for token.

        Nobody knows its tokens before a save tells them. But who asks on sends it back, and unless the template drops a
        part of it, or it is tokenized otherwise than it was generated, llama-server then finds all of it in the slot.
        """
        return self._n_whole >= self.SURE

    def answered(self, n_answer: int, n_returned: int) -> None:
        """Somebody went on after an answer of ``n_answer`` tokens, the first ``n_returned`` of which were found in its
        slot."""
        self._n_whole = min(self._n_whole + 1, self.SURE) if n_returned >= n_answer else 0
        self._returned.append(min(max(n_returned / n_answer, 0.0), 1.0))

    def likely(self, n_answer: int) -> int:
        """How much of an answer of ``n_answer`` tokens is likely to come back in the next prompt, from its beginning:
        the share that did as a rule. All of it before anything is known."""
        share = median_low(self._returned) if len(self._returned) >= self.LEAST else 1.0
        return int(share * n_answer)

    def to_json(self) -> dict[str, Any]:
        """What falls short, the oldest first; the tallies begin anew with each start."""
        short = {f"{memory.value} {source}": list(last) for (memory, source), last in self._short.items()}
        return {"short": short, "n_whole": self._n_whole, "returned": list(self._returned)}

    @classmethod
    def from_json(cls, data: object) -> Predictions:
        """What ``to_json`` gave, learned again; anything else in ``data`` is ignored."""
        predictions = cls()
        parts = data if isinstance(data, Mapping) else {}
        if isinstance(n_whole := parts.get("n_whole"), int):
            predictions._n_whole = min(max(n_whole, 0), cls.SURE)
        returned = parts.get("returned")
        for share in returned if isinstance(returned, list) else ():
            if isinstance(share, int | float) and 0 <= share <= 1:
                predictions._returned.append(float(share))
        for memory, source, short in _samples(parts.get("short")):
            predictions.observe(memory, source, cls.MOST + 1, cls.MOST + 1 - short)
        predictions.tallies.clear()
        return predictions


def _samples(data: object) -> Iterator[tuple[Memory, str, int]]:
    known = {memory.value: memory for memory in Memory}
    for key, last in data.items() if isinstance(data, Mapping) else ():
        memory, _, source = str(key).partition(" ")
        for short in last if isinstance(last, list) and memory in known else ():
            if isinstance(short, int) and 0 <= short <= Predictions.MOST:
                yield known[memory], source, short


@dataclass(frozen=True, slots=True)
class ReuseForecast:
    """How many tokens of a prompt are expected to be reused, said before the prompt is sent. All numbers are tokens.

    ``n_usable``: what this kind of model can reuse of what the slot holds. ``n_expected``: that, as this build has
    behaved so far; less is a misprediction. ``n_likely``: ``n_expected`` and what is likely to come back of the last
    answer. ``n_whole``: what is reused if the last answer comes back token for token, ``n_answer`` of which are that
    answer; None where the prompt does not go on behind an answer. ``is_rewind``: the slot holds more than
    ``n_expected``, and is cut back.
    """

    n_usable: int = 0
    n_expected: int = 0
    n_likely: int = 0
    n_whole: int | None = None
    n_answer: int = 0
    is_rewind: bool = False


NO_REUSE = ReuseForecast()

RESIDENT, SNAPSHOT, TRUNK = "resident", "snapshot", "trunk"  # sources, as far as their predictions differ


@dataclass(slots=True)
class Recall:
    """What is known of one server and its model: how it remembers, and what comes back of what was saved.

    ``keeps_checkpoints``: slot files have the checkpoints of their slots; None: not known, taken for yes.
    """

    memory: Memory = Memory.DENSE
    window: int | None = None  # tokens of a sliding window; None where no file tells
    keeps_checkpoints: bool | None = None
    predictions: Predictions = field(default_factory=Predictions)

    @property
    def is_rewindable(self) -> bool:
        return self.memory is Memory.DENSE

    @property
    def is_rewound(self) -> bool:
        """Whether a slot goes back to the end of its prompt before it is saved: its file keeps no checkpoints, so
        that it must end exactly where the next turn still agrees."""
        return self.memory is Memory.RECURRENT and self.keeps_checkpoints is False

    def in_file(self, checkpoints: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a slot's checkpoints that its file has."""
        return () if self.keeps_checkpoints is False else checkpoints

    def usable(
        self, source: str, n_shared: int, n_held: int | None, checkpoints: tuple[int, ...], n_prompt: int
    ) -> int:
        """What is predicted to be reused: by the kind of memory, and by what was learned of this build."""
        n_usable = usable(self.memory, n_shared, n_held, checkpoints, n_prompt)
        return self.predictions.correct(self.memory, source, n_usable)

    def of_slot(self, content: Content, n_shared: int, n_prompt: int) -> int:
        """The same of what a slot holds. Models that cannot go back go on from its exact end, if that is to be
        expected of a prompt that goes on behind an answer; others from wherever they part in it."""
        is_behind = not self.is_rewindable and goes_on_behind(content, n_shared, n_prompt)
        if is_behind and self.predictions.do_answers_return:
            return content.n_held
        n_held = content.n_tokens if content.is_exact else None
        # Also with a sliding window, while it is in its slot and fills it (seen running: 2,560 of 6,000, window 512).
        window = _MOST_WINDOW if self.window is None else self.window
        least = window if self.memory is Memory.SWA else 0
        if n_held is not None and least < n_held <= n_shared and n_held < n_prompt:
            return n_held
        return self.usable(RESIDENT, n_shared, n_held, content.checkpoints, n_prompt)

    def likely_of_slot(self, content: Content, n_shared: int, n_prompt: int) -> int:
        """What is likely to be reused of what a slot holds, where ``of_slot`` tells what is to be counted on: models
        that can go back to any token find what the prompt has of the answer, whose tokens nobody knows."""
        n_usable = self.of_slot(content, n_shared, n_prompt)
        if not (self.is_rewindable and goes_on_behind(content, n_shared, n_prompt)):
            return n_usable
        return n_usable + self.predictions.likely(content.n_more)


def goes_on_behind(content: Content, n_shared: int, n_prompt: int) -> bool:
    """Whether a prompt may go on behind the answer that a slot holds, and whose tokens are not known."""
    return content.n_more > 0 and n_shared == content.n_tokens and n_prompt > content.n_held


def has_failed(n_predicted: int, n_reused: int) -> bool:
    """Whether a snapshot brought so much less than was predicted of it that something is wrong with it."""
    return n_predicted > Predictions.MOST and n_reused < n_predicted / 2


class Strikes:
    """Snapshots that have failed to deliver: one failure may be an accident (a stranger in the slot), two are not."""

    OUT = 2

    def __init__(self) -> None:
        self._failures: Counter[str] = Counter()

    def note(self, snapshot: str, n_predicted: int, n_reused: int) -> bool:
        """What a restored snapshot has brought; True when it is to be given up. One that delivers starts anew."""
        if not has_failed(n_predicted, n_reused):
            del self._failures[snapshot]
            return False
        self._failures[snapshot] += 1
        if self._failures[snapshot] < self.OUT:
            return False
        del self._failures[snapshot]
        return True
