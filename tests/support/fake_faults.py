"""Faults on order. Each method arms one fault; the next request that fits uses it up, except where the method says
more.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from dataclasses import dataclass

from tests.support.fake_model import BadInput, pack

SAVE_FAILED = "Unable to save slot"


@dataclass(frozen=True)
class SaveFault:
    """How the next save goes wrong: it writes other ``tokens``, writes only a ``part`` of the file, or ends with an
    ``error``.
    """

    tokens: bytes | None = None
    part: float | None = None
    error: BadInput | None = None
    clears: bool = False


@dataclass(frozen=True)
class Cut:
    """A stream that breaks off: after a number of writes, or of writes with a token. ``path``: only on this route."""

    n: int
    of_tokens: bool = False
    path: str | None = None


class Hang:
    """A route that does not answer until ``release``. ``reached`` is set when a request hangs in it."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        self._released.set()

    async def wait(self) -> None:
        self.reached.set()
        await self._released.wait()


class Faults:
    """``what`` names a request: "save", "restore", "erase" or a path such as "/completion"."""

    def __init__(self) -> None:
        self.cache_lie: int | None = None
        """Every answer reports so many reused tokens."""
        self.miscount = 0
        """Completions see this many tokens more than /tokenize tells."""
        self.novelty = False
        """Every event of a stream has a field that is in no version so far."""
        self.close_after_slow_s: float | None = None
        """Close a kept connection right after a response that took longer, without saying so (the real one: 5 s)."""
        self._errors: defaultdict[str, deque[BadInput]] = defaultdict(deque)
        self._failures: deque[tuple[int, BadInput]] = deque()
        self._n_losses = 0
        self._saves: deque[SaveFault] = deque()
        self._hangs: dict[str, Hang] = {}
        self._cuts: deque[Cut] = deque()
        self._drops: deque[str | None] = deque()
        self._drops_after: deque[str | None] = deque()

    def fail(self, what: str, status: int = 500, message: str | None = None, times: int = 1) -> None:
        """The next ``times`` requests for ``what`` get an error. A restore that fails leaves its slot empty."""
        if message is None:
            message = SAVE_FAILED if what == "save" else "Failure on order"
        kind = "invalid_request_error" if status < 500 else "server_error"
        self._errors[what].extend([BadInput(message, status, kind)] * times)

    def refuse(self, what: str, message: str, kind: str, status: int = 400) -> None:
        """The next request for ``what`` gets this error."""
        self._errors[what].append(BadInput(message, status, kind))

    def fail_stream(
        self, message: str = "failed to process speculative batch", *, after_tokens: int = 0
    ) -> None:
        """The next completion fails inside the server: 500, or an error event when its stream has begun."""
        self._failures.append((after_tokens, BadInput(message, 500, "server_error")))

    def lose_slots(self, times: int = 1) -> None:
        """The next ``times`` completions find their slot empty, as if another client of llama-server had erased it."""
        self._n_losses += times

    def truncate_save(self, part: float = 0.5) -> None:
        """The next save answers 200 and leaves a file that is cut off."""
        self._saves.append(SaveFault(part=part))

    def empty_save(self) -> None:
        """The next save answers 200 with ``n_saved`` 0, because another task has cleared its slot (unified KV)."""
        self._saves.append(SaveFault(clears=True))

    def wrong_save(self, tokens: bytes | None = None) -> None:
        """The next save captures another conversation; without ``tokens``, random ones of the same number."""
        self._saves.append(SaveFault(tokens=b"" if tokens is None else tokens))

    def disk_full(self, times: int = 1) -> None:
        """The next saves answer 500 and leave a truncated file whose header claims all tokens."""
        fault = SaveFault(part=0.3, error=BadInput(SAVE_FAILED, 500, "server_error"))
        self._saves.extend([fault] * times)

    def hang(self, what: str) -> Hang:
        """Requests for ``what`` wait until the returned ``Hang`` is released."""
        self._hangs[what] = hang = Hang()
        return hang

    def disconnect_after_events(self, n_events: int) -> None:
        """The next stream breaks off after ``n_events`` writes: the connection is reset."""
        self._cuts.append(Cut(n_events))

    def disconnect_after_tokens(self, n_tokens: int, path: str | None = None) -> None:
        """The next stream (of ``path``, None for any) breaks off after ``n_tokens`` writes that have a token."""
        self._cuts.append(Cut(n_tokens, True, path))

    def disconnect_before_headers(self, what: str | None = None) -> None:
        """The next request (for ``what``, None for any) is read, and its connection is reset; nothing is
        done for it.
        """
        self._drops.append(what)

    def disconnect_after_work(self, what: str | None = None) -> None:
        """The next request (for ``what``, None for any) is carried out, and its connection is reset instead of an
        answer.
        """
        self._drops_after.append(what)

    # ---- asked by the fake

    def take(self, what: str) -> BadInput | None:
        errors = self._errors[what]
        return errors.popleft() if errors else None

    def take_failure(self) -> tuple[int, BadInput] | None:
        """Return after how many tokens the completion that starts now fails, and how; None if it does not."""
        return self._failures.popleft() if self._failures else None

    def take_loss(self) -> bool:
        """True if the completion that starts now finds its slot empty."""
        is_lost = self._n_losses > 0
        self._n_losses -= is_lost
        return is_lost

    def take_save(self, held: bytes) -> SaveFault:
        """Return the fault of the save that starts now, an empty ``SaveFault`` if it has none. For a wrong save its
        ``tokens`` are filled in.
        """
        if (error := self.take("save")) is not None:
            return SaveFault(error=error, part=0.0)
        if not self._saves:
            return SaveFault()
        fault = self._saves.popleft()
        if fault.tokens == b"":
            ids = random.Random(0).choices(range(0x20, 0x7F), k=len(held) // 4)
            return SaveFault(tokens=pack(ids))
        return fault

    def take_drop(self, names: tuple[str, ...], *, after: bool = False) -> bool:
        drops = self._drops_after if after else self._drops
        for what in drops:
            if what is None or what in names:
                drops.remove(what)
                return True
        return False

    def told(self, events: bytes) -> bytes:
        """Return the part of a stream's ``events`` that is really sent."""
        return events.replace(b"data: {", b'data: {"novelty":1,') if self.novelty else events

    def take_cut(self, path: str) -> Cut | None:
        if not self._cuts or self._cuts[0].path not in (None, path):
            return None
        return self._cuts.popleft()

    async def hold(self, names: tuple[str, ...]) -> None:
        for name in names:
            if (hang := self._hangs.get(name)) is not None:
                await hang.wait()

    def reported_cache(self, n_cache: int, n_prompt: int) -> int:
        return n_cache if self.cache_lie is None else min(self.cache_lie, n_prompt)
