"""``/v1/chat/completions`` (OpenAI), called ``/api/chat`` by older builds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llamaslot.formats.base import Format, PromptKind
from llamaslot.formats.stream_to_json import (
    HARMLESS,
    Assembly,
    Doubt,
    OpenAIAssembly,
    PartialAnswer,
    has_only,
    n_answers,
    streamed_with_usage,
    without_nulls,
)
from llamaslot.llama.sse import event_of

#: Fields whose effect on a stream and on a JSON answer is known.
_FIELDS = HARMLESS | {
    "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_format",
    "reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
}  # fmt: skip
_SAID = {"content", "reasoning_content", "tool_calls"}


class ChatFormat(Format):
    """The API ``/v1/chat/completions``: the body is the chat that llama-server renders."""

    name = "chat"
    prompt_kind = PromptKind.CHAT
    messages_key = "messages"

    def chat_body(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """``body`` itself, as it is a chat already. Its tokens: ``Tokenizer.chat``."""
        return body

    def progress_event(self, id_: str, model: str, progress: Mapping[str, int]) -> bytes:
        """The event in the form of llama-server's own progress events (measured on xllamacpp 2026.10.11549)."""
        delta = {"role": "assistant", "content": None}
        return event_of(
            {
                "created": int(time.time()),
                "id": f"chatcmpl-{id_}",
                "model": model,
                "choices": [{"finish_reason": None, "index": 0, "delta": delta}],
                "object": "chat.completion.chunk",
                "prompt_progress": progress,
            }
        )

    def can_assemble(self, body: Mapping[str, Any]) -> bool:
        """True if the answer to ``body`` can be assembled from a stream.

        A server started with ``--reasoning-format deepseek-legacy`` may put the reasoning elsewhere in a stream:
        ``Probes.moves_reasoning`` finds the flag, and then no answer of that server is assembled.
        """
        given = without_nulls(body)
        return n_answers(given) is not None and _is_plain(given) and has_only(given, _FIELDS)

    def streamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``body`` as a request for a stream, with ``echo``: without it a stream omits the assistant message
        that the answer continues.
        """
        return streamed_with_usage(body) | {"echo": True}

    def assembly(self, body: Mapping[str, Any]) -> Assembly:
        return ChatAssembly(n_answers(without_nulls(body)) or 1)


def _is_plain(given: Mapping[str, Any]) -> bool:
    """True if all messages of a chat are text, and its reasoning is in the same field with and without a stream."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    is_text = all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    return is_text and given.get("reasoning_format", "auto") in ("none", "auto", "deepseek")


class ChatAssembly(OpenAIAssembly):
    """Assembles the answer to a chat from its events."""

    def _take(self, payload: dict[str, Any]) -> None:
        """Take one event. A token has an event for each of its deltas; the last of these has ``timings``. After the
        tokens of an answer come its finish reason and its totals.

        The totals have no index, but directly follow their finish reason (to_json_oaicompat_chat_stream).
        """
        self._know_event(payload)
        if not payload["choices"]:
            part, name = self._ended[-1], payload["object"].removesuffix(".chunk")
            part.n_tokens = payload["usage"]["completion_tokens"]
            part.totals = {**payload, "object": name}
            return
        choice = payload["choices"][0]
        part, delta = self._part(choice["index"]), choice["delta"]
        self._know(choice, {"finish_reason", "index", "delta"})
        self._know(delta, _SAID | {"role"})
        part.text += delta.get("content") or ""
        part.reasoning += delta.get("reasoning_content") or ""
        for piece in delta.get("tool_calls", ()):
            self._take_call(part.calls, piece)
        if choice["finish_reason"] is not None:
            self._end(part, choice["finish_reason"])
        elif "timings" in payload:
            # The first token always has an event with the role.
            part.tell(payload["timings"]["predicted_n"], any(delta.get(name) for name in _SAID))

    def _take_call(self, calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
        """Add one piece of a tool call to ``calls``. The first piece of a call has its id and name; further pieces
        extend its arguments.
        """
        index, function = piece["index"], piece["function"]
        self._know(piece, {"index", "id", "type", "function"})
        if index == len(calls):
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}, "id": piece["id"]})
        whole = calls[index]["function"]
        for name, text in function.items():
            whole[name] += text

    def _doubt_about(self, part: PartialAnswer) -> Doubt | None:
        """Return why an answer that was put together from its events may differ from the one that llama-server sends
        without a stream; None if both are the same. In doubt the request is repeated without a stream.

        ``HELD_BACK``: the end of the text may be missing. This shows only if the answer has stopped at its token limit,
        because the tokens that llama-server's chat parser removes, such as the end token, have no events either.
        ``UNPARSED``: the parser has left nothing of the text.
        """
        if part.is_cut and part.n_said < part.n_tokens:
            return Doubt.HELD_BACK
        if not (part.text or part.reasoning or part.calls):
            # One token that was the end, or the stop word: then the raw text is empty too.
            return None if part.finish_reason == "stop" and part.n_tokens == 1 else Doubt.UNPARSED
        return None

    def _choice(self, index: int, part: PartialAnswer) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["tool_calls"] = part.calls
        return {"finish_reason": part.finish_reason, "index": index, "message": message}
