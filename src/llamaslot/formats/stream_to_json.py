"""Assembles the JSON answer that llama-server would have sent, from the events of its stream.

Why: llama-server detects that its client has left when a write to it fails, and it writes nothing before the end of an
answer that is not streamed. So llamaslot requests each answer as a stream (``Format.streamed``), and assembles it from
the events (``Assembly``): field by field what ``"stream": false`` gives. Each format has its own part of both; the
common part is here. tests/real/test_assemble.py compares the two answers on the real server.

Some answers cannot be assembled. For most of them the body shows it, and ``Format.can_assemble`` is False:

- ``logprobs``, ``n_probs``: tokens without an event of their own lose their entries: in chat the end token and the tags
  of reasoning and calls, and everywhere drafted tokens. The answer leaves out the entries of a stop word's tokens,
  which only the server can count. A streamed chat with tools and ``logprobs`` is refused with a 400.
- ``return_tokens``: the first bytes of a character have no event, so their ids are lost.
- ``n_indent``: the answer leaves out the end of its last line, which was streamed already.
- ``verbose``: the raw text is in no event.
- ``reasoning_format`` deepseek-legacy puts the reasoning elsewhere in a stream (server-schema.cpp,
  reasoning_in_content).
- ``stream_options`` is checked even without a stream; images, and every field that the tests do not cover.

What shows only at the end of a stream: see ``Doubt``. One case cannot be detected: if the model itself ends a chat in
the middle of a character, the bytes of that character are missing (U+FFFD in the answer).

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
    """Why the assembled answer may differ from the one that llama-server would have sent without a stream. In doubt the
    request is repeated without a stream.
    """

    #: The end of the text may be missing: llama-server does not stream a part of a character, nor what may be the
    #: beginning of a stop word.
    HELD_BACK = "the end of the text may be missing"
    #: Parsing has left nothing of the text (``<think></think>``, blanks). An answer without a stream has the raw text
    #: then.
    UNPARSED = "parsing has left nothing of the text"
    #: The events have an unknown form, which will be the same in all streams of this llama-server.
    UNKNOWN = "its events have an unknown form"


class Incomplete(Unavailable):
    """The stream ended before all of its answers were complete."""


# -- the request -------------------------------------------------------------------------------------------------

# fmt: off
#: Fields that change the content of an answer but not its form, so they do not hinder an assembly.
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
#: Fields that have no effect while they are off. ``Format.streamed`` overwrites some of them, so a value of a wrong
#: type, which llama-server would refuse, must be noticed before.
_OFF = {"stream", "verbose", "echo", "return_tokens", "post_sampling_probs", "logprobs", "n_probs", "n_indent"}
_OFF_AT_0 = {"logprobs", "n_probs", "n_indent"}
# fmt: on


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``body`` without the fields that are null: llama-server treats them as absent (server-schema.cpp,
    has_value).
    """
    return {name: value for name, value in body.items() if value is not None}


def has_only(given: Mapping[str, Any], known: set[str]) -> bool:
    """True if each field of a body is in ``known``, or has a value that has no effect."""
    return all(_is_fit(name, value, known) for name, value in given.items())


def _is_fit(name: str, value: Any, known: set[str]) -> bool:
    if name in ("timings_per_token", "return_progress"):
        return isinstance(value, bool)
    if name in _OFF:
        return value is False or (type(value) is int and value == 0 and name in _OFF_AT_0)
    return name in known


def n_answers(given: Mapping[str, Any]) -> int | None:
    """Return the number of answers that a body requests for each prompt. None if it is not certain how llama-server
    reads it.
    """
    counts = [given[name] for name in ("n", "n_cmpl") if name in given] or [1]
    if len(counts) > 1 or type(counts[0]) is not int or not 1 <= counts[0] < 2**31:
        return None
    return counts[0]


def n_answers_to_prompts(given: Mapping[str, Any]) -> int | None:
    """Return the number of answers to all prompts in ``prompt`` together. None if it is not certain."""
    n, prompt = n_answers(given), given.get("prompt")
    if n is None or _is_prompt(prompt):
        return n
    if isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        return n * len(prompt)
    return None


