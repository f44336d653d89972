"""What the fake llama-server knows of its model: byte tokens, a ChatML template, and answers that depend on the tokens.

Token ids and template are those of the generated GGUFs of ``models.py``; ``test_fake.py`` compares both with the real
server. An answer is a hash of the weights and of all tokens before it. So an answer computed on the KV of another model
or conversation is not the right answer, and a test detects it.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from tests.support import fake_media

NO_MEDIA = "{} input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
IM_START, IM_END, END_OF_TEXT = 256, 257, 258
N_VOCAB = 259
SPECIALS = {"<|im_start|>": IM_START, "<|im_end|>": IM_END, "<|endoftext|>": END_OF_TEXT}
PIECES = {token: text for text, token in SPECIALS.items()}


class BadInput(Exception):
    """A request that llama-server answers with an error. ``extra`` are further fields of the error object."""

    def __init__(
        self, message: str, status: int = 400, kind: str = "invalid_request_error", **extra: Any
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.extra = status, kind, extra

    def body(self) -> dict[str, Any]:
        return {"error": {"code": self.status, "message": str(self), "type": self.kind, **self.extra}}


def pack(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}i", *ids)


def unpack(tokens: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(tokens) // 4}i", tokens))


def common(a: bytes, b: bytes) -> int:
    """The number of tokens that two sequences share from their beginning."""
    low, high = 0, min(len(a), len(b)) // 4
    if a[: high * 4] == b[: high * 4]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low * 4 : middle * 4] == b[low * 4 : middle * 4]:
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(slots=True)
class FakeModel:
    """``weights`` stands for a real GGUF's tensors: other weights give other answers."""

    weights: str = "A"
    path: str = "/models/fake.gguf"
    n_ctx_train: int = 262_144
    # A tokenizer whose special tokens strip the white space after them (Phi, for one): a text tokenized in two pieces,
    # cut after <|im_end|>, then has more tokens than the whole.
    strips: bool = False
    has_infill: bool = True  # tokens for /infill
    takes_media: bool = False
    moves_media: bool = False  # in front of all text
    reasoning_format: str = "deepseek"  # --reasoning-format

    def tokenize(self, text: str, *, parse_special: bool = True) -> list[int]:
        if not parse_special:
            return list(text.encode())
        ids: list[int] = []
        position = 0
        while position < len(text):
            start = text.find("<|", position)
            if start < 0:
                ids.extend(text[position:].encode())
                break
            special = next((s for s in SPECIALS if text.startswith(s, start)), None)
            end = start + (2 if special is None else 0)
            ids.extend(text[position:end].encode())
            if special is not None:
                ids.append(SPECIALS[special])
                end = start + len(special)
                while self.strips and text[end : end + 1].isspace():
                    end += 1
            position = end
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        pieces = (PIECES[i].encode() if i in PIECES else bytes([i]) for i in ids)
        return b"".join(pieces).decode("utf-8", "replace")

    def next_token(self, tokens: bytes, origins: frozenset[str]) -> int:
        """The greedy next token: printable ASCII. ``origins``: the weights that have computed the KV before it."""
        return 0x20 + self._hash(tokens, origins) % 95

    def top(self, tokens: bytes, origins: frozenset[str], n: int) -> list[dict[str, Any]]:
        """The ``top_logprobs`` of the next token, best first."""
        seed = self._hash(tokens, origins)
        first = 0x20 + seed % 95
        top = []
        for rank in range(n):
            token = 0x20 + (first - 0x20 + rank * 7) % 95
            logprob = -0.3 - 0.9 * rank - ((seed >> (8 * (rank % 7))) % 256) / 1000
            top.append({"id": token, "token": chr(token), "bytes": [token], "logprob": logprob})
        return top

    def _hash(self, tokens: bytes, origins: frozenset[str]) -> int:
        others = ",".join(sorted(origins - {self.weights}))
        return xxhash.xxh3_64_intdigest(
            tokens, seed=xxhash.xxh32_intdigest(f"{self.weights}|{others}".encode())
        )

    def render(self, body: dict[str, Any]) -> str:
        """The prompt of a chat body, as ``CHAT_TEMPLATE`` renders it. Raises ``BadInput`` with the server's words."""
        if isinstance(body, dict) and not self.takes_media:
            for part in fake_media.of(body):
                kind = str(part["type"]).removeprefix("input_").removesuffix("_url")
                raise BadInput(NO_MEDIA.format(kind), 500, "server_error")
        moved = "".join(map(fake_media.shown, fake_media.of(body))) if self.moves_media else ""
        return moved + render(body)


