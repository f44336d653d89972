"""A client's request, and the request that is sent to llama-server for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from llamaslot.formats.base import Format
from llamaslot.llama.response import Response

Post = Callable[[dict[str, Any]], contextlib.AbstractAsyncContextManager[Response]]


class ClientRequest(Struct, frozen=True):
    """A client's request. ``post`` sends a body to the same route of llama-server."""

    id: str
    body: dict[str, Any]
    format: Format
    post: Post
    started: float

    @property
    def is_streaming(self) -> bool:
        return self.body.get("stream") is True

    @property
    def wants_progress(self) -> bool:
        return self.is_streaming and self.body.get("return_progress") is True

    def may_set(self, name: str) -> bool:
        """Whether llamaslot may set a boolean field: it is absent or a boolean. llama-server refuses other values."""
        return isinstance(self.body.get(name), bool | None)
