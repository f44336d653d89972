"""Finds the few of many backends on which a request may be placed: those with most of its tokens in a slot, and those
with an idle slot that costs least.

A close look at one backend (``SlotTable.view``) takes 0.1 to 0.2 ms, so of many backends only a few are looked at.
They are found in one index of the tokens of all slots, and in sorted lists of backends with idle slots. Finding them
costs about the same for 10 and for 1,000 backends. A placement with its lease takes 1.0 ms of CPU with 10 backends of
4 slots, 1.6 ms with 100, and 5.6 ms with 1,000, because of loops over all backends (``dispatch_pass``).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from llamaslot.backend.slot_table import SlotTable
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS
from llamaslot.cache.namespaces import InNamespaces, Namespace
from llamaslot.cache.prefix_index import PrefixIndex
from llamaslot.fleet.open_backends import OpenBackends
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import Slot, SlotKey

_N_NEAREST, _N_OTHERS = 3, 2
_FEW = 8  # a pool of at most so many backends has no index: all are looked at
_N_HITS = 32  # slots that share most with a request; several may be of one backend, and some may be at work
# Of the backends with idle slots, the cheapest and the fastest are compared: of two backends with the same speed only
# the cheaper one can be chosen.
_N_CHEAPEST, _N_FASTEST = 12, 4
_DEPTH = 5_000  # tokens; backends are ordered by their speed there
_VALID_S = 60.0  # the cost of a loss falls by 3 % meanwhile
_RENEWED = 4  # old ranks computed again at each placement

_Cheapest = tuple[float, float, str]
_Fastest = tuple[float, str]


class _Rank(NamedTuple):
    """The sort keys of a backend with an idle slot, as they were at the time ``at``. ``cheapest``: the seconds that
    the loss of its cheapest idle slot costs, the time when that slot was last used, and the backend's name.
    ``fastest``: the seconds of prefill for a token, and the backend's name.
    """

    cheapest: _Cheapest
    fastest: _Fastest
    at: float


class PoolIndex:
    """The tokens of all slots of a pool, and its backends with idle slots in sorted lists. It is kept only for more
    than ``_FEW`` backends. The slot tables report each change.
    """

    def __init__(self) -> None:
        self._tables: dict[str, SlotTable] = {}
        self._is_kept = False
        self._index: PrefixIndex[SlotKey] = PrefixIndex()
        self._found = InNamespaces(self._index, self._namespace_of)
        self._stale = set[str]()
        self._ranks: dict[str, _Rank] = {}  # the one ranked longest ago comes first
        self._cheapest: list[_Cheapest] = []
        self._fastest: list[_Fastest] = []

    def attach(self, table: SlotTable) -> None:
        """Include the slots of a backend, which may be leased from now on."""
        self.detach(table.backend)
        self._tables[table.backend] = table
        if self._is_kept:
            self._watch(table)
        elif len(self._tables) > _FEW:
            self._is_kept = True
            for each in self._tables.values():
                self._watch(each)

    def detach(self, backend: str) -> None:
        """Remove the slots of ``backend``, which no longer exist. Idempotent."""
        table = self._tables.pop(backend, None)
        if table is None or not self._is_kept:
            return
        table.on_content = None
        table.worth.on_change.clear()
        for slot in table.slots:
            self._index.drop(slot.key)
        self._stale.discard(backend)
        self._drop_rank(backend)

    def _watch(self, table: SlotTable) -> None:
        table.on_content = self._holds
        table.worth.on_change.append(partial(self._stale.add, table.backend))
        for slot in table.slots:
            self._holds(slot, _marked(table, slot))
        self._stale.add(table.backend)

    def _holds(self, slot: Slot, marked: bytes) -> None:
        if marked:
            self._index.insert(slot.key, marked)
        else:
            self._index.drop(slot.key)

    # -- questions -----------------------------------------------------------------------------------------------

    def worth_a_look(
        self,
        among: OpenBackends,
        request: Request,
        now: float,
        reserved: Mapping[SlotKey, float] = MappingProxyType({}),
    ) -> list[SlotTable]:
        """Return the tables of ``among`` that ``request`` may be placed on: those whose slots share most with it, and,
        of those with an idle slot that is not ``reserved``, the tables where taking one costs least.

        Tables whose slots are too small for the prompt are left out if other slots are large enough, because backends
        of one model may have different contexts.
        """
        here, n = among.tables, request.n_tokens
        if n >= among.least_ctx:
            here = {name: table for name, table in here.items() if table.n_ctx > n} or here
        if len(here) <= _FEW or not self._is_kept:
            return [*here.values()]
        nearest = self._nearest(here, request)
        n_reserved = Counter(slot.backend for slot in reserved)
        full = (name for name, n_slots in n_reserved.items() if name in here and here[name].n_idle <= n_slots)
        others = self._others(here, {*nearest, *full}, n, now)
        return [*nearest.values(), *others] or [*islice(here.values(), _FEW)]

    def _nearest(self, here: dict[str, SlotTable], request: Request) -> dict[str, SlotTable]:
        if request.no_cache:
            return {}
        least, shared = min(NEGLIGIBLE_TOKENS, request.n_tokens // 2), dict[str, int]()
        for hit in self._found.match(request.tokens, request.reads, _N_HITS):
            if hit.n_shared < least:
                break
            if hit.holder.backend in here:
                shared.setdefault(hit.holder.backend, hit.n_shared)
        if len(shared) > _N_NEAREST:
            shared = dict.fromkeys(
                heapq.nlargest(_N_NEAREST, shared, key=lambda name: (shared[name], here[name].n_idle > 0)), 0
            )
        return {name: here[name] for name in shared}

    def _others(
        self, here: dict[str, SlotTable], besides: Collection[str], n_tokens: int, now: float
    ) -> list[SlotTable]:
        self._renew(now)
        names = {
            *_first(_N_CHEAPEST, (name for _, _, name in self._cheapest), here, besides),
            *_first(_N_FASTEST, (name for _, name in self._fastest), here, besides),
        }

        def cost(name: str) -> tuple[float, float, str]:
            loss_s, used_at, _ = self._ranks[name].cheapest
            return round(loss_s + here[name].rates.prefill.seconds(0, n_tokens), 2), used_at, name

        return [here[name] for name in heapq.nsmallest(_N_OTHERS, names, key=cost)]

    def _renew(self, now: float) -> None:
        """Compute the ranks of the backends that have changed, and some of the oldest ranks."""
        old = list[str]()
        for name, rank in self._ranks.items():
            if 0 <= now - rank.at < _VALID_S or len(old) == _RENEWED:
                break
            old.append(name)
        for name in {*self._stale, *old}:
            self._drop_rank(name)
            table = self._tables[name]
            if (offer := table.worth.cheapest(now)) is None:
                continue
            loss_s, used_at = offer
            rank = _Rank((loss_s, used_at, name), (table.rates.prefill.per_token_s(_DEPTH), name), now)
            self._ranks[name] = rank
            insort(self._cheapest, rank.cheapest)
            insort(self._fastest, rank.fastest)
        self._stale.clear()

    def _drop_rank(self, backend: str) -> None:
        if (rank := self._ranks.pop(backend, None)) is not None:
            del self._cheapest[bisect_left(self._cheapest, rank.cheapest)]
            del self._fastest[bisect_left(self._fastest, rank.fastest)]

    def _namespace_of(self, slot: SlotKey) -> Namespace:
        return self._tables[slot.backend].namespace_of(slot.id)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first invariant of this index that does not hold."""
        if not self._is_kept:
            return
        self._index.check()
        assert self._cheapest == sorted(rank.cheapest for rank in self._ranks.values()), "ranks ascend"
        assert self._fastest == sorted(rank.fastest for rank in self._ranks.values()), "speeds ascend"
        for name, table in self._tables.items():
            is_ranked = name in self._ranks or name in self._stale
            assert is_ranked or not table.n_idle, f"a backend with an idle slot is ranked: {name}"
            for slot in table.slots:
                marked = _marked(table, slot)
                held = self._index.tokens(slot.key) if slot.key in self._index else b""
                assert held == marked, f"each slot is found by what it holds: {slot}"
        assert {slot.backend for slot in self._index.holders()} <= self._tables.keys(), "no slot is left"


def _marked(table: SlotTable, slot: Slot) -> bytes:
    """Return the tokens that a slot holds or will hold, behind the mark of their namespace."""
    try:
        return table.residents.index.tokens(slot.id)
    except KeyError:
        return b""


def _first(n: int, names: Iterable[str], here: Collection[str], besides: Collection[str]) -> Iterator[str]:
    for name in names:
        if name in here and name not in besides:
            yield name
            n -= 1
            if not n:
                return