def _is_prompt(prompt: Any) -> bool:
    """True if ``prompt`` is a single prompt: a text, or a list with an id in it. Other lists are lists of prompts
    (tokenize_input_prompts).
    """
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        return int in kinds and kinds <= {int, str}
    return isinstance(prompt, str)


def streamed_with_progress(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``body`` as a request for a stream that reports the progress of the prefill."""
    return {**body, "stream": True, "return_progress": True}


def streamed_with_usage(body: Mapping[str, Any]) -> dict[str, Any]:
    """As ``streamed_with_progress``, for an OpenAI format, whose streams have ``usage`` only on request.
    ``timings_per_token`` gives each event the number of tokens so far, from which Doubt.HELD_BACK is found.
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
        self.n_told = 0  # number of tokens up to the last event for a token
        self.n_said = 0  # number of tokens up to the last event with content
        self.n_tokens = 0  # of the whole answer, as the totals tell
        self.finish_reason: str | None = None
        self.totals: dict[str, Any] = {}  # the last event of the answer, in the form of a JSON answer

    def tell(self, n_tokens: int, says_something: bool) -> None:
        """Record an event for a token: ``n_tokens`` so far, and whether the event ``says_something``, that is, has
        content.
        """
        self.n_told = n_tokens
        if says_something:
            self.n_said = n_tokens

    @property
    def is_cut(self) -> bool:
        """True if the answer ended at its limit of tokens."""
        return self.finish_reason in ("length", "limit")


class Assembly(ABC):
    """Assembles the ``n_answers`` answers to one body. ``feed`` it the JSON of each event, except ``[DONE]``."""

    def __init__(self, n_answers: int) -> None:
        self._n_answers = n_answers
        self._parts: dict[int, PartialAnswer] = {}
        self._ended: list[PartialAnswer] = []
        self._is_known = True

    def feed(self, payload: dict[str, Any]) -> None:
        """Take the JSON of one event. Progress events must be fed too: in a chat they may have text that comes before
        the first token.

        Raises UpstreamError for an error event, with the status and body that llama-server's error has without a
        stream.
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
        """True if all answers have ended, and their totals have come."""
        return len(self._ended) == self._n_answers and all(part.totals for part in self._ended)

    @property
    def doubt(self) -> Doubt | None:
        """Why the assembled answer may differ from llama-server's own; None if it does not. Raises Incomplete if events
        are missing.
        """
        if not self._is_known:
            return Doubt.UNKNOWN
        self._check()
        return next(filter(None, map(self._doubt_about, self._ended)), None)

    def answer(self) -> Any:
        """Return the assembled JSON answer: a list for several native answers, else an object. Its ``id`` and
        ``created`` are those of the stream. Raises Incomplete if events are missing.
        """
        self._check()
        return self._whole(sorted(self._parts.items()))

    def _check(self) -> None:
        if not self.is_complete:
            n_ended, n = len(self._ended), self._n_answers
            raise Incomplete(f"llama-server broke off its stream after {n_ended} of {n} answers; ask again")

    @abstractmethod
    def _take(self, payload: dict[str, Any]) -> None:
        """Take one event that is no error. Raises AttributeError, LookupError or TypeError if its form is unknown."""

    @abstractmethod
    def _whole(self, parts: list[tuple[int, PartialAnswer]]) -> Any:
        """Return the JSON answer made from all ``parts``, each with its index."""

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
        """Return the JSON answer with one choice for each part. Its totals are those of the first part, as in
        llama-server's own answer.
        """
        return {**parts[0][1].totals, "choices": [self._choice(index, part) for index, part in parts]}

    @abstractmethod
    def _choice(self, index: int, part: PartialAnswer) -> dict[str, Any]:
        """Return one part as an entry of ``choices``."""


_OPENAI_EVENT = {
    "choices", "created", "model", "system_fingerprint", "object", "usage", "id", "timings", "prompt_progress",
}  # fmt: skip
