"""The JSON answer that llama-server would have sent, put together from the events of its stream.

Why: that a client has left is noticed when a write to it fails, and to one that does not stream nothing is written. So
its request is sent on as a stream (``streamed``), and its answer is made of the events (``Assembly``): field by field
what ``"stream": false`` gives. tests/real/test_assemble.py holds the one against the other on the real server.

What a stream cannot give is known from the body as a rule; then ``can_assemble`` says no:

- ``logprobs``, ``n_probs``: entries are lost with tokens that have no event of their own (in chat the end, and tags of
  reasoning and of calls) and with drafted ones, and the answer leaves out those of a stop word's tokens, which only the
  server can count. In chat with tools and a stream they are a 400.
- ``return_tokens``: the first bytes of a character have no event, so their ids are lost.
- ``n_indent``: the answer loses the end of its last line when that was streamed already.
- ``verbose``: the raw text is in no event.
- ``reasoning_format`` deepseek-legacy moves the reasoning in streams only (server-schema.cpp, reasoning_in_content).
- ``stream_options`` is checked even where it has no use; images, and every field that the tests do not know.

What is known at the end only: see ``Doubt``. Nothing tells one thing: where the model itself ends a chat in
the middle of a character, the bytes of that are missing (U+FFFD in the answer).

Sources: llama.cpp, tools/server/server-task.cpp (to_json_..., update_chat_msg), server-context.cpp (process_token,
send_partial_response, send_final_response), server-schema.cpp (the fields of a body).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from llamaslot.errors import LlamaslotError, UpstreamError
from llamaslot.llama.routes import Format


class Doubt(enum.StrEnum):
    """Why the answer may not be the one that llama-server would have sent: ask again without a stream."""

    #: Its end may be missing: a part of a character, or what could have become a stop word, is not streamed.
    HELD_BACK = "held back"
    #: Where nothing is left of the text once it is parsed (``<think></think>``, blanks), the answer has the raw text.
    UNPARSED = "unparsed"
    #: There is something in the events that is not known here. With this server it will be so every time.
    UNKNOWN = "unknown"


class Incomplete(LlamaslotError):
    """The stream ended before all its answers had."""

    status = 503
    type = "unavailable_error"
    retry_after_s = 5.0


# -- the request -------------------------------------------------------------------------------------------------

# fmt: off
#: Fields that decide what is said, not how it is told.
_HARMLESS = {
    "model", "id_slot", "cache_prompt", "seed", "n_predict", "max_tokens", "max_completion_tokens", "n", "n_cmpl",
    "stop", "ignore_eos", "logit_bias", "grammar", "json_schema", "lora", "n_keep", "n_discard", "n_cache_reuse",
    "t_max_predict_ms", "samplers", "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p",
    "top_n_sigma", "xtc_probability", "xtc_threshold", "typical_p", "min_keep", "repeat_last_n", "repeat_penalty",
    "frequency_penalty", "presence_penalty", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
    "dry_sequence_breakers", "mirostat", "mirostat_tau", "mirostat_eta", "adaptive_target", "adaptive_decay",
    "sse_ping_interval",
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",  # of OpenAI, no use here
}
_KNOWN: dict[Format, set[str]] = {
    "chat": _HARMLESS | {
        "messages", "tools", "tool_choice", "parallel_tool_calls", "response_format", "reasoning_format",
        "reasoning_effort", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    },
    "openai-completion": _HARMLESS | {"prompt"},
    "native-completion": _HARMLESS | {"prompt", "response_fields"},
    "infill": _HARMLESS | {"input_prefix", "input_suffix", "input_extra", "prompt", "response_fields"},
}
_NATIVE = ("native-completion", "infill")
#: Without effect when they are off. ``streamed`` may set them, so a value of another type must not go unnoticed.
_OFF = {"stream", "verbose", "echo", "return_tokens", "post_sampling_probs", "logprobs", "n_probs", "n_indent"}
_OFF_AT_0 = {"logprobs", "n_probs", "n_indent"}
# fmt: on


def can_assemble(body: Mapping[str, Any], kind: Format) -> bool:
    """Whether the answer to ``body``, whose client does not stream, can be had from a stream, but for a ``Doubt``.

    A server that was started with ``--reasoning-format deepseek-legacy`` cannot be told from here: its chat must not be
    assembled. ``generation_settings`` of any native answer tells it, /props does not (ran).
    """
    given = _given(body)
    if kind not in _KNOWN or _n_answers(given, kind) is None or _paths(given) is None:
        return False
    if kind == "chat" and not _is_plain_chat(given):
        return False
    return all(_is_fit(kind, name, value) for name, value in given.items())


def _is_fit(kind: Format, name: str, value: Any) -> bool:
    if name in ("timings_per_token", "return_progress"):
        return isinstance(value, bool)
    if name in _OFF:
        return value is False or (type(value) is int and value == 0 and name in _OFF_AT_0)
    return name in _KNOWN[kind]


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    """Without nulls, which are absent fields (server-schema.cpp, has_value)."""
    return {name: value for name, value in body.items() if value is not None}


def _is_plain_chat(given: Mapping[str, Any]) -> bool:
    """Text only, and its reasoning in the same place with and without a stream."""
    messages = given.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    is_text = all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
    return is_text and given.get("reasoning_format", "auto") in ("none", "auto", "deepseek")


def _n_answers(given: Mapping[str, Any], kind: Format) -> int | None:
    """How many answers there will be: ``n`` for each prompt. None where that is not certain."""
    counts = [given[name] for name in ("n", "n_cmpl") if name in given] or [1]
    if len(counts) > 1 or type(counts[0]) is not int or not 1 <= counts[0] < 2**31:
        return None
    prompt = given.get("prompt")
    if kind in ("chat", "infill") or _is_prompt(prompt):
        return counts[0]
    if isinstance(prompt, list) and prompt and all(map(_is_prompt, prompt)):
        return counts[0] * len(prompt)
    return None


def _is_prompt(prompt: Any) -> bool:
    """One prompt: a text, or a list with an id in it; other lists are of prompts (tokenize_input_prompts)."""
    if isinstance(prompt, list):
        kinds = set(map(type, prompt))
        return int in kinds and kinds <= {int, str}
    return isinstance(prompt, str)


def _paths(given: Mapping[str, Any]) -> list[str] | None:
    """``response_fields``, as names with slashes between them; None if they are anything else."""
    paths = given.get("response_fields", [])
    if isinstance(paths, list) and all(isinstance(path, str) and all(path.split("/")) for path in paths):
        return paths
    return None


def streamed(body: Mapping[str, Any], kind: Format) -> dict[str, Any]:
    """The body that asks for the same answer as a stream. Only where ``can_assemble``."""
    body = {**body, "stream": True, "return_progress": True}
    if kind in _NATIVE:
        body.pop("response_fields", None)  # the last event would have these only
        return body
    # With timings each event says how many tokens there are by now, by which Doubt.HELD_BACK is found.
    body |= {"stream_options": {"include_usage": True}, "timings_per_token": True}
    if kind == "chat":
        body["echo"] = True  # else the stream leaves out the assistant's message that it goes on with
    return body


# -- the answer --------------------------------------------------------------------------------------------------


class _Part:
    """One of the answers, as far as it has come."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.calls: list[dict[str, Any]] = []
        self.n_told = 0  # how many tokens there were at the last event for a token
        self.n_said = 0  # the same for the last event that said something
        self.n_tokens = 0  # of the whole answer
        self.finish_reason: str | None = None
        self.totals: dict[str, Any] = {}  # its last event, as the answer has it

    def tell(self, n_tokens: int, says_something: bool) -> None:
        self.n_told = n_tokens
        if says_something:
            self.n_said = n_tokens


