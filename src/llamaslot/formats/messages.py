"""Converts a body of ``/v1/messages`` (Anthropic; Claude Code) to the chat body that llama-server makes of it.

llama-server converts such a body into one of ``/v1/chat/completions`` and renders that. The result here renders, by
``POST /apply-template``, to the same prompt; tests/real/test_conversions.py compares it with the real server.

Source: llama.cpp, tools/server/server-chat.cpp, ``server_chat_convert_anthropic_to_oai``; measured on xllamacpp
2026.10.11549. The conversion keeps a few fields and drops all others, among them ``id_slot``, ``cache_prompt``,
``lora`` and ``n``, so the chat body has none of these either. It also lacks fields without effect on the rendering:
sampling, ``stop_sequences``, ``metadata``, and ``thinking``, whose budget only limits what is sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llamaslot.errors import PromptNotTokenizable, Reason
from llamaslot.formats.base import LAST_EVENTS, ErrorEvents, Format, PromptKind, UsageCounts
from llamaslot.llama.dry_run import DryRun, dry_run
from llamaslot.llama.sse import event_of

_HEADER = b"x-anthropic-billing-header:"
_STAMP = b"cch="
_STAMP_BYTES = 5

#: Types of blocks that llama-server omits. It omits every type that it does not know, for example documents. Only
#: blocks without a text are listed here: the next build may render a block with a text.
_LEFT_OUT = {"redacted_thinking"}
_LEFT_OUT_OF_RESULTS = {"tool_reference"}

_IMAGE = {"type": "image_url"}
_CHOICES = {"auto": "auto", "any": "required", "tool": "required"}  # "none" is dropped: the model may call

#: Fields that llama-server's conversion keeps besides the chat, with their names in the converted body. All other
#: fields never reach the samplers.
_KEPT = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "max_tokens": "max_tokens",
    "stop_sequences": "stop",
}  # fmt: skip
_ERROR_TYPES = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error", "rate_limit_error",
    "timeout_error", "api_error", "overloaded_error",
}  # fmt: skip


class MessagesFormat(Format):
    """The API ``/v1/messages``: llama-server converts a body to a chat, and chooses the slot itself."""

    name = "messages"
    prompt_kind = PromptKind.CONVERTED
    honours_id_slot = False
    messages_key = "messages"
    system_key = "system"
    count_path = "/v1/messages/count_tokens"
    last_events = (b"event: message_stop", *LAST_EVENTS)
    usage_key = "message"

    def chat_body(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return chat_body(body)

    def n_answers(self, body: Mapping[str, Any]) -> int:
        """Always 1: llama-server gives one answer, whatever the body requests."""
        return 1

    def dry_run(
        self, body: Mapping[str, Any], chat: Mapping[str, Any] | None, *, tokens: bytes | None, n: int
    ) -> DryRun:
        kept = {ours: body[theirs] for theirs, ours in _KEPT.items() if theirs in body}
        return dry_run(kept | dict(chat or {}), is_chat=chat is not None, tokens=tokens, n=n)

    def stream_start(self, id_: str, body: Mapping[str, Any], n_total: int, n_reused: int) -> bytes:
        """The ``message_start`` event. llamaslot sends it if llama-server omits it, as it does when the first token is
        half a character (measured): clients fail without it.
        """
        usage = {"cache_read_input_tokens": n_reused, "input_tokens": n_total - n_reused, "output_tokens": 0}
        message = {
            "id": f"chatcmpl-{id_}",
            "type": "message",
            "role": "assistant",
            "content": [],
            "model": body.get("model", ""),
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return event_of({"type": "message_start", "message": message}, b"event: message_start\n")

    def counts(self, usage: Mapping[str, Any]) -> UsageCounts:
        """Return the token counts in ``usage``, whose ``input_tokens`` are only the computed tokens of the prompt."""
        n_cached, n_prompt = usage.get("cache_read_input_tokens"), None
        if n_cached is not None and "input_tokens" in usage:
            n_prompt = int(n_cached) + int(usage["input_tokens"])
        return UsageCounts(n_cached, n_prompt, int(usage.get("output_tokens", 0)))

    def correct_usage(self, usage: dict[str, Any], n_reused: int) -> bool:
        if "cache_read_input_tokens" not in usage:
            return False
        n_cached = int(usage["cache_read_input_tokens"])
        n_prompt, n_reused = n_cached + int(usage.get("input_tokens", 0)), min(n_reused, n_cached)
        usage |= {"cache_read_input_tokens": n_reused, "input_tokens": n_prompt - n_reused}
        return True

    def errors(self, id_: str) -> ErrorEvents:
        return MessagesErrors(id_)


class MessagesErrors(ErrorEvents):
    """Encodes errors for Anthropic's libraries. They read only events named ``error`` that have ``error.type`` and
    ``error.message``; llama-server's own error events have another form.
    """

    is_translated = True

    def event(self, error: Mapping[str, Any]) -> bytes:
        said = {**error, "type": _error_type(error)}
        return event_of({"type": "error", "error": said}, b"event: error\n")


def _error_type(error: Mapping[str, Any]) -> str:
    type_, status = error.get("type"), error.get("code")
    if type_ in _ERROR_TYPES:
        return str(type_)
    if type_ == "unavailable_error":
        return "overloaded_error"
    return "invalid_request_error" if isinstance(status, int) and 400 <= status < 500 else "api_error"


def chat_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat body whose rendering is the prompt of ``body``.

    An image becomes a part that only marks its position, because such a chat is rendered no further than its first
    image. Raises PromptNotTokenizable if it is not known how llama-server renders a part (documents, unknown blocks),
    and for bodies that llama-server refuses: its own answer explains the fault best.
    """
    messages: list[Any] = [{"role": "system", "content": text} for text in _system(body.get("system"))]
    given = body.get("messages")
    if not isinstance(given, list):
        raise PromptNotTokenizable("'messages' is no list")
    for message in given:
        messages += _messages(message)
    chat: dict[str, Any] = {"messages": messages}
    tools = body.get("tools")
    if isinstance(tools, list):
        chat["tools"] = [_tool(tool) for tool in tools]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and (kind := _CHOICES.get(_text(choice, "type"))):
        chat["tool_choice"] = kind
    if "chat_template_kwargs" in body:
        chat["chat_template_kwargs"] = body["chat_template_kwargs"]
    return chat


