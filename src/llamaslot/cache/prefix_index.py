"""A radix tree over token sequences: finds which *holders* (slots, snapshots) share how long a prefix with a prompt.

Edges are ``bytes`` of int32 tokens. A lookup walks down along the prompt once, at memcmp speed, and collects the
holders on the way back up. Its time grows with the length of the prompt and the branch points on its path, whatever
else is in the tree. A path of 5,000 branch points costs 4 ms: do not keep sequences that end less than 64 tokens apart
on one path.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterable, Iterator, KeysView
from itertools import count as counter
from itertools import islice, pairwise
from operator import attrgetter
from typing import Generic, NamedTuple, TypeVar

from llamaslot.cache import ids as tok

H = TypeVar("H", bound=Hashable)
_RANK = attrgetter("rank")


class Shared(NamedTuple, Generic[H]):
    """The number of tokens that one holder shares with a query.

    A named tuple, because it takes half the time of a frozen dataclass: with 256 slots, most of a match's time goes
    into making these.
    """

    holder: H
    n_shared: int  # tokens in common with the query
    n_tokens: int  # tokens of the holder


class Near(NamedTuple, Generic[H]):
    """The result of ``PrefixIndex.near``, which leaves out holders that share little with the query.

    ``hits``: the holders that are not left out, in the order of ``match``. ``n_rest``: the highest number of tokens
    that a left-out holder shares. ``n_shared``: a function that gives the number of tokens that a holder shares, also
    for left-out holders; valid until the index changes.
    """

    hits: list[Shared[H]]
    n_rest: int
    n_shared: Callable[[H], int]


class Branch(NamedTuple, Generic[H]):
    """A point where a sequence ends or sequences diverge. ``edge``: the tokens between its parent and it;
    ``n_above``: the number of tokens from the root to its parent.
    """

    n_above: int
    edge: bytes
    holders: tuple[H, ...]


class _Node(Generic[H]):
    """A point of the tree where a sequence ends or sequences diverge.

    A holder's rank is the number of its tokens, then the age of its node: shorter sequences come first, then older
    nodes. The ``rank`` of a node is that of the first holder at or below it. ``order`` has the children by rank, so
    the first few holders below a node with 10,000 children are found without reading the other children.
    """

    __slots__ = ("children", "edge", "holders", "n_tokens", "order", "parent", "rank", "serial")

    def __init__(self, edge: bytes, parent: _Node[H] | None, n_tokens: int, serial: int) -> None:
        self.edge = edge  # tokens between the parent and here; empty at the root only
        self.parent = parent
        self.n_tokens = n_tokens  # from the root to here
        self.serial = serial
        self.rank = self.own_rank
        self.holders: dict[H, None] = {}  # a set that keeps the order of insertion
        self.children: dict[bytes, _Node[H]] = {}  # by the first token of their edges
        self.order: list[_Node[H]] = []

    @property
    def own_rank(self) -> int:
        return self.n_tokens << 48 | self.serial  # sorting one integer takes two thirds of the time of a pair

    def __repr__(self) -> str:
        return f"<Node {self.n_tokens} tok, {len(self.holders)} holders, {len(self.children)} children>"


class PrefixIndex(Generic[H]):
    """Token sequences and their holders. Not thread-safe: it belongs to the event loop.

    ``on_cover(holder)`` is called when the insertion or removal of another holder may have changed
    ``shared_with_others(holder)``: for one or two holders each time, however many the index has.
    """

    def __init__(self, on_cover: Callable[[H], None] | None = None) -> None:
        self._on_cover = on_cover
        self._serials = counter()
        self._root: _Node[H] = _Node(b"", None, 0, next(self._serials))
        self._ends: dict[H, _Node[H]] = {}
        self._n_tokens = 0

    def __contains__(self, holder: object) -> bool:
        return holder in self._ends

    def __len__(self) -> int:
        return len(self._ends)

    def __repr__(self) -> str:
        return f"<PrefixIndex {len(self)} holders, {self._n_tokens} unique tok>"

    @property
    def n_tokens(self) -> int:
        """The number of distinct tokens stored: a prefix that several sequences share counts once."""
        return self._n_tokens

    def holders(self) -> KeysView[H]:
        return self._ends.keys()

    def tokens(self, holder: H) -> bytes:
        """The sequence of ``holder``, joined from the edges. Raises KeyError for an unknown one."""
        node: _Node[H] | None = self._ends[holder]
        edges = []
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return b"".join(reversed(edges))

    def insert(self, holder: H, tokens: bytes) -> None:
        """Set the sequence of ``holder`` to ``tokens``, replacing the previous one.

        Raises ValueError, and changes nothing, if the bytes do not end on a whole token.
        """
        if len(tokens) % tok.WIDTH:
            raise ValueError(f"{len(tokens)} bytes are not whole tokens of {tok.WIDTH} bytes")
        self.drop(holder)
        node, position = self._root, 0
        while position < len(tokens):
            if (child := node.children.get(tokens[position : position + tok.WIDTH])) is None:
                node = self._add_leaf(node, tokens[position:])
                break
            if not tokens.startswith(child.edge, position):
                child = self._split(child, tok.common(tokens, child.edge, node.n_tokens))
            node, position = child, child.n_tokens * tok.WIDTH
        self._cover_changes(node)
        node.holders[holder] = None
        self._ends[holder] = node
        self._rerank(node)

    def drop(self, holder: H) -> None:
        """Remove ``holder`` from the index. Idempotent."""
        if (node := self._ends.pop(holder, None)) is None:
            return
        del node.holders[holder]
        if (parent := node.parent) is not None and not node.holders and not node.children:
            del parent.children[node.edge[: tok.WIDTH]]
            del parent.order[self._position(node)]
            self._n_tokens -= tok.count(node.edge)
            node = parent
        self._cover_changes(node)
        self._rerank(node)
        if node.parent is not None and not node.holders and len(node.children) == 1:
            self._merge(node)

    def match(self, query: bytes, limit: int | None = None) -> list[Shared[H]]:
        """The holders with at least one token in common with ``query``, at most ``limit`` of them.

        The longest common prefix comes first. Of equal ones, the shortest sequence comes first, so a sequence that is
        wholly a prefix of the query precedes longer ones. The order of further ties does not depend on ``limit``. With
        a limit, only the nodes on the query's path and those that lead to the first ``limit`` holders are visited.
        """
        if limit is not None and limit < len(self._ends):
            return list(islice(self.hits(query), max(limit, 0)))
        return self.near(query, 1, 1.0).hits

    def near(self, query: bytes, least: int, share: float) -> Near[H]:
        """As ``match``, but without the holders that share fewer than ``least`` tokens and also less than the fraction
        ``share`` of their own tokens. If a thousand sequences have a short beginning in common, collecting them all
        would be most of the work.
        """
        new, found = tuple.__new__, list[Shared[H]]()  # 0.1 us less for each than a call of Shared
        path, n_rest = dict[_Node[H], int](), 0
        for n_shared, node, siblings, seen in self._levels(query):
            path[siblings[0] if node is None else node] = n_shared
            if node is not None:
                found += [new(Shared, (holder, n_shared, n_shared)) for holder in node.holders]
            if n_shared >= least:
                below_it: Iterable[_Node[H]] = _all_below(siblings, seen)
            else:
                n_rest = max(n_rest, n_shared)
                below_it = _first_below(siblings, seen, n_shared / share)
            found += [
                new(Shared, (holder, n_shared, below.n_tokens))
                for below in below_it
                for holder in below.holders
            ]
        ends = self._ends

        def n_shared_of(holder: H) -> int:
            node = ends.get(holder)
            while node is not None:
                if (n := path.get(node)) is not None:
                    return n
                node = node.parent
            return 0

        return Near(found, n_rest, n_shared_of)

    def shared_with_others(self, holder: H) -> int:
        """The length in tokens of the longest prefix that the sequence of ``holder`` has in common with any other
        holder's. Raises KeyError for an unknown holder. Reads no tokens: the node above the end of a sequence is where
        another sequence ends or diverges.
        """
        node = self._ends[holder]
        if len(node.holders) > 1 or node.children or node.parent is None:
            return node.n_tokens
        return node.parent.n_tokens

    def hits(self, query: bytes) -> Iterator[Shared[H]]:
        """As ``match`` without a limit, but an iterator. The index must not change while it is read."""
        for n_shared, node, siblings, seen in self._levels(query):
            if node is not None:
                for holder in node.holders:
                    yield Shared(holder, n_shared, n_shared)
            for below in _first_below(siblings, seen):
                for holder in below.holders:
                    yield Shared(holder, n_shared, below.n_tokens)

    def longest_full_prefix(self, query: bytes) -> Shared[H] | None:
        """The holder with the longest sequence that is wholly a prefix of ``query``; None if there is none. Empty
        sequences do not count. Recurrent and sliding-window models need it: their states cannot be truncated.
        """
        node, _, _ = self._descend(query)
        while node.parent is not None:
            for holder in node.holders:
                return Shared(holder, node.n_tokens, node.n_tokens)
            node = node.parent
        return None

    @classmethod
    def of_branches(cls, branches: Iterable[Branch[H]]) -> PrefixIndex[H]:
        """Build the index that has these ``branches``, without a walk from the root for each holder. Hits have the same
        order, except that those of the same length may change places. Raises ValueError if no index has the branches in
        this order.
        """
        index = cls()
        root, path, nodes, n_holders = index._root, [index._root], list[_Node[H]](), 0
        for n_above, edge, holders in branches:
            while path[-1].n_tokens > n_above >= 0:
                path.pop()
            if nodes:
                parent, n_new = path[-1], tok.count(edge)
                if parent.n_tokens != n_above or not n_new or len(edge) % tok.WIDTH:
                    raise ValueError("a branch begins or ends where none can")
                node = _Node(edge, parent, n_above + n_new, next(index._serials))
                parent.children[edge[: tok.WIDTH]] = node
                parent.order.append(node)
                path.append(node)
                index._n_tokens += n_new
            elif edge or n_above:
                raise ValueError("the first branch is not the root")
            else:
                node = root
            nodes.append(node)
            for holder in holders:
                node.holders[holder] = None
                index._ends[holder] = node
            n_holders += len(holders)
        if len(index._ends) != n_holders:
            raise ValueError("a holder has two places")
        for node in reversed(nodes):  # those below come before those above
            ranks = [child.rank for child in node.order]
            if len(node.children) != len(ranks) or any(a > b for a, b in pairwise(ranks)):
                raise ValueError("two branches begin alike, or they have another order")
            if not node.holders and node is not root:
                if len(ranks) < 2:
                    raise ValueError("a branch has neither a holder nor a fork")
                node.rank = ranks[0]
        return index

    def become(self, other: PrefixIndex[H]) -> None:
        """Take the sequences of ``other``, which must not be used after that, in place of the present ones."""
        self._root, self._ends, self._n_tokens = other._root, other._ends, other._n_tokens
        self._serials = other._serials

    def branches(self) -> Iterator[Branch[H]]:
        """All nodes in pre-order, the root first. The index must not change while it is read."""
        stack = [self._root]
        while stack:
            node = stack.pop()
            yield Branch(node.n_tokens - tok.count(node.edge), node.edge, tuple(node.holders))
            stack += reversed(node.order)

    def _descend(self, query: bytes) -> tuple[_Node[H], _Node[H] | None, int]:
        """Walk down the tree along ``query``. Returns the last node that matches as a whole, the child in whose
        edge the match ends (or None), and the number of matched tokens.
        """
        node, position = self._root, 0
        while child := node.children.get(query[position : position + tok.WIDTH]):
            if not query.startswith(child.edge, position):
                return node, child, node.n_tokens + tok.common(query, child.edge, node.n_tokens)
            node, position = child, child.n_tokens * tok.WIDTH
        return node, None, node.n_tokens

    def _levels(self, query: bytes) -> Iterator[tuple[int, _Node[H] | None, list[_Node[H]], _Node[H] | None]]:
        """The levels of the tree along ``query``, from the deepest match up to the last one before the root.

        Each is ``(n_shared, node, siblings, seen)``. ``n_shared``: the common tokens of all holders on this level.
        ``node``: the node that ends after these tokens; None if the match ends within an edge. ``siblings``: the
        subtrees below. ``seen``: the one of these that a deeper level has covered, or None.
        """
        node, inside, n_shared = self._descend(query)
        if inside is not None:
            yield n_shared, None, [inside], None
        seen = inside
        while node.parent is not None:
            yield node.n_tokens, node, node.order, seen
            seen, node = node, node.parent

    def _cover_changes(self, node: _Node[H]) -> None:
        """Call ``on_cover`` for the holder that ends at ``node``, if no other holder ends there and no child is below.
        Then ``shared_with_others(holder)`` ends at the parent, which has changed.
        """
        if self._on_cover is not None and not node.children and len(node.holders) == 1:
            self._on_cover(next(iter(node.holders)))

    def _add_leaf(self, parent: _Node[H], edge: bytes) -> _Node[H]:
        self._cover_changes(parent)
        leaf = _Node(edge, parent, parent.n_tokens + tok.count(edge), next(self._serials))
        parent.children[edge[: tok.WIDTH]] = leaf
        insort(parent.order, leaf, key=_RANK)
        self._n_tokens += tok.count(edge)
        self._rerank(parent)
        return leaf

    def _split(self, lower: _Node[H], n: int) -> _Node[H]:
        """Split the edge of ``lower`` after its first ``n`` tokens by a new node with the same rank, and return that
        node.
        """
        parent, cut = _parent(lower), n * tok.WIDTH
        upper = _Node(lower.edge[:cut], parent, parent.n_tokens + n, next(self._serials))
        upper.rank = lower.rank
        parent.order[self._position(lower)] = upper
        parent.children[upper.edge[: tok.WIDTH]] = upper
        lower.edge, lower.parent = lower.edge[cut:], upper
        upper.children[lower.edge[: tok.WIDTH]] = lower
        upper.order.append(lower)
        self._cover_changes(lower)
        return upper

    def _merge(self, upper: _Node[H]) -> None:
        """Remove a node that has no holders and one child, by joining the edges of both. The child object stays, so its
        own children, perhaps thousands, keep their parent.
        """
        parent, lower = _parent(upper), upper.order[0]
        parent.order[self._position(upper)] = lower
        parent.children[upper.edge[: tok.WIDTH]] = lower
        lower.edge, lower.parent = upper.edge + lower.edge, parent
        self._cover_changes(lower)

    def _rerank(self, node: _Node[H]) -> None:
        """Update the rank of ``node`` and of the nodes above it, up to the first whose rank does not change. Called
        after the first holder at or below ``node`` may have changed.
        """
        while node.parent is not None:
            rank = node.own_rank if node.holders else node.order[0].rank
            if rank == node.rank:
                return
            siblings = node.parent.order
            del siblings[self._position(node)]
            node.rank = rank
            insort(siblings, node, key=_RANK)
            node = node.parent

    @staticmethod
    def _position(node: _Node[H]) -> int:
        """The index of ``node`` in the sorted list of its siblings; ranks are unique."""
        return bisect_left(_parent(node).order, node.rank, key=_RANK)

    def check(self) -> None:
        """Raise AssertionError with the name of the first invariant that does not hold."""
        root, ends, n_tokens = self._root, dict[H, _Node[H]](), 0
        assert (root.parent, root.edge, root.n_tokens) == (None, b"", 0), "the root is no edge's end"
        stack = [root]
        while stack:
            node = stack.pop()
            n_tokens += tok.count(node.edge)
            for holder in node.holders:
                assert holder not in ends, f"one place for each holder: {holder!r}"
                ends[holder] = node
            ranks = [child.rank for child in node.order]
            assert all(a < b for a, b in pairwise(ranks)), f"children by rank: {node}"
            assert len(node.order) == len(node.children), f"order has all children: {node}"
            for child in node.order:
                assert child.edge, f"no empty edge: {child}"
                assert len(child.edge) % tok.WIDTH == 0, f"edges are whole tokens: {child}"
                assert child.parent is node, f"parent links: {child}"
                key = child.edge[: tok.WIDTH]
                assert node.children.get(key) is child, f"children by their first token: {child}"
                assert child.n_tokens == node.n_tokens + tok.count(child.edge), f"depths add up: {child}"
                assert child.holders or len(child.children) > 1, f"a holder or a fork at each node: {child}"
                rank = child.own_rank if child.holders else child.order[0].rank
                assert child.rank == rank, f"rank of the first holder below: {child}"
            stack += node.order
        assert ends == self._ends, "every holder is found where it ends"
        assert n_tokens == self._n_tokens, f"unique tokens are counted: {n_tokens} and not {self._n_tokens}"


def _parent(node: _Node[H]) -> _Node[H]:
    assert node.parent is not None, "the root has no siblings, no edge and no rank"
    return node.parent


def _all_below(siblings: list[_Node[H]], seen: _Node[H] | None) -> list[_Node[H]]:
    """All nodes with holders in the subtrees ``siblings``, except the subtree ``seen``, sorted by rank."""
    found, stack = [], [node for node in siblings if node is not seen]
    while stack:
        node = stack.pop()
        if node.holders:
            found.append(node)
        if node.order:
            stack += node.order
    found.sort(key=_RANK)
    return found


def _first_below(
    siblings: list[_Node[H]], seen: _Node[H] | None, most: float = math.inf
) -> Iterator[_Node[H]]:
    """As ``_all_below``, but an iterator that ends before the first node with more than ``most`` tokens. A heap
    holds the next sibling of each list reached so far, so nodes behind the last result are not visited.
    """
    heap: list[tuple[int, list[_Node[H]], int]] = []

    def reach(siblings: list[_Node[H]], i: int) -> None:
        if i < len(siblings) and siblings[i] is seen:
            i += 1
        if i < len(siblings):
            heapq.heappush(heap, (siblings[i].rank, siblings, i))

    reach(siblings, 0)
    while heap:
        _, siblings, i = heapq.heappop(heap)
        node = siblings[i]
        reach(siblings, i + 1)
        reach(node.order, 0)
        if node.holders:
            if node.n_tokens > most:
                return
            yield node
