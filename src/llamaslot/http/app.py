"""The web application: authenticates each request, and passes it to the handler of its route."""

from __future__ import annotations

import asyncio
import logging

from aiohttp import web

from llamaslot.config.load import Config
from llamaslot.errors import (
    BadRequest,
    ClientGone,
    Forbidden,
    LlamaslotError,
    NotImplementedHere,
    shortened,
)
from llamaslot.fleet.registry import Registry
from llamaslot.http.admin import Status, check_method
from llamaslot.http.aiohttp_connection import Connection
from llamaslot.http.auth import USER, Authenticator, Cors, is_own_page, refuse_foreign_page
from llamaslot.http.body_changes import SystemPrompts, tell_rewrote
from llamaslot.http.client_stream import MISTAKE, error_instead, error_response, name_itself
from llamaslot.http.completion import Completions
from llamaslot.http.health_check import health_of
from llamaslot.http.in_flight import CLIENT_GONE, Requests, by_operator, note_error
from llamaslot.http.page import is_page_file, page_file
from llamaslot.http.page_api import PageApi
from llamaslot.http.passthrough import Passthrough
from llamaslot.http.reload import Reload
from llamaslot.http.request_body import Uploads, close_behind, hold_back, speaks_http
from llamaslot.http.tracing import Tracing
from llamaslot.llama.routes import Route, classify
from llamaslot.observe.history import History
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_NO_METHODS = ("CONNECT", "TRACE")


class _Everything(web.DynamicResource):
    """A route that matches every path, also those that aiohttp's patterns leave out: a path with a line feed, ``*``,
    the target of ``CONNECT``. Without it aiohttp would answer these itself, without a check of keys.
    """

    def _match(self, path: str) -> dict[str, str]:
        return {}


