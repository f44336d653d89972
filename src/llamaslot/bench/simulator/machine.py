"""The main loop of a llama-server as flows instead of steps: what it does next, and when that is through.

As on the real one: slot actions come first and stop everything else; then the batch is filled with prompt tokens, those
of the lowest slot first, and each decoding stream gets one token with it; without prompts streams run at their own
speed. Between two changes all speeds are known in closed form, so a request costs a handful of events, however long.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field

_NOTHING_LEFT = 1e-6  # tokens


@dataclass(frozen=True, slots=True)
class Hardware:
    """The speeds of a 7B model on a GPU. ``prefill_tokens_per_s`` at depth 0, half of it at ``halved_at``.

    ``batch``: prompt tokens of one step, beside which each stream gets one token.
    """

    prefill_tokens_per_s: float = 2_000.0
    halved_at: float = 40_000.0
    decode_tokens_per_s: float = 60.0
    batch: int = 512
    save_bytes_per_s: float = 1e9
    restore_bytes_per_s: float = 3.5e9
    action_s: float = 0.005  # what a save, erase or restore takes beside its bytes
    bytes_per_token: int = 56_000

    def prefill_s(self, start: float, end: float) -> float:
        """Seconds for tokens ``start`` to ``end``, with nothing else to do."""
        return (end - start) * (1 + (start + end) / (2 * self.halved_at)) / self.prefill_tokens_per_s

    def reached(self, start: float, seconds: float) -> float:
        """Where a prefill from ``start`` on is after ``seconds``: the inverse of ``prefill_s``."""
        half = self.halved_at
        return math.sqrt((half + start) ** 2 + 2 * half * self.prefill_tokens_per_s * seconds) - half

    def times(self, factor: float) -> Hardware:
        """So many of them, as one."""
        return Hardware(
            self.prefill_tokens_per_s * factor,
            self.halved_at,
            self.decode_tokens_per_s,
            int(self.batch * factor),
            self.save_bytes_per_s * factor,
            self.restore_bytes_per_s * factor,
            self.action_s / factor,
            self.bytes_per_token,
        )


@dataclass(slots=True, eq=False)
class _Work:
    """``at``: tokens that are there (a prefill) or still to come (an answer); ``end``: where a prefill ends."""

    at: float
    end: float
    done: asyncio.Future[None]


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


class Machine:
    """One server's time. ``act``, ``prefill`` and ``decode`` return when that is done."""

    def __init__(self, loop: asyncio.AbstractEventLoop, hardware: Hardware) -> None:
        self.hardware = hardware
        self.stalls = Stalls()
        self.reached: dict[int, int] = {}  # by slot: where its last prefill ended, or was stopped
        self.busy_s = 0.0
        self._loop = loop
        self._settled_at = loop.time()
        self._timer: asyncio.TimerHandle | None = None
        self._actions: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._action_ends = 0.0
        self._prefills: dict[int, _Work] = {}
        self._streams: dict[int, _Work] = {}

    @property
    def is_idle(self) -> bool:
        return not (self._actions or self._prefills or self._streams)

    async def act(self, seconds: float) -> None:
        """A slot action: after those before it, ahead of everything else. Carried out whoever leaves."""
        self._settle()
        done = self._loop.create_future()
        self._actions.append((seconds, done))
        if len(self._actions) == 1:
            self._action_ends = self._settled_at + seconds
        self._plan()
        await done

    async def prefill(self, slot: int, start: int, end: int) -> None:
        """Compute tokens ``start`` to ``end`` in ``slot``. Cancelling stops it; ``reached`` says where."""
        self._settle()
        assert slot not in self._prefills, f"slot {slot} prefills already"
        assert slot not in self._streams, f"slot {slot} decodes"
        work = _Work(start, end, self._loop.create_future())
        self._prefills[slot] = work
        self._plan()
        try:
            await work.done
        finally:
            if slot in self._prefills:  # cancelled
                self._settle()
                del self._prefills[slot]
                self._plan()
            self.reached[slot] = int(work.at)

    async def decode(self, slot: int, n: int) -> None:
        """Decode ``n`` tokens in ``slot``. Cancelling ends it."""
        if n <= 0:
            return
        self._settle()
        assert slot not in self._streams, f"slot {slot} decodes already"
        work = _Work(n, 0, self._loop.create_future())
        self._streams[slot] = work
        self._plan()
        try:
            await work.done
        finally:
            if slot in self._streams:
                self._settle()
                del self._streams[slot]
                self._plan()

    # -- time ----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Bring everything to now: since the last change each speed has been the same."""
        seconds, self._settled_at = self._loop.time() - self._settled_at, self._loop.time()
        if seconds <= 0:
            return
        self.busy_s += 0.0 if self.is_idle else seconds
        if self._actions:
            self.stalls.add(seconds, len(self._streams))
            return
        if self._prefills:
            work = self._prefills[min(self._prefills)]
            reached = min(self.hardware.reached(work.at, seconds), work.end)
            n_prefilled, work.at = reached - work.at, reached
            n_decoded = n_prefilled / self.hardware.batch
        else:
            n_decoded = seconds * self.hardware.decode_tokens_per_s
        for stream in self._streams.values():
            stream.at -= n_decoded

    def _plan(self) -> None:
        """Come back when the first thing will be through."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at := self._next()) is not None:
            self._timer = self._loop.call_at(at, self._come_back)

    def _next(self) -> float | None:
        if self._actions:
            return self._action_ends
        n_left = min((stream.at for stream in self._streams.values()), default=math.inf)
        if self._prefills:
            work = self._prefills[min(self._prefills)]
            end = min(work.end, work.at + n_left * self.hardware.batch)
            return self._settled_at + self.hardware.prefill_s(work.at, end)
        if self._streams:
            return self._settled_at + n_left / self.hardware.decode_tokens_per_s
        return None

    def _come_back(self) -> None:
        self._settle()
        if self._actions:
            if self._settled_at >= self._action_ends:
                self._end(self._actions.popleft()[1])
                if self._actions:
                    self._action_ends = self._settled_at + self._actions[0][0]
                else:
                    self.stalls.end()
        else:
            for works in (self._prefills, self._streams):
                for slot, work in list(works.items()):
                    if (work.end - work.at if works is self._prefills else work.at) < _NOTHING_LEFT:
                        work.at = work.end
                        del works[slot]
                        self._end(work.done)
        self._plan()

    @staticmethod
    def _end(done: asyncio.Future[None]) -> None:
        if not done.done():
            done.set_result(None)
