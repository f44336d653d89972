"""The main loop of a llama-server, step by step, as far as an observer could tell: what it does next, and when that
ends.

As on the real one: between two steps it carries out what was asked of it, slot actions and questions in their order,
and takes up what was sent. A step is one token for each answer and a batch of prompt tokens, those of the lowest slot
first, and nothing gets in between. Steps of the same kind are taken in one leap, whose inner ends are known in closed
form, and which is cut when something comes: a request costs a handful of events, however long.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# The event for the batch that runs when a connection is closed cannot be written, and the next batch begins before that
# has come to the main loop (real: 1.0-1.3 s until the slot is idle, where a batch takes 0.6 s).
_BATCHES_AFTER_CLOSE = 2
_SAME_TIME_S = 1e-9


@dataclass(frozen=True, slots=True)
class Hardware:
    """The speeds of a 7B model on a GPU. ``prefill_tokens_per_s`` at depth 0, half of it at ``halved_at``.

    ``batch``: prompt tokens of one step, beside which each stream gets one token. A step is never shorter than one of
    decoding. Before a request is there it is sent, and read by a thread of its own: ``request_s``, and for each token
    of a prompt ``ids_s`` or, as text, ``text_s`` (seen running on two shared cores: 2 to 3 ms, 0.9 us, 7 us).
    """

    prefill_tokens_per_s: float = 2_000.0
    halved_at: float = 40_000.0
    decode_tokens_per_s: float = 60.0
    batch: int = 512
    save_bytes_per_s: float = 1e9
    restore_bytes_per_s: float = 3.5e9
    action_s: float = 0.005  # what a save or restore takes beside its bytes
    erase_s: float = 0.0005
    bytes_per_token: int = 56_000
    request_s: float = 0.003
    ids_s: float = 1e-6
    text_s: float = 7e-6

    @property
    def step_s(self) -> float:
        """A step without prompts."""
        return 1 / self.decode_tokens_per_s

    def prefill_s(self, start: float, end: float) -> float:
        """Seconds for tokens ``start`` to ``end``, with nothing else to do."""
        return (end - start) * (1 + (start + end) / (2 * self.halved_at)) / self.prefill_tokens_per_s

    def reached(self, start: float, seconds: float) -> float:
        """Where a prefill from ``start`` on is after ``seconds``: the inverse of ``prefill_s``."""
        half = self.halved_at
        return math.sqrt((half + start) ** 2 + 2 * half * self.prefill_tokens_per_s * seconds) - half

    def times(self, factor: float) -> Hardware:
        """So many of them, as one. Requests are read as before, for each has a thread of its own."""
        return replace(
            self,
            prefill_tokens_per_s=self.prefill_tokens_per_s * factor,
            batch=int(self.batch * factor),
            save_bytes_per_s=self.save_bytes_per_s * factor,
            restore_bytes_per_s=self.restore_bytes_per_s * factor,
            action_s=self.action_s / factor,
        )


@dataclass(slots=True, eq=False)
class Work:
    """A request in a slot: prompt tokens ``at`` to ``end``, of which the last brings the first token of the answer, and
    ``n_left`` more tokens. ``on_end`` is called once, between two steps."""

    slot: int
    at: int
    end: int
    n_left: int
    on_end: Callable[[Work], None]
    is_begun: bool = False  # tokens of it have gone into a batch
    is_over: bool = False
    batches_left: float = math.inf  # once its connection is closed
    goal: float = math.inf
    waiter: asyncio.Future[None] | None = None

    @property
    def progress(self) -> float:
        """To be compared with a goal: -1 before it has begun, tokens of its prompt, infinity when it is over."""
        if self.is_over:
            return math.inf
        return self.at if self.is_begun else -1

    @property
    def is_stream(self) -> bool:
        return self.at == self.end


@dataclass(slots=True)
class Stalls:
    """What slot actions did to the streams of others. ``longest_s``: of actions one after the other."""

    longest_s: float = 0.0
    stream_s: float = 0.0  # summed up over all streams
    _current_s: float = field(default=0.0, repr=False)

    def add(self, seconds: float, n_streams: int) -> None:
        self._current_s += seconds if n_streams else 0.0
        self.longest_s = max(self.longest_s, self._current_s)
        self.stream_s += seconds * n_streams

    def end(self) -> None:
        self._current_s = 0.0


@dataclass(slots=True)
class Streamed:
    """What all answers together have got. ``seconds``: from first tokens on, summed up over them; ``longest_gap_s``:
    between two tokens of one."""

    n_tokens: int = 0
    seconds: float = 0.0
    longest_gap_s: float = 0.0


@dataclass(slots=True)
class _Task:
    """What the loop does between two steps: an action, or in no time an answer."""

    seconds: float
    done: asyncio.Future[None]


@dataclass(slots=True)
class _Leap:
    """``n_steps`` of the same kind from ``started_at`` on, or one ``action``. ``parts``: how many prompt tokens of
    whom are in each step; of one alone in each of several, or of all there are in a single one.
    """

    started_at: float
    n_steps: int
    parts: list[tuple[Work, int]]
    streams: list[Work]
    action: _Task | None = None


class Machine:
    """One server's time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hardware: Hardware) -> None:
        self.hardware = hardware
        self.stalls = Stalls()
        self.streamed = Streamed()
        self.busy_s = 0.0
        self._loop = loop
        self._tasks: deque[_Task] = deque()
        self._works: dict[int, Work] = {}  # by slot
        self._leap: _Leap | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._token_at = 0.0  # when streams last had a token each

    @property
    def is_idle(self) -> bool:
        return self._leap is None

    # -- what is asked of it -------------------------------------------------------------------------------------

    async def act(self, seconds: float) -> None:
        """A slot action: after the step that is running, and those before it. Completed even if its client leaves."""
        done = self._loop.create_future()
        self._tasks.append(_Task(seconds, done))
        self._came()
        await done

    async def between_steps(self) -> None:
        """What a question that the main loop answers waits for."""
        await self.act(0.0)

    def start(
        self, slot: int, start: int, end: int, n_answer: int = 0, *, on_end: Callable[[Work], None]
    ) -> Work:
        """Compute tokens ``start`` to ``end`` in ``slot``, then ``n_answer`` tokens more than the one that follows from
        that."""
        assert slot not in self._works, f"slot {slot} is at work"
        assert start < end, f"nothing of {end} tokens to compute"
        work = self._works[slot] = Work(slot, start, end, n_answer, on_end)
        self._came()
        return work

    async def until(self, work: Work, goal: float) -> None:
        """Wait until so many tokens of its prompt are there (0: until it has begun, infinity: until it is over).

        Told at the end of a step. Canceling is safe: the work goes on.
        """
        if work.progress >= goal:
            return
        assert work.waiter is None, "one waits for a work"
        work.goal, work.waiter = goal, self._loop.create_future()
        if (leap := self._leap) is not None and leap.parts and leap.parts[0][0] is work:
            self._cut(max(math.ceil((goal - work.at) / leap.parts[0][1]), 1) if goal < work.end else math.inf)
        try:
            await work.waiter
        finally:
            work.goal, work.waiter = math.inf, None

    def close(self, work: Work) -> None:
        """Its connection is closed: it ends some batches later, if it is not over by then. Idempotent."""
        if not work.is_over and work.batches_left == math.inf:
            work.batches_left = _BATCHES_AFTER_CLOSE + (self._running() - 1 if self._is_in_leap(work) else 0)
            if self._is_in_leap(work):
                self._cut(work.batches_left)

    def tally(self) -> Streamed:
        """What streams have got up to now."""
        found, leap = self.streamed, self._leap
        if leap is None or not leap.streams:
            return Streamed(found.n_tokens, found.seconds, found.longest_gap_s)
        n = len(leap.streams)
        n_steps = 0 if leap.action is not None else self._running() - 1
        seconds = found.seconds + n * (self._loop.time() - leap.started_at)
        return Streamed(found.n_tokens + n * n_steps, seconds, found.longest_gap_s)

    # -- steps ---------------------------------------------------------------------------------------------------

    def _came(self) -> None:
        """Something new is there: it is looked at after the step that is running."""
        if self._leap is None:
            self._plan(self._loop.time())
        else:
            self._cut(0)

    def _plan(self, at: float) -> None:
        """Begin with what comes next."""
        while self._tasks and self._tasks[0].seconds == 0:
            _tell(self._tasks.popleft().done)
        streams = [work for work in self._works.values() if work.is_stream]
        if self._tasks:
            self._begin(_Leap(at, 1, [], streams, self._tasks.popleft()))
            return
        parts = self._batch()
        if not parts and not streams:
            self._leap = None
            return
        n_steps = min((work.n_left for work in streams), default=math.inf)
        if parts:
            work, n = parts[0]
            is_full = n == self.hardware.batch and self._took(work.at, n) > self.hardware.step_s
            upto = min(work.goal, work.end)
            # Full batches of one prompt, up to where a waiter is to be told; the last one is another leap.
            n_steps = (
                min(n_steps, (work.end - work.at) // n, math.ceil((upto - work.at) / n)) if is_full else 1
            )
        n_steps = min(
            [n_steps, *(work.batches_left for work, _ in parts), *(w.batches_left for w in streams)]
        )
        self._begin(_Leap(at, max(int(n_steps), 1), parts, streams))

    def _batch(self) -> list[tuple[Work, int]]:
        """The prompt tokens of the next step."""
        parts, room = [], self.hardware.batch
        for _, work in sorted(self._works.items()):
            if room > 0 and not work.is_stream:
                n = min(room, work.end - work.at)
                parts.append((work, n))
                room -= n
        return parts

    def _took(self, start: int, n: int) -> float:
        return self.hardware.prefill_s(start, start + n)

    def _begin(self, leap: _Leap) -> None:
        self._leap = leap
        for work, _ in leap.parts:
            work.is_begun = True
            _tell_goal(work)
        self._set_timer(leap)

    def _set_timer(self, leap: _Leap) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._end_of(leap, leap.n_steps), self._come_back)

    def _end_of(self, leap: _Leap, n: int) -> float:
        """When step ``n`` of a leap ends, counted from 1."""
        if leap.action is not None:
            return leap.started_at + leap.action.seconds
        if not leap.parts:
            return leap.started_at + n * self.hardware.step_s
        took_s = sum(self._took(work.at, n * n_each) for work, n_each in leap.parts)
        return leap.started_at + max(took_s, self.hardware.step_s)

    def _running(self) -> int:
        """Which step of the leap is running, counted from 1; one that ends just now is."""
        leap = self._leap
        assert leap is not None
        seconds = self._loop.time() - leap.started_at - _SAME_TIME_S
        if leap.n_steps == 1 or seconds <= 0:
            return 1
        if leap.parts:
            work, n = leap.parts[0]
            done = (self.hardware.reached(work.at, seconds) - work.at) / n
        else:
            done = seconds / self.hardware.step_s
        return min(int(done) + 1, leap.n_steps)

    def _is_in_leap(self, work: Work) -> bool:
        leap = self._leap
        return leap is not None and (work in leap.streams or any(part is work for part, _ in leap.parts))

    def _cut(self, n_steps: float) -> None:
        """End the leap after so many steps, or when the one that is running ends."""
        leap = self._leap
        if leap is not None and leap.n_steps > 1 and n_steps < leap.n_steps:
            n = max(int(n_steps), self._running())
            if n < leap.n_steps:
                leap.n_steps = n
                self._set_timer(leap)

    def _come_back(self) -> None:
        """The leap is through."""
        leap = self._leap
        assert leap is not None
        ended_at, n_streams = self._end_of(leap, leap.n_steps), len(leap.streams)
        seconds = ended_at - leap.started_at
        self.busy_s += seconds
        self.streamed.seconds += n_streams * seconds
        if leap.action is not None:
            self.stalls.add(seconds, n_streams)
            _tell(leap.action.done)
        else:
            self.stalls.end()
            if leap.streams:
                last_s = ended_at - (
                    self._end_of(leap, leap.n_steps - 1) if leap.n_steps > 1 else self._token_at
                )
                gaps = self._end_of(leap, 1) - self._token_at, last_s
                self.streamed.longest_gap_s = max(self.streamed.longest_gap_s, *gaps)
                self.streamed.n_tokens += n_streams * leap.n_steps
            self._token_at = ended_at
            self._advance(leap)
        self._plan(ended_at)

    def _advance(self, leap: _Leap) -> None:
        n_steps = leap.n_steps
        works = [*leap.streams, *(work for work, _ in leap.parts)]
        for stream in leap.streams:
            stream.n_left -= n_steps
        for work, n in leap.parts:
            work.at += n * n_steps
        for work in works:
            work.batches_left -= n_steps
            if work.batches_left <= 0 or (work.is_stream and work.n_left <= 0):
                work.is_over = True
                del self._works[work.slot]
                work.on_end(work)
            _tell_goal(work)


def _tell(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _tell_goal(work: Work) -> None:
    if work.waiter is not None and work.progress >= work.goal:
        _tell(work.waiter)
