"""The completion routes of the fake, in five dialects, streaming and not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from aiohttp import web

from llamaslot.tokens.media import OLD_MARKER
from tests.support import fake_body, fake_infill
from tests.support.fake_agents import Messages, Responses, messages_to_chat, responses_to_chat
from tests.support.fake_http import Dropped, Seen, common_headers, reply
from tests.support.fake_model import BadInput, user_marks
from tests.support.fake_render import Chat, Json, Native, Text, Wording, event
from tests.support.fake_types import Begin, Done, Failed, Result, Token

if TYPE_CHECKING:
    from tests.support.fake import FakeServer

COMPLETIONS: dict[str, type[Wording]] = {
    "/completion": Native,
    "/completions": Native,
    "/infill": Native,
    "/v1/completions": Text,
    "/chat/completions": Chat,
    "/v1/chat/completions": Chat,
    "/api/chat": Chat,
    "/v1/messages": Messages,
    "/responses": Responses,
    "/v1/responses": Responses,
}


class Completions:
    def __init__(self, server: FakeServer) -> None:
        self.server = server

    async def answer(self, request: web.BaseRequest, seen: Seen, body: Any) -> web.StreamResponse:
        server, engine = self.server, self.server.engine
        kind = COMPLETIONS[seen.path]
        rows, chat = self._rows(kind, seen.path, body)
        marks = user_marks(chat, server.model) if chat is not None and server.shape.kind != "dense" else ()
        asked = body if chat is None else {**chat, "stream": body.get("stream", False)}
        rows = [row + [0x20] * server.faults.miscount for row in rows]
        tasks = fake_body.tasks(asked, rows, server.shape, engine.next_id, user_marks=marks)
        seen.tasks = tasks
        every = {task.index: task for parent in tasks for task in (parent, *parent.children)}
        wording = kind(server.model, every, asked, server.faults.reported_cache, int(time.time()))
        engine.post(tasks)
        with server.watch(request, seen):
            if asked.get("stream"):
                return await self._stream(request, seen, wording)
            return await self._whole(seen, wording)

    def _rows(self, kind: type[Wording], path: str, body: Any) -> tuple[list[list[int]], Json | None]:
        """Return the prompts of a body, and the chat body that they come from, None for a plain prompt."""
        model = self.server.model
        if kind in (Chat, Messages, Responses):
            chat: Json = body
            if kind is not Chat:
                chat = messages_to_chat(body) if kind is Messages else responses_to_chat(body)
            return [model.tokenize(model.render(chat))], chat
        if path == "/infill":
            if not isinstance(body, dict):
                raise BadInput("[json.exception.type_error.305] cannot use operator[] with a string argument")
            return [fake_infill.tokens(body, model, self.server.shape)], None
        if not isinstance(body, dict) or "prompt" not in body:
            raise BadInput("[json.exception.out_of_range.403] key 'prompt' not found")
        return fake_body.prompts(body["prompt"], model, self.server.media_marker or OLD_MARKER), None

    async def _whole(self, seen: Seen, wording: Wording) -> web.StreamResponse:
        ends: dict[int, Done] = {}
        queue = seen.tasks[0].results
        while len(ends) < len(wording.tasks):
            result = await queue.get()
            if result is None:
                raise Dropped
            if isinstance(result, Failed):
                self.server.engine.cancel(seen.tasks)
                raise result.error
            if isinstance(result, Done):
                ends[result.index] = result
        response = reply(wording.whole(ends), headers=seen.origin)
        assert isinstance(response.body, bytes)
        seen.answer += response.body
        return response

    async def _stream(self, request: web.BaseRequest, seen: Seen, wording: Wording) -> web.StreamResponse:
        queue = seen.tasks[0].results
        first = await queue.get()
        if first is None:
            raise Dropped
        if isinstance(first, Failed):
            self.server.engine.cancel(seen.tasks)
            raise first.error
        response = web.StreamResponse(headers=common_headers() | seen.origin | {"X-Accel-Buffering": "no"})
        response.content_type = "text/event-stream"
        response.enable_chunked_encoding()
        cut = self.server.faults.take_cut(seen.path)
        n_open = len(wording.tasks)
        try:
            if cut is not None and cut.n == 0:
                raise Dropped
            await response.prepare(request)
            n_written = 0
            result: Result = first
            while True:
                # Headers go out with the first result; what announces further prompts of an array is a null event.
                is_late_begin = isinstance(result, Begin) and result is not first
                data = event(None) if is_late_begin else self.server.faults.told(wording.stream(result))
                if data:
                    seen.answer += data
                    await response.write(data)
                    n_written += cut is not None and (isinstance(result, Token) or not cut.of_tokens)
                if cut is not None and n_written == cut.n:
                    raise Dropped
                if isinstance(result, Failed):
                    break
                n_open -= isinstance(result, Done)
                if not n_open:
                    if wording.ending:
                        seen.answer += wording.ending
                        await response.write(wording.ending)
                    break
                following = await queue.get()
                if following is None:
                    raise Dropped
                result = following
            await response.write_eof()
        except (ConnectionError, Dropped):
            seen.client_left = cut is None
            raise Dropped from None
        finally:
            self.server.engine.cancel(task for task in seen.tasks if not task.ended)
        return response