class App:
    """Handles every request of clients. It owns the handlers of all routes, the requests in flight and
    their history.
    """

    def __init__(self, config: Config, registry: Registry, reload: Reload) -> None:
        self.config, self._registry, self._metrics = config, registry, registry.metrics
        uploads = Uploads(config.listen.max_body, config.listen.read_timeout_s)
        self._prompts = prompts = SystemPrompts(config.rules, registry.metrics)
        self._passthrough = Passthrough(config, registry, uploads, prompts)
        self._completions = Completions(config, registry, uploads, self._passthrough, prompts)
        self._tasks = TaskOwner()
        self._history = History(config.store.meta_dir / "history.sqlite")
        self._requests = Requests(registry, self._history)
        self._tracing = Tracing(endpoint, registry) if (endpoint := config.log.otlp_endpoint) else None
        self._authenticator, self._cors = Authenticator(config.auth), Cors(config.listen.cors)
        self._status = Status(registry, prompts, reload)
        self._page_api = PageApi(registry, self._requests, self._tasks, self._is_admitted)

    def apply(self, config: Config) -> None:
        """Put another configuration in force, as far as that needs no restart. Raises ConfigError, and changes nothing,
        if a file named in ``config`` has become unreadable since ``config`` was loaded.
        """
        self._authenticator = Authenticator(config.auth)
        self._cors = Cors(config.listen.cors)
        self._prompts.apply(config.rules)
        self.config = config

    def _is_admitted(self, request: web.Request) -> bool:
        """True if the key of the request is valid now. An operator may have removed it since the request came."""
        try:
            self._authenticator.authenticate(request)
        except LlamaslotError:
            return False
        return True

    def application(self) -> web.Application:
        app = web.Application()
        everything = _Everything("/{path}")
        everything.add_route("*", self.handle, expect_handler=hold_back)
        app.router.register_resource(everything)
        app.on_response_prepare.append(self._add_headers)
        app.on_startup.append(self._start)
        app.on_shutdown.append(self._stop_watching)
        app.on_cleanup.append(self._close)
        if self._tracing is not None:
            app.on_cleanup.append(self._tracing.close)
        return app

    async def _start(self, _: web.Application) -> None:
        self._tasks.spawn(self._history.load(), "read the history")

    async def _stop_watching(self, _: web.Application) -> None:
        """At a shutdown, end the event streams of open operator pages: aiohttp waits until all answers have ended."""
        await self._page_api.events.close()

    async def _close(self, _: web.Application) -> None:
        self._requests.close()
        await self._history.close()
        await self._tasks.close()

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Add the headers that every answer has. Two kinds of answers do not come by here: those to health checks
        (``health_check``), and those of ``aiohttp_connection`` to requests that are too slow or no HTTP.
        """
        for add in (name_itself, self._cors.allow, tell_rewrote, close_behind):
            add(request, response)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request, and count it in the metrics. Called for every request, except health checks that
        ``NewConnection`` answers. Raises CancelledError if aiohttp cancels it because the client has left, and nothing
        else.
        """
        connection = request.protocol
        if isinstance(connection, Connection):
            connection.serving(True)
        route = classify(request.method, request.raw_path, self.config.passthrough.allow)
        metrics, status = self._metrics, CLIENT_GONE
        is_watched, answered = route.kind in ("completion", "exclusive"), None
        flight = self._requests.begin(request, route) if is_watched else None
        end_trace = self._tracing.begin(request) if self._tracing is not None and is_watched else None
        try:
            answered = response = await self._answer(request, route)
            status = response.status
        except asyncio.CancelledError:
            metrics.clients_left.inc()  # aiohttp cancels the handler of a client that has closed its connection
            raise
        except ClientGone:
            metrics.clients_left.inc()
            return web.Response(status=CLIENT_GONE)  # the client does not read it
        finally:
            metrics.requests.labels(route.kind, str(status)).inc()
            if flight is not None:
                self._requests.end(flight, status)
            if end_trace is not None:
                end_trace(status, answered)
            if isinstance(connection, Connection):
                connection.serving(False)
        return response

    async def _answer(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Answer a request. Every error becomes an error answer in OpenAI's form, never a traceback. Raises ClientGone,
        and CancelledError if the client has left.
        """
        try:
            if not speaks_http(request):
                raise BadRequest("this port takes HTTP/1.1 and HTTP/1.0 only")
            if (answer := self._cors.preflight(request)) is not None:
                return answer
            request[USER] = self._authenticator.authenticate(request)
            return await self._dispatch(request, route)
        except ClientGone:
            raise
        except asyncio.CancelledError:
            return error_instead(request, by_operator(request))
        except LlamaslotError as error:
            return error_instead(request, error)
        except web.HTTPException as error:
            wrapped = BadRequest(error.reason)
            wrapped.status = error.status
            return error_response(wrapped)
        except Exception:
            log.exception(
                "%s %s was answered 500: internal error in llamaslot; please report it",
                request.method, request.rel_url.raw_path,
            )  # fmt: skip
            mistake = LlamaslotError(MISTAKE)
            note_error(request, mistake)
            return error_response(mistake)

    async def _dispatch(self, request: web.Request, route: Route) -> web.StreamResponse:
        if request.method in _NO_METHODS or request.raw_path == "*":
            raise NotImplementedHere(
                f"{request.method} {shortened(request.raw_path)} is not served: llamaslot is no proxy for other servers"
            )
        if is_page_file(request):
            return page_file(request)
        if is_own_page(request):
            refuse_foreign_page(request, needs_key=self._authenticator.needs_admin_key)
            check_method(request)
            return await self._page_api.handle(request) or await self._status.handle(request)
        match route.kind:
            case "own":
                status, told = health_of(self._registry)
                return web.json_response(told, status=status)
            case "forbidden" | "gated":
                raise Forbidden(route.refusal)
            case "completion":
                return await self._completions.handle(request, route)
            case "exclusive":
                return await self._passthrough.run_exclusively(request, route)
            case "passthrough" if route.format is not None:
                return await self._passthrough.count(request, route)
            case "passthrough":
                return await self._passthrough.forward(request, route)
