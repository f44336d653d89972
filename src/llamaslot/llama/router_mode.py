"""Clients for llama-server in router mode: one address, and behind it a process for each loaded model. Each request
names its model: in the JSON of a POST, in the query of a GET.

By default the router loads a model when any request names it, and may unload another one for that. The query
``autoload=false`` prevents that. All requests of ``ModelServer`` have it, so only ``ModelRouter.load`` loads a model.
(tools/server/server-models.cpp)
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote_plus

import orjson
from msgspec import Struct, field

from llamaslot.errors import BackendRestarted
from llamaslot.llama.answers import Response, Take, error_of, next_piece, whole
from llamaslot.llama.client import LlamaServer, as_known
from llamaslot.llama.transport.kept_connections import Answer

#: The router's error text for a model that is not loaded, and for one that is being unloaded.
_IS_NOT_LOADED = (b"model is not loaded", b"is not running")
_LIST_S = 10.0
_SLEEP_FLAG = "--sleep-idle-seconds"


class RouterModel(Struct, frozen=True):
    """A model of a router. ``state``: "unloaded", "loading", "loaded", "sleeping" (its process runs without the model),
    or another word. ``sleep_s``: after so many idle seconds the model falls asleep; None: never. ``entry``: its whole
    entry in ``GET /models``.
    """

    name: str
    aliases: tuple[str, ...] = ()
    state: str = "unloaded"
    sleep_s: float | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> RouterModel:
        """The model that an entry of ``GET /models`` describes. Raises KeyError, TypeError and ValueError for anything
        else.
        """
        status = entry["status"]
        aliases = tuple(str(alias) for alias in entry.get("aliases") or ())
        return cls(str(entry["id"]), aliases, str(status["value"]), _sleep_s(status.get("args") or []), entry)


def _sleep_s(args: list[str]) -> float | None:
    """The idle seconds after which a model falls asleep, from the arguments of its process; None if it never does."""
    if _SLEEP_FLAG not in args[:-1]:
        return None
    seconds = float(args[args.index(_SLEEP_FLAG) + 1])
    return seconds if seconds >= 0 else None


class ModelRouter(LlamaServer):
    """A client for the router itself; ``server_of`` makes a client for one of its models. Canceling any coroutine
    closes the connection.
    """

    @as_known
    async def models(self) -> list[RouterModel]:
        """``GET /models``. Raises BackendDown, UpstreamError, and NotUnderstood if the server is no router."""
        told = await self._ask_json("GET", "/models", timeout_s=_LIST_S)
        return [RouterModel.of(entry) for entry in told["data"]]

    async def load(self, model: str) -> None:
        """Have the router load ``model``, and wait until it is loaded. If the router has reached its ``--models-max``,
        it first unloads the least recently used model that has no request. Raises BackendDown, and UpstreamError if the
        model cannot be loaded.
        """
        path = f"/props?model={quote(model, safe='')}&autoload=true"
        async with self.request("GET", path) as response:
            if response.status != 200:
                raise await error_of(response)

    def server_of(self, model: str) -> ModelServer:
        """A client for requests to one model of the router."""
        name = f"{self.name}/{model}"
        return ModelServer(self.url, self.api_key, self.watchdog_s, name=name, model=model)

    async def unload(self, model: str) -> None:
        """Have the router unload ``model``. Returns before the model's process has ended. Raises BackendDown,
        UpstreamError.
        """
        await self._json("POST", "/models/unload", {"model": model}, timeout_s=10.0)

    async def changes(self) -> AsyncGenerator[None, None]:
        """``GET /models/sse``: yields once when connected, then each time the state of any model has changed, until the
        router closes the connection. Raises BackendDown, and UpstreamError if this build has no such route.
        """
        async with self.request("GET", "/models/sse") as response:
            if response.status != 200:
                raise await error_of(response)
            yield
            while await next_piece(response):
                yield


class ModelServer(LlamaServer):
    """A client for one model of a router. Its requests never load the model: if it is not loaded, they call
    ``on_unloaded`` and raise BackendRestarted.
    """

    health_path = "/props"  # the router's own /health tells nothing of the model

    def __init__(
        self, url: str, api_key: str | None, watchdog_s: float | None, *, name: str, model: str
    ) -> None:
        super().__init__(url, api_key, watchdog_s, name=name)
        self.model = model
        self.on_unloaded: Callable[[], None] = lambda: None
        self._query = f"model={quote(model, safe='')}&autoload=false"
        self._member = b'"model":%b}' % orjson.dumps(model)

    def request(
        self, method: str, path: str, *, data: Any = None, **options: Any
    ) -> contextlib.AbstractAsyncContextManager[Response]:
        """As ``LlamaServer.request``."""
        return _IfLoaded(
            super().request(method, self._path(path), data=self._body(data), **options), self._check
        )

    async def _question(
        self, method: str, path: str, data: bytes | None = None, timeout_s: float = 60.0
    ) -> Answer:
        answer = await super()._question(method, self._path(path), self._body(data), timeout_s)
        self._check(answer.status, answer.body)
        # Without ``is_connected``: an open connection to the router says nothing about the model's process.
        return Answer(answer.status, answer.content_type, answer.body)

    async def why_unhealthy(self, timeout_s: float = 5.0) -> str | None:
        try:
            return await super().why_unhealthy(timeout_s)
        except BackendRestarted:
            return "has unloaded this model"

    @as_known
    async def model_info(self) -> dict[str, Any]:
        """The model's own entry of ``GET /models``."""
        entries = (await self._ask_json("GET", "/models"))["data"]
        return dict(next(entry for entry in entries if entry["id"] == self.model))

    def _path(self, path: str) -> str:
        """``path`` with ``model`` and ``autoload=false`` in the query, and without any that the client sent."""
        route, _, query = path.partition("?")
        kept = [part for part in query.split("&") if part and not _is_ours(part)]
        return f"{route}?{'&'.join([*kept, self._query])}"

    def _body(self, data: Any) -> Any:
        """``data`` with this model's name added at the end of its JSON object: llama-server uses the last of two equal
        keys. ``data`` that is no JSON object, such as a form, stays as it is.
        """
        if not isinstance(data, bytes) or not data.lstrip().startswith(b"{"):
            return data
        rest = data.rstrip()
        if not rest.endswith(b"}"):
            return data
        rest = rest[:-1].rstrip()
        return rest + (b"" if rest.endswith(b"{") else b",") + self._member

    def _check(self, status: int, body: bytes) -> None:
        if status == 400 and any(text in body for text in _IS_NOT_LOADED):
            self.on_unloaded()
            raise BackendRestarted(f"{self.name} is not loaded any more")


