"""How the interpreter of a process that serves is set up, and on what it listens."""

from __future__ import annotations

import gc
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamaslot.config.load import Config
from llamaslot.errors import ConfigError
from llamaslot.fleet.registry import Registry
from llamaslot.http.serve import Front, keep_answers_flowing
from llamaslot.http.service_manager import ServiceManager


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