def _system(system: Any) -> Iterator[str]:
    """Yield the content of the system message: the texts of all blocks, concatenated. Yields nothing if
    there is none.
    """
    if system is None:
        return
    blocks = [{"type": "text", "text": system}] if isinstance(system, str) else system
    if not isinstance(blocks, list) or not all(_type(block) == "text" for block in blocks):
        raise PromptNotTokenizable("'system' is neither a string nor a list of texts")
    yield "".join(_without_stamp(_text(block, "text")) for block in blocks)


def _without_stamp(text: str) -> str:
    """Return ``text`` with Claude Code's attribution stamp made equal for all requests, as llama-server does it.

    ``x-anthropic-billing-header: cc_version=…; cch=a5145;`` has another ``cch`` each time, so no two prompts would have
    a common prefix. If a text begins with this header, the five bytes between its first ``cch=`` and ``;`` become
    ``fffff``. (``normalize_anthropic_billing_header``, pull 21793)
    """
    raw = text.encode()
    if not raw.startswith(_HEADER):
        return text
    found = raw.find(_STAMP, len(_HEADER))
    begin, end = found + len(_STAMP), found + len(_STAMP) + _STAMP_BYTES
    if found < 0 or raw[end : end + 1] != b";":
        return text
    return (raw[:begin] + b"f" * _STAMP_BYTES + raw[end:]).decode()


