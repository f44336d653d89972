"""Of what kinds of things a body is made: by that it is known for which ones a conversion is right."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

#: What is a client's own, names included: arguments of calls, and what describes them.
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
            # What is no name is looked through below, and may be large: written out at each level it takes for ever.
            names = [part.get("type"), part.get("role")]
            kind = " ".join(name[:64] if isinstance(name, str) else "" for name in names)
            for name, value in part.items():
                found.add((kind, str(name)[:64]))
                if name not in _OWN and not (name == "input" and part is not body):  # of a call
                    left.append(value)
    return frozenset(found)


class Shapes:
    """What is known of the conversion of bodies by their shapes, until ``forget``.

    ``ask`` posts to llama-server and gives status and JSON.
    """

    def __init__(self, ask: Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, Any]]]) -> None:
        self._ask = ask
        self._is_right: dict[frozenset[tuple[str, str]], bool] = {}

    def forget(self) -> None:
        """The server was restarted, perhaps as another build."""
        self._is_right = {}

    def learn(self, body: Mapping[str, Any], *, is_right: bool) -> None:
        """The server has counted as many tokens as the conversion gives, or others. Once wrong is wrong."""
        shape = shape_of(body)
        self._is_right[shape] = self._is_right.pop(shape, True) and is_right
        if len(self._is_right) > _MAX_SHAPES:
            del self._is_right[next(iter(self._is_right))]

    def known(self, body: Mapping[str, Any]) -> bool | None:
        """Whether the conversion of such a body is right; None while that is not known."""
        return self._is_right.get(shape_of(body)) if self._is_right else None

    async def check(self, body: Mapping[str, Any], n_tokens: int) -> bool:
        """Whether the server counts ``n_tokens`` in a body of /v1/messages of a shape that is not ``known``.

        One that it does not count is refused by it as a rule, and asked about again. A build without this route is
        taken at its word when it answers. Raises BackendDown.
        """
        status, counted = await self._ask(_COUNT, body)
        if status == 404:
            return True
        if status != 200 or not isinstance(counted, Mapping):
            return False
        is_right = counted.get("input_tokens") == n_tokens
        self.learn(body, is_right=is_right)
        return is_right
