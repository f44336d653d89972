"""The web application: dispatches requests to their handlers, and starts and stops llamaslot."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import re
import signal
from collections.abc import AsyncIterator
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from llamaslot import __version__
from llamaslot.config.load import Config
from llamaslot.errors import (
    BadRequest,
    ClientGone,
    Forbidden,
    LlamaslotError,
    NotImplementedHere,
)
from llamaslot.fleet.registry import Registry
from llamaslot.http.admin import Status
from llamaslot.http.auth import USER, Authenticator, is_own_page
from llamaslot.http.client_errors import MISTAKE, error_instead, error_response
from llamaslot.http.client_stream import StreamRules, name_itself
from llamaslot.http.completion import Completions
from llamaslot.http.connections import ClientTimeouts, Connection, Connections, raise_file_limit
from llamaslot.http.cors import Cors
from llamaslot.http.deadlines import Timeouts
from llamaslot.http.new_connection import HealthAnswer
from llamaslot.http.passthrough import Passthrough
from llamaslot.http.request_body import Uploads, close_behind, hold_back, speaks_http
from llamaslot.http.rewriting import SystemPrompts, tell_rewrote
from llamaslot.http.tls import Certificate
from llamaslot.http.unassisted import Unassisted
from llamaslot.llama.managed.process import ManagedServer
from llamaslot.llama.routes import Route, classify
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

_QUOTED = re.compile(r":? (?:bytearray\()?b['\"].*")
_BACKLOG = 1024  # connections that the kernel has established and that are not accepted yet
_NO_METHODS = ("CONNECT", "TRACE")
CLIENT_GONE = 499  # in metrics only: nginx's number for a client that has closed its connection


class _Everything(web.DynamicResource):
    """Matches every path, also those that aiohttp's patterns leave out: a line feed in a path, ``*``, the address of
    ``CONNECT``. aiohttp would answer these itself, without a check of keys.
    """

    def _match(self, path: str) -> dict[str, str]:
        return {}


class App:
    """llamaslot as one object: the backends and the routes in front of them."""

    def __init__(self, config: Config, registry: Registry) -> None:
        self.config, self._metrics = config, registry.metrics
        timeouts = Timeouts(config.timeouts.first_token_s, config.timeouts.total_s)
        rules = StreamRules(config.stream.keepalive_s, config.stream.comments, timeouts)
        uploads = Uploads(config.listen.max_body, config.listen.read_timeout_s)
        prompts = SystemPrompts(config.rules, registry.metrics)
        unassisted = Unassisted(rules)
        self._passthrough = Passthrough(registry, uploads, timeouts, prompts, unassisted)
        self._completions = Completions(registry, rules, uploads, self._passthrough, unassisted, prompts)
        self._status = Status(registry, prompts)
        self._authenticator, self._cors = Authenticator(config.auth), Cors(config.listen.cors)

    def application(self) -> web.Application:
        app = web.Application()
        everything = _Everything("/{path}")
        everything.add_route("*", self.handle, expect_handler=hold_back)
        app.router.register_resource(everything)
        app.on_response_prepare.append(name_itself)
        app.on_response_prepare.append(self._cors.allow)
        app.on_response_prepare.append(tell_rewrote)
        app.on_response_prepare.append(close_behind)
        return app

    def health(self) -> HealthAnswer:
        """The answer to ``GET /health``, counted."""
        status, told = self._status.health()
        self._metrics.requests.labels("own", str(status)).inc()
        return HealthAnswer(status, HTTPStatus(status).phrase, json.dumps(told).encode())

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Handle and count a request; all requests come through here. Raises CancelledError only."""
        connection = request.protocol
        if isinstance(connection, Connection):
            connection.serving(True)
        route = classify(request.method, request.raw_path, self.config.passthrough.allow)
        metrics, status = self._metrics, CLIENT_GONE
        try:
            response = await self._answer(request, route)
            status = response.status
        except asyncio.CancelledError:
            metrics.clients_left.inc()  # aiohttp cancels the handler of a client that has closed its connection
            raise
        except ClientGone:
            metrics.clients_left.inc()
            return web.Response(status=CLIENT_GONE)  # the client does not read it
        finally:
            metrics.requests.labels(route.kind, str(status)).inc()
            if isinstance(connection, Connection):
                connection.serving(False)
        return response

    async def _answer(self, request: web.Request, route: Route) -> web.StreamResponse:
        """Answer a request. Every failure becomes an OpenAI-shaped error, never a traceback. Raises ClientGone."""
        try:
            if not speaks_http(request):
                raise BadRequest("this port takes HTTP/1.1 and HTTP/1.0 only")
            if (answer := self._cors.preflight(request)) is not None:
                return answer
            request[USER] = self._authenticator.authenticate(request)
            return await self._dispatch(request, route)
        except ClientGone:
            raise
        except LlamaslotError as error:
            return error_instead(request, error)
        except web.HTTPException as error:
            wrapped = BadRequest(error.reason)
            wrapped.status = error.status
            return error_response(wrapped)
        except Exception:
            log.exception("%s %s: internal error; please report it", request.method, request.path)
            return error_response(LlamaslotError(MISTAKE))

    async def _dispatch(self, request: web.Request, route: Route) -> web.StreamResponse:
        if is_own_page(request):
            return await self._status.handle(request)
        if request.method in _NO_METHODS or request.raw_path == "*":
            raise NotImplementedHere(
                f"{request.method} {request.raw_path} is not served: llamaslot is no proxy for other servers"
            )
        match route.kind:
            case "own":
                status, told = self._status.health()
                return web.json_response(told, status=status)
            case "forbidden" | "gated":
                raise Forbidden(route.refusal)
            case "completion":
                return await self._completions.handle(request, route)
            case "exclusive":
                return await self._passthrough.in_turn(request, route)
            case "passthrough" if route.format is not None:
                return await self._passthrough.count(request, route)
            case "passthrough":
                return await self._passthrough.forward(request, route)


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT. Raises LlamaslotError if the store cannot be used, OSError for the port."""
    tasks = TaskOwner()
    raise_file_limit()
    await asyncio.to_thread(_make_directories, config)
    managed = _managed(config)
    url = managed.url if managed is not None else config.backend.url
    assert url is not None
    registry = Registry.of(config, url)
    await registry.open()
    stop, save_s = asyncio.Event(), 0.0
    try:
        async with listening(config, registry) as listener:
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            if managed is not None:
                tasks.spawn(managed.run(), "managed llama-server")
            registry.start()
            _greet(config, listener)
            gc.freeze()  # a full collection over a large index takes 150 ms; afterwards it has little to visit
            # A request leaves few cycles, and 32 of them have thousands of objects: by default every few requests cause
            # a collection.
            gc.set_threshold(20_000, 20, 20)
            gc.enable()
            await stop.wait()
            log.info("stopping")
        save_s = config.shutdown.save_s
    finally:
        await registry.close(save_s)
        await tasks.close()  # a managed server is ended last: its slots have been saved


@contextlib.asynccontextmanager
async def listening(config: Config, registry: Registry) -> AsyncIterator[asyncio.Server]:
    """Listen for clients. At the end running answers get ``shutdown.drain_s`` seconds. Raises OSError for the port."""
    app = App(config, registry)
    runner = web.AppRunner(
        app.application(),
        handler_cancellation=True,  # detect that a client leaves while nothing is being written to it
        shutdown_timeout=config.shutdown.drain_s,
    )
    logging.getLogger("aiohttp.server").addFilter(_in_one_line)
    try:
        await runner.setup()
        assert runner.server is not None, "set up"
        timeouts, n_max = ClientTimeouts(config.listen.read_timeout_s), config.listen.max_connections
        # Pages of other origins get more headers with the answer.
        health = app.health if not config.listen.cors else None
        connections = Connections(runner.server, timeouts, n_max, health)
        listener = await _listen(config, connections)
        try:
            yield listener
        finally:
            listener.close()
            connections.close_new()
    finally:
        await runner.cleanup()


async def _listen(config: Config, connections: Connections) -> asyncio.Server:
    """As aiohttp's ``TCPSite``, with llamaslot's own connection class. Raises OSError for the port."""
    listen = config.listen
    context = Certificate(listen.tls).context if listen.tls is not None else None
    return await asyncio.get_running_loop().create_server(
        connections, listen.host, listen.port, backlog=_BACKLOG, ssl=context
    )


def _in_one_line(record: logging.LogRecord) -> bool:
    """Shorten aiohttp's traceback for a client that sends no valid HTTP, or a corrupt body, to one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, HttpProcessingError | web.RequestPayloadError):
        # It quotes the invalid text, which may be a key or a part of a prompt.
        said = _QUOTED.sub("", " ".join(str(error).split()))
        record.msg, record.args = "%s: %s", (record.getMessage(), said)
        record.exc_info, record.levelno, record.levelname = None, logging.INFO, "INFO"
    return True