def _is_ours(parameter: str) -> bool:
    return unquote_plus(parameter.partition("=")[0]) in ("model", "autoload")


class _IfLoaded(contextlib.AbstractAsyncContextManager[Response]):
    """A request whose answer is read whole before it is yielded if its status is 400: it may say that the model is not
    loaded.
    """

    def __init__(
        self,
        request: contextlib.AbstractAsyncContextManager[Response],
        check: Callable[[int, bytes], None],
    ) -> None:
        self._request, self._check = request, check

    async def __aenter__(self) -> Response:
        response = await self._request.__aenter__()
        if response.status != 400:
            return response
        try:
            body = await whole(response)
            self._check(response.status, body)
        except BaseException as error:
            await self._request.__aexit__(type(error), error, error.__traceback__)
            raise
        return _Read(response, body)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._request.__aexit__(kind, error, trace)


class _Read:
    """A ``Response`` whose whole body has been read already."""

    def __init__(self, response: Response, body: bytes) -> None:
        self.status, self.reason, self.headers = response.status, response.reason, response.headers
        self._body = body

    @property
    def has_ended(self) -> bool:
        return not self._body

    async def pass_to(self, take: Take) -> bool:
        """As ``Response.pass_to``; the whole body is one piece."""
        body, self._body = self._body, b""
        return bool(body) and not take(body)
