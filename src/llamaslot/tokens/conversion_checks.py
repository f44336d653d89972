"""The shape of a request body. For each shape it is recorded whether our conversion yields the server's token count."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

#: Fields with names and values of the client's own: arguments of calls, and their descriptions.
_OWN = {"input_schema", "parameters", "metadata", "chat_template_kwargs", "arguments"}
_MAX_SHAPES = 1024
_COUNT = "/v1/messages/count_tokens"


def shape_of(body: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """The names of its fields, with the types and roles of its parts."""
    found = set[tuple[str, str]]()
    left: list[Any] = [body]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left += part
        elif isinstance(part, Mapping):
            # Values that are no names are visited below and may be large: formatting them at each level takes far too
            # long.
            names = [part.get("type"), part.get("role")]
            kind = " ".join(name[:64] if isinstance(name, str) else "" for name in names)
            for name, value in part.items():
                found.add((kind, str(name)[:64]))
                if name not in _OWN and not (name == "input" and part is not body):  # of a call
                    left.append(value)
    return frozenset(found)


class ConversionChecks:
    """Whether the conversion of bodies is right, by shape.

    ``ask`` posts to llama-server and returns status and JSON.
    """

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, Any]]]) -> None:
        self._ask = ask
        self._is_right: dict[frozenset[tuple[str, str]], bool] = {}

    def learn(self, body: Mapping[str, Any], *, is_right: bool) -> None:
        """Record whether the server counted as many tokens as the conversion gives. One wrong count is final."""
        shape = shape_of(body)
        self._is_right[shape] = self._is_right.pop(shape, True) and is_right
        if len(self._is_right) > _MAX_SHAPES:
            del self._is_right[next(iter(self._is_right))]

    def known(self, body: Mapping[str, Any]) -> bool | None:
        """Whether the conversion of such a body is right; None if that is unknown."""
        return self._is_right.get(shape_of(body)) if self._is_right else None

    async def check(self, body: Mapping[str, Any], n_tokens: int) -> bool:
        """Whether the server counts ``n_tokens`` in a body of /v1/messages whose shape is not ``known``.

        False if it refuses the body (as a rule it would refuse the request too); such a shape is checked again next
        time. True on a build without this route: the count in the answer decides later. Raises BackendDown.
        """
        status, counted = await self._ask(_COUNT, body)
        if status == 404:
            return True
        if status != 200 or not isinstance(counted, Mapping):
            return False
        is_right = counted.get("input_tokens") == n_tokens
        self.learn(body, is_right=is_right)
        return is_right
