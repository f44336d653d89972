"""How the interpreter of a process that serves is set up, and on what it listens."""

from __future__ import annotations

import asyncio
import gc
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaslot.config.load import Config
from llamaslot.errors import ConfigError
from llamaslot.fleet.registry import Registry
from llamaslot.http import connections
from llamaslot.http.connections import NewConnection
from llamaslot.http.serve import Front, keep_answers_flowing
from llamaslot.http.service_manager import ServiceManager
from tests.support.real import free_port


@pytest.fixture
def _as_before() -> Iterator[None]:
    interval_s, thresholds, is_enabled = sys.getswitchinterval(), gc.get_threshold(), gc.isenabled()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)
    (gc.enable if is_enabled else gc.disable)()
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("_as_before")
def test_no_thread_and_no_collection_holds_up_answers_for_long() -> None:
    """A thread that commits a save gives the event loop its turn within a batch of the fastest model."""
    gc.disable()  # as while it starts
    keep_answers_flowing()
    assert sys.getswitchinterval() < 0.001
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0


async def test_a_unix_socket_of_the_service_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is a fault that can be read: users are told apart by addresses, which it has not."""
    config = Config.of(
        {"backends": [{"url": "http://127.0.0.1:9"}], "store": {"meta_dir": str(tmp_path)}},
        "a test",
        tmp_path,
    )
    manager = ServiceManager()
    with socket.socket(socket.AF_UNIX) as given:
        given.bind(str(tmp_path / "socket"))
        monkeypatch.setattr(manager, "sockets", lambda: [given])
        with pytest.raises(ConfigError, match="no TCP socket"):
            await Front(config, Registry.of(config), None, manager).listen()


def test_the_application_is_imported_beside_the_event_loop() -> None:
    """By the thread that calls this; else health checks would wait until all of it is imported."""
    code = (
        "import sys; from llamaslot.http import serve;"
        " names = {'llamaslot.http.app', 'llamaslot.http.aiohttp_connection'};"
        " assert not names & sys.modules.keys(); serve._import_application(); assert names <= sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels lack these options")
async def test_sockets_of_clients_have_the_options_of_the_listener(tmp_path: Path) -> None:
    """So the kernel notices a client that has gone without notice, and its request gives its slot back."""
    config = Config.of(
        {
            "listen": {"port": free_port()},
            "backends": [{"url": "http://127.0.0.1:9"}],
            "store": {"meta_dir": str(tmp_path)},
        },
        "a test",
        tmp_path,
    )
    front = Front(config, Registry.of(config), None, ServiceManager())
    await front.listen()
    reader, writer = await asyncio.open_connection(config.listen.host, config.listen.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readline()
    (connection,) = front.connections._open
    assert isinstance(connection, NewConnection)
    assert connection._transport is not None
    its = connection._transport.get_extra_info("socket")
    assert its.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000
    assert its.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
    writer.close()
    await front.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels lack these options")
async def test_a_kernel_that_refuses_an_option_of_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """As sandboxes do: llamaslot serves all the same, with the options that it has."""
    monkeypatch.setattr(connections, "_OPTIONS", {"TCP_USER_TIMEOUT": -1, "TCP_KEEPIDLE": 30})
    listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    connections.set_options(listener)
    assert listener.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
    listener.close()
