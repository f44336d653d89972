"""How much of a snapshot others hold: what is kept from question to question is what would be found anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamaslot.cache.content import SnapshotKind
from llamaslot.cache.ids import head, pack
from llamaslot.cache.reuse import CacheKind
from llamaslot.store import WithTokens
from llamaslot.store.model_snapshots import ModelSnapshots
from llamaslot.store.overlap import PrefixOverlap

A, B, C = pack(range(1000, 2000)), pack(range(3000, 4000)), pack(range(5000, 6000))


def snapshot(id_: str, tokens: bytes, **more: Any) -> WithTokens:
    fields: dict[str, Any] = {"checkpoints": (), "size_bytes": len(tokens), **more}
    return WithTokens.of(tokens, id=id_, fingerprint="model", created_at=0.0, source="test", **fields)


def library_of(*snapshots: WithTokens, cache_kind: CacheKind = CacheKind.DENSE) -> ModelSnapshots:
    library = ModelSnapshots()
    library.overlap.cache_kind = cache_kind
    for each in snapshots:
        library.add(each)
    return library


def test_a_leaf_is_covered_by_what_others_share_with_it() -> None:
    """On a dense model any of them will do, up to where they part."""
    library = library_of(snapshot("a", A + B), snapshot("b", A + C), snapshot("c", C))
    assert [library.overlap.n_tokens(id_) for id_ in "abc"] == [1000, 1000, 0]


def test_what_goes_further_covers_all() -> None:
    """The same conversation, saved later, and its own beginning."""
    library = library_of(snapshot("a", A), snapshot("ab", A + B))
    assert [library.overlap.n_tokens(id_) for id_ in ("a", "ab")] == [1000, 1000]


def test_the_last_of_its_kind_is_covered_no_more() -> None:
    """When the other one is gone, what both began with is only here."""
    library = library_of(snapshot("a", A + B), snapshot("b", A + C))
    assert library.overlap.n_tokens("b") == 1000
    library.drop("a")
    assert library.overlap.n_tokens("b") == 0
    library.add(snapshot("d", head(A, 500)))
    assert library.overlap.n_tokens("b") == 500


def test_a_trunk_is_covered_by_shorter_snapshots_only() -> None:
    """Each conversation on it holds its tokens too, but is larger and goes sooner."""
    library = library_of(
        snapshot("trunk", A, kind=SnapshotKind.TRUNK),
        snapshot("leaf", A + B),
        snapshot("short", head(A, 300), kind=SnapshotKind.TRUNK),
    )
    assert [library.overlap.n_tokens(id_) for id_ in ("trunk", "leaf", "short")] == [300, 1000, 0]


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_where_a_model_cannot_go_back_only_exact_ends_and_checkpoints_cover(cache_kind: CacheKind) -> None:
    """Two conversations that begin alike do not help each other; their trunk helps both."""
    library = library_of(snapshot("a", A + B), snapshot("b", A + C), cache_kind=cache_kind)
    assert library.overlap.n_tokens("a") == 0
    library.add(snapshot("trunk", A, kind=SnapshotKind.TRUNK))
    assert [library.overlap.n_tokens(id_) for id_ in "ab"] == [1000, 1000]
    library.drop("trunk")
    assert [library.overlap.n_tokens(id_) for id_ in "ab"] == [0, 0]
    library.add(snapshot("c", A + A, checkpoints=(800,)))
    assert 790 <= library.overlap.n_tokens("c") + 800 <= 801
    library.overlap.cache_kind = CacheKind.DENSE
    assert library.overlap.n_tokens("a") == 0, "not looked at yet"
    library.overlap.compute_some(3)
    assert library.overlap.n_tokens("a") == 1000


def test_a_trunk_that_comes_or_goes_is_looked_at_in_its_own_space_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of other users share nothing with it, and there may be hundreds."""
    library, looked_at, real = library_of(), list[str](), PrefixOverlap._compute
    for user in range(20):
        library.add(snapshot(f"of {user}", A, kind=SnapshotKind.TRUNK, namespace=f"key:{user}"))

    def compute(self: PrefixOverlap, id_: str, tokens: bytes | None = None) -> None:
        looked_at.append(id_)
        real(self, id_, tokens)

    monkeypatch.setattr(PrefixOverlap, "_compute", compute)
    library.add(snapshot("new", head(A, 300), kind=SnapshotKind.TRUNK, namespace="key:7"))
    library.drop("new")
    assert set(looked_at) == {"new", "of 7"}


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([CacheKind.DENSE, CacheKind.RECURRENT]))
def test_what_is_kept_is_what_would_be_found_anew(seed: int, cache_kind: CacheKind) -> None:
    """Snapshots come and go at random, all sharing with each other; nothing that is believed is out of date.

    On models that go on from few points only trunks and exact ends are looked at here: checkpoints are an estimate.
    """
    rng = random.Random(seed)
    library = library_of(cache_kind=cache_kind)
    trunks = [pack([rng.randrange(2) for _ in range(rng.randrange(1, 8))]) for _ in range(2)]
    for serial in range(25):
        if rng.random() < 0.3 and library.snapshots:
            library.drop(rng.choice(list(library.snapshots)))
        elif rng.random() < 0.15:
            tokens = rng.choice(trunks)
            if not any(library.index.tokens(id_) == tokens for id_ in library.snapshots):
                library.add(snapshot(f"t{serial}", tokens, kind=SnapshotKind.TRUNK))
        else:
            tokens = rng.choice(trunks) + pack([rng.randrange(2) for _ in range(rng.randrange(9))])
            # Its last token is its own: leaves of which one is the beginning of another are superseded.
            library.add(snapshot(f"l{serial}", tokens + pack([100 + serial])))
        anew = PrefixOverlap(library.in_namespaces, library.snapshots)
        anew.cache_kind = cache_kind
        for id_ in library.snapshots:
            anew.put(id_)
        anew.compute_some(100)
        for id_, each in library.snapshots.items():
            assert library.overlap.n_tokens(id_) == anew.n_tokens(id_), each
        library.check()
