"""Checks whether llama-server accepts a request, without computing anything: a dry run.

llama-server reads a completion in this order, and refuses it at the first fault (measured on xllamacpp 2026.10.11549,
on every kind of model; docs/llama-server.md has the table):

1. the form of the route: messages, tools, ``tool_choice``, ``response_format`` of a chat; the parts of /infill
2. the prompt: its type is checked, and its tokens are made
3. its fields, one after the other: ``temperature``, ``max_tokens``, … by type and limits
4. in its slot, before anything there is changed: ids outside of the vocabulary, then the samplers, including the
   grammar
5. the length of the prompt: an empty one is answered at once, and one of ``n_ctx`` tokens or more is refused
6. only now the slot's content is compared with the prompt, and truncated

``POST /apply-template`` checks 1 for a chat. A dry run sends the request with another prompt, which is refused at 5.
This checks all else in 3 and 4. It runs in a slot that the caller has leased, and which keeps its content. Whether
there is a route at all is asked with an empty body.
"""

from __future__ import annotations

import enum
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol

import orjson
from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import count, unpack
from llamaslot.errors import UpstreamError
from llamaslot.llama.client import QUICK_S, LlamaServer

log = logging.getLogger(__name__)

_COMPLETION, _CHAT = "/completion", "/v1/chat/completions"

#: Fields that make a chat or its prompt; they were checked with that.
_CHATS = (
    "messages",
    "tools",
    "tool_choice",
    "response_format",
    "parallel_tool_calls",
    "chat_template_kwargs",
)
_PROMPTS = ("prompt", "input", "input_prefix", "input_suffix", "input_extra", "messages")
#: Fields that llama-server does not read, often with another value in each request.
_UNREAD = (
    "user",
    "metadata",
    "client_metadata",
    "prompt_cache_key",
    "safety_identifier",
    "store",
    "service_tier",
)
#: Any number from -1 on (none, or no limit) that fits into an int32 is accepted for these.
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
_STOPPER = {"samplers": [0]}
_REFUSALS = (400, 500)
_TOO_LONG = "exceed_context_size_error"
_WORD = "a b "  # two tokens of every vocabulary tested, and fast to tokenize
_WORD_TOKENS = 2
_ATTEMPTS = 4
_MAX_KNOWN = 4096
# Estimated seconds per token of a prompt that is too long for the slot, until measured (70 ms for 65,000 tokens
# here), and how many times as much the dry run must be able to save.
_TOKENIZING_S = 1.5e-6
_WORTH = 5.0


