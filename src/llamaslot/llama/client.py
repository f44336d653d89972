"""A client of llama-server with a method for each route. It translates errors of connections to llamaslot's.

``transport`` has the connections. Requests that may run twice, short questions above all, use kept connections
(``kept_connections``). Each other request opens a new one (``fresh_connections``), with aiohttp if it must
(``aiohttp_fallback``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import orjson
import xxhash

from llamaslot.cache.ids import count, unpack
from llamaslot.errors import JSON_TYPE, BackendDown, NotUnderstood, SlotActionFailed, UpstreamError
from llamaslot.llama.answers import (
    RELAYED_BYTES,
    Progress,
    Props,
    Response,
    SlotAction,
    SlotInfo,
    content_type_of,
    error_of,
    next_piece,
    whole,
)
from llamaslot.llama.sse import EventSplitter, data_of
from llamaslot.llama.token_lists import packed
from llamaslot.llama.transport.connection import NotReached
from llamaslot.llama.transport.fresh_connections import Check, FreshConnections, Sending
from llamaslot.llama.transport.kept_connections import Answer, KeptConnections
from llamaslot.llama.transport.quick_import import import_aiohttp
from llamaslot.tasks import give_way

if TYPE_CHECKING:
    from llamaslot.llama.transport.aiohttp_fallback import AiohttpFallback

P = ParamSpec("P")

T = TypeVar("T")

# Time limit of a short request. llama-server answers /slots and /tokenize after the running batch, which takes several
# seconds on a slow machine.
QUICK_S = 60.0

_READ_BYTES = 1 << 18

ACTION_S = 900.0  # time limit of a save, restore or erase: enough for many GiB to a slow disk


_REFUSED = (
    "refuses the connection (is it running, with this --port? The default is 8080, in newer builds 9931)"
)


def as_known(call: Callable[P, Awaitable[T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A decorator that turns the errors of reading an answer of unexpected form (KeyError, ValueError, ...) into
    NotUnderstood. Without it, an answer of another program on the server's port (a proxy's page, an unknown build)
    would end the task that watches the server.
    """

    @functools.wraps(call)
    async def translated(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise NotUnderstood(
                f"{call.__name__}: what answers is no llama-server as llamaslot knows it: {error!r}"
            ) from error

    return translated


class LlamaServer:
    """A client of one llama-server. Canceling any coroutine is safe: it closes the connection. A save, restore or erase
    that was sent is carried out all the same.
    """

    health_path = "/health"

    def __init__(
        self, url: str, api_key: str | None = None, watchdog_s: float | None = None, *, name: str = ""
    ) -> None:
        """``watchdog_s``: seconds without a byte after which a watched answer raises SlotWedged; None: never. ``name``:
        the backend's name for log lines; the URL by default.
        """
        self.url, self.watchdog_s = url.rstrip("/"), watchdog_s
        self.name = name or self.url
        self.api_key = api_key
        self._aiohttp: AiohttpFallback | None = None
        self._kept, self._fresh = (
            KeptConnections.of(self.url, api_key),
            FreshConnections.of(self.url, api_key),
        )

    def _aiohttp_fallback(self) -> AiohttpFallback:
        if self._aiohttp is None:
            import_aiohttp()
            from llamaslot.llama.transport.aiohttp_fallback import AiohttpFallback

            self._aiohttp = AiohttpFallback(self.url, self.api_key)
        return self._aiohttp

    async def close(self) -> None:
        if self._kept is not None:
            self._kept.close()
        if self._aiohttp is not None:
            await self._aiohttp.close()
            self._aiohttp = None

    def request(
        self,
        method: str,
        path: str,
        *,
        data: bytes | AsyncIterator[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        is_watched: bool = False,
        is_relayed: bool = False,
        check: Check | None = None,
    ) -> contextlib.AbstractAsyncContextManager[Response]:
        """Send one request on a new connection; the context yields the response and closes it at the end.

        ``path``: sent unchanged, with its query. ``is_watched``: raise SlotWedged if nothing arrives for
        ``watchdog_s``. ``is_relayed``: a client reads the answer, perhaps slowly, so little of it is buffered.
        ``check``: as for ``FreshConnections.send``; never called where ``AiohttpFallback`` sends the request.

        Raises BackendDown if llama-server cannot be reached or closes the connection, also where the body of the block
        reads the response.
        """
        silence_s = self.watchdog_s if is_watched else None
        n_held_bytes = RELAYED_BYTES if is_relayed else _READ_BYTES

        def over_aiohttp() -> contextlib.AbstractAsyncContextManager[Response]:
            return self._aiohttp_fallback().request(
                method, path, data, headers or {},
                timeout_s=timeout_s, silence_s=silence_s, n_held_bytes=n_held_bytes,
            )  # fmt: skip

        if self._fresh is None or isinstance(data, AsyncIterator):
            return Sending(None, over_aiohttp, self._is_down)
        fresh = self._fresh.send
        return Sending(
            lambda: fresh(
                method, path, data, headers or {},
                timeout_s=timeout_s, silence_s=silence_s, n_held_bytes=n_held_bytes, check=check,
            ),
            over_aiohttp,
            self._is_down,
        )  # fmt: skip

    def _is_down(self, error: BaseException) -> BackendDown:
        return BackendDown(f"llama-server at {self.url} {_why(error)}; try again in a moment")

    async def _question(
        self, method: str, path: str, data: bytes | None = None, timeout_s: float = QUICK_S
    ) -> Answer:
        """The answer to a request that may run twice, sent on a kept connection if possible. Raises BackendDown."""
        if self._kept is not None:
            try:
                return await self._kept.ask(method, path, data, timeout_s)
            except (ConnectionError, TimeoutError) as error:
                raise self._is_down(error) from error
        headers = None if data is None else {"Content-Type": "application/json"}
        async with self.request(method, path, data=data, headers=headers, timeout_s=timeout_s) as response:
            return Answer(response.status, content_type_of(response), await whole(response))

    async def _ask_json(self, method: str, path: str, body: Any = None, timeout_s: float = QUICK_S) -> Any:
        """The JSON answer to a request that may run twice. Raises UpstreamError for an error answer, BackendDown."""
        data = None if body is None else orjson.dumps(body)
        return self._checked(await self._question(method, path, data, timeout_s))

    @staticmethod
    def _accepted(answer: Answer) -> bytes:
        """The body of an answer. Raises UpstreamError for an error answer."""
        if answer.status != 200:
            raise UpstreamError(answer.status, answer.body, answer.content_type or JSON_TYPE)
        return answer.body

    def _checked(self, answer: Answer) -> Any:
        """The JSON in an answer. Raises UpstreamError for an error answer."""
        return orjson.loads(self._accepted(answer))

    async def _json(self, method: str, path: str, body: Any, timeout_s: float) -> Any:
        """The JSON answer to a request that must run once only. Raises UpstreamError (error answer), BackendDown."""
        headers, data = {"Content-Type": "application/json"}, orjson.dumps(body)
        async with self.request(method, path, data=data, headers=headers, timeout_s=timeout_s) as response:
            if response.status != 200:
                raise await error_of(response)
            return orjson.loads(await whole(response))

    async def why_unhealthy(self, timeout_s: float = 5.0) -> str | None:
        """Why the server cannot serve requests now, as the end of a sentence; None if it can. Asks ``GET /health``,
        which needs no API key. Never raises.

        A server of another kind without such a route (404) can serve too.
        """
        try:
            status = (await self._question("GET", self.health_path, timeout_s=timeout_s)).status
            is_serving = status < 500 or status == 501
            return None if is_serving else f"answers {status} to {self.health_path}"  # 503 while loading
        except BackendDown as error:
            return _why(error.__cause__ or error)

    @as_known
    async def props(self, timeout_s: float = 10.0) -> Props:
        """``GET /props``. Raises UpstreamError: 503 while the model is loading, 401 for a wrong API key."""
        answer = await self._question("GET", "/props", timeout_s=timeout_s)
        raw = self._checked(answer)
        settings = raw.get("default_generation_settings") or {}
        return Props(
            n_slots=int(raw["total_slots"]) if "total_slots" in raw else None,
            max_models=int(raw.get("max_instances", 0)) if raw.get("role") == "router" else None,
            n_ctx=int(settings.get("n_ctx") or raw.get("n_ctx", 0)),
            model_path=str(raw.get("model_path", "")),
            boot_id=str(raw.get("media_marker", "")),
            template=xxhash.xxh3_64_hexdigest(str(raw.get("chat_template", "")).encode()),
            modalities=raw.get("modalities"),
            is_sleeping=raw.get("is_sleeping") is True,
            is_connected=answer.is_connected,
        )

    @as_known
    async def model_info(self) -> dict[str, Any]:
        """The first entry of ``GET /v1/models``: id and ``meta`` (n_params, size, n_vocab, …)."""
        entry = dict((await self._ask_json("GET", "/v1/models"))["data"][0])
        if not isinstance(entry["id"], str):
            raise ValueError("a model's id is a text")
        return entry

    async def glimpse(self, path: str) -> str:
        """Status, content type and the first characters of the answer to ``GET path``, as a line for the log. Raises
        BackendDown.
        """
        answer = await self._question("GET", path)
        begin = " ".join(answer.body[:200].decode("utf-8", "replace").split())[:60]
        return f"GET {path} {answer.status} {answer.content_type or 'without a type'} {begin!r}"

    @as_known
    async def slots(self) -> list[SlotInfo]:
        """``GET /slots``. llama-server notices that a client has left only if one second has passed since the last such
        call. So while a client may have left, call this at most every 1.25 s.
        """
        return [
            SlotInfo(
                id=int(raw["id"]),
                is_processing=bool(raw["is_processing"]),
                n_tokens=raw.get("n_prompt_tokens"),
                id_task=raw.get("id_task"),
            )
            for raw in await self._ask_json("GET", "/slots")
        ]

    @as_known
    async def lora_adapters(self) -> list[Any]:
        """``GET /lora-adapters``: id, path and scale of each adapter. Empty without adapters, and if the build lacks
        the route.
        """
        try:
            return list(await self._ask_json("GET", "/lora-adapters"))
        except UpstreamError:
            return []

    @as_known
    async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
        """``POST /apply-template``: the text of the prompt that llama-server renders from a chat body. ``raw``: the
        body as JSON, if the caller has it. Raises UpstreamError with llama-server's status if it refuses the body.
        """
        data = orjson.dumps(body) if raw is None else raw
        answer = await self._question("POST", "/apply-template", data)
        await give_way(len(answer.body))
        text = str(self._checked(answer)["prompt"])
        await give_way(len(text))
        return text

    @as_known
    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        await give_way(len(content))  # the caller has searched it
        data = orjson.dumps({"content": content, "add_special": add_special, "parse_special": parse_special})
        await give_way(len(data))
        return await packed(self._accepted(await self._question("POST", "/tokenize", data)))

    @as_known
    async def detokenize(self, tokens: bytes) -> str:
        """``POST /detokenize``: the text of ``tokens``, special tokens included. A character that begins or ends
        outside of them becomes U+FFFD.
        """
        return str((await self._ask_json("POST", "/detokenize", {"tokens": unpack(tokens)}))["content"])

    async def ask(
        self, path: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[int, Any]:
        """``POST`` to any route. Returns the status and the JSON answer, None if it is not JSON. Raises only
        BackendDown, also after ``timeout_s``.
        """
        return await self._ask(path, body, timeout_s=timeout_s)

    async def refusal(self, path: str, body: Mapping[str, Any]) -> tuple[int, Any]:
        """As ``ask``, for a body that llama-server should refuse. If it accepts the body, returns the status and None,
        and closes the connection; if the body sets ``return_progress``, llama-server notices that within a batch.
        """
        return await self._ask(path, body, only_refusals=True)

    async def _ask(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        only_refusals: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[int, Any]:
        headers, data = {"Content-Type": "application/json"}, orjson.dumps(body)
        async with self.request("POST", path, data=data, headers=headers, timeout_s=timeout_s) as response:
            if only_refusals and response.status < 400:
                return response.status, None
            try:
                return response.status, orjson.loads(await whole(response))
            except orjson.JSONDecodeError:
                return response.status, None

    async def _slot_action(self, slot: int, action: str, body: dict[str, str]) -> dict[str, Any]:
        try:
            answer = await self._json("POST", f"/slots/{slot}?action={action}", body, timeout_s=ACTION_S)
        except UpstreamError as error:
            raise SlotActionFailed(f"{action} of slot {slot} failed: {error}", error.status) from error
        return dict(answer)

    @as_known
    async def save(self, slot: int, filename: str) -> SlotAction:
        """Have llama-server save the slot as ``filename`` in its ``--slot-save-path``. Raises SlotActionFailed, with
        status 501 if the server has no such flag, and BackendDown.
        """
        raw = await self._slot_action(slot, "save", {"filename": filename})
        seconds = float(raw.get("timings", {}).get("save_ms", 0.0)) / 1000
        return SlotAction(int(raw["n_saved"]), int(raw["n_written"]), seconds)

    @as_known
    async def restore(self, slot: int, filename: str) -> SlotAction:
        """Have llama-server read ``filename`` into the slot, which must have been erased. Raises SlotActionFailed,
        which leaves the slot empty, and BackendDown.
        """
        raw = await self._slot_action(slot, "restore", {"filename": filename})
        seconds = float(raw.get("timings", {}).get("restore_ms", 0.0)) / 1000
        return SlotAction(int(raw["n_restored"]), int(raw["n_read"]), seconds)

    async def erase(self, slot: int) -> None:
        await self._slot_action(slot, "erase", {})

    async def prefill(
        self, slot: int, tokens: bytes, lora: str = "", written: bytes | None = None
    ) -> AsyncGenerator[Progress]:
        """Compute the KV cache of exactly ``tokens`` in ``slot``. Yields one Progress per batch; the first one, before
        anything is computed, tells the reused tokens. ``lora``: the LoRA scales as JSON, "" for the server's.
        ``written``: ``tokens`` as a JSON list, if the caller has it.

        ``n_predict`` 0 lets llama-server stop after the prompt. If the iterator is closed early, llama-server stops
        within one batch, and the computed tokens stay in the slot. Raises UpstreamError, BackendDown and SlotWedged.
        """
        body: dict[str, Any] = {
            "prompt": unpack(tokens) if written is None else orjson.Fragment(written),
            "n_predict": 0,
            "id_slot": slot,
            "cache_prompt": True,
            "stream": True,
            "return_progress": True,
        }
        if lora:
            body["lora"] = orjson.Fragment(lora)
        splitter = EventSplitter()
        headers = {"Content-Type": "application/json"}
        data = orjson.dumps(body)
        async with self.request(
            "POST", "/completion", data=data, headers=headers, is_watched=True
        ) as response:
            if response.status != 200:
                raise await error_of(response)
            is_complete = False
            while chunk := await next_piece(response):
                for event in splitter.feed(chunk):
                    payload = data_of(event)
                    if not isinstance(payload, dict):
                        continue
                    if "error" in payload:
                        raise UpstreamError(int(payload["error"].get("code", 500)), orjson.dumps(payload))
                    if progress := payload.get("prompt_progress"):
                        yield Progress(
                            int(progress["total"]),
                            int(progress["cache"]),
                            int(progress["processed"]),
                            float(progress["time_ms"]) / 1000,
                        )
                    is_complete = is_complete or bool(payload.get("stop"))
            if not is_complete:
                raise BackendDown(
                    f"llama-server at {self.url} ended a prefill of {count(tokens)} tokens early"
                )

    @as_known
    async def top_logprobs(self, slot: int, tokens: bytes, n_probs: int) -> dict[int, float]:
        """The ``n_probs`` likeliest next tokens after ``tokens``, as a dict from id to log-probability. Computed in
        ``slot`` from the beginning, which overwrites its content.
        """
        body = {
            "prompt": unpack(tokens),
            "n_predict": 1,
            "n_probs": n_probs,
            "id_slot": slot,
            "cache_prompt": False,
            "temperature": 0.0,
        }
        raw = await self._json("POST", "/completion", body, timeout_s=ACTION_S)
        entries = raw["completion_probabilities"][0]["top_logprobs"]
        return {int(entry["id"]): float(entry["logprob"]) for entry in entries}


def _why(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return _REFUSED
    if isinstance(error, NotReached):
        return "does not answer"
    if isinstance(error, TimeoutError):
        return "did not answer in time"
    return "closed the connection"
