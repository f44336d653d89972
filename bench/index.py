"""``python -m bench.index``: what the prefix index costs, as ratios that hold on any machine.

Times are CPU time of this thread. Each lookup is timed once per round, in random order over far more data
than a cache holds: in the proxy, too, the tree is cold when a prompt arrives.
"""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median, quantiles

from llamaslot.cache.ids import common, count, head, pack, unpack
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.llama.identity import Identity
from llamaslot.store.index_file import IndexFile
from llamaslot.tasks import TaskOwner

LONG, SHORT = 60_000, 2_000  # tokens of a prompt
BEST = 8  # holders that a lookup asks for
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One ratio, its bound, and the two times or sizes behind it in words."""

    name: str
    value: float
    bound: float
    at_least: bool
    detail: str

    @property
    def is_met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def __str__(self) -> str:
        relation = ">=" if self.at_least else "<="
        verdict = "pass" if self.is_met else "FAIL"
        return f"{verdict}  {self.name:<52} {self.value:7.2f} {relation} {self.bound:<5g} {self.detail}"


class Traffic:
    """Prompts like those of a busy server.

    Twenty system prompts of 200 to 5,800 tokens, some much more used than others, that all begin with the
    same tokens of the chat template. On them conversations that grow by 200 to 4,600 tokens a turn until they
    have up to 64,000 (one in ten gets beyond 60,000), 200 of them at the same time; one turn in eight goes
    back to an earlier point and branches off there.
    """

    def __init__(self, seed: int = 1) -> None:
        self._rng = random.Random(seed)
        # Token ids are ordered by how common they are, so that Zipf's law makes them log-uniform: half are below
        # 2,000, as in texts. Uniform ones would be no text's, and cannot be stored in less than 17 bits.
        self._ids = [pack([int(30 * (131_072 / 30) ** (i / 65_536))]) for i in range(65_536)]
        template = self.text(4)
        self.systems = [template + self.text(200 + 280 * i) + pack([i]) for i in range(20)]
        self._rng.shuffle(self.systems)

    def text(self, n: int) -> bytes:
        """``n`` random tokens of a vocabulary of 131,072, by Zipf's law."""
        at = memoryview(self._rng.randbytes(2 * n)).cast("H")
        return b"".join(map(self._ids.__getitem__, at))

    def _target(self) -> int:
        kind = self._rng.random()
        if kind < 0.6:
            return self._rng.randrange(1_500, 12_000)
        return self._rng.randrange(12_000, 40_000) if kind < 0.9 else self._rng.randrange(60_000, 64_000)

    def snapshots(self) -> Iterator[bytes]:
        """The state of a slot after each turn, endlessly."""
        rng = self._rng
        live: list[tuple[int, list[bytes]]] = []  # the length at which each conversation ends, and its turns
        while True:
            if len(live) < 200:
                system = self.systems[min(int(rng.expovariate(0.2)), len(self.systems) - 1)]
                live.append((self._target(), [system]))
            i = rng.randrange(len(live))
            target, turns = live[i]
            if rng.random() < 1 / 8:
                del turns[rng.randrange(1, len(turns) + 1) :]
            turns.append(turns[-1] + self.text(rng.randrange(200, 4_600)))
            yield turns[-1]
            if count(turns[-1]) >= target:
                live[i] = live[-1]
                live.pop()

    def prompts(self, stored: list[bytes], n_tokens: int, n: int) -> list[bytes]:
        """``n`` prompts of ``n_tokens`` each, against an index that has ``stored``.

        Seven of ten follow up on a sequence of about that length, two start on a known system prompt, one
        repeats an earlier part of a conversation and then goes on otherwise.
        """
        rng = self._rng
        alike = [tokens for tokens in stored if 0.7 * n_tokens < count(tokens) < n_tokens] or stored
        systems = [system for system in self.systems if count(system) < n_tokens]
        prompts = []
        for i in range(n):
            base = rng.choice(alike) if i % 10 < 8 else rng.choice(systems)
            if i % 10 == 0:
                base = head(base, rng.randrange(count(base)))
            base = head(base, n_tokens)
            prompts.append(base + self.text(n_tokens - count(base)))
        return prompts


def timed(work: Callable[[bytes], object], items: list[bytes], rounds: int = ROUNDS) -> tuple[float, float]:
    """Median and 99th percentile of the microseconds that ``work`` takes for an item."""
    order = random.Random(2)
    samples = []
    for _ in range(rounds):
        for item in order.sample(items, len(items)):
            start = time.thread_time_ns()
            work(item)
            samples.append((time.thread_time_ns() - start) / 1000)
    return median(samples), quantiles(samples, n=100)[98]


def us(times: tuple[float, float]) -> str:
    return f"{times[0]:.0f} us (p99 {times[1]:.0f})"


def build(sequences: Iterable[bytes]) -> PrefixIndex[int]:
    index: PrefixIndex[int] = PrefixIndex()
    for holder, tokens in enumerate(sequences):
        index.insert(holder, tokens)
    return index


@dataclass(frozen=True, slots=True)
class Filled:
    """An index and what it was filled with, as far as that is kept: all of it would be half a gigabyte."""

    index: PrefixIndex[int]
    stored: list[bytes]

    @classmethod
    def of(cls, snapshots: Iterator[bytes], n_entries: int, keep_each: int) -> Filled:
        stored: list[bytes] = []

        def keep() -> Iterator[bytes]:
            for i, tokens in enumerate(islice(snapshots, n_entries)):
                if i % keep_each == 0:
                    stored.append(tokens)
                yield tokens

        return cls(build(keep()), stored)


