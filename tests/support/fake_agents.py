"""The answers of /v1/messages and /v1/responses: only the parts that a proxy may look at."""

from __future__ import annotations

from typing import Any

from tests.support.fake_model import BadInput
from tests.support.fake_render import Json, Wording, event, random_name
from tests.support.fake_types import Done, Progress, Task, Token


def messages_to_chat(body: Json) -> Json:
    """The chat body that the real server makes of a body of /v1/messages. ``id_slot`` is dropped, as there."""
    if "messages" not in body:
        raise BadInput("'messages' is required")
    system = body.get("system")
    if isinstance(system, list):
        system = "".join(part.get("text", "") for part in system)
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": messages + list(body["messages"]), "max_tokens": body.get("max_tokens", 4096)}


def responses_to_chat(body: Json) -> Json:
    if "input" not in body:
        raise BadInput("'input' is required")
    given = body["input"]
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else list(given)
    if body.get("instructions"):
        messages.insert(0, {"role": "system", "content": body["instructions"]})
    limit: Json = {"max_tokens": body["max_output_tokens"]} if "max_output_tokens" in body else {}
    kept: Json = {
        key: body[key] for key in ("id_slot", "cache_prompt", "return_progress", "n") if key in body
    }
    return {"messages": messages, **limit, **kept}


class Messages(Wording):
    """/v1/messages"""

    def usage(self, task: Task) -> Json:
        cached = self.lie(task.n_cache, task.n_prompt)
        return {"cache_read_input_tokens": cached, "input_tokens": task.n_prompt - cached}

    def message(self, task: Task, **more: Any) -> Json:
        fixed = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": self.model.path,
        }
        return fixed | {"stop_reason": None, "stop_sequence": None} | more

    def progress(self, task: Task, result: Progress) -> bytes:
        return b""

    def token(self, task: Task, result: Token) -> bytes:
        begin = b""
        if not self.n_begun:
            self.n_begun.add(0)
            message = self.message(task, usage=self.usage(task) | {"output_tokens": 0})
            begin = event({"type": "message_start", "message": message}, "message_start")
            block = {"type": "text", "text": ""}
            start = {"type": "content_block_start", "index": 0, "content_block": block}
            begin += event(start, "content_block_start")
        if not result.text:
            return begin
        delta = {"type": "text_delta", "text": result.text}
        return begin + event(
            {"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta"
        )

    def done(self, task: Task, result: Done) -> bytes:
        delta = {"stop_reason": self.reason(result), "stop_sequence": None}
        usage = {"output_tokens": len(task.generated)}
        return (
            event({"type": "content_block_stop", "index": 0}, "content_block_stop")
            + event({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
            + event({"type": "message_stop"}, "message_stop")
        )

    def failed(self, body: Json) -> bytes:
        return event(body["error"], "error")

    def reason(self, result: Done) -> str:
        return "max_tokens" if result.stop_type == "limit" else "end_turn"

    def whole(self, ends: dict[int, Done]) -> Any:
        task = self.tasks[0]
        usage = self.usage(task) | {"output_tokens": len(task.generated)}
        content = [{"type": "text", "text": self.text(task)}]
        return self.message(task, content=content, stop_reason=self.reason(ends[0]), usage=usage)


class Responses(Wording):
    """/v1/responses"""

    def progress(self, task: Task, result: Progress) -> bytes:
        return b""

    def item(self, status: str, content: list[Json]) -> Json:
        fixed = {"id": self.id.replace("chatcmpl-", "msg_"), "role": "assistant", "type": "message"}
        return fixed | {"status": status, "content": content}

    def response(self, status: str, **more: Any) -> Json:
        return {"id": self.id.replace("chatcmpl-", "resp_"), "object": "response", "status": status, **more}

    def token(self, task: Task, result: Token) -> bytes:
        begin = b""
        item_id = self.item("", [])["id"]
        if not self.n_begun:
            self.n_begun.add(0)
            for name in ("response.created", "response.in_progress"):
                begin += event({"type": name, "response": self.response("in_progress")}, name)
            name = "response.output_item.added"
            begin += event({"type": name, "item": self.item("in_progress", [])}, name)
            name = "response.content_part.added"
            part = {"type": "output_text", "text": ""}
            begin += event({"type": name, "item_id": item_id, "part": part}, name)
        if not result.text:
            return begin
        name = "response.output_text.delta"
        return begin + event({"type": name, "item_id": item_id, "delta": result.text}, name)

    def done(self, task: Task, result: Done) -> bytes:
        text, whole = self.text(task), self.whole({0: result})
        del whole["completed_at"]  # as of this build only in the answer that is not streamed
        item = whole["output"][0]
        name = "response.output_text.done"
        ends = event({"type": name, "item_id": item["id"], "text": text}, name)
        name = "response.content_part.done"
        ends += event({"type": name, "item_id": item["id"], "part": item["content"][0]}, name)
        name = "response.output_item.done"
        ends += event({"type": name, "item": item}, name)
        name = "response.completed"
        return ends + event(
            {"type": name, "response": whole, "timings": self.timings(task, result.times)}, name
        )

    def whole(self, ends: dict[int, Done]) -> Any:
        task = self.tasks[0]
        part = {"type": "output_text", "annotations": [], "logprobs": [], "text": self.text(task)}
        usage = {
            "input_tokens": task.n_prompt,
            "output_tokens": len(task.generated),
            "total_tokens": task.n_prompt + len(task.generated),
            "input_tokens_details": {"cached_tokens": self.lie(task.n_cache, task.n_prompt)},
        }
        return self.response(
            "completed",
            created_at=self.now,
            completed_at=self.now,
            model=self.model.path,
            output=[self.item("completed", [part])],
            usage=usage,
        ) | {"id": "resp_" + random_name()}
