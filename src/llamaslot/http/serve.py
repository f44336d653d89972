"""Starts and stops llamaslot: ``llamaslot serve``, and ``llamaslot run`` with a llama-server of its own.

What answers ``/health`` is imported and started first. aiohttp and the application take as long again to import. They
follow when a client needs them, 0.3 s later at the latest.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamaslot import __version__
from llamaslot.config.load import Config
from llamaslot.config.sections import EVERY_ADDRESS
from llamaslot.errors import ConfigError, LlamaslotError
from llamaslot.fleet.managed_models import ManagedModels
from llamaslot.fleet.registry import Registry
from llamaslot.http.connections import Connections, raise_file_limit, set_options
from llamaslot.http.reload import Reload
from llamaslot.http.service_manager import ServiceManager
from llamaslot.llama.managed.process import ManagedServer
from llamaslot.llama.transport.quick_import import import_aiohttp
from llamaslot.tasks import TaskOwner

if TYPE_CHECKING:
    from aiohttp import web

log = logging.getLogger(__name__)

_LAST_REQUESTS_S = 0.25  # wait for the requests of connections that were accepted just before the end
_BACKLOG = 1024  # connections that the kernel has established and llamaslot has not accepted yet
_LOAD_AFTER_S = 0.3  # by then llamaslot has connected to a llama-server that answers quickly
# The part of the time to stop of ``llamaslot run`` that running answers have to end. Their connections have as much
# again to close.
DRAIN_SHARE = 1 / 6
# The part in which llama-server ends, after its slots are saved: it must free its memory.
_END_SHARE = 1 / 6
_END_MIN_S = 1.0

# Python's thread switch interval: how long a thread that commits a save and the event loop may keep each other waiting.
# Beside a computing thread, one wake-up of the loop in a hundred came 0.4 to 42 ms late with Python's default of 5 ms,
# and 0.1 ms late with 0.5. In a thread beside a busy loop, listing a directory of 60 files took up to 85 ms, and 17.
_SWITCH_S = 0.0005


class Front:
    """The port on which llamaslot listens. It answers health checks from the start, and all other requests once the
    application is loaded.
    """

    def __init__(
        self, config: Config, registry: Registry, path: Path | None, manager: ServiceManager
    ) -> None:
        """``path``: the configuration file; None if there is no file to read again."""
        self._config, self._registry, self._manager = config, registry, manager
        self.reload = Reload(path, config, registry, manager, self._check_open)
        self.connections = Connections(config.listen.max_connections, registry)
        self._listeners: list[asyncio.Server] = []
        self._runner: web.AppRunner | None = None
        self._is_activated = False  # True: the sockets are the service manager's, which goes on listening

    async def listen(self) -> None:
        """Listen for clients, with llamaslot's own connections: on the sockets of the service manager if it has some,
        else on ``listen.host`` and ``listen.port``.

        Raises OSError if the port cannot be used, and ConfigError if a socket of the service manager is not TCP's, or
        other machines can reach it and no keys are required.
        """
        listen, options = self._config.listen, dict[str, Any](backlog=_BACKLOG)
        if listen.tls is not None:
            from llamaslot.config.tls import Certificate

            # A client that begins no handshake would be kept for a minute.
            options |= {
                "ssl": Certificate(listen.tls).context,
                "ssl_handshake_timeout": listen.read_timeout_s,
            }
        loop, given = asyncio.get_running_loop(), self._manager.sockets()
        for sock in given:
            if sock.family not in (socket.AF_INET, socket.AF_INET6):
                fault = "is no TCP socket: ListenStream=HOST:PORT"
                raise ConfigError("the socket of the service manager", [fault])
            self._listeners.append(await loop.create_server(self.connections, sock=sock, **options))
            self._check_open(self._config)
        self._is_activated = bool(given)
        if not given:
            self._listeners.append(
                await loop.create_server(self.connections, listen.host, listen.port, **options)
            )
        for listener in self._listeners:
            set_options(listener)

    def _check_open(self, config: Config) -> None:
        """Raise ConfigError if other machines can reach llamaslot, and ``config`` requires no keys."""
        if config.auth.keys_file is not None or config.auth.allow_anonymous:
            return
        for host, port in self.addresses:
            if not ipaddress.ip_address(host).is_loopback:
                raise ConfigError(
                    f"the socket {_address(host, port)}",
                    ["other machines can reach it, and no key is required: set auth.keys_file"],
                )

    async def load(self) -> None:
        """Import and start the application. Raises ConfigError if a configured file has become unreadable. Canceling is
        safe.
        """
        await asyncio.to_thread(_import_application)
        from aiohttp import web

        from llamaslot.http.aiohttp_connection import in_one_line, serve_with
        from llamaslot.http.app import App

        app = App(self.reload.config, self._registry, self.reload)
        self.reload.apply = app.apply
        runner = self._runner = web.AppRunner(
            app.application(),
            handler_cancellation=True,  # detect that a client leaves while nothing is being written to it
            shutdown_timeout=self._config.shutdown.drain_s,
        )
        logging.getLogger("aiohttp.server").addFilter(in_one_line)
        await runner.setup()
        assert runner.server is not None, "set up"
        serve_with(self.connections, runner.server, self._config.listen.read_timeout_s)

    async def close(self) -> None:
        """Stop listening. Answers that are running have ``shutdown.drain_s`` seconds to end."""
        for listener in self._listeners:
            listener.close()
        if self._is_activated:
            await asyncio.sleep(_LAST_REQUESTS_S)
        self.connections.close_new()
        if self._runner is not None:
            await self._runner.cleanup()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """The addresses on which llamaslot listens, as the kernel has bound them."""
        bound = [sock.getsockname()[:2] for listener in self._listeners for sock in listener.sockets]
        return sorted({(str(host), int(port)) for host, port in bound})


def _import_application() -> None:
    """Import aiohttp and the application. Runs in a thread, so that health checks are answered meanwhile."""
    import_aiohttp()
    import llamaslot.http.aiohttp_connection
    import llamaslot.http.app  # noqa: F401


@contextlib.asynccontextmanager
async def listening(
    config: Config, registry: Registry, path: Path | None = None, manager: ServiceManager | None = None
) -> AsyncIterator[Front]:
    """A context manager that listens for clients; in its block ``Front.load`` must follow. At its end, running answers
    have ``shutdown.drain_s`` seconds to end. ``path``: the configuration file. Raises as ``Front.listen`` does.
    """
    front = Front(config, registry, path, manager or ServiceManager())
    try:
        await front.listen()
        yield front
    finally:
        await front.close()


def handle_signals(stop: asyncio.Event, reload: Callable[[], object] | None = None) -> None:
    """From now on SIGTERM and SIGINT set ``stop``, and SIGHUP calls ``reload`` if there is one."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if reload is not None:
        loop.add_signal_handler(signal.SIGHUP, reload)


