"""``records.dataclass`` does what the standard one does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import field
from typing import Any

import pytest

from llamaslot import records

Decorate = Callable[..., Any]
SORTS: list[dict[str, bool]] = [
    {},
    {"frozen": True},
    {"slots": True},
    {"frozen": True, "slots": True},
    {"slots": True, "eq": False},
    {"slots": True, "repr": False},
    {"frozen": True, "slots": True, "order": True},
    {"frozen": True, "slots": True, "kw_only": True},
]


def made(decorate: Decorate, options: dict[str, bool]) -> Any:
    """The same class, by one decorator or the other."""

    @decorate(**options)
    class Thing:
        a: int
        b: list[int] = field(default_factory=list)
        c: str = field(default="c", compare=False)
        d: float = field(default=0.5, repr=False)

        def twice(self) -> int:
            return 2 * self.a

    return Thing


def outcome(call: Callable[[], object]) -> object:
    try:
        return call()
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("options", SORTS, ids=str)
def test_it_does_as_the_standard_one(options: dict[str, bool]) -> None:
    """Values, defaults, texts, comparisons, hashes, and copies."""
    ours, theirs = made(records.dataclass, options), made(dataclasses.dataclass, options)
    assert ours.__match_args__ == theirs.__match_args__

    def told(kind: Any) -> list[object]:
        one, same, other = kind(a=1), kind(a=1, c="x"), kind(a=2, b=[3])
        changed = dataclasses.replace(one, a=7)
        if (said := repr(one)).startswith("<"):
            said = "as any object"
        return [
            said,
            one.twice(),
            changed.a,
            one == same,
            one == other,
            one == 1,
            one != other,
            dataclasses.asdict(other),
            copy.copy(other).b is other.b,
            outcome(lambda: kind()),
            outcome(lambda: one < other),
            kind.__hash__ is None,
            hasattr(one, "__dict__"),
        ]

    assert told(ours) == told(theirs)


def test_hashes_are_of_the_values() -> None:
    """Of a frozen one without lists."""

    def kind(decorate: Decorate) -> Any:
        @decorate(frozen=True, slots=True)
        class Key:
            a: int
            b: str = field(default="", compare=False)

        return Key

    ours, theirs = kind(records.dataclass), kind(dataclasses.dataclass)
    assert hash(ours(1, "x")) == hash(theirs(1, "y"))
    assert {ours(1, "x"), ours(1, "y"), ours(2)} == {ours(1), ours(2)}


@records.dataclass(frozen=True, slots=True)
class Own:
    """With methods of its own."""

    a: int
    whole: Any = None

    def __repr__(self) -> str:
        return "own"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Own)

    def __hash__(self) -> int:
        return 7


@records.dataclass(frozen=True, slots=True)
class More(Own):
    b: int = 0


@records.dataclass(slots=True)
class Loop:
    itself: Any = None


def test_own_methods_stay() -> None:
    """Those of a base class are replaced, as by the standard one."""
    assert (repr(Own(1)), Own(1), hash(Own(2))) == ("own", Own(2), 7)
    assert repr(More(1, b=2)) == "More(a=1, whole=None, b=2)"
    assert More(1) != More(2)
    assert pickle.loads(pickle.dumps(More(1, b=2))) == More(1, b=2)


def test_a_loop_is_told() -> None:
    """Once."""
    loop = Loop()
    loop.itself = loop
    assert repr(loop) == "Loop(itself=...)"