def _managed(config: Config) -> ManagedServer | None:
    settings = config.backend
    if settings.managed is None:
        return None
    assert settings.slot_save_path is not None, "the configuration gives a managed server its directory"
    return ManagedServer(
        settings.managed,
        name=settings.name,
        slot_save_path=settings.slot_save_path,
        log_path=config.store.meta_dir / f"{settings.name}.log",
        port=settings.managed.port,
        api_key=settings.resolve_api_key(),
    )


def _make_directories(config: Config) -> None:
    paths = [config.store.meta_dir]
    if config.backend.managed is not None and config.backend.slot_save_path is not None:
        paths.append(config.backend.slot_save_path)
    for path in paths:
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LlamaslotError(f"cannot make the directory {path}: {error.strerror}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _greet(config: Config, listener: asyncio.Server) -> None:
    """Log where it listens: the addresses bound by the kernel, and one to try on this machine."""
    bound = sorted({socket.getsockname()[:2] for socket in listener.sockets})
    scheme = "https" if config.listen.tls is not None else "http"
    every = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    base = f"{scheme}://{_address(every.get(bound[0][0], bound[0][0]), bound[0][1])}"
    is_open = any(host in every for host, _ in bound)
    has_keys = config.auth.keys_file is not None
    which, header = (
        ("with a key of yours", " -H 'Authorization: Bearer …'") if has_keys else ("any API key", "")
    )
    log.info(
        "llamaslot %s listens on %s%s; from this machine: %s/v1", __version__,
        " and ".join(_address(*address) for address in bound),
        ", every address of this machine" if is_open else "", base,
    )  # fmt: skip
    print(  # noqa: T201
        f"\nPoint any OpenAI client at {base}/v1 ({which}), or try:\n\n"
        f"  curl -N {base}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
        """    -d '{"stream": true, "messages": [{"role": "user", "content": "Name three colours."}]}'\n""",
        flush=True,
    )


__all__ = ["App", "listening", "serve"]
