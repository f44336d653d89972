"""llamaslot as a service: readiness, watchdog, socket activation, reload. As a process, with a fake llama-server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.config.keys import editing, made_now, new_key
from llamaslot.store.directory_lock import DirectoryLock
from tests.support.activated import Activated
from tests.support.fake import FakeServer
from tests.support.inprocess import a_session
from tests.support.real import free_port

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
async def fakes(tmp_path: Path) -> AsyncIterator[list[FakeServer]]:
    servers = []
    for name in ("kv0", "kv1"):
        (tmp_path / name).mkdir()
        servers.append(FakeServer(tmp_path / name, port=free_port(), slots=2, context=8192))
        await servers[-1].start()
    yield servers
    for server in servers:
        await server.kill()


def backend(name: str, server: FakeServer) -> dict[str, Any]:
    return {"name": name, "url": server.url, "slot_save_path": str(server.save_dir)}


async def ask(session: aiohttp.ClientSession, url: str) -> int:
    async with session.post(url + "/v1/chat/completions", json=CHAT) as answer:
        await answer.read()
        return answer.status


async def get(session: aiohttp.ClientSession, url: str, page: str) -> Any:
    async with session.get(f"{url}/llamaslot/{page}") as answer:
        return await answer.json()


async def until(session: aiohttp.ClientSession, url: str, holds: Callable[[Any], bool]) -> None:
    """Wait until its backends are like that."""
    async with asyncio.timeout(30):
        while not holds((await get(session, url, "status"))["backends"]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_restart_refuses_no_connection(tmp_path: Path, fakes: list[FakeServer]) -> None:
    """Requests that come all the time, one after the other, on fresh connections: each is answered 200, also those
    that come while no llamaslot runs. It says what it does, and its event loop beats."""
    settings = {"backends": [backend("gpu0", fakes[0])], "shutdown": {"drain_s": 5}}
    async with Activated(tmp_path, settings, watchdog_s=0.4) as it, a_session() as session:
        statuses, is_over = list[int](), asyncio.Event()

        async def keep_asking() -> None:
            while not is_over.is_set():
                statuses.append(await ask(session, it.url))

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(keep_asking())
            await it.until("WATCHDOG=1")
            await it.restart()
            n_before = len(statuses)
            await it.until("WATCHDOG=1")
            while len(statuses) < n_before + 6:  # noqa: ASYNC110 - they come from three tasks
                await asyncio.sleep(0.01)
            is_over.set()
        assert set(statuses) == {200}
        assert it.told.count("READY=1") == 2
        assert "STOPPING=1" in it.told
        assert f"STATUS=serves on 127.0.0.1:{it.port}" in it.told


async def test_a_reload(tmp_path: Path, fakes: list[FakeServer]) -> None:
    """Limits, keys, rules, quota, log level and backends at once; the rest is named; with a fault nothing changes."""
    settings = {"backends": [backend("gpu0", fakes[0])]}
    async with Activated(tmp_path, settings) as it, a_session() as session:
        it.configure(queue={"max_waiting": -1})
        await it.reload()
        assert "queue.max_waiting: should be at least 0" in it.log
        assert "the old configuration stays in force" in it.log
        async with session.post(it.url + "/llamaslot/reload") as answer:
            assert answer.status == 409
        async with session.post(
            it.url + "/llamaslot/reload", headers={"Origin": "http://evil.example"}
        ) as answer:
            assert answer.status == 403

        it.configure(
            queue={"max_waiting": 7},
            rewrite=[{"name": "dates", "pattern": "hello", "replace": "bye"}],
            log={"format": "text", "level": "debug"},
            store={"meta_dir": str(tmp_path / "meta"), "quota": "1MiB", "idle_save_s": 9},
            backends=[backend("gpu0", fakes[0]), backend("gpu1", fakes[1])],
        )
        told = await _reloaded(it)
        assert told.splitlines() == [
            "in force: store.quota, queue.max_waiting, log.level, rewrite, backends: gpu1 added",
            "needs a restart: store.idle_save_s",
        ]
        status = await get(session, it.url, "status")
        assert [its["name"] for its in status["backends"]] == ["gpu0", "gpu1"]
        assert status["snapshots"]["quota_bytes"] == 2 * 2**20
        assert [its["name"] for its in status["rewrite"] if its["name"] == "dates"] == ["dates"]

        it.configure(backends=[backend("gpu1", fakes[1])])
        assert (await _reloaded(it)).splitlines()[0] == "in force: backends: gpu0 drains"
        await until(session, it.url, lambda backends: backends[0]["drain"] == "drained")
        await until(session, it.url, lambda backends: backends[1]["health"] == "up")
        assert await ask(session, it.url) == 200
        it.configure(backends=[backend("gpu0", fakes[0]), backend("gpu1", fakes[1])])
        assert (await _reloaded(it)).splitlines()[0] == "in force: backends: gpu0 added"
        assert (await get(session, it.url, "status"))["backends"][0]["drain"] is None

        keys, key = tmp_path / "keys.json", new_key()
        with editing(keys) as entries:
            entries.append(made_now("ops", key, is_admin=True))
        it.configure(auth={"keys_file": str(keys)})
        await it.reload()
        assert await ask(session, it.url) == 401
        async with session.get(it.url + "/llamaslot/status", headers={"x-api-key": key}) as answer:
            assert answer.status == 200


async def test_a_reload_does_not_open_the_port_to_other_machines(
    tmp_path: Path, fakes: list[FakeServer]
) -> None:
    """The addresses in use count, not ``listen.host`` of the file, which needs a restart."""
    keys = tmp_path / "keys.json"
    with editing(keys) as entries:
        entries.append(made_now("ada", new_key()))
    settings = {"backends": [backend("gpu0", fakes[0])], "auth": {"keys_file": str(keys)}}
    async with Activated(tmp_path, settings, host="0.0.0.0") as it, a_session() as session:
        assert await ask(session, it.url) == 401
        it.configure(auth={})
        await it.reload()
        assert "no key is required" in it.log
        assert await ask(session, it.url) == 401
        it.configure(auth={"allow_anonymous": True})
        await it.reload()
        assert await ask(session, it.url) == 200


async def test_a_backend_that_a_reload_cannot_add_is_not_there(
    tmp_path: Path, fakes: list[FakeServer]
) -> None:
    """Another llamaslot has its directory; the next reload tries again. One that drains does not come back as another
    server of its name."""
    first, second = backend("gpu0", fakes[0]), backend("gpu1", fakes[1])
    lock = DirectoryLock(tmp_path / "kv1")
    lock.acquire()
    async with Activated(tmp_path, {"backends": [first]}) as it, a_session() as session:

        async def names() -> list[str]:
            return [its["name"] for its in (await get(session, it.url, "status"))["backends"]]

        it.configure(backends=[first, second])
        for _ in range(2):
            told = (await _reloaded(it)).splitlines()
            assert told[0] == "in force: nothing new"
            assert told[1].startswith("needs a restart: backends: gpu1 (")
            assert await names() == ["gpu0"]
        lock.release()
        assert (await _reloaded(it)).splitlines() == ["in force: backends: gpu1 added"]
        await until(session, it.url, lambda backends: [its["health"] for its in backends] == ["up", "up"])

        it.configure(backends=[first])
        assert (await _reloaded(it)).splitlines() == ["in force: backends: gpu1 drains"]
        it.configure(backends=[first, {**second, "url": "http://127.0.0.1:9"}])
        for _ in range(2):
            told = (await _reloaded(it)).splitlines()
            assert told[0] == "in force: nothing new"
            assert told[1].startswith("needs a restart: backends: gpu1 (it drains with other settings")
        assert (await get(session, it.url, "status"))["backends"][1]["drain"] == "drained"
        it.configure(backends=[first, second])
        assert (await _reloaded(it)).splitlines() == ["in force: backends: gpu1 added"]


async def test_what_waits_for_a_backend_that_a_reload_removes_is_told(
    tmp_path: Path, fakes: list[FakeServer]
) -> None:
    """It would wait for max_wait_s in vain; running answers end."""
    settings = {"backends": [backend("gpu0", fakes[0])], "queue": {"max_wait_s": None}}
    async with Activated(tmp_path, settings) as it, a_session() as session, asyncio.TaskGroup() as group:
        fakes[0].hold()
        asked = [group.create_task(ask(session, it.url)) for _ in range(3)]
        async with asyncio.timeout(30):
            while (await get(session, it.url, "status"))["queue"] < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        it.configure(backends=[{"name": "other", "url": f"http://127.0.0.1:{free_port()}"}])
        await it.reload()
        done, _ = await asyncio.wait(asked, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        assert [one.result() for one in done] == [503]
        fakes[0].go()
    assert sorted(one.result() for one in asked) == [200, 200, 503]


async def _reloaded(it: Activated) -> str:
    """What the command says."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "llamaslot", "reload", "--config", str(it.config_path)),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()
