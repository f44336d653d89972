"""A read-only prefix index, mapped from disk. It holds the state of a ``PrefixIndex`` at one moment (a *generation*).

The tokens are the keys of a marisa trie, in chunks of 128 tokens. A key is the hash of all token bytes before the
chunk, then the chunk as UTF-8, one character for each token. This takes about two bytes for each unique token. All
processes share the memory, and Python's garbage collector has no work with it. If n chunks of a prompt are in the
trie, so are the first n - 1. So a lookup probes at doubling distances, then bisects: 10 to 20 probes, whatever the
size of the index. (marisa cannot tell how far a key would have matched.)

The radix tree of ``prefix_index``, without its tokens, is in columns of int32. A point is where a sequence ends or
sequences diverge. An entry is one holder. Points are ordered so that all entries below a point are one contiguous
range. A tree of minima over the entries finds the shortest holders of a range without reading the others. Dropping a
holder sets its length there to infinity. A range with an infinite minimum has no holders left, even if the trie still
has its chunks.

After a hash collision a lookup can report a prefix that is too long. That does no harm, because a restore compares
the tokens. Two sequences that a collision makes equal are detected when the generation is made.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Collection, Iterator, KeysView, Sequence
from itertools import islice
from typing import NamedTuple

import marisa_trie  # type: ignore[import-not-found]  # compiled, without stubs
from xxhash import xxh3_64

from llamaslot.cache.ids import WIDTH
from llamaslot.cache.prefix_index import PrefixIndex, Shared

CHUNK = 128  # tokens of a key, fewer where a sequence ends
_BYTES = CHUNK * WIDTH
_HASH = 8  # bytes
_DROPPED = 2**31 - 1  # stands for the length of a dropped entry: greater than any length
_ROOT = 0

Column = Sequence[int]  # of int32: an array, or a memoryview of a mapped file


class Columns(NamedTuple):
    """The radix tree as columns of integers; -1 stands for none. At or below a point are the entries from ``first`` to
    before ``past``; those that end at the point itself come first.
    """

    point: Column  # for each key of the trie: the first point at or beyond the end of its chunk
    before: Column  # for each key: the key of the chunk before
    n_tokens: Column  # for each point: tokens from the root
    above: Column  # for each point: its parent, which has a smaller number
    first: Column
    past: Column
    key: Column  # for each point where an entry ends: the key of its last chunk
    end: Column  # for each entry: its point


def is_freezable(tokens: bytes) -> bool:
    """True if a generation can store this sequence: all ids are from 0 to 0x10FFFF, as in all known vocabularies."""
    return len(_text(tokens)) * WIDTH == len(tokens)


def _text(tokens: bytes) -> str:
    """Token ids as a string of the characters with these code points. The string ends before the first id that is no
    code point (an image has the id -1).

    ``surrogatepass`` allows the ids 55,296 to 57,343. Decoding is 30 times faster than ``chr``.
    """
    try:
        return tokens.decode("utf-32-le", "surrogatepass")
    except UnicodeDecodeError as error:
        return tokens[: error.start].decode("utf-32-le", "surrogatepass")


def _utf8(text: str) -> bytes:
    """``text`` in modified UTF-8, as in Java: NUL is two bytes, because marisa needs an eighth more space if keys have
    NUL bytes. No token's bytes begin with the bytes of another token, so only whole tokens match.
    """
    return text.encode("utf-8", "surrogatepass").replace(b"\0", b"\xc0\x80")


def _tokens(utf8: bytes) -> bytes:
    return (
        utf8.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass").encode("utf-32-le", "surrogatepass")
    )


def _key(hashed: xxh3_64, text: str) -> bytes:
    """The trie's key of a chunk, or of its beginning. ``hashed``: the hash of all tokens before the chunk."""
    return hashed.digest().replace(b"\0", b"\1") + _utf8(text)