def lookups(traffic: Traffic, few: Filled, many: Filled, n_prompts: int) -> Iterator[Row]:
    """Lookups by length of the prompt, by number of entries, and against making the prompt's bytes."""

    def looked_up(filled: Filled, n_tokens: int) -> tuple[float, float]:
        prompts = traffic.prompts(filled.stored, n_tokens, n_prompts)
        return timed(lambda prompt: filled.index.match(prompt, BEST), prompts)

    times = {n: (looked_up(many, n), looked_up(few, n)) for n in (SHORT, LONG)}
    longs, shorts = times[LONG][0], times[SHORT][0]
    name = f"lookup, {LONG} / {SHORT} tokens, {len(many.index)} entries"
    yield Row(name, longs[0] / shorts[0], 6, False, f"{us(longs)} / {us(shorts)}")
    for n_tokens, (slow, fast) in times.items():
        name = f"lookup of {n_tokens} tokens, {len(many.index)} / {len(few.index)} entries"
        yield Row(name, slow[0] / fast[0], 3, False, f"{us(slow)} / {us(fast)}")
    ids = {prompt: unpack(prompt) for prompt in traffic.prompts(many.stored, LONG, max(n_prompts // 10, 2))}
    packing = timed(lambda prompt: pack(ids[prompt]), list(ids))
    name = f"lookup of {LONG} tokens / struct.pack of their list"
    yield Row(name, longs[0] / packing[0], 0.3, False, f"{us(longs)} / {us(packing)}")


def residents(traffic: Traffic, latest: list[bytes], n_prompts: int) -> Iterator[Row]:
    """The shares of all slots at once, in order, against as many comparisons without more ado."""
    index = build(latest)
    prompts = traffic.prompts(latest, LONG, n_prompts)
    at_once = timed(index.match, prompts)
    one_by_one = timed(lambda prompt: [common(prompt, tokens) for tokens in latest], prompts)
    name = f"shares of all {len(latest)} slots, one by one / at once"
    yield Row(name, one_by_one[0] / at_once[0], 4, True, f"{us(one_by_one)} / {us(at_once)}")


def changes(few: Filled, many: Filled, later: list[bytes]) -> Iterator[Row]:
    """Inserts and drops by number of entries. The indices are as before when this is done."""
    holders = {tokens: -1 - i for i, tokens in enumerate(later)}

    def changed(index: PrefixIndex[int]) -> tuple[tuple[float, float], tuple[float, float]]:
        inserts = timed(lambda tokens: index.insert(holders[tokens], tokens), later, rounds=1)
        return inserts, timed(lambda tokens: index.drop(holders[tokens]), later, rounds=1)

    for name, slow, fast in zip(("insert", "drop"), changed(many.index), changed(few.index), strict=True):
        name = f"{name}, {len(many.index)} / {len(few.index)} entries"
        yield Row(name, slow[0] / fast[0], 4, False, f"{us(slow)} / {us(fast)}")


def memory(n_entries: int) -> Iterator[Row]:
    """Bytes that the index keeps allocated for each unique token."""
    snapshots = Traffic().snapshots()
    gc.collect()
    tracemalloc.start()
    index = build(islice(snapshots, n_entries))
    del snapshots
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    detail = f"{size / 2**20:.0f} MiB / {index.n_tokens / 1e6:.1f} M unique tokens"
    yield Row(f"bytes per unique token, {n_entries} entries", size / index.n_tokens, 6, False, detail)


def file(index: PrefixIndex[int]) -> Row:
    """What the copy of an index on disk takes."""
    named: PrefixIndex[str] = PrefixIndex()
    for holder in index.holders():
        named.insert(f"ls-{holder:016x}", index.tokens(holder))
    with tempfile.TemporaryDirectory(prefix="llamaslot-bench-") as directory:
        copy = IndexFile(Path(directory, "index"), Identity({}, dict.fromkeys(range(8), -1.0)), TaskOwner())
        started = time.monotonic()
        copy._replace(list(named.branches()))
        written = time.monotonic()
        n_holders = len(copy._read())
        read = time.monotonic()
        size = copy.path.stat().st_size
    assert n_holders == len(index)
    detail = f"{size / 2**20:.0f} MiB, written in {written - started:.2f} s, read in {read - written:.2f} s"
    return Row(
        f"index file, {n_holders} entries: bytes per unique token", size / index.n_tokens, 4.5, False, detail
    )


def measure(
    n_few: int = 1_000, n_many: int = 10_000, n_slots: int = 256, n_prompts: int = 200
) -> Iterator[Row]:
    """Every ratio in turn. The default numbers are those that the bounds are for."""
    yield from memory(n_many)
    traffic = Traffic()
    snapshots = traffic.snapshots()
    many = Filled.of(snapshots, n_many, 10)
    few = Filled.of(snapshots, n_few, 1)  # later: conversations need some thousand turns to get long
    later = list(islice(snapshots, n_prompts))
    yield from lookups(traffic, few, many, n_prompts)
    yield from changes(few, many, later)
    yield file(many.index)
    yield from residents(traffic, few.stored[-n_slots:], n_prompts)


def main() -> int:
    failed = 0
    for row in measure():
        sys.stdout.write(f"{row}\n")
        sys.stdout.flush()
        failed += not row.is_met
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