def _messages(message: Any) -> Iterator[Any]:
    """Yield the chat messages that one message of the body becomes: one message with its text, images and tool calls,
    then one message for each tool result. A message whose content is a string stays as it is.

    The tool results come last even if they were first in the body, as Claude Code sends them. So the text that it adds
    behind a result (reminders) comes before the result.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise PromptNotTokenizable("a message without a role")
    if "content" not in message and message["role"] == "assistant":
        return
    content = message.get("content")
    if isinstance(content, str):
        yield message
        return
    if not isinstance(content, list):
        raise PromptNotTokenizable("a message whose content is neither a string nor a list")
    texts, calls, results, reasoning = list[Any](), list[Any](), list[Any](), ""
    for block in content:
        match _type(block):
            case "text":
                _text(block, "text")
                texts.append(block)
            case "thinking":
                reasoning += _text(block, "thinking")
            case "image" if _is_shown(block):
                texts.append(_IMAGE)
            case "tool_use":
                calls.append(_call(block))
            case "tool_result":
                results.append(_result(block))
            case other if other not in _LEFT_OUT:
                raise PromptNotTokenizable(f"a block of type {other!r}", _reason(other))
    if texts or calls or reasoning:
        made: dict[str, Any] = {"role": message["role"], "content": texts or ""}
        if calls:
            made["tool_calls"] = calls
        if reasoning:
            made["reasoning_content"] = reasoning
        yield made
    yield from results


def _call(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool call of the chat. Its arguments stay an object: llama-server serializes them itself, in a chat too.

    Templates that show the arguments as text show that serialization, for example ``1e+15``, which no other JSON writer
    reproduces. (common/chat.cpp accepts an object since March 2026, see issue 20198; before, a string only.)
    """
    arguments = block.get("input")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise PromptNotTokenizable("a tool_use block whose input is no object")
    function = {"name": _text(block, "name"), "arguments": {} if arguments is None else arguments}
    return {"id": _text(block, "id"), "type": "function", "function": function}


def _result(block: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chat message of role ``tool`` for a tool result, with the result's texts concatenated. llama-server
    drops ``is_error``, and reads no block after the first image.
    """
    content = block.get("content")
    if isinstance(content, list):
        images = list[Any]()
        for at, part in enumerate(content):
            if (type_ := _type(part)) == "image" and _is_shown(part):
                images, content = [_IMAGE], content[:at]
                break  # nothing after it is read
            if type_ != "text" and type_ not in _LEFT_OUT_OF_RESULTS:
                raise PromptNotTokenizable(f"a tool result with a block of type {type_!r}", _reason(type_))
        content = "".join(_text(part, "text") for part in content if part["type"] == "text")
        if images:
            content = [{"type": "text", "text": content}, *images]
    elif content is not None and not isinstance(content, str):
        raise PromptNotTokenizable("a tool result whose content is neither a string nor a list")
    return {"role": "tool", "tool_call_id": _text(block, "tool_use_id"), "content": content or ""}


def _tool(tool: Any) -> dict[str, Any]:
    """Return a tool of the body as a function of the chat. Anthropic's own tools (``web_search_…``), which have only a
    name, become functions without parameters.
    """
    if not isinstance(tool, Mapping):
        raise PromptNotTokenizable("a tool that is no object")
    function = {
        "name": _text(tool, "name"),
        "description": _text(tool, "description"),
        "parameters": tool.get("input_schema", {}),
    }
    return {"type": "function", "function": function}


def _is_shown(image: Mapping[str, Any]) -> bool:
    """True if llama-server renders an image: its source is of type ``base64`` or ``url``. llama-server omits images of
    other types, for example ``file``.
    """
    source = image.get("source")
    return isinstance(source, Mapping) and source.get("type") in ("base64", "url")


def _reason(unknown: str) -> Reason:
    return Reason.MEDIA if unknown == "image" else Reason.SHAPE


def _type(block: Any) -> str:
    if not isinstance(block, Mapping):
        raise PromptNotTokenizable("a block that is no object")
    return _text(block, "type")


def _text(block: Mapping[str, Any], name: str) -> str:
    """Return the string in a field; empty if the field is missing or null. Raises PromptNotTokenizable for another
    type.
    """
    value = block.get(name)
    if value is not None and not isinstance(value, str):
        raise PromptNotTokenizable(f"{name!r} is no string")
    return value or ""
