"""Assembles the JSON answer that llama-server would have sent, from the events of its stream.

Why: a client that has left is detected when a write to it fails, and nothing is written to a client that does not
stream. So its request is sent on as a stream (``Format.streamed``), and its answer is assembled from the events
(``Assembly``): field by field what ``"stream": false`` gives. Each format has its own of both; here is the shared
part. tests/real/test_assemble.py compares the two on the real server.

What a stream cannot give usually shows in the body; then ``Format.can_assemble`` is False:

- ``logprobs``, ``n_probs``: entries are lost with tokens that have no event of their own (in chat the end, and tags
  of reasoning and of calls) and with drafted ones, and the answer omits those of a stop word's tokens, which only the
  server can count. In chat with tools and a stream they are a 400.
- ``return_tokens``: the first bytes of a character have no event, so their ids are lost.
- ``n_indent``: the answer loses the end of its last line, which was streamed already.
- ``verbose``: the raw text is in no event.
- ``reasoning_format`` deepseek-legacy moves the reasoning in streams only (server-schema.cpp, reasoning_in_content).
- ``stream_options`` is checked even where it has no use; images, and every field that the tests do not cover.

What is known only at the end: see ``Doubt``. One case cannot be detected: if the model itself ends a chat in the
middle of a character, the bytes of that are missing (U+FFFD in the answer).

Sources: llama.cpp, tools/server/server-task.cpp (to_json_..., update_chat_msg), server-context.cpp (process_token,
send_partial_response, send_final_response), server-schema.cpp (the fields of a body).
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from llamaslot.errors import Unavailable, UpstreamError


class Doubt(enum.StrEnum):
    """Why the answer may differ from the one that llama-server would have sent: repeat the request without a stream."""

    #: Its end may be missing: a part of a character, or a possible beginning of a stop word, is not streamed.
    HELD_BACK = "held back"
    #: If nothing is left of the text after parsing (``<think></think>``, blanks), the answer has the raw text.
    UNPARSED = "unparsed"
    #: The events contain something unknown. With this server that will always be so.
    UNKNOWN = "unknown"


class Incomplete(Unavailable):
    """The stream ended before all its answers did."""


# -- the request -------------------------------------------------------------------------------------------------

# fmt: off
#: Fields that determine the content of the answer, not its form.
HARMLESS = {
    "model", "id_slot", "cache_prompt", "seed", "n_predict", "max_tokens", "max_completion_tokens", "n", "n_cmpl",
    "stop", "ignore_eos", "logit_bias", "grammar", "json_schema", "lora", "n_keep", "n_discard", "n_cache_reuse",
    "t_max_predict_ms", "samplers", "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p",
    "top_n_sigma", "xtc_probability", "xtc_threshold", "typical_p", "min_keep", "repeat_last_n", "repeat_penalty",
    "frequency_penalty", "presence_penalty", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "mirostat", "mirostat_tau", "mirostat_eta", "adaptive_target", "adaptive_decay",
    "sse_ping_interval",
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",  # of OpenAI, no use here
}
#: Without effect if they are off. A streamed body may set them, so a value of another type must be noticed.
_OFF = {"stream", "verbose", "echo", "return_tokens", "post_sampling_probs", "logprobs", "n_probs", "n_indent"}
_OFF_AT_0 = {"logprobs", "n_probs", "n_indent"}
# fmt: on


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` without fields that are null: llama-server treats these as absent (server-schema.cpp, has_value)."""
    return {name: value for name, value in body.items() if value is not None}


def has_only(given: Mapping[str, Any], known: set[str]) -> bool:
    """Whether each field of a body is in ``known``, or has a value that has no effect."""
    return all(_is_fit(name, value, known) for name, value in given.items())


def _is_fit(name: str, value: Any, known: set[str]) -> bool:
    if name in ("timings_per_token", "return_progress"):
        return isinstance(value, bool)
    if name in _OFF:
        return value is False or (type(value) is int and value == 0 and name in _OFF_AT_0)
    return name in known


def n_answers(given: Mapping[str, Any]) -> int | None:
    """The number of answers that a body requests for each prompt; None if llama-server's reading of it
    is not certain.
    """
    counts = [given[name] for name in ("n", "n_cmpl") if name in given] or [1]
    if len(counts) > 1 or type(counts[0]) is not int or not 1 <= counts[0] < 2**31:
        return None
    return counts[0]


def n_answers_to_prompts(given: Mapping[str, Any]) -> int | None:
    """The number of answers to all prompts in ``prompt`` together; None if it is not certain."""
    n, prompt = n_answers(given), given.get("prompt")
    if n is None or _is_prompt(prompt):
        return n
    if isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        return n * len(prompt)
    return None


def _is_prompt(prompt: Any) -> bool:
    """Whether ``prompt`` is one prompt: a text, or a list with an id in it. Other lists are lists of prompts
    (tokenize_input_prompts).
    """
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        return int in kinds and kinds <= {int, str}
    return isinstance(prompt, str)