class Assembly:
    """The answer to ``body``, the client's own and not the streamed one. Feed it each event's JSON, but ``[DONE]``."""

    def __init__(self, body: Mapping[str, Any], kind: Format) -> None:
        given = _given(body)
        self._n_answers, self._paths = _n_answers(given, kind) or 1, _paths(given)
        self._kind = kind
        self._parts: dict[int, _Part] = {}
        self._ended: list[_Part] = []
        self._is_known = True
        feeds: dict[Format, Callable[[dict[str, Any]], None]] = {
            "chat": self._feed_chat,
            "openai-completion": self._feed_text,
            "native-completion": self._feed_native,
            "infill": self._feed_native,
        }
        self._feed = feeds[kind]

    def feed(self, payload: dict[str, Any]) -> None:
        """Take in one event, also one of progress: a chat's text before the first token comes with that.

        Raises UpstreamError for an error event, with the status and the body that the error has without a stream.
        """
        if "error" in payload:
            error = payload["error"]
            code = error.get("code") if isinstance(error, dict) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            raise UpstreamError(status, orjson.dumps({"error": error}))
        try:
            self._feed(payload)
        except (AttributeError, LookupError, TypeError):
            self._is_known = False

    @property
    def is_complete(self) -> bool:
        return len(self._ended) == self._n_answers and all(part.totals for part in self._ended)

    @property
    def doubt(self) -> Doubt | None:
        """None if the answer is exact. Raises Incomplete."""
        if not self._is_known:
            return Doubt.UNKNOWN
        self._check()
        return next(filter(None, map(self._doubt_about, self._ended)), None)

    def answer(self) -> Any:
        """The JSON value: a list for several native answers, else an object. ``id`` and ``created`` are the stream's.

        Raises Incomplete.
        """
        self._check()
        parts = sorted(self._parts.items())
        if self._kind in _NATIVE:
            answers = [self._native(part) for _, part in parts]
            return answers if len(answers) > 1 else answers[0]
        choice = _chat_choice if self._kind == "chat" else _text_choice
        # With several answers the totals are those of the first one.
        return {**parts[0][1].totals, "choices": [choice(index, part) for index, part in parts]}

    def _check(self) -> None:
        if not self.is_complete:
            n_ended, n = len(self._ended), self._n_answers
            raise Incomplete(f"llama-server broke off its stream after {n_ended} of {n} answers; ask again")

    def _doubt_about(self, part: _Part) -> Doubt | None:
        is_chat, is_cut = self._kind == "chat", part.finish_reason in ("length", "limit")
        # Chat has no events for what its parser takes out, the end among it: there only a cut one can be told.
        if (is_cut and part.n_said < part.n_tokens) or (not is_chat and part.n_told < part.n_tokens):
            return Doubt.HELD_BACK
        if is_chat and not (part.text or part.reasoning or part.calls):
            # One token that was the end, or the stop word: then the raw text is empty too.
            return None if part.finish_reason == "stop" and part.n_tokens == 1 else Doubt.UNPARSED
        return None

    def _part(self, index: int) -> _Part:
        return self._parts.setdefault(index, _Part())

    def _know(self, names: Iterable[str], known: set[str]) -> None:
        self._is_known = self._is_known and known.issuperset(names)

    def _end(self, part: _Part, finish_reason: str) -> None:
        part.finish_reason = finish_reason
        self._ended.append(part)

    def _feed_chat(self, payload: dict[str, Any]) -> None:
        """A token's deltas, one event each, the last of them with ``timings``; then the finish reason; then the totals.

        The totals have no index, but follow their finish reason at once (to_json_oaicompat_chat_stream).
        """
        self._know(payload, _OPENAI_EVENT)
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
            self._feed_call(part.calls, piece)
        if choice["finish_reason"] is not None:
            self._end(part, choice["finish_reason"])
        elif "timings" in payload:
            # The first token has an event with the role, whatever became of the token.
            part.tell(payload["timings"]["predicted_n"], any(delta.get(name) for name in _SAID))

    def _feed_call(self, calls: list[dict[str, Any]], piece: dict[str, Any]) -> None:
        """The first piece of a call has its id and its name, further ones add to the arguments."""
        index, function = piece["index"], piece["function"]
        self._know(piece, {"index", "id", "type", "function"})
        if index == len(calls):
            calls.append({"type": "function", "function": {"name": "", "arguments": ""}, "id": piece["id"]})
        whole = calls[index]["function"]
        for name, text in function.items():
            whole[name] += text

    def _feed_text(self, payload: dict[str, Any]) -> None:
        """An event for each token, also for one that adds nothing; the last has the finish reason and the totals."""
        self._know(payload, _OPENAI_EVENT)
        choice = payload["choices"][0]
        part = self._part(choice["index"])
        self._know(choice, {"text", "index", "logprobs", "finish_reason"})
        part.text += choice["text"]
        if choice["finish_reason"] is not None:
            part.totals, part.n_tokens = payload, payload["usage"]["completion_tokens"]
            self._end(part, choice["finish_reason"])
        else:
            part.tell(payload["timings"]["predicted_n"], bool(choice["text"]))

    def _feed_native(self, payload: dict[str, Any]) -> None:
        """An event for each token, also for one that adds nothing; the last is the answer but for the text."""
        part = self._part(payload["index"])
        part.text += payload["content"]
        if payload["stop"]:
            settings = {**payload["generation_settings"], "stream": False}
            part.totals = {**payload, "generation_settings": settings}
            part.n_tokens = payload["tokens_predicted"]
            self._end(part, payload["stop_type"])
        else:
            self._know(payload, _NATIVE_EVENT)
            part.tell(payload["tokens_predicted"], bool(payload["content"]))

    def _native(self, part: _Part) -> dict[str, Any]:
        whole = {**part.totals, "content": part.text}
        return _chosen(whole, self._paths) if self._paths else whole


# fmt: off
_OPENAI_EVENT = {
    "choices", "created", "model", "system_fingerprint", "object", "usage", "id", "timings", "prompt_progress",
}
_SAID = {"content", "reasoning_content", "tool_calls"}
_NATIVE_EVENT = {
    "index", "content", "tokens", "stop", "id_slot", "tokens_predicted", "tokens_evaluated", "timings",
    "prompt_progress",
}
# fmt: on


def _chat_choice(index: int, part: _Part) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": part.text}
    if part.reasoning:
        message["reasoning_content"] = part.reasoning
    if part.calls:
        message["tool_calls"] = part.calls
    return {"finish_reason": part.finish_reason, "index": index, "message": message}


def _text_choice(index: int, part: _Part) -> dict[str, Any]:
    return {"text": part.text, "index": index, "logprobs": None, "finish_reason": part.finish_reason}


def _chosen(whole: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """A slash goes into an object; what is not there is left out (server-common.cpp, json_get_nested_values)."""
    result: dict[str, Any] = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            result[path] = value
    return result


_MISSING: Any = object()
