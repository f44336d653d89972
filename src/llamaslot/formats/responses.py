"""Converts a body of ``/v1/responses`` (OpenAI) to the chat body that llama-server makes of it.

llama-server converts such a body into one of ``/v1/chat/completions`` and renders that. The result here renders, by
``POST /apply-template``, to the same prompt; tests/real/test_conversions.py compares it with the real server.

Source: llama.cpp, tools/server/server-chat.cpp, ``server_chat_convert_responses_to_chatcmpl``; measured on xllamacpp
2026.10.11549. The conversion replaces ``input``, ``instructions``, ``tools``, ``reasoning`` and ``max_output_tokens``
and keeps all other fields: ``id_slot``, ``cache_prompt``, ``return_progress``, ``lora``, ``n``, ``response_format``,
``chat_template_kwargs`` mean the same as in a chat, and are in the chat body too. OpenAI's ``text`` (its ``format``),
``conversation``, ``prompt`` and ``truncation`` are kept and have no effect.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from llamaslot.errors import PromptNotTokenizable
from llamaslot.formats.base import LAST_EVENTS, ErrorEvents, Format, PromptKind, UsageCounts
from llamaslot.llama.sse import data_of, event_of

_REPLACED = {"input", "instructions", "messages", "tools", "reasoning", "max_output_tokens"}
_CREATED = b"event: response.created"


class ResponsesFormat(Format):
    """The API ``/v1/responses``: llama-server converts a body to a chat, and keeps the fields that choose its slot."""

    name = "responses"
    required_key = "input"
    prompt_kind = PromptKind.CONVERTED
    messages_key = "input"
    system_key = "instructions"
    count_path = "/v1/responses/input_tokens"
    last_events = (b"event: response.completed", *LAST_EVENTS)
    usage_key = "response"
    usage_details_key = "input_tokens_details"

    def chat_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return chat_body(body)

    def counts(self, usage: Mapping[str, Any]) -> UsageCounts:
        """Return the token counts in ``usage``, whose ``input_tokens`` are all tokens of the prompt."""
        n_cached = (usage.get(self.usage_details_key) or {}).get("cached_tokens")
        n_prompt = int(usage["input_tokens"]) if n_cached is not None and "input_tokens" in usage else None
        return UsageCounts(n_cached, n_prompt, int(usage.get("output_tokens", 0)))

    def errors(self, id_: str) -> ErrorEvents:
        return ResponsesErrors(id_)


class ResponsesErrors(ErrorEvents):
    """Encodes errors in a form that Codex and the libraries of OpenAI and Vercel all understand.

    - Codex ignores events whose ``type`` it does not know, reports "stream closed before response.completed" and
      repeats the request five times. It needs ``response.failed`` with a string as ``code``: after
      ``context_length_exceeded`` and ``invalid_prompt`` it does not repeat the request, after ``server_error`` and
      ``rate_limit_exceeded`` it does. It shows the message of all but the first.
    - OpenAI's libraries do not raise on ``response.failed``, and an interrupted answer would look like a short one. For
      them ``error`` is at the root too.
    - Vercel's library needs a ``sequence_number``.
    """

    is_translated = True

    def __init__(self, id_: str) -> None:
        super().__init__(id_)
        self._created = self._last = b""

    def saw(self, event: bytes) -> None:
        self._last = event
        if event.startswith(_CREATED):
            self._created = event

    def event(self, error: Mapping[str, Any]) -> bytes:
        created, last = data_of(self._created), data_of(self._last)
        begun = created["response"] if isinstance(created, dict) else {"id": f"resp_{self.id}", "output": []}
        n_last = last.get("sequence_number") if isinstance(last, dict) else None
        code = {"code": _error_code(error), "message": error["message"]}
        response = {
            "object": "response",
            "created_at": int(time.time()),
            **begun,
            "status": "failed",
            "error": code,
        }
        number = n_last + 1 if isinstance(n_last, int) else 0
        failed = {"type": "response.failed", "sequence_number": number, "response": response, "error": error}
        return event_of(failed, b"event: response.failed\n")


def _error_code(error: Mapping[str, Any]) -> str:
    if error.get("type") == "exceed_context_size_error":
        return "context_length_exceeded"
    status = error.get("code")
    if not isinstance(status, int) or not 400 <= status < 500:
        return "server_error"
    return "rate_limit_exceeded" if status == 429 else "invalid_prompt"


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat body whose rendering is the prompt of ``body``.

    An image becomes a part that only marks its position, because such a chat is rendered no further than its first
    image. Raises PromptNotTokenizable if it is not known how llama-server renders a part, and for bodies that
    llama-server refuses, such as ``previous_response_id``, files, refusals, and unknown items: its own answer explains
    the fault best.
    """
    if body.get("previous_response_id"):
        raise PromptNotTokenizable("'previous_response_id' is not supported by llama-server")
    chat = {name: value for name, value in body.items() if name not in _REPLACED}
    chat["messages"] = [*_system(body), *_messages(body.get("input"))]
    if "tools" in body and (tools := list(_tools(body["tools"]))):
        chat["tools"] = tools
    reasoning = body.get("reasoning")
    if isinstance(reasoning, Mapping) and "effort" in reasoning:
        chat["reasoning_effort"] = reasoning["effort"]
    if "max_output_tokens" in body:
        chat["max_tokens"] = body["max_output_tokens"]
    return chat