def streamed_with_progress(body: Mapping[str, Any]) -> dict[str, Any]:
    """``body`` as a request for a stream that reports the progress of its prompt."""
    return {**body, "stream": True, "return_progress": True}


def streamed_with_usage(body: Mapping[str, Any]) -> dict[str, Any]:
    """As ``streamed_with_progress``, for an OpenAI format, whose streams have usage only on request. The timings give
    each event the number of tokens so far, which reveals Doubt.HELD_BACK.
    """
    told = {"stream_options": {"include_usage": True}, "timings_per_token": True}
    return streamed_with_progress(body) | told


# -- the answer --------------------------------------------------------------------------------------------------


class PartialAnswer:
    """One of the answers to a body, as far as its events have come."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.n_told = 0  # number of tokens at the last event for a token
        self.n_said = 0  # the same for the last event with content
        self.n_tokens = 0  # of the whole answer
        self.finish_reason: str | None = None
        self.totals: dict[str, Any] = {}  # its last event, in the form of the answer

    def tell(self, n_tokens: int, says_something: bool) -> None:
        self.n_told = n_tokens
        if says_something:
            self.n_said = n_tokens

    @property
    def is_cut(self) -> bool:
        """Whether the answer ended at its limit of tokens."""
        return self.finish_reason in ("length", "limit")


class Assembly(ABC):
    """Assembles the ``n_answers`` answers to one body. Feed it the JSON of each event, except ``[DONE]``."""

    def __init__(self, n_answers: int) -> None:
        self._n_answers = n_answers
        self._parts: dict[int, PartialAnswer] = {}
        self._ended: list[PartialAnswer] = []
        self._is_known = True

    def feed(self, payload: dict[str, Any]) -> None:
        """Take one event. Progress events count too: in a chat they have text before the first token.

        Raises UpstreamError for an error event, with the status and body that the error has without a stream.
        """
        if "error" in payload:
            error = payload["error"]
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            raise UpstreamError(status, orjson.dumps({"error": error}))
        try:
            self._take(payload)
        except (AttributeError, LookupError, TypeError):
            self._is_known = False

    @property
    def is_complete(self) -> bool:
        return len(self._ended) == self._n_answers and all(part.totals for part in self._ended)

    @property
    def doubt(self) -> Doubt | None:
        """Why the assembled answer may differ from llama-server's own; None if it is exact. Raises Incomplete if
        events are missing.
        """
        if not self._is_known:
            return Doubt.UNKNOWN
        self._check()
        return next(filter(None, map(self._doubt_about, self._ended)), None)

    def answer(self) -> Any:
        """The assembled JSON answer: a list for several native answers, else an object. ``id`` and ``created`` are the
        stream's. Raises Incomplete if events are missing.
        """
        self._check()
        return self._whole(sorted(self._parts.items()))

    def _check(self) -> None:
        if not self.is_complete:
            n_ended, n = len(self._ended), self._n_answers
            raise Incomplete(f"llama-server broke off its stream after {n_ended} of {n} answers; ask again")

    @abstractmethod
    def _take(self, payload: dict[str, Any]) -> None:
        """Take one event that is no error. Raises AttributeError, LookupError or TypeError for an unknown one."""

    @abstractmethod
    def _whole(self, parts: list[tuple[int, PartialAnswer]]) -> Any:
        """The JSON answer, made from all ``parts``, each with its index."""

    def _doubt_about(self, part: PartialAnswer) -> Doubt | None:
        is_end_missing = part.n_told < part.n_tokens or (part.is_cut and part.n_said < part.n_tokens)
        return Doubt.HELD_BACK if is_end_missing else None

    def _part(self, index: int) -> PartialAnswer:
        return self._parts.setdefault(index, PartialAnswer())

    def _know(self, names: Iterable[str], known: set[str]) -> None:
        self._is_known = self._is_known and known.issuperset(names)

    def _end(self, part: PartialAnswer, finish_reason: str) -> None:
        part.finish_reason = finish_reason
        self._ended.append(part)


class OpenAIAssembly(Assembly):
    """Assembles an answer that has its texts in ``choices``."""

    def _know_event(self, payload: dict[str, Any]) -> None:
        self._know(payload, _OPENAI_EVENT)

    def _whole(self, parts: list[tuple[int, PartialAnswer]]) -> Any:
        """The JSON answer with one choice for each part. The totals are those of the first part, as llama-server gives
        them.
        """
        return {**parts[0][1].totals, "choices": [self._choice(index, part) for index, part in parts]}

    @abstractmethod
    def _choice(self, index: int, part: PartialAnswer) -> dict[str, Any]:
        """One part as an entry of ``choices``."""


_OPENAI_EVENT = {
    "choices", "created", "model", "system_fingerprint", "object", "usage", "id", "timings", "prompt_progress",
}  # fmt: skip