def _text(message: dict[str, Any]) -> str:
    content = message.get("content")
    if content is None:
        if message.get("role") == "assistant":
            return ""
        raise BadInput("All non-assistant messages must contain 'content'")
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return fake_media.content(content)
    raise BadInput("Expected 'content' to be a string or an array")


def _checked(body: Any) -> list[dict[str, Any]]:
    if not isinstance(body, dict) or "messages" not in body:
        raise BadInput("'messages' is required")
    messages = body["messages"]
    if not isinstance(messages, list):
        raise BadInput("Expected 'messages' to be an array")
    for message in messages:
        if not isinstance(message, dict) or "role" not in message:
            told = json.dumps(message, separators=(",", ":"), ensure_ascii=False)
            raise BadInput(
                f"Failed to parse messages: Missing 'role' in message: {told}", 500, "server_error"
            )
        if message["role"] != "assistant" and "content" not in message:
            raise BadInput("All non-assistant messages must contain 'content'")
    return messages


def render(body: dict[str, Any]) -> str:
    """ChatML with tools, tool calls and reasoning; see ``models.CHAT_TEMPLATE``."""
    messages = _checked(body)
    tools = [_tool(tool) for tool in body.get("tools") or []]
    keep = bool((body.get("chat_template_kwargs") or {}).get("keep_reasoning"))
    roles = [message["role"] for message in messages]
    last_user = max((i for i, role in enumerate(roles) if role == "user"), default=-1)
    parts: list[str] = []
    if tools:
        parts.append("<|im_start|>system\n")
        if roles and roles[0] == "system":
            parts.append(_text(messages[0]) + "\n\n")
        parts.append("# Tools\n\nYou may call one or more functions.\n\n<tools>")
        parts.extend("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        parts.append(
            "\n</tools>\n\nFor each call return a json object within <tool_call></tool_call> tags:\n"
        )
        parts.append('<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>')
        parts.append("<|im_end|>\n")
    elif roles and roles[0] == "system":
        parts.append(f"<|im_start|>system\n{_text(messages[0])}<|im_end|>\n")
    # An assistant message at the end is an answer begun: it is left open, and no other is started.
    open_answer = bool(roles) and roles[-1] == "assistant" and not messages[-1].get("tool_calls")
    for i, message in enumerate(messages):
        role = roles[i]
        if role == "user" or (role == "system" and i):
            parts.append(f"<|im_start|>{role}\n{_text(message)}<|im_end|>\n")
        elif role == "assistant":
            parts.append("<|im_start|>assistant\n")
            reasoning = message.get("reasoning_content") or ""
            if (reasoning and (keep or i > last_user)) or (open_answer and i == len(messages) - 1):
                parts.append(f"<think>\n{reasoning}\n</think>\n\n")
            parts.append(_text(message))
            parts.append(_calls(message))
            if not (open_answer and i == len(messages) - 1):
                parts.append("<|im_end|>\n")
        elif role == "tool":
            if not i or roles[i - 1] != "tool":
                parts.append("<|im_start|>user")
            parts.append(f"\n<tool_response>\n{_text(message)}\n</tool_response>")
            if i == len(messages) - 1 or roles[i + 1] != "tool":
                parts.append("<|im_end|>\n")
    if not open_answer and body.get("add_generation_prompt", True):
        parts.append("<|im_start|>assistant\n")
    return "".join(parts)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as the server passes it to the template: three fields, whatever else the client wrote."""
    function = tool.get("function", {})
    kept = {name: function.get(name, "") for name in ("name", "description")}
    return {"type": "function", "function": {**kept, "parameters": function.get("parameters", {})}}


def _calls(message: dict[str, Any]) -> str:
    text = ""
    for n, call in enumerate(message.get("tool_calls") or []):
        call = call.get("function", call)
        arguments = call.get("arguments")
        if not isinstance(arguments, str):
            arguments = json.dumps(arguments, ensure_ascii=False)
        newline = "\n" if message.get("content") or n else ""
        text += f'{newline}<tool_call>\n{{"name": "{call["name"]}", "arguments": {arguments}}}\n</tool_call>'
    return text


def user_marks(body: dict[str, Any], model: FakeModel) -> tuple[int, ...]:
    """The numbers of tokens before each user message, where the chat routes make checkpoints."""
    *heads, _ = render(body).split("<|im_start|>user\n")
    counts = itertools.accumulate(len(model.tokenize(head)) for head in heads)
    return tuple(n + i * len(model.tokenize("<|im_start|>user\n")) for i, n in enumerate(counts))


def per_second(n: int, ms: float) -> float:
    return 0.0 if not ms or math.isinf(ms) else 1000.0 * n / ms