class DryRunServer(Protocol):
    """The parts of the client that dry runs use."""

    async def ask(
        self, path: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[int, Any]:
        """``POST`` any route: status and JSON."""
        ...

    async def refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """As ``ask``, for a body that should be refused; if it is accepted, the answer is not awaited."""
        ...

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        """``POST /tokenize`` -> the packed tokens."""
        ...


class DryRun(Struct, frozen=True):
    """What llama-server may refuse of a request whose prompt is valid. ``fields`` are sent to ``path``. ``chat``: the
    fields of a chat from which the template makes a grammar, None if it makes none. ``tokens``: the prompt, if it was
    sent as ids.
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

    ``fields``: of a body, as the samplers receive them; with ``is_chat`` those of the chat body, or of the chat that
    the body is converted to. ``tokens``: the prompt, if it was sent as ids. ``n``: number of answers; a dry run sets
    it to 1, because the others would take slots. ``path``: the route that accepts these fields with a prompt.
    """
    given = dict(fields)
    for name in _UNREAD:
        given.pop(name, None)
    for name in ("n", "n_cmpl") if n > 1 else ():
        given.pop(name, None)
    for name in ("stream", "cache_prompt", "return_progress"):
        # Set here. A value that is no boolean is sent, so that it is refused.
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
    """What a dry run has shown about a request."""

    TAKEN = "taken"
    REFUSED = "refused"
    UNSURE = "unsure"  # the server does not check requests now
    #: The server ran a prompt that every tested build refuses as too long: the content of the slot is unknown.
    RUNS = "runs"


class DryRuns:
    """Makes dry runs on one llama-server, and remembers the requests that it has accepted, until ``forget``."""

    def __init__(self, server: DryRunServer) -> None:
        self._server = server
        self.forget()

    def forget(self) -> None:
        """Forget everything: the server was restarted, perhaps as another build."""
        self._taken: dict[bytes, None] = {}
        self._ids = (0, 0)  # lowest and highest id known to be valid
        self._is_usable: dict[str, bool] = {}  # by route: whether dry runs work there
        # A text that is too long for a prompt, and the seconds needed to tokenize it.
        self._too_long: tuple[str, float] | None = None
        # The server's error for a request whose last field is invalid; False if it accepts that.
        self._stopped: object = None

    def note_accepted(self, run: DryRun) -> None:
        """Record that llama-server has accepted a request like ``run``, so that no dry run is made for the next one."""
        self._learn(_key(run.path, run.fields))
        if run.chat is not None:
            self._learn(_key(_CHAT, run.chat))

    async def is_unreadable(self, run: DryRun) -> bool:
        """Whether llama-server refuses a field of the request for its type or value. llama-server checks this before
        it looks for a slot, so this works while all slots are busy. An invalid last field is added, which surely
        prevents the request from running.

        Checked once for each kind of request. Raises BackendDown. Canceling is safe.
        """
        key = _key("", run.fields)
        if key is None or key in self._taken:
            return False
        is_wrong = await self.is_malformed(_COMPLETION, {**run.fields, "prompt": [[]]})
        if not is_wrong:
            self._learn(key)
        return is_wrong

    async def is_malformed(self, path: str, body: Mapping[str, Any]) -> bool:
        """As ``is_unreadable``, for a whole body on a route that keeps all fields."""
        if self._stopped is None:
            self._stopped = await self._words(_COMPLETION, {"prompt": [[]]})
        if not self._stopped:
            return False
        said = await self._words(path, {"cache_prompt": True, **body})
        return bool(said) and said != self._stopped

    async def _words(self, path: str, body: Mapping[str, Any]) -> object:
        """llama-server's first error for ``body``, to which an invalid last field is added. False if llama-server
        accepts even that field, None if it cannot check requests now.
        """
        status, answer = await self._server.ask(path, {**body, **_STOPPER}, QUICK_S)
        return answer if status in _REFUSALS else None if status >= 400 else False

    async def ask(self, run: DryRun, slot: int, *, n_ctx: int, lora: str, worth_s: float) -> Verdict:
        """Whether llama-server will refuse such a request, as far as that can be found out without computing: checked
        once for each kind of request, in ``slot``, which the caller has leased and which keeps its content.

        ``lora``: the scales with which the slot was filled; with others it would be emptied. ``worth_s``: seconds of
        work wasted if the request is refused only later. Raises BackendDown. Canceling is safe.
        """
        ours = {"id_slot": slot, **({"lora": orjson.loads(lora)} if lora else {})}
        if run.chat is not None and worth_s >= _WORTH * self._seconds(n_ctx):
            return await self._ask(_Trial(_CHAT, run.chat, ours, n_ctx))
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
                "dry runs of %s do not work on this llama-server: what it refuses may be computed first",
                trial.path,
            )
            return Verdict.RUNS if verdict is Verdict.RUNS else Verdict.TAKEN
        return verdict

    async def _verdict(self, trial: _Trial) -> Verdict:
        """The verdict of one dry run: TAKEN if the length of the prompt is the first fault that llama-server finds."""
        body = {"cache_prompt": True, **_sent(trial.fields), **trial.ours}
        if trial.path != _CHAT and trial.ids is None:
            status, _ = await self._server.ask(trial.path, {**body, "prompt": [[]]}, QUICK_S)
            return Verdict.TAKEN if status < 400 else _refusal(status)
        # If it runs, the answer is not awaited; llama-server notices that within a batch.
        body = {"stream": True, "return_progress": True, **body}
        if trial.ids is None:
            if (content := await self._long_text(trial.n_ctx)) is None:
                return Verdict.REFUSED  # a valid request would be refused too: no use
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
        """A text of at least ``n_ctx`` tokens; None if a few attempts fail."""
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
    """``fields`` without those to which a dry run gives values of its own."""
    left_out = {"id_slot"}
    lora = fields.get("lora")
    if isinstance(lora, list) and all(isinstance(entry, Mapping) for entry in lora):
        left_out.add("lora")
    return {name: value for name, value in fields.items() if name not in left_out}


def _key(path: str, fields: Mapping[str, Any]) -> bytes | None:
    """The same key for requests that llama-server accepts or refuses alike; None for a request that it
    surely accepts.
    """
    doubtful = {name: value for name, value in fields.items() if not _is_sure(name, value)}
    if not doubtful:
        return None
    return hashlib.blake2b(
        orjson.dumps([path, doubtful], option=orjson.OPT_SORT_KEYS), digest_size=16
    ).digest()


def _is_sure(name: str, value: Any) -> bool:
    """Whether every build of llama-server accepts this field with this value."""
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
    """Which routes the running llama-server has. A route that exists answers an empty body with 400, and takes no
    slot.
    """

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self._known: dict[str, bool] = {}

    def forget(self) -> None:
        """Forget everything: the server was restarted, perhaps with another model."""
        self._known = {}

    async def has(self, path: str) -> bool:
        """Whether the server has the route ``path``; asked once. True while that is unknown, because the server is
        loading. Raises BackendDown, also if there is no answer: a refusal needs no slot.
        """
        known = self._known
        if (found := known.get(path)) is None:
            status, _ = await self._server.ask(path, {}, QUICK_S)
            found = status not in IS_NOT_OFFERED
            if status < 500 or not found:
                known[path] = found
        return found
