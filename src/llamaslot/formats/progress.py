"""Events of progress as llama-server sends them, for the part of a prompt that is computed ahead of its request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llamaslot.llama.routes import Format
from llamaslot.llama.sse import event_of


def progress_event(
    kind: Format, id_: str, model: str, *, n_total: int, n_reused: int, n_done: int, seconds: float
) -> bytes:
    """What a client that sets ``return_progress`` is sent after each batch: ``n_done`` of ``n_total`` tokens are there,
    ``n_reused`` of them from before. The shapes were seen running on xllamacpp 2026.10.11549; ``id_`` is llamaslot's,
    for llama-server has not seen the request yet.
    """
    progress = {"total": n_total, "cache": n_reused, "processed": n_done, "time_ms": round(seconds * 1000)}
    event: dict[str, Any]
    if kind in ("native-completion", "infill"):
        event = {
            "index": 0,
            "content": "",
            "tokens": [0],
            "stop": False,
            "id_slot": -1,
            "tokens_predicted": 0,
        }
        return event_of({**event, "tokens_evaluated": n_total, "prompt_progress": progress})
    event = {"created": int(time.time()), "id": f"chatcmpl-{id_}", "model": model}
    if kind == "chat":
        delta = {"role": "assistant", "content": None}
        choices: list[Any] = [{"finish_reason": None, "index": 0, "delta": delta}]
        event |= {"choices": choices, "object": "chat.completion.chunk"}
    else:
        choices = [{"text": "", "index": 0, "logprobs": None, "finish_reason": None}]
        event |= {"choices": choices, "object": "text_completion"}
    return event_of({**event, "prompt_progress": progress})


def message_start(id_: str, body: Mapping[str, Any], n_total: int, n_reused: int) -> bytes:
    """The event that an Anthropic stream begins with, of a prompt of ``n_total`` tokens; shaped as llama-server's."""
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


#: The formats that have events of progress of their own, which can be made up. Others are told in comments.
TELLS_PROGRESS: tuple[Format, ...] = ("chat", "openai-completion", "native-completion", "infill")
