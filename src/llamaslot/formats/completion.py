"""``/v1/completions`` (OpenAI): a plain prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from llamaslot.formats.base import Format, PromptKind
from llamaslot.formats.stream_to_json import (
    HARMLESS,
    Assembly,
    OpenAIAssembly,
    PartialAnswer,
    has_only,
    n_answers_to_prompts,
    streamed_with_usage,
    without_nulls,
)
from llamaslot.llama.dry_run import DryRun, dry_run
from llamaslot.llama.sse import event_of
from llamaslot.tokens.tokenizer import listed

_FIELDS = HARMLESS | {"prompt"}


class CompletionFormat(Format):
    """The API ``/v1/completions``: the prompt is a text, ids, or a list of prompts; the answer has ``choices``."""

    name = "openai-completion"
    required_key = "prompt"
    prompt_kind = PromptKind.PLAIN

    def n_prompts(self, body: Mapping[str, Any]) -> int:
        return len(listed(body.get("prompt")))

    def dry_run(
        self, body: Mapping[str, Any], chat: Mapping[str, Any] | None, *, tokens: bytes | None, n: int
    ) -> DryRun:
        """As ``Format.dry_run``; the dry run goes to ``/v1/completions``."""
        return dry_run(body, is_chat=False, tokens=tokens, n=n, path="/v1/completions")

    def progress_event(self, id_: str, model: str, progress: Mapping[str, int]) -> bytes:
        """Return the event in the form of llama-server's own progress events (measured on xllamacpp 2026.10.11549)."""
        return event_of(
            {
                "created": int(time.time()),
                "id": f"chatcmpl-{id_}",
                "model": model,
                "choices": [{"text": "", "index": 0, "logprobs": None, "finish_reason": None}],
                "object": "text_completion",
                "prompt_progress": progress,
            }
        )

    def can_assemble(self, body: Mapping[str, Any]) -> bool:
        given = without_nulls(body)
        return n_answers_to_prompts(given) is not None and has_only(given, _FIELDS)

    def streamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return streamed_with_usage(body)

    def assembly(self, body: Mapping[str, Any]) -> Assembly:
        return TextAssembly(n_answers_to_prompts(without_nulls(body)) or 1)


class TextAssembly(OpenAIAssembly):
    """Assembles the answer to a plain prompt from its events."""

    def _take(self, payload: dict[str, Any]) -> None:
        """Take one event. llama-server sends one for each token, even for a token without text. The last event of an
        answer has its finish reason and the totals.
        """
        self._know_event(payload)
        choice = payload["choices"][0]
        part = self._part(choice["index"])
        self._know(choice, {"text", "index", "logprobs", "finish_reason"})
        part.text += choice["text"]
        if choice["finish_reason"] is not None:
            part.totals, part.n_tokens = payload, payload["usage"]["completion_tokens"]
            self._end(part, choice["finish_reason"])
        else:
            part.tell(payload["timings"]["predicted_n"], bool(choice["text"]))

    def _choice(self, index: int, part: PartialAnswer) -> dict[str, Any]:
        return {"text": part.text, "index": index, "logprobs": None, "finish_reason": part.finish_reason}
