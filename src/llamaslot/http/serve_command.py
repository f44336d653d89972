"""Serves one llama-server that is started with llamaslot and ends with it: ``llamaslot run``."""

from __future__ import annotations

import asyncio
import logging

from llamaslot import __version__
from llamaslot.config.load import Config
from llamaslot.fleet.registry import Registry
from llamaslot.http.connections import raise_file_limit
from llamaslot.http.serve import collect_seldom, listening, set_by_signals
from llamaslot.llama.managed.process import ManagedServer
from llamaslot.tasks import TaskOwner

log = logging.getLogger(__name__)

# Of the time to stop: for running answers, and as much again for their connections to close.
_DRAIN_SHARE = 1 / 6
# For llama-server to end after its slots are saved: it frees its memory.
_END_SHARE = 1 / 6
_END_MIN_S = 1.0


def drain_s(stop_s: float) -> float:
    """``shutdown.drain_s`` of a llamaslot that has ``stop_s`` seconds to stop."""
    return stop_s * _DRAIN_SHARE


async def serve_command(config: Config, server: ManagedServer, stop_s: float) -> int | None:
    """Serve until SIGTERM or SIGINT, or until the llama-server ends by itself. Returns the exit code of the latter
    (negative: minus the signal's number), None after a signal.

    After a signal it has ``stop_s`` seconds: running answers end, slots are saved, llama-server ends. Raises
    LlamaslotError if the store cannot be used, OSError for the port.
    """
    raise_file_limit()
    loop, tasks, stop = asyncio.get_running_loop(), TaskOwner(), asyncio.Event()
    registry = Registry.of(config, {server.name: server.url})
    await registry.open()
    code, save_s, stops_at = None, 0.0, loop.time()
    try:
        async with listening(config, registry) as front:
            await front.load()  # before a child is started: importing aiohttp changes the environment
            set_by_signals(stop)
            life = tasks.spawn(server.run_once(), "llama-server")
            life.add_done_callback(lambda _: stop.set())
            registry.start()
            address = f"{config.listen.host}:{config.listen.port}"
            log.info(
                "llamaslot %s listens on %s; from this machine: http://%s/v1", __version__, address, address
            )
            collect_seldom()
            await stop.wait()
            stops_at = loop.time() + stop_s
            log.info("stopping")
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
