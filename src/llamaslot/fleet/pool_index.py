"""Finds the few of many backends on which a request may be placed: those with most of its tokens in a slot, and those
with an idle slot that costs least.

A close look at one backend (``SlotTable.view``) takes 0.1 to 0.2 ms, so of many backends only a few are looked at.
They are found in one index of the tokens of all slots, and in sorted lists of backends with idle slots. Finding them
costs about the same for any number, if all have the same directory of snapshots: a placement with its lease takes
0.5 ms of CPU with 9 backends of 4 slots, 0.7 ms with 100, and 1.0 ms with 1,000. Each further directory costs a
look-up, 5 to 17 µs with its index in memory.
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
from llamaslot.scheduling.placement import TIE_S
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.slots import Slot, SlotKey

_N_NEAREST, _N_ON_DISK, _N_OTHERS = 3, 2, 2
_FEW = 8  # a pool of at most so many backends has no index: all are looked at
_N_HITS = 32  # slots that share most with a request; several may be of one backend, and some may be at work
# Of the backends with idle slots, the cheapest and the fastest are compared: of two backends with the same speed only
# the cheaper one can be chosen.
_N_CHEAPEST, _N_FASTEST = 8, 4
_DEPTH = 5_000  # tokens; backends are ordered by their speed there
_VALID_S = 60.0  # the cost of a loss falls by 3 % meanwhile
_RENEWED = 4  # old ranks computed again at each placement

_Cheapest = tuple[float, float, str]
_Fastest = tuple[float, str]


class _Rank(NamedTuple):
    """The sort keys of a backend with an idle slot, as they were at the time ``at``. ``cheapest``: the seconds that
    the loss of its cheapest idle slot costs, the time when that slot was last used, and the backend's name; False: of
    the slots without a large context, True: of those with one. ``fastest``: the seconds of prefill for a token, and the
    backend's name.
    """

    cheapest: dict[bool, _Cheapest]
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
        self._cheapest: dict[bool, list[_Cheapest]] = {False: [], True: []}
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
        self._renew(now)
        found = self._nearest(here, request)
        n_reserved = Counter(slot.backend for slot in reserved)
        full = {name for name, n_slots in n_reserved.items() if name in here and here[name].n_idle <= n_slots}
        found |= dict.fromkeys(self._on_disk(among, here, full, request))
        found |= dict.fromkeys(self._others(here, {*found, *full}, n))
        return [here[name] for name in found] or [*islice(here.values(), _FEW)]

    def _nearest(self, here: Mapping[str, SlotTable], request: Request) -> dict[str, None]:
        """Find at most ``_N_NEAREST`` backends: those with a slot that shares the longest prefix with ``request``. Of
        backends with equally long ones, those with an idle slot come first. Short prefixes do not count.
        """
        if request.no_cache:
            return {}
        least, shared = min(NEGLIGIBLE_TOKENS, request.n_tokens // 2), dict[str, int]()
        for hit in self._found.match(request.tokens, request.reads, _N_HITS):
            if hit.n_shared < least:
                break
            if hit.holder.backend in here:
                shared.setdefault(hit.holder.backend, hit.n_shared)
        if len(shared) <= _N_NEAREST:
            return dict.fromkeys(shared)

        def key(name: str) -> tuple[int, bool]:
            return shared[name], here[name].n_idle > 0

        return dict.fromkeys(heapq.nlargest(_N_NEAREST, shared, key=key))

    def _on_disk(
        self, among: OpenBackends, here: Mapping[str, SlotTable], full: Collection[str], request: Request
    ) -> list[str]:
        """If the backends have several directories: find those that restore a part of ``request`` from their own, and
        have the cheapest idle slots. This costs a look-up for each directory whose backends have one.
        """
        if len(among.libraries) < 2 or request.no_cache:
            return []
        costs_s = dict[str, float]()
        for group in among.libraries:
            library = group[0].model_snapshots
            offers = [
                min(self._ranks[name].cheapest.values())
                for table in group
                if (name := table.backend) in here and name in self._ranks and name not in full
            ]
            if not offers or not library.snapshots:
                continue
            hits = library.in_namespaces.match(request.tokens, request.reads, 1)
            if hits and hits[0].n_shared >= NEGLIGIBLE_TOKENS:
                loss_s, _, name = min(offers)
                n_shared = min(hits[0].n_shared, request.n_tokens)
                costs_s[name] = loss_s + here[name].rates.prefill.seconds(n_shared, request.n_tokens)
        return heapq.nsmallest(_N_ON_DISK, costs_s, key=costs_s.__getitem__)

    def _others(self, here: Mapping[str, SlotTable], besides: Collection[str], n_tokens: int) -> list[str]:
        """Find the backends with the cheapest idle slots; for a small request, slots without a large context first."""
        names = set(_first(_N_FASTEST, (name for _, name in self._fastest), here, besides))
        for ranks in self._cheapest.values():
            names.update(_first(_N_CHEAPEST, (name for _, _, name in ranks), here, besides))

        def cost(name: str) -> tuple[bool, int, float, str]:
            cheapest, table = self._ranks[name].cheapest, here[name]
            is_small = n_tokens < table.settings.small_prompt_tokens
            loss_s, used_at, _ = cheapest[False] if is_small and False in cheapest else min(cheapest.values())
            seconds = loss_s + table.rates.prefill.seconds(0, n_tokens)
            return is_small and False not in cheapest, round(seconds / TIE_S), used_at, name

        return heapq.nsmallest(_N_OTHERS, names, key=cost)

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
            if not (cheapest := table.worth.cheapest(now)):
                continue
            offers = {is_large: (*offer, name) for is_large, offer in cheapest.items()}
            rank = _Rank(offers, (table.rates.prefill.per_token_s(_DEPTH), name), now)
            self._ranks[name] = rank
            for is_large, offer in offers.items():
                insort(self._cheapest[is_large], offer)
            insort(self._fastest, rank.fastest)
        self._stale.clear()

    def _drop_rank(self, backend: str) -> None:
        if (rank := self._ranks.pop(backend, None)) is not None:
            for is_large, offer in rank.cheapest.items():
                del self._cheapest[is_large][bisect_left(self._cheapest[is_large], offer)]
            del self._fastest[bisect_left(self._fastest, rank.fastest)]

    def _namespace_of(self, slot: SlotKey) -> Namespace:
        return self._tables[slot.backend].namespace_of(slot.id)

    # -- invariants ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError naming the first invariant of this index that does not hold."""
        if not self._is_kept:
            return
        self._index.check()
        for is_large, ranks in self._cheapest.items():
            offers = [rank.cheapest[is_large] for rank in self._ranks.values() if is_large in rank.cheapest]
            assert ranks == sorted(offers), "ranks ascend"
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
