"""Dry runs: find out whether llama-server would accept a request, without computing its prompt.

llama-server reads a completion in this order, and refuses it at the first fault (measured on xllamacpp 2026.10.11549,
on every kind of model; docs/llama-server.md has the table):

1. the form of the route: messages, tools, ``tool_choice``, ``response_format`` of a chat; the parts of /infill
2. the prompt: its type is checked, and its tokens are made
3. its fields, one after the other: ``temperature``, ``max_tokens``, … by type and limits
4. in its slot, before anything there is changed: ids outside of the vocabulary, then the samplers, including the
   grammar
5. the length of the prompt: an empty one is answered at once, and one of ``n_ctx`` tokens or more is refused
6. only now the slot's content is compared with the prompt, and truncated

``POST /apply-template`` has checked 1 for a chat. A dry run sends the fields of the request with another prompt, an
empty one or one that is too long, with which llama-server stops at step 5. If it gets there, the fields have passed 3
and 4. A dry run needs a slot that the caller has leased; the slot keeps its content.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import orjson
from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import count, unpack
from llamaslot.errors import UpstreamError
from llamaslot.llama.client import QUICK_S, LlamaServer
from llamaslot.tasks import give_way

log = logging.getLogger(__name__)

_COMPLETION, _CHAT = "/completion", "/v1/chat/completions"

#: Fields that only form the prompt of a chat: ``POST /apply-template`` has checked them.
_CHATS = (
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "parallel_tool_calls",
    "chat_template_kwargs",
)
_PROMPTS = ("prompt", "input", "input_prefix", "input_suffix", "input_extra", "messages")
#: Fields that llama-server does not read. Many clients send another value with each request.
_UNREAD = (
    "user",
    "metadata",
    "client_metadata",
    "prompt_cache_key",
    "safety_identifier",
    "store",
    "service_tier",
)
#: llama-server accepts for these fields any number from -1 (none, or no limit) up to the largest int32.
_NUMBERS = {
    "seed", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "top_p", "top_k", "min_p",
    "typical_p", "presence_penalty", "frequency_penalty", "repeat_penalty",
}  # fmt: skip
_SWITCHES = {
    "stream",
    "cache_prompt",
    "return_progress",
    "return_tokens",
    "timings_per_token",
    "echo",
    "ignore_eos",
}
_STOPPER = {"samplers": [0]}  # the last field that is read; this value is refused
_REFUSALS = (400, 500)
_TOO_LONG = "exceed_context_size_error"
_WORD = "a b "  # two tokens of every vocabulary tested, and fast to tokenize
_WORD_TOKENS = 2
_ATTEMPTS = 4
_MAX_KNOWN = 4096
# Estimated seconds per token for tokenizing a prompt that is too long for the slot, until that was measured (70 ms for
# 65,000 tokens here). A dry run of a chat is made only if a late refusal would waste _WORTH times as much.
_TOKENIZING_S = 1.5e-6
_WORTH = 5.0


class DryRun(Struct, frozen=True):
    """The parts of a request that llama-server may refuse although its prompt is valid. ``fields``: without the prompt,
    to send to ``path``. ``chat``: the fields of a chat from which the template makes a grammar, None if it makes none.
    ``tokens``: the prompt if the client sent it as ids, whose range is checked; else empty.
    """

    path: str
    fields: dict[str, Any]
    chat: dict[str, Any] | None = None
    tokens: bytes = b""

    @property
    def ids(self) -> tuple[int, int] | None:
        """The lowest and the highest token id in ``tokens``; None without tokens."""
        ids = unpack(self.tokens)
        return (min(ids), max(ids)) if ids else None


def dry_run(
    fields: Mapping[str, Any], *, is_chat: bool, tokens: bytes | None, n: int, path: str = _COMPLETION
) -> DryRun:
    """The ``DryRun`` of a request.

    ``fields``: all fields of the body; if ``is_chat``, of the chat body, or of the chat that llama-server converts the
    body to. ``tokens``: the prompt if the client sent it as ids, else None. ``n``: the number of answers; more than one
    would take more slots, so a dry run asks for one. ``path``: a route that accepts these fields with a prompt.
    """
    given = dict(fields)
    for name in _UNREAD:
        given.pop(name, None)
    for name in ("n", "n_cmpl") if n > 1 else ():
        given.pop(name, None)
    for name in ("stream", "cache_prompt", "return_progress"):
        # A dry run sets these itself. But a value that is no boolean stays, so that llama-server refuses it.
        if isinstance(given.get(name), bool | None):
            given.pop(name, None)
    dropped = (*_CHATS, *_PROMPTS) if is_chat else _PROMPTS
    kept = {name: value for name, value in given.items() if name not in dropped}
    return DryRun(path, kept, _with_grammar(given) if is_chat else None, tokens or b"")


def _with_grammar(chat: dict[str, Any]) -> dict[str, Any] | None:
    """The fields of a chat from which the template makes a grammar for the answer; None if it makes none."""
    wanted = chat.get("response_format")
    is_formed = isinstance(wanted, Mapping) and wanted.get("type") != "text"
    if not (chat.get("tools") or is_formed or chat.get("json_schema") is not None):
        return None
    left_out = ("messages", "prompt", "input", "continue_final_message", "add_generation_prompt")
    return {name: value for name, value in chat.items() if name not in left_out}


class Verdict(enum.Enum):
    """The result of a dry run."""

    TAKEN = "taken"  # llama-server will accept the request
    REFUSED = "refused"  # llama-server will refuse the request
    UNSURE = "unsure"  # llama-server answered with another error, such as 503 while it is loading
    #: The server ran the prompt of the dry run, which every tested build refuses: the slot's content is unknown now.
    RUNS = "runs"


class DryRuns:
    """Makes dry runs on one llama-server, one for each kind of request: remembers which kinds it accepts."""

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self.forget()

    def forget(self) -> None:
        """Forget all results, because the server was restarted, perhaps as another build."""
        self._taken: dict[bytes, None] = {}
        self._ids = (0, 0)  # the lowest and the highest token id that llama-server has accepted
        self._is_usable: dict[str, bool] = {}  # by route: False if dry runs do not work there
        # A text with too many tokens for a slot, and the seconds that tokenizing it took.
        self._too_long: tuple[str, float] | None = None
        # The server's error for a request with only the invalid last field; False if it accepts that; None: not asked.
        self._stopped: object = None

    def note_accepted(self, run: DryRun) -> None:
        """Record that llama-server has accepted a request with the fields of ``run``: later ones like it need no dry
        run.
        """
        self._learn(_key(run.path, run.fields))
        if run.chat is not None:
            self._learn(_key(_CHAT, run.chat))

    async def is_unreadable(self, run: DryRun) -> bool:
        """True if llama-server refuses a field of the request for its type or value. It checks fields before it looks
        for a slot, so this needs no lease and works while all slots are busy. The request that is sent has an invalid
        last field besides, so it surely does not run.

        Asks once for each kind of request. Raises BackendDown. Canceling is safe.
        """
        key = _key("", run.fields)
        if key is None or key in self._taken:
            return False
        is_wrong = await self.is_malformed(_COMPLETION, {**run.fields, "prompt": [[]]})
        if not is_wrong:
            self._learn(key)
        return is_wrong

    async def is_malformed(self, path: str, body: Mapping[str, Any]) -> bool:
        """As ``is_unreadable``, for a whole body and the route ``path``, but asks at each call. The route must read all
        fields of the body.
        """
        if self._stopped is None:
            self._stopped = await self._words(_COMPLETION, {"prompt": [[]]})
        if not self._stopped:
            return False
        said = await self._words(path, {"cache_prompt": True, **body})
        return bool(said) and said != self._stopped

    async def _words(self, path: str, body: Mapping[str, Any]) -> object:
        """llama-server's error for ``body`` with an invalid last field. False if it accepts even that; None after
        another error status than 400 or 500, which says nothing about the body.
        """
        status, answer = await self._server.ask(path, {**body, **_STOPPER}, QUICK_S)
        return answer if status in _REFUSALS else None if status >= 400 else False

    async def ask(self, run: DryRun, slot: int, *, n_ctx: int, lora: str, worth_s: float) -> Verdict:
        """Find out whether llama-server will accept a request like ``run``, by a dry run in ``slot``, which the caller
        has leased and which keeps its content. Asks once for each kind of request.

        ``n_ctx``: the size of the slot's context. ``lora``: the LoRA scales of the slot's content, as JSON; with others
        llama-server would empty the slot. ``worth_s``: the seconds of computing that would be wasted if llama-server
        refused the request only after the prefill. Raises BackendDown. Canceling is safe.
        """
        ours = {"id_slot": slot, **({"lora": orjson.loads(lora)} if lora else {})}
        if run.chat is not None and worth_s >= _WORTH * self._seconds(n_ctx):
            return await self._ask(_Trial(_CHAT, run.chat, ours, n_ctx))
        await give_way(len(run.tokens))  # the caller has packed them
        if (ids := run.ids) is not None and not (self._ids[0] <= ids[0] and ids[1] <= self._ids[1]):
            return await self._ask(_Trial(run.path, run.fields, ours, n_ctx, ids))
        return await self._ask(_Trial(run.path, run.fields, ours, n_ctx))

    async def _ask(self, trial: _Trial) -> Verdict:
        key = _key(trial.path, trial.fields)
        is_known = (key is None or key in self._taken) and trial.ids is None
        if is_known or not self._is_usable.get(trial.path, True):
            return Verdict.TAKEN
        verdict = await self._verdict(trial)
        if verdict is Verdict.TAKEN:
            self._learn(key)
            if trial.ids is not None:
                self._ids = min(trial.ids[0], self._ids[0]), max(trial.ids[1], self._ids[1])
        elif verdict is Verdict.REFUSED and trial.path not in self._is_usable:
            plain = await self._verdict(replace(trial, fields={}, ids=None))
            if plain is Verdict.UNSURE:
                return plain
            self._is_usable[trial.path] = plain is Verdict.TAKEN
            verdict = verdict if plain is Verdict.TAKEN else plain
        if verdict is Verdict.RUNS or not self._is_usable.get(trial.path, True):
            self._is_usable[trial.path] = False
            log.info(
                "this llama-server cannot test a request to %s without computing its prompt (a dry run),"
                " so it may compute a prompt before it refuses the request",
                trial.path,
            )
            return Verdict.RUNS if verdict is Verdict.RUNS else Verdict.TAKEN
        return verdict

    async def _verdict(self, trial: _Trial) -> Verdict:
        """Make one dry run. TAKEN if llama-server finds no fault before the length of the prompt (step 5)."""
        body = {"cache_prompt": True, **_sent(trial.fields), **trial.ours}
        if trial.path != _CHAT and trial.ids is None:
            status, _ = await self._server.ask(trial.path, {**body, "prompt": [[]]}, QUICK_S)
            return Verdict.TAKEN if status < 400 else _refusal(status)
        # If llama-server runs the request, ``refusal`` closes the connection, which llama-server notices within a
        # batch.
        body = {"stream": True, "return_progress": True, **body}
        if trial.ids is None:
            if (content := await self._long_text(trial.n_ctx)) is None:
                return Verdict.REFUSED  # also without fields: ``_ask`` makes no more dry runs here
            body["messages"] = [{"role": "user", "content": content}]
        else:
            body["prompt"] = [*trial.ids, *[trial.ids[1]] * trial.n_ctx]
        status, answer = await self._server.refusal(trial.path, body)
        error = answer.get("error") if isinstance(answer, Mapping) else None
        if status < 400:
            return Verdict.RUNS
        is_too_long = isinstance(error, Mapping) and error.get("type") == _TOO_LONG
        return Verdict.TAKEN if is_too_long else _refusal(status)

    async def _long_text(self, n_ctx: int) -> str | None:
        """A text of at least ``n_ctx`` tokens, made once and kept; None if a few attempts fail."""
        n_words = n_ctx // _WORD_TOKENS + 1
        for _ in range(_ATTEMPTS):
            if self._too_long is not None:
                return self._too_long[0]
            text, started = _WORD * n_words, time.monotonic()
            try:
                n_tokens = count(await self._server.tokenize(text, add_special=False))
            except UpstreamError:
                break
            if n_tokens >= n_ctx:
                self._too_long = text, time.monotonic() - started
            n_words *= 2
        return None

    def _seconds(self, n_ctx: int) -> float:
        return self._too_long[1] if self._too_long is not None else n_ctx * _TOKENIZING_S

    def _learn(self, key: bytes | None) -> None:
        if key is not None:
            self._taken[key] = None
        if len(self._taken) > _MAX_KNOWN:
            del self._taken[next(iter(self._taken))]


class _Trial(Struct, frozen=True):
    path: str
    fields: Mapping[str, Any]
    ours: Mapping[str, Any]
    n_ctx: int
    ids: tuple[int, int] | None = None


def _refusal(status: int) -> Verdict:
    return Verdict.REFUSED if status in _REFUSALS else Verdict.UNSURE


def _sent(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` without those for which a dry run has its own values: ``id_slot``, and ``lora`` if it is valid."""
    left_out = {"id_slot"}
    lora = fields.get("lora")
    if isinstance(lora, list) and all(isinstance(entry, Mapping) for entry in lora):
        left_out.add("lora")
    return {name: value for name, value in fields.items() if name not in left_out}


