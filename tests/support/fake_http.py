"""What the fake's routes share: the log of requests, and answers with llama-server's headers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.support.fake_types import Task


class Dropped(Exception):
    """Raised when the connection was reset on purpose: no client can get an answer."""


@dataclass
class Seen:
    """One request that was sent to the fake."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]
    slot: int | None = None  # what it asked for: id_slot, or the N of /slots/N
    action: str | None = None
    status: int | None = None
    client_left: bool = False
    n_slots: int = 1
    tasks: list[Task] = field(default_factory=list, repr=False)
    answer: bytearray = field(
        default_factory=bytearray, repr=False
    )  # of a completion: its body as it was sent

    @property
    def origin(self) -> dict[str, str]:
        """The CORS headers of the server's answer: any web page may ask."""
        return {"Access-Control-Allow-Origin": self.headers.get("Origin", "")}

    @property
    def landed(self) -> list[int]:
        """The slots that the request has really taken so far; for a slot action, the slot that it names."""
        if self.action is not None:
            return [] if self.slot is None else [self.slot % self.n_slots]
        every = (task for parent in self.tasks for task in (parent, *parent.children))
        return [task.landed for task in every if task.landed is not None]

    @property
    def names(self) -> tuple[str, ...]:
        return (self.action, self.path) if self.action else (self.path,)


def common_headers() -> dict[str, str]:
    return {"Server": "llama.cpp", "Access-Control-Allow-Origin": "", "Keep-Alive": "timeout=5, max=100"}


def reply(
    body: Any,
    status: int = 200,
    *,
    content_type: str = "application/json; charset=utf-8",
    headers: dict[str, str] | None = None,
) -> web.Response:
    data = body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode()
    every = common_headers() | {"Content-Type": content_type} | (headers or {})
    return web.Response(body=data, status=status, headers=every)