def keep_answers_flowing() -> None:
    """Set garbage collection and thread switching so that they delay the event loop little from now on."""
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()  # a full collection over a large index takes 150 ms; afterwards it has little to visit
    # 32 requests have thousands of objects, so with Python's defaults every few requests would cause a collection. But
    # a request leaves few cycles to collect.
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


async def serve(config: Config, path: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ``path``: the configuration file, which SIGHUP reads again. Raises LlamaslotError
    if a store cannot be used, OSError if the port cannot be used.
    """
    raise_file_limit()
    sys.setswitchinterval(
        _SWITCH_S
    )  # llamaslot connects while threads read the index and import the application
    manager, tasks = ServiceManager(), TaskOwner()
    await asyncio.to_thread(_make_directories, config)
    servers = {server.name: server for server in _managed(config)}
    registry = Registry.of(config, {name: server.url for name, server in servers.items()})
    await registry.open()
    limits = config.managed
    managed = ManagedModels(
        registry.backends, servers, limits.max_loaded, limits.idle_unload_s, config.shutdown.save_s
    )
    registry.router.expected = {
        backend.managed.model_name: backend.name
        for backend in reversed(config.backends)
        if backend.managed is not None
    }
    registry.router.is_on_demand = managed.on_demand is not None
    stop, save_s = asyncio.Event(), 0.0
    try:
        async with listening(config, registry, path, manager) as front:
            handle_signals(stop, lambda: tasks.spawn(front.reload.on_signal(), "reload"))
            if servers:
                await front.load()  # before a child is started: importing aiohttp changes the environment
                managed.start()
            registry.start()
            _greet(config, front.addresses)
            if not servers:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOAD_AFTER_S):
                        await front.connections.is_wanted.wait()
                await front.load()
            keep_answers_flowing()
            manager.ready(f"serves on {' and '.join(_address(*address) for address in front.addresses)}")
            await stop.wait()
            log.info("stopping: running answers get time to end, then unsaved slots are saved")
            manager.stopping()
            await tasks.close()
            await managed.stop_loading()
        save_s = config.shutdown.save_s
    finally:
        await tasks.close()
        await registry.close(save_s)
        await managed.close()  # last: it ends the llama-servers, whose slots have been saved by now
        manager.close()


def _managed(config: Config) -> Iterator[ManagedServer]:
    for settings in config.backends:
        if settings.managed is None:
            continue
        assert settings.slot_save_path is not None, "the configuration gives a managed server its directory"
        yield ManagedServer(
            settings.managed,
            name=settings.name,
            slot_save_path=settings.slot_save_path,
            log_path=config.store.meta_dir / f"{settings.name}.log",
            port=settings.managed.port,
            api_key=settings.resolve_api_key(),
        )


def _make_directories(config: Config) -> None:
    paths = [config.store.meta_dir, *([config.store.directory] if config.store.directory else [])]
    paths += [
        backend.slot_save_path
        for backend in config.backends
        if backend.managed is not None and backend.slot_save_path is not None
    ]
    for path in paths:
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise LlamaslotError(
                f"cannot make the directory {path}: {error.strerror}; store.meta_dir chooses another"
            ) from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _log_addresses(bound: Sequence[tuple[str, int]], scheme: str) -> str:
    """Log the addresses on which llamaslot listens. Returns the URL of the first one, as seen from this machine."""
    host, port = bound[0]
    base = f"{scheme}://{_address(EVERY_ADDRESS.get(host, host), port)}"
    is_open = any(host in EVERY_ADDRESS for host, _ in bound)
    log.info(
        "llamaslot %s listens on %s%s; from this machine: %s/v1", __version__,
        " and ".join(_address(*address) for address in bound),
        ", every address of this machine" if is_open else "", base,
    )  # fmt: skip
    return base


def _greet(config: Config, bound: list[tuple[str, int]]) -> None:
    """Log the addresses on which llamaslot listens. Print a URL to try on this machine."""
    base = _log_addresses(bound, "https" if config.listen.tls is not None else "http")
    has_keys = config.auth.keys_file is not None
    which, header = (
        ("with a key of yours", " -H 'Authorization: Bearer …'") if has_keys else ("any API key", "")
    )
    print(  # noqa: T201
        f"\nPoint any OpenAI client at {base}/v1 ({which}), or try:\n\n"
        f"  curl -N {base}/v1/chat/completions -H 'Content-Type: application/json'{header} \\\n"
        """    -d '{"stream": true, "messages": [{"role": "user", "content": "Name three colours."}]}'\n""",
        flush=True,
    )


async def serve_command(config: Config, server: ManagedServer, stop_s: float) -> int | None:
    """Serve for ``llamaslot run``, until SIGTERM or SIGINT, or until its llama-server ends by itself. Returns
    llama-server's exit code (negative: minus the number of a signal), None after a signal to llamaslot.

    After a signal there are ``stop_s`` seconds in which running answers end, slots are saved, and llama-server ends.
    Raises LlamaslotError if the store cannot be used, OSError if the port cannot be used.
    """
    raise_file_limit()
    loop, tasks, stop = asyncio.get_running_loop(), TaskOwner(), asyncio.Event()
    registry = Registry.of(config, {server.name: server.url})
    await registry.open()
    code, save_s, stops_at = None, 0.0, loop.time()
    try:
        async with listening(config, registry) as front:
            await front.load()  # before a child is started: importing aiohttp changes the environment
            handle_signals(stop)
            life = tasks.spawn(server.run_once(), "llama-server")
            life.add_done_callback(lambda _: stop.set())
            registry.start()
            _log_addresses([(config.listen.host, config.listen.port)], "http")
            keep_answers_flowing()
            await stop.wait()
            stops_at = loop.time() + stop_s
            log.info("stopping: running answers get time to end, then unsaved slots are saved")
            if life.done():
                code = life.result()
                for pool in registry.pools:
                    pool.doubt()
        if code is None:
            save_s = max(0.0, stops_at - loop.time() - max(_END_MIN_S, stop_s * _END_SHARE))
    finally:
        await registry.close(save_s)
        server.stop_s = max(_END_MIN_S, stops_at - loop.time())
        await tasks.close()
    return code
