"""Measures how fast a llama-server computes, saves and restores, and for how long that stops a stream."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

import orjson
from msgspec import Struct

from llamaslot.backend.probes import meaningless_tokens
from llamaslot.cache.ids import unpack
from llamaslot.cli.doctor.slots_taken import until_idle
from llamaslot.llama.answers import Progress, next_piece
from llamaslot.llama.client import LlamaServer
from llamaslot.sizes import readable_size
from llamaslot.tasks import TaskOwner

_DEEPER = 1.5  # a prefill slows down with depth
_WARM_UP = 8  # pieces of a stream before anything is measured
_STREAM = 4000  # tokens at most
_WAIT_S = 30.0


class Filled(Struct):
    """The result of filling a slot: ``n_tokens`` were computed in ``seconds``. ``batch``: tokens that llama-server
    computes at a time, in ``batch_s`` seconds; None if the prompt was shorter than two batches. ``rest_s``: estimated
    seconds for the tokens that were left out.
    """

    n_tokens: int
    seconds: float
    batch: int | None
    batch_s: float = 0.0
    rest_s: float = 0.0


async def fill(api: LlamaServer, slot: int, n_tokens: int, budget_s: float | None) -> Filled:
    """Compute ``n_tokens`` meaningless tokens in ``slot``; fewer if all would take longer than ``budget_s`` (None: no
    limit).
    """
    seen: list[Progress] = []
    async with contextlib.aclosing(api.prefill(slot, meaningless_tokens(n_tokens))) as events:
        async for event in events:
            seen.append(event)
            n_done, took_s = event.processed - seen[0].cache, event.seconds
            if len(seen) < 3 or n_done <= 0 or budget_s is None:
                continue
            rest_s = (n_tokens - event.processed) * took_s / n_done * _DEEPER
            if took_s + rest_s > budget_s:
                break
        else:
            return Filled(n_tokens, seen[-1].seconds, *_batch(seen))
    # llama-server ends the batch that is running, and keeps it.
    await until_idle(api, slot)
    left = next(info.n_tokens for info in await api.slots() if info.id == slot) or event.processed
    return Filled(left, took_s, *_batch(seen), rest_s)


def _batch(seen: list[Progress]) -> tuple[int | None, float]:
    steps = [
        (after.processed - before.processed, after.seconds - before.seconds)
        for before, after in itertools.pairwise(seen)
    ]
    largest = max(steps, default=(0, 0.0))
    return (largest[0], largest[1]) if len(seen) > 2 and largest[0] > 1 else (None, 0.0)


class Trip(Struct):
    """The seconds of saving and restoring a slot. ``pause_s``: the longest gap meanwhile between two tokens of a stream
    in another slot; None if there was no stream.
    """

    n_saved: int
    n_restored: int
    n_bytes: int
    save_s: float
    restore_s: float
    pause_s: float | None

    def told(self) -> str:
        size = f"{readable_size(self.n_bytes)} ({self.n_saved:,} tokens)"
        text = f"{size} saved in {self.save_s:.2f} s, restored in {self.restore_s:.2f} s"
        pause = "" if self.pause_s is None else f"; a stream beside it stood still for {self.pause_s:.2f} s"
        return text + pause


async def round_trip(api: LlamaServer, slot: int, other: int | None, name: str, owner: TaskOwner) -> Trip:
    """Save ``slot`` to the file ``name``, empty it and restore it, while a stream runs in the slot ``other`` (None: no
    stream). Returns the times. Raises SlotActionFailed.
    """
    stream = _Stream()
    if other is not None:
        owner.spawn(stream.run(api, other), "doctor: a stream")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_S):
                await stream.is_running.wait()
    began = time.monotonic()
    saved = await api.save(slot, name)
    between = time.monotonic()
    await api.erase(slot)
    erased = time.monotonic()
    restored = await api.restore(slot, name)
    ended = time.monotonic()
    if stream.is_running.is_set():
        await asyncio.sleep(0.2)  # the piece after the pause
    pause_s = stream.longest_gap_s(began, ended)
    return Trip(saved.n_tokens, restored.n_tokens, saved.n_bytes, between - began, ended - erased, pause_s)


class _Stream:
    """A streamed answer in one slot, and the times at which its pieces came."""

    def __init__(self) -> None:
        self.is_running = asyncio.Event()
        self._times: list[float] = []

    async def run(self, api: LlamaServer, slot: int) -> None:
        body = {
            "prompt": unpack(meaningless_tokens(20)),
            "n_predict": _STREAM,
            "id_slot": slot,
            "stream": True,
            "ignore_eos": True,
        }
        headers = {"Content-Type": "application/json"}
        async with api.request("POST", "/completion", data=orjson.dumps(body), headers=headers) as response:
            while await next_piece(response):
                self._times.append(time.monotonic())
                if len(self._times) >= _WARM_UP:
                    self.is_running.set()

    def longest_gap_s(self, began: float, ended: float) -> float | None:
        """Return the longest gap, in seconds, between two pieces of the stream that overlaps the time from ``began`` to
        ``ended``. None if the stream did not run then.
        """
        gaps = [
            after - before
            for before, after in itertools.pairwise(self._times)
            if after >= began and before <= ended
        ]
        return max(gaps, default=None)
