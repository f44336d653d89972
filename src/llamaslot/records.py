"""``dataclass`` of the standard library, made in a third of the time: a start makes a hundred, at 1 ms each.

The standard one compiles each method of each class. Here only ``__init__`` is compiled; the others are closures.
``frozen`` is left to the type checker: enforced at run time, an object takes three times as long to make. What is not
supported here is left to the standard one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from operator import attrgetter
from reprlib import recursive_repr
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass
else:

    def dataclass(cls: type | None = None, /, **options: bool) -> Any:
        """As the standard one."""
        return _made(cls, **options) if cls is not None else lambda cls: _made(cls, **options)


def _made(
    cls: type[Any],
    *,
    frozen: bool = False,
    slots: bool = False,
    eq: bool = True,
    repr: bool = True,  # noqa: A002
    **others: bool,
) -> type[Any]:
    own = vars(cls)
    if others:
        return dataclasses.dataclass(frozen=frozen, slots=slots, eq=eq, repr=repr, **others)(cls)
    if cls.__doc__ is None:
        cls.__doc__ = cls.__name__  # else it would be the signature, which takes 0.2 ms
    made: type[Any] = dataclasses.dataclass(repr=False, eq=False, slots=slots)(cls)
    fields, methods = dataclasses.fields(made), dict[str, Any]()
    if repr and "__repr__" not in own:
        methods["__repr__"] = _repr_of([each.name for each in fields if each.repr])
    if eq:
        equal, hashed = _eq_and_hash_of(_values_of([each.name for each in fields if each.compare]))
        if "__eq__" not in own:
            methods["__eq__"] = equal
        if own.get("__hash__") is None:
            methods["__hash__"] = hashed if frozen else None
    for name, method in methods.items():
        setattr(made, name, method)
    return made


def _values_of(names: Sequence[str]) -> Callable[[object], tuple[object, ...]]:
    if len(names) > 1:
        return attrgetter(*names)
    return lambda self: tuple([getattr(self, name) for name in names])


def _eq_and_hash_of(
    values: Callable[[object], tuple[object, ...]],
) -> tuple[Callable[[object, object], bool], Callable[[object], int]]:
    def __eq__(self: object, other: object) -> bool:  # noqa: N807
        return values(self) == values(other) if other.__class__ is self.__class__ else NotImplemented

    def __hash__(self: object) -> int:  # noqa: N807
        return hash(values(self))

    return __eq__, __hash__


def _repr_of(names: Sequence[str]) -> Callable[[object], str]:
    @recursive_repr()
    def __repr__(self: object) -> str:  # noqa: N807
        told = ", ".join([f"{name}={getattr(self, name)!r}" for name in names])
        return f"{self.__class__.__qualname__}({told})"

    return __repr__


__all__ = ["dataclass"]
