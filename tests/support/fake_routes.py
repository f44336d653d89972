"""The routes of the fake llama-server."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.support import fake_actions, fake_body, fake_media
from tests.support.fake_agents import messages_to_chat
from tests.support.fake_complete import COMPLETIONS, Completions
from tests.support.fake_http import Dropped, Seen, reply
from tests.support.fake_model import BadInput
from tests.support.fake_types import FakeSlot, State

if TYPE_CHECKING:
    from tests.support.fake import FakeServer

Json = dict[str, Any]
PUBLIC = {"/health", "/v1/health", "/"}
NOT_FOUND = {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
LOADING = {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}
#: What llama-server says to a browser that asks whether it may ask.
ANY_PAGE = {
    "Access-Control-Allow-Credentials": "true",
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "*",
}
NO_SLOTS = "This server does not support slots action. Start it with `--slot-save-path`"


class Routes:
    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.completions = Completions(server)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        server = self.server
        began_s = server.clock.now()
        data = await request.read()
        seen = self._seen(request, data)
        server.requests.append(seen)
        server.changed()
        if server.faults.take_drop(seen.names):
            return self.reset(request)
        await server.faults.hold(seen.names)
        try:
            response = await self._answer(request, seen, data)
        except BadInput as error:
            response = reply(error.body(), error.status)
        except Dropped:
            return self.reset(request)
        seen.status = response.status
        server.changed()
        if server.faults.take_drop(seen.names, after=True):
            return self.reset(request)
        slow_s = server.faults.close_after_slow_s
        if slow_s is not None and server.clock.now() - began_s > slow_s:
            await response.prepare(request)
            await response.write_eof()
            if request.transport is not None:
                request.transport.close()
        return response

    def reset(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    def _seen(self, request: web.BaseRequest, data: bytes) -> Seen:
        try:
            body = json.loads(data) if data else None
        except ValueError:
            body = data
        query = dict(request.query)
        n_slots = self.server.shape.n_slots
        seen = Seen(request.method, request.path, query, body, dict(request.headers), n_slots=n_slots)
        if request.path.startswith("/slots/"):
            number = request.path.removeprefix("/slots/")
            seen.slot, seen.action = (int(number) if number.isdigit() else None), query.get("action")
        elif isinstance(body, dict) and isinstance(body.get("id_slot"), int):
            seen.slot = body["id_slot"]
        return seen

    async def _answer(self, request: web.BaseRequest, seen: Seen, data: bytes) -> web.StreamResponse:
        server, path = self.server, seen.path
        if server.loading:
            return reply(LOADING, 503)
        if seen.method == "OPTIONS":  # for any path, before key and route are looked at
            return reply(b"", content_type="text/html", headers=ANY_PAGE)
        key = request.headers.get("Authorization", "").removeprefix("Bearer ") or request.headers.get(
            "X-Api-Key"
        )
        if server.api_key is not None and path not in PUBLIC and key != server.api_key:
            raise BadInput("Invalid API Key", 401, "authentication_error")
        if (error := server.faults.take(path)) is not None:
            raise error
        if path in server.overrides:
            status, answer = server.overrides[path]
            return reply(answer, status)
        if path in server.missing:
            return reply(NOT_FOUND, 404)
        if seen.method == "GET" and (get := self._gets().get(path)) is not None:
            return await get(seen)
        if seen.method == "POST":
            if path in COMPLETIONS:
                return await self.completions.answer(request, seen, fake_body.parse(data))
            if path.startswith("/slots/"):
                return await self.slot_action(seen, data)
            if (post := self._posts().get(path)) is not None:
                return await post(fake_body.parse(data))
        return reply(NOT_FOUND, 404)

    # ---- questions

    def _gets(self) -> dict[str, Callable[[Seen], Awaitable[web.StreamResponse]]]:
        return {
            "/health": self.health,
            "/v1/health": self.health,
            "/props": self.props,
            "/slots": self.slots,
            "/models": self.models,
            "/v1/models": self.models,
            "/metrics": self.metrics,
            "/lora-adapters": self.lora,
        }

    def _posts(self) -> dict[str, Callable[[Any], Awaitable[web.StreamResponse]]]:
        return {
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/apply-template": self.apply_template,
            "/v1/messages/count_tokens": self.count_tokens,
            "/props": self.change_props,
            "/embeddings": self.embeddings,
            "/v1/embeddings": self.embeddings,
        }

    async def health(self, seen: Seen) -> web.StreamResponse:
        return reply({"status": "ok"})

    async def lora(self, seen: Seen) -> web.StreamResponse:
        return reply([])

    async def change_props(self, body: Any) -> web.StreamResponse:
        text = "This server does not support changing global properties. Start it with `--props`"
        raise BadInput(text, 501, "not_supported_error")

    async def embeddings(self, body: Any) -> web.StreamResponse:
        text = "This server does not support embeddings. Start it with `--embeddings`"
        raise BadInput(text, 501, "not_supported_error")

    async def props(self, seen: Seen) -> web.StreamResponse:
        server = self.server
        return reply(
            {
                "default_generation_settings": {"params": {"n_predict": -1}, "n_ctx": server.shape.n_ctx},
                "total_slots": server.shape.n_slots,
                "model_alias": server.model.path,
                "model_ftype": "all F32",
                "model_path": server.model.path,
                "modalities": dict.fromkeys(("vision", "video", "audio"), server.model.takes_media),
                "media_marker": server.media_marker,
                "endpoint_slots": True,
                "endpoint_props": False,
                "endpoint_metrics": True,
                "ui": True,
                "ui_settings": {},
                "chat_template": "{# ChatML, rendered by the fake itself #}",
                "chat_template_caps": {},
                "bos_token": "<|endoftext|>",
                "eos_token": "<|im_end|>",
                "build_info": "b0-unknown",
                "is_sleeping": False,
                "cors_proxy_enabled": False,
            }
        )

    async def models(self, seen: Seen) -> web.StreamResponse:
        server = self.server
        path = server.model.path
        meta = {
            "vocab_type": 2,
            "n_vocab": 259,
            "n_ctx": server.shape.n_ctx,
            "n_ctx_train": server.model.n_ctx_train,
            "n_embd": 64,
            "n_params": 109_952,
            "size": 440_320,
            "ftype": "all F32",
        }
        data = {
            "id": path,
            "aliases": [path],
            "tags": [],
            "object": "model",
            "architecture": {"input_modalities": ["text"], "output_modalities": ["text"]},
            "created": int(time.time()),
            "owned_by": "llamacpp",
            "meta": meta,
        }
        old = {"name": path, "model": path, "type": "model", "capabilities": ["completion"]}
        return reply({"models": [old], "object": "list", "data": [data]})

    async def slots(self, seen: Seen) -> web.StreamResponse:
        engine = self.server.engine
        return reply(await engine.ask(lambda: [self.slot_json(slot) for slot in engine.slots]))

    def slot_json(self, slot: FakeSlot) -> Json:
        fixed = {
            "id": slot.id,
            "n_ctx": self.server.shape.n_ctx,
            "speculative": False,
            "is_processing": slot.is_processing,
        }
        if slot.last_task is None:
            return fixed
        task = slot.task
        n_decoded = len(task.generated) if task else 0
        limit = task.n_predict if task else -1
        next_token = {
            "has_next_token": task is not None and slot.state is State.DECODE,
            "has_new_line": False,
            "n_remain": limit - n_decoded if limit >= 0 else -1,
            "n_decoded": n_decoded,
        }
        return {
            **fixed,
            "id_task": slot.last_task.id,
            "n_prompt_tokens": slot.n_tokens,
            "n_prompt_tokens_processed": task.n_computed if task else 0,
            "n_prompt_tokens_cache": task.n_cache if task else 0,
            "params": {"n_predict": limit, "lora": []},
            "next_token": [next_token],
        }

    async def metrics(self, seen: Seen) -> web.StreamResponse:
        server, engine = self.server, self.server.engine
        numbers = await engine.ask(engine.metrics)
        lines = [
            f"# TYPE llamacpp:{name} gauge\nllamacpp:{name} {value:g}\n" for name, value in numbers.items()
        ]
        headers = {"Process-Start-Time-Unix": str(server.started_at)}
        return reply("".join(lines).encode(), content_type="text/plain; version=0.0.4", headers=headers)

    async def tokenize(self, body: Any) -> web.StreamResponse:
        model = self.server.model
        parse_special = body.get("parse_special", True) is not False
        ids = model.tokenize(str(body.get("content", "")), parse_special=parse_special)
        if body.get("with_pieces"):
            return reply({"tokens": [{"id": i, "piece": model.detokenize([i])} for i in ids]})
        return reply({"tokens": ids})

    async def detokenize(self, body: Any) -> web.StreamResponse:
        return reply({"content": self.server.model.detokenize(body.get("tokens", []))})

    async def apply_template(self, body: Any) -> web.StreamResponse:
        if any(fake_media.of(body)):
            self.server.violations.append("/apply-template downloads media a second time")
        return reply({"prompt": self.server.model.render(body)})

    async def count_tokens(self, body: Any) -> web.StreamResponse:
        model, n_more = self.server.model, self.server.faults.miscount
        return reply({"input_tokens": len(model.tokenize(model.render(messages_to_chat(body)))) + n_more})

    # ---- slot actions

    async def slot_action(self, seen: Seen, data: bytes) -> web.StreamResponse:
        server, engine = self.server, self.server.engine
        if server.save_dir is None:
            raise BadInput(NO_SLOTS, 501, "not_supported_error")
        if seen.slot is None:
            raise BadInput("Invalid slot ID")
        if seen.action not in ("save", "restore", "erase"):
            raise BadInput("Invalid action")
        slot = engine.slots[seen.slot % len(engine.slots)]
        answer: Json = {"id_slot": seen.slot}
        if seen.action == "erase":
            n_erased = await engine.act(
                seen.slot, "erase", lambda: fake_actions.erase(engine, slot), lambda _: 0.0
            )
            return reply({**answer, "n_erased": n_erased})
        body = fake_body.parse(data)
        if "filename" not in body:
            raise BadInput("[json.exception.out_of_range.403] key 'filename' not found")
        name = body["filename"]
        if not name or "/" in name or "\\" in name or ".." in name or len(name.encode()) > 255:
            raise BadInput("Invalid filename")
        path, action = (
            server.save_dir / name,
            fake_actions.save if seen.action == "save" else fake_actions.restore,
        )
        byte_s = server.pace.byte_s
        n_tokens, n_bytes = await engine.act(
            seen.slot, seen.action, lambda: action(engine, slot, path), lambda result: result[1] * byte_s
        )
        ms = n_bytes * (byte_s or 1e-9) * 1000
        words = ("n_saved", "n_written", "save_ms")
        if seen.action == "restore":
            words = ("n_restored", "n_read", "restore_ms")
        return reply(
            {**answer, "filename": name, words[0]: n_tokens, words[1]: n_bytes, "timings": {words[2]: ms}}
        )
