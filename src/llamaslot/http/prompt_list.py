"""Several prompts in one request: each is sent as a request of its own, one after the other, and they are answered
together.

llama-server would compute all prompts but the first without interruption. Measured of its answer to a list: it is the
answer to the first prompt with the choices of all prompts, in the native format a list of answers. In a stream all
events have one ``id``, and ``index`` continues over the prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
from aiohttp import web

from llamaslot.errors import LlamaslotError
from llamaslot.http.client_stream import SSE_HEADERS, Downstream
from llamaslot.llama.sse import EventSplitter, data_of, event_of, n_commented


class PromptPart(Downstream):
    """The client's side of one prompt of a list. ``whole``: the client's side of the request; ``first``: the index that
    this prompt's first answer has in the whole answer.
    """

    def __init__(self, whole: Downstream, first: int, *, is_last: bool) -> None:
        super().__init__(whole.request, whole.config, whole.is_streaming, whole.headers)
        self._whole, self._first, self._is_last = whole, first, is_last
        self._splitter = EventSplitter()
        self.has_failed = False
        self.response = whole.response

    async def begin(
        self, status: int = 200, headers: Mapping[str, str] | None = None, *, is_more: bool = False
    ) -> web.StreamResponse:
        self.response = await self._whole.begin(status, headers)
        return self.response

    async def write(self, data: bytes) -> None:
        """Send comments unchanged, and events with the index and id that they have in the whole answer."""
        n = n_commented(data) if not self._splitter.rest else 0
        events = [data[:n], *map(self._told, self._splitter.feed(data[n:]))]
        told = [event for event in events if event]
        if told:
            await self.begin(headers=SSE_HEADERS)
            await self._whole.write(b"".join(told))

    def put(self, data: bytes) -> bool:
        return False

    async def fail(self, error: LlamaslotError) -> web.StreamResponse:
        return await self._whole.fail(error)

    async def end(self, last: bytes = b"") -> web.StreamResponse:
        await self.write(last)
        return await self._whole.end() if self._is_last else await self.begin()

    def _told(self, event: bytes) -> bytes:
        """Return ``event`` as it is in the answer to the whole list; empty for a ``[DONE]`` that is not the
        last one.
        """
        event = event[n_commented(event) :]
        if event.startswith(b"data: [DONE]"):
            return event if self._is_last else b""
        payload = data_of(event)
        if not isinstance(payload, dict) or "error" in payload:
            self.has_failed = self.has_failed or isinstance(payload, dict)
            return event
        shift(payload, self._first)
        if "id" in payload:
            payload["id"] = self._whole.told.setdefault("id", payload["id"])
        return event_of(payload)


def shift(answer: dict[str, Any], first: int) -> None:
    """Add ``first`` to the index of each answer in ``answer``, in place."""
    for part in [answer, *answer.get("choices", ())]:
        if isinstance(part.get("index"), int):
            part["index"] += first


def joined(parts: list[bytes], n_each: int) -> bytes:
    """Return the JSON answer to a list of prompts, joined from the answers to the single prompts. ``n_each``: the
    number of answers to each prompt.
    """
    answers: list[dict[str, Any]] = []
    for number, payload in enumerate(parts):
        answer = orjson.loads(payload)
        for one in answer if isinstance(answer, list) else [answer]:
            shift(one, number * n_each)
            answers.append(one)
    if "choices" not in answers[0]:
        return orjson.dumps(answers)
    choices = [choice for answer in answers for choice in answer["choices"]]
    return orjson.dumps({**answers[0], "choices": choices})
