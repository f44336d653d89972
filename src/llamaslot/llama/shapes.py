"""Of what kinds of things a body is made: by that those are known for which a conversion has turned out wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What is a client's own, names included: arguments of calls, and what describes them.
_OWN = {"input_schema", "parameters", "metadata", "chat_template_kwargs", "arguments"}
_MAX_SHAPES = 256


def shape_of(body: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """The names of its fields, with the types and roles of its parts."""
    found = set[tuple[str, str]]()
    left: list[Any] = [body]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, Mapping):
            # What is no name is looked through below, and may be large: written out at each level it takes for ever.
            names = [part.get("type"), part.get("role")]
            kind = " ".join(name[:64] if isinstance(name, str) else "" for name in names)
            for name, value in part.items():
                found.add((kind, str(name)[:64]))
                if name not in _OWN and not (name == "input" and part is not body):  # of a call
                    left.append(value)
    return frozenset(found)


class WrongShapes:
    """Shapes of bodies of which the server has counted other tokens than their conversion gives, until ``forget``."""

    def __init__(self) -> None:
        self._wrong: dict[frozenset[tuple[str, str]], None] = {}

    def forget(self) -> None:
        """The server was restarted, perhaps as another build."""
        self._wrong = {}

    def add(self, body: Mapping[str, Any]) -> None:
        self._wrong[shape_of(body)] = None
        if len(self._wrong) > _MAX_SHAPES:
            del self._wrong[next(iter(self._wrong))]

    def has(self, body: Mapping[str, Any]) -> bool:
        return bool(self._wrong) and shape_of(body) in self._wrong