class DiskIndex:
    """One generation, without the holders dropped since it was made. Not thread-safe: it belongs to the event loop.

    ``trie`` and ``columns`` never change: drops are recorded in memory only. ``names``: the holder of each entry.
    """

    def __init__(self, trie: marisa_trie.BinaryTrie, columns: Columns, names: Sequence[str]) -> None:
        self.trie, self.columns, self.names = trie, columns, names
        self.gone: set[str] = set()
        self._entries = {holder: entry for entry, holder in enumerate(names)}
        n_leaves = 1 << (len(names) - 1).bit_length() if names else 1
        lengths = [columns.n_tokens[point] for point in columns.end]
        level = lengths + [_DROPPED] * (n_leaves - len(lengths))
        levels = [level]
        while len(level) > 1:
            level = list(map(min, level[::2], level[1::2]))
            levels.append(level)
        self._n_leaves = n_leaves
        # A binary tree: index 1 has the minimum of all lengths; 2i and 2i + 1 have those of the two halves of i.
        self._shortest = array("i", [_DROPPED])
        for level in reversed(levels):
            self._shortest.extend(level)

    def __contains__(self, holder: object) -> bool:
        return holder in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<Frozen {len(self)} holders, {len(self.gone)} dropped, {len(self.trie)} chunks>"

    def holders(self) -> KeysView[str]:
        return self._entries.keys()

    def drop(self, holder: str) -> None:
        """Remove ``holder`` from the index. Idempotent."""
        if (entry := self._entries.pop(holder, None)) is None:
            return
        self.gone.add(holder)
        shortest, i = self._shortest, self._n_leaves + entry
        shortest[i] = _DROPPED
        while i > 1:
            i //= 2
            smaller = min(shortest[2 * i], shortest[2 * i + 1])
            if shortest[i] == smaller:
                return
            shortest[i] = smaller

    def tokens(self, holder: str) -> bytes:
        """The sequence of ``holder``, joined from its chunks. Raises KeyError for an unknown one."""
        return self._path(self._entries[holder], b"", 0)

    def n_tokens(self, holder: str) -> int:
        """The number of tokens of ``holder``. Raises KeyError for an unknown one."""
        return self.columns.n_tokens[self.columns.end[self._entries[holder]]]

    def sequences(self) -> Iterator[tuple[str, bytes]]:
        """Each holder that was not dropped, and its tokens. The prefix that a sequence shares with the previous one is
        not read again.
        """
        previous, tokens, columns = -1, b"", self.columns
        for entry, holder in enumerate(self.names):
            if holder not in self._entries:
                continue
            fork = columns.end[entry]
            while columns.first[fork] > previous >= 0:
                fork = columns.above[fork]
            tokens = self._path(entry, tokens, columns.n_tokens[fork] if previous >= 0 else 0)
            previous = entry
            yield holder, tokens

    def _path(self, entry: int, known: bytes, n_known: int) -> bytes:
        """The tokens of ``entry``. The first ``n_known`` of them are copied from ``known`` instead of read from the
        trie.
        """
        point = self.columns.end[entry]
        n_tokens = self.columns.n_tokens[point]
        key, at, chunks = self.columns.key[point], -(-n_tokens // CHUNK), []
        while at * CHUNK > n_known:
            chunks.append(self.trie.restore_key(key)[_HASH:])
            key, at = self.columns.before[key], at - 1
        return known[: at * _BYTES] + _tokens(b"".join(reversed(chunks)))[: (n_tokens - at * CHUNK) * WIDTH]

    def match(self, query: bytes, limit: int | None = None) -> list[Shared[str]]:
        """The holders that share a prefix with ``query``, as ``PrefixIndex.match``."""
        return list(islice(self.hits(query), None if limit is None else max(limit, 0)))

    def cover(self, tokens: bytes, exclude: Collection[str] = ()) -> int:
        """The longest prefix of ``tokens`` that a holder shares, in tokens, as ``PrefixIndex.cover``."""
        return next((hit.n_shared for hit in self.hits(tokens) if hit.holder not in exclude), 0)

    def hits(self, query: bytes) -> Iterator[Shared[str]]:
        """The holders that share a prefix with ``query``, one by one, as ``PrefixIndex.hits``."""
        columns, names = self.columns, self.names
        point, n_shared = self._descend(query)
        seen = (0, 0)
        while point != _ROOT:
            first, past = columns.first[point], columns.past[point]
            for entry, n_tokens in self._shortest_of(first, past, *seen):
                yield Shared(names[entry], n_shared, n_tokens)
            seen = first, past
            point = columns.above[point]
            n_shared = columns.n_tokens[point]

    def longest_full_prefix(self, query: bytes, exclude: Collection[str] = ()) -> Shared[str] | None:
        """The longest holder that is wholly a prefix of ``query``, as ``PrefixIndex.longest_full_prefix``."""
        columns, names = self.columns, self.names
        point, n_shared = self._descend(query)
        if columns.n_tokens[point] > n_shared:
            point = columns.above[point]
        while point != _ROOT:
            entry = columns.first[point]
            while entry < len(names) and columns.end[entry] == point:
                if names[entry] in self._entries and names[entry] not in exclude:
                    return Shared(names[entry], columns.n_tokens[point], columns.n_tokens[point])
                entry += 1
            point = columns.above[point]
        return None

    def _descend(self, query: bytes) -> tuple[int, int]:
        """The first point at or beyond the place where ``query`` diverges from all sequences, and the number of tokens
        before that place.

        Sequences of dropped holders count too: their points may have no entries left.
        """
        view = memoryview(query)
        # The first ``low`` chunks are present, ``high`` chunks are not; ``key`` and ``hashed`` belong to the first
        # ``low``.
        low, high, step, key, hashed = 0, len(query) // _BYTES + 1, 1, -1, xxh3_64()
        while high - low > 1:
            at = min(low + step, high - 1) if step else (low + high) // 2
            start = (at - 1) * _BYTES
            hash_at = hashed.copy()
            hash_at.update(view[low * _BYTES : start])
            chunk = query[start : start + _BYTES]
            text = _text(chunk)
            # A chunk cut short by media would match the shorter last chunk of another sequence.
            found = self.trie.get(_key(hash_at, text), -1) if len(text) == CHUNK else -1
            if found < 0:
                high, step = at, 0
            else:
                hash_at.update(chunk)
                low, step, key, hashed = at, step * 2, found, hash_at
        text = _text(query[low * _BYTES : min((low + 1) * _BYTES, len(query) // WIDTH * WIDTH)])
        n, key = self._in_chunk(hashed, text, key)
        if key < 0:
            return _ROOT, 0
        point, n_shared = self.columns.point[key], low * CHUNK + n
        while self.columns.n_tokens[self.columns.above[point]] >= n_shared:
            point = self.columns.above[point]
        return point, n_shared

    def _in_chunk(self, hashed: xxh3_64, text: str, key: int) -> tuple[int, int]:
        """Find the chunk with the longest common prefix with ``text``, among the chunks that follow the tokens with the
        hash ``hashed``. Returns the number of common tokens, and the trie's key of the chunk (``key`` if none has a
        common token).

        A probe ends on a whole token: one byte more would match a sibling that begins with that byte.
        """
        low, high = 0, len(text) + 1
        while high - low > 1:
            at = (low + high) // 2
            found = next(self.trie.iteritems(_key(hashed, text[:at])), None)
            if found is None:
                high = at
            else:
                low, key = at, found[1]
        return low, key

    def _shortest_of(self, first: int, past: int, skip: int, to: int) -> Iterator[tuple[int, int]]:
        """The entries from ``first`` to before ``past``, except those from ``skip`` to before ``to``, each with its
        number of tokens, shortest first. Dropped entries are left out.
        """
        shortest, n_leaves = self._shortest, self._n_leaves
        if skip == to:
            heap = [(shortest[i], i) for i in self._cut(first, past)]
        else:
            heap = [(shortest[i], i) for i in (*self._cut(first, skip), *self._cut(to, past))]
        heapq.heapify(heap)
        while heap:
            n_tokens, i = heap[0]
            if n_tokens == _DROPPED:
                return
            if i >= n_leaves:
                heapq.heappop(heap)
                yield i - n_leaves, n_tokens
            else:
                heapq.heapreplace(heap, (shortest[2 * i], 2 * i))
                heapq.heappush(heap, (shortest[2 * i + 1], 2 * i + 1))

    def _cut(self, first: int, past: int) -> Iterator[int]:
        """The fewest nodes of the tree of minima that together cover the entries from ``first`` to before ``past``."""
        low, high = self._n_leaves + first, self._n_leaves + past
        while low < high:
            if low & 1:
                yield low
                low += 1
            if high & 1:
                high -= 1
                yield high
            low //= 2
            high //= 2

    def check(self) -> None:
        """Raise AssertionError with the name of the first invariant that does not hold. Reads the whole index."""
        columns, n_points, n_entries = self.columns, len(self.columns.n_tokens), len(self.names)
        assert len(columns.point) == len(columns.before) == len(self.trie), "a row for each key"
        assert len(columns.end) == n_entries, "a point for each entry"
        assert not self.gone & self._entries.keys(), "dropped or there"
        assert len(self.gone) + len(self._entries) == n_entries, "each entry is dropped or there"
        for point in range(1, n_points):
            above = columns.above[point]
            assert 0 <= above < point, f"a point hangs on one before it: {point}"
            assert columns.n_tokens[above] < columns.n_tokens[point], f"lengths grow: {point}"
            inside = columns.first[above] <= columns.first[point] < columns.past[point] <= columns.past[above]
            assert inside, f"entries below a point are below the one above: {point}"
        for entry, holder in enumerate(self.names):
            point, n_tokens = columns.end[entry], self._shortest[self._n_leaves + entry]
            is_below = columns.first[point] <= entry < columns.past[point]
            assert is_below, f"an entry is below its point: {holder}"
            expected = columns.n_tokens[point] if holder in self._entries else _DROPPED
            assert n_tokens == expected, f"the length of an entry, or that it was dropped: {holder}"
        for i in range(1, self._n_leaves):
            smaller = min(self._shortest[2 * i], self._shortest[2 * i + 1])
            assert self._shortest[i] == smaller, f"minima of minima: {i}"
        for holder, tokens in self.sequences():
            assert tokens == self.tokens(holder), f"what is not read again is the same: {holder}"
            point, n_shared = self._descend(tokens)
            assert n_shared * WIDTH == len(tokens), f"a sequence is found: {holder}"
            assert point == columns.end[self._entries[holder]], f"a sequence ends at its point: {holder}"


def freeze(index: PrefixIndex[str]) -> DiskIndex:
    """Make a generation of all sequences in ``index``. It holds the GIL for seconds: do not call it in the process of
    the event loop. Raises ValueError for a sequence that is not ``is_freezable``, and for a hash collision.
    """
    keys: list[bytes] = []
    point_of, before, end, names = array("i"), array("i"), array("i"), list[str]()
    n_tokens, above, first, past, key_of = (array("i") for _ in range(5))
    # Of the path to the present point: its tokens, the hash before each chunk, and the number of each whole chunk's
    # key.
    path, hashes, chunks = bytearray(), [xxh3_64()], list[int]()
    unfinished: list[int] = []  # the points on this path, whose ``past`` is not known yet

    def add_key(chunk: bytes, point: int) -> int:
        text = chunk.decode("utf-32-le", "surrogatepass")
        keys.append(_key(hashes[len(chunks)], text))
        before.append(chunks[-1] if chunks else -1)
        point_of.append(point)
        return len(keys) - 1

    for n_above, edge, holders in index.branches():
        while unfinished and n_tokens[unfinished[-1]] > n_above:
            past[unfinished.pop()] = len(names)
        point = len(n_tokens)
        del path[n_above * WIDTH :], chunks[n_above // CHUNK :], hashes[n_above // CHUNK + 1 :]
        path += edge
        n_tokens.append(len(path) // WIDTH)
        above.append(unfinished[-1] if unfinished else -1)
        first.append(len(names))
        past.append(0)
        unfinished.append(point)
        while (len(chunks) + 1) * _BYTES <= len(path):
            chunk = bytes(path[len(chunks) * _BYTES : (len(chunks) + 1) * _BYTES])
            hashed = hashes[-1].copy()
            hashed.update(chunk)
            chunks.append(add_key(chunk, point))
            hashes.append(hashed)
        rest = bytes(path[len(chunks) * _BYTES :]) if holders else b""
        last = chunks[-1] if chunks else -1
        key_of.append(add_key(rest, point) if rest else last if holders else -1)
        names.extend(holders)
        end.extend([point] * len(holders))
    for point in unfinished:
        past[point] = len(names)

    trie = marisa_trie.BinaryTrie(keys)
    if len(trie) != len(keys):
        raise ValueError(f"{len(keys) - len(trie)} chunks of different sequences have the same hash")
    ids = [trie.key_id(key) for key in keys]
    by_id_point, by_id_before = array("i", ids), array("i", ids)  # only for their length: filled below
    for made, id_ in enumerate(ids):
        by_id_point[id_] = point_of[made]
        by_id_before[id_] = ids[before[made]] if before[made] >= 0 else -1
    key_of = array("i", (ids[made] if made >= 0 else -1 for made in key_of))
    return DiskIndex(
        trie, Columns(by_id_point, by_id_before, n_tokens, above, first, past, key_of, end), names
    )