def _system(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the system message; nothing if the body has no ``instructions``. ``"instructions": null`` gives an empty
    message, which templates show.
    """
    if "instructions" in body:
        instructions = body["instructions"]
        if instructions is not None and not isinstance(instructions, str):
            raise PromptNotTokenizable("'instructions' is no string")
        yield {"role": "system", "content": instructions or ""}


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise PromptNotTokenizable("'input' is neither a string nor a list")
    messages: list[dict[str, Any]] = []
    for item in given:
        if not isinstance(item, Mapping):
            raise PromptNotTokenizable("an item that is no object")
        _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Append the message that ``item`` becomes. Consecutive items of the assistant become one message."""
    match item.get("type"), item.get("role"):
        case "message" | None, "user" | "system" | "developer":
            messages.append(_message(item, _parts(item.get("content"), "input_text", "input_image")))
        case "message", "assistant":  # without the type, which OpenAI accepts, llama-server answers 400
            content = item.get("content")
            parts = [] if content is None else _parts(content, "output_text", "input_text")
            if _is_assistants(messages):
                messages[-1]["content"] = [*(messages[-1].get("content") or []), *parts]
            else:
                messages.append(_message(item, parts))
        case "function_call", _:
            function = {"arguments": _text(item, "arguments"), "name": _text(item, "name")}
            call = {"function": function, "id": _text(item, "call_id"), "type": "function"}
            if not _is_assistants(messages):
                messages.append({"role": "assistant"})
            messages[-1]["tool_calls"] = [*(messages[-1].get("tool_calls") or []), call]
        case "function_call_output", _:
            messages.append(
                {
                    "content": _output(item.get("output")),
                    "role": "tool",
                    "tool_call_id": _text(item, "call_id"),
                }
            )
        case "reasoning", _:
            if not _is_assistants(messages):
                messages.append({"role": "assistant", "content": []})
            messages[-1]["reasoning_content"] = _reasoning(item)
        case type_, role:
            raise PromptNotTokenizable(f"an item of type {type_!r} and role {role!r}")


def _is_assistants(messages: list[dict[str, Any]]) -> bool:
    """True if the last message is the assistant's, so that a further item of the assistant belongs to it."""
    return bool(messages) and messages[-1]["role"] == "assistant"


def _message(item: Mapping[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the chat message of ``item``: ``parts`` as its content, and all fields of the item but ``type`` and
    ``status``.
    """
    return {name: value for name, value in item.items() if name not in ("type", "status")} | {
        "content": parts
    }


def _parts(content: Any, *types: str) -> list[dict[str, Any]]:
    """Return the content of a message as parts of a chat. ``content`` is a string, or a list of parts of these
    ``types``; raises PromptNotTokenizable for anything else.
    """
    if isinstance(content, str):
        return [{"text": content, "type": "text"}]
    return [
        {"type": "image_url"} if part["type"] == "input_image" else {"text": part["text"], "type": "text"}
        for part in _checked(content, *types)
    ]


def _output(output: Any) -> Any:
    """Return the content of a tool's result: a string, or parts that keep their other fields."""
    if isinstance(output, str):
        return output
    return [{**part, "type": "text"} for part in _checked(output, "input_text")]


def _checked(parts: Any, *types: str) -> list[Mapping[str, Any]]:
    if not isinstance(parts, list):
        raise PromptNotTokenizable("a content that is neither a string nor a list")
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") not in types:
            raise PromptNotTokenizable(f"a part of the content that is not {' or '.join(types)}")
        _text(part, "image_url" if part["type"] == "input_image" else "text")
    return parts


def _reasoning(item: Mapping[str, Any]) -> str:
    """Return the first text of a reasoning item. llama-server answers 400 to an item that is only encrypted or
    summarized.
    """
    content = item.get("content")
    if not isinstance(item.get("summary"), list) or not isinstance(content, list) or not content:
        raise PromptNotTokenizable("a reasoning without its text")
    if not isinstance(content[0], Mapping):
        raise PromptNotTokenizable("a reasoning whose first part is no object")
    return _text(content[0], "text")


def _tools(tools: Any) -> Iterator[dict[str, Any]]:
    """Yield the functions among the tools. llama-server leaves out tools of other types (``web_search``,
    ``custom``).
    """
    if not isinstance(tools, list):
        raise PromptNotTokenizable("'tools' is no list")
    for tool in tools:
        if not isinstance(tool, Mapping):
            raise PromptNotTokenizable("a tool that is no object")
        if tool.get("type") == "function":
            function = {name: value for name, value in tool.items() if name != "type"}
            yield {"type": "function", "function": {**function, "strict": tool.get("strict", True)}}


def _text(item: Mapping[str, Any], name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise PromptNotTokenizable(f"{name!r} is no string")
    return value