def _key(path: str, fields: Mapping[str, Any]) -> bytes | None:
    """A key that is the same for requests with the same doubtful fields, which llama-server accepts or refuses alike.
    None if no field is doubtful: it surely accepts the request.
    """
    doubtful = {name: value for name, value in fields.items() if not _is_sure(name, value)}
    if not doubtful:
        return None
    return hashlib.blake2b(
        orjson.dumps([path, doubtful], option=orjson.OPT_SORT_KEYS), digest_size=16
    ).digest()


def _is_sure(name: str, value: Any) -> bool:
    """True if every build of llama-server accepts this field with this value."""
    if value is None or name in ("model", "id_slot"):
        return True
    if name in _NUMBERS:
        return type(value) in (int, float) and -1 <= value < 2**31
    if name in ("n", "n_cmpl"):
        return value == 1 and type(value) is int
    if name == "stop":
        return isinstance(value, str) or (
            isinstance(value, list) and all(isinstance(word, str) for word in value)
        )
    if name == "stream_options":
        return isinstance(value, Mapping) and all(isinstance(one, bool) for one in value.values())
    return name in _SWITCHES and isinstance(value, bool)


#: 404: this build has no such route. 501: the model does not support it (embeddings, rerank, /infill, audio).
#: Measured.
IS_NOT_OFFERED = (404, 501)


class RouteAvailability:
    """Finds out which routes the running llama-server has, by sending an empty body: a route that exists answers 400
    and takes no slot.
    """

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self._known: dict[str, bool] = {}

    def forget(self) -> None:
        """Forget all routes, because the server was restarted, perhaps with another model."""
        self._known = {}

    async def has(self, path: str) -> bool:
        """True if the server has the route ``path``. Asks once; while the server answers with an error such as 503, it
        returns True and asks again at the next call. Raises BackendDown, also if no answer comes within ``QUICK_S``.
        """
        known = self._known
        if (found := known.get(path)) is None:
            status, _ = await self._server.ask(path, {}, QUICK_S)
            found = status not in IS_NOT_OFFERED
            if status < 500 or not found:
                known[path] = found
        return found
