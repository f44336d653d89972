"""The fake llama-server's own promises: faults on order, what it notes, time by hand. Its likeness: tests/real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from llamaslot.tasks import TaskOwner
from tests.support.fake import FakeModel, FakeServer, HandClock

PROMPT = list(range(0x30, 0x60))


@pytest.fixture
async def fake(tmp_path: Path) -> AsyncIterator[FakeServer]:
    async with FakeServer(tmp_path / "kv") as server:
        yield server


@pytest.fixture
async def tasks() -> AsyncIterator[TaskOwner]:
    owner = TaskOwner()
    yield owner
    await owner.close()


def body(slot: int | None = 0, n_predict: int = 2, **more: Any) -> dict[str, Any]:
    pinned = {} if slot is None else {"id_slot": slot}
    return {"prompt": PROMPT, "n_predict": n_predict, **pinned, **more}


async def status(fake: FakeServer, path: str, sent: Any = None) -> int:
    async with aiohttp.request("POST", fake.url + path, json=sent) as answer:
        await answer.read()
        return answer.status


async def events(fake: FakeServer, sent: dict[str, Any]) -> list[dict[str, Any]]:
    async with aiohttp.request("POST", fake.url + "/completion", json={**sent, "stream": True}) as answer:
        return [json.loads(line[6:]) async for line in answer.content if line.startswith(b"data: ")]


async def test_everything_sent_is_noted_with_where_it_landed(fake: FakeServer) -> None:
    """``requests`` has method, path, body, the slot that was asked for and the slots that were taken."""
    await fake.post("/completion", body(6))
    await fake.post("/slots/1?action=erase", {})
    first, second = fake.requests
    assert (first.path, first.slot, first.landed, first.status) == ("/completion", 6, [2], 200)
    assert (second.action, second.slot, second.landed) == ("erase", 1, [1])
    assert fake.sent(action="erase") == [second]
    assert not fake.violations


async def test_a_request_for_a_busy_slot_is_a_violation(fake: FakeServer, tasks: TaskOwner) -> None:
    """Pinned completions and slot actions alike; so is an action while others are deferred."""
    fake.hold()
    tasks.spawn(fake.post("/completion", body()), "first")
    await fake.wait_for(lambda f: f.slots[0].is_processing)
    tasks.spawn(fake.post("/completion", body()), "second")
    await fake.wait_for(lambda f: len(f.engine.deferred) == 1)
    tasks.spawn(fake.post("/slots/0?action=erase", {}), "erase")
    await fake.wait_for(lambda f: len(f.engine.deferred) == 2)
    assert len(fake.violations) == 3
    fake.go()
    await tasks.all_ended()


async def test_prompts_of_one_array_are_no_violation(fake: FakeServer) -> None:
    """They queue behind each other in their own slot."""
    await fake.post("/completion", body() | {"prompt": ["One", "Two", "Three"]})
    assert not fake.violations


async def test_a_restore_without_erase_is_a_violation(fake: FakeServer) -> None:
    """Only an erase directly before it makes a restore safe with a draft model."""
    await fake.post("/completion", body())
    await fake.post("/slots/0?action=save", {"filename": "a.kv"})
    await fake.post("/slots/1?action=erase", {})
    await fake.post("/slots/1?action=restore", {"filename": "a.kv"})
    assert not fake.violations
    await fake.post("/slots/1?action=restore", {"filename": "a.kv"})
    assert len(fake.violations) == 1


async def test_steps_are_computed_by_hand(tmp_path: Path, tasks: TaskOwner) -> None:
    """``hold`` and ``step``: one batch of a prefill at a time."""
    async with FakeServer(tmp_path, batch=16) as fake:
        fake.hold()
        asked = tasks.spawn(fake.post("/completion", body()), "asked")
        await fake.wait_for(lambda f: f.slots[0].is_processing)
        await fake.step()
        assert fake.slots[0].n_tokens == 16
        await fake.step()
        assert fake.slots[0].n_tokens == 32
        fake.go()
        assert (await asked)["timings"]["prompt_n"] == len(PROMPT)


async def test_time_ticks_by_hand(tmp_path: Path, tasks: TaskOwner) -> None:
    """With a ``HandClock`` a step is over when its seconds have been let pass, and the timings tell these seconds."""
    clock = HandClock()
    async with FakeServer(tmp_path, clock=clock, step_s=2.0) as fake:
        asked = tasks.spawn(fake.post("/completion", body(n_predict=1)), "asked")
        await fake.wait_for(lambda f: f.slots[0].is_processing)
        await clock.advance(1.9)
        assert fake.slots[0].is_processing
        await clock.advance(0.2)
        assert (await asked)["timings"]["prompt_ms"] == 2000


async def test_a_client_that_left_unheard_is_noticed_after_a_second(tmp_path: Path, tasks: TaskOwner) -> None:
    """A second of the fake's clock without any result; each answer to GET /slots starts it anew."""
    clock = HandClock()
    async with FakeServer(tmp_path, clock=clock, batch=1, step_s=0.5) as fake:
        asked = tasks.spawn(fake.post("/completion", body()), "asked")
        await fake.wait_for(lambda f: f.slots[0].is_processing)
        asked.cancel()
        for n in range(6):
            told = tasks.spawn(fake.get("/slots"), "slots")
            await fake.wait_for(lambda f, n=n: len(f.requests) == n + 2)  # type: ignore[misc]
            await clock.advance(0.6)
            assert (await told)[0]["is_processing"]
        await clock.advance(2.0)
        assert not fake.slots[0].is_processing
        assert fake.requests[0].client_left


@pytest.mark.parametrize("action", ["save", "restore", "erase"])
async def test_slot_actions_fail_on_order(fake: FakeServer, action: str) -> None:
    """Once, then they work again."""
    await fake.post("/completion", body())
    await fake.post("/slots/0?action=save", {"filename": "a.kv"})
    fake.faults.fail(action, 500)
    assert await status(fake, f"/slots/0?action={action}", {"filename": "a.kv"}) == 500
    assert await status(fake, f"/slots/0?action={action}", {"filename": "a.kv"}) == 200


async def test_saves_go_wrong_on_order(fake: FakeServer) -> None:
    """Truncated, empty, of another conversation, or on a full disk."""
    await fake.post("/completion", body(n_predict=1))
    save, n_tokens = "/slots/0?action=save", len(PROMPT)

    fake.faults.truncate_save()
    assert (await fake.post(save, {"filename": "a.kv"}))["n_saved"] == n_tokens
    assert await status(fake, "/slots/1?action=restore", {"filename": "a.kv"}) == 400

    fake.faults.disk_full()
    assert await status(fake, save, {"filename": "b.kv"}) == 500
    whole = (await fake.post(save, {"filename": "c.kv"}))["n_written"]
    assert fake.save_dir is not None
    assert (fake.save_dir / "b.kv").stat().st_size < whole == (fake.save_dir / "c.kv").stat().st_size

    fake.faults.wrong_save()
    assert (await fake.post(save, {"filename": "d.kv"}))["n_saved"] == n_tokens
    held = [(fake.save_dir / name).read_bytes()[24 : 24 + 4 * n_tokens] for name in ("c.kv", "d.kv")]
    assert held[0] == fake.slots[0].tokens != held[1]

    fake.faults.empty_save()
    assert (await fake.post(save, {"filename": "e.kv"}))["n_saved"] == 0
    assert not fake.slots[0].tokens


async def test_a_route_hangs_until_released(fake: FakeServer, tasks: TaskOwner) -> None:
    """``hang`` tells when a request has reached it."""
    hang = fake.faults.hang("save")
    saving = tasks.spawn(fake.post("/slots/0?action=save", {"filename": "a.kv"}), "save")
    await hang.reached.wait()
    assert not saving.done()
    hang.release()
    assert (await saving)["n_saved"] == 0
    assert (await fake.post("/slots/0?action=save", {"filename": "b.kv"}))["n_saved"] == 0


async def test_connections_break_on_order(fake: FakeServer) -> None:
    """Before the headers, after the work, and in the middle of a stream: and the slot is free afterwards."""
    fake.faults.disconnect_before_headers("/completion")
    with pytest.raises(aiohttp.ClientConnectionError):
        await fake.post("/completion", body())
    assert fake.slots[0].n_tokens == 0
    fake.faults.disconnect_after_work("save")
    await fake.post("/completion", body())
    with pytest.raises(aiohttp.ClientConnectionError):
        await fake.post("/slots/0?action=save", {"filename": "a.kv"})
    assert fake.save_dir is not None
    assert (fake.save_dir / "a.kv").exists()
    fake.faults.disconnect_after_events(2)
    with pytest.raises(aiohttp.ClientError):
        await events(fake, body(n_predict=500))
    await fake.wait_for(lambda f: not f.slots[0].is_processing)
    assert fake.slots[0].n_tokens < 500


async def test_a_failure_inside_a_stream_is_an_event(fake: FakeServer) -> None:
    """``fail_stream`` after so many tokens: the stream ends with an error event; before the first, it is a 500."""
    fake.faults.fail_stream(after_tokens=2)
    seen = await events(fake, body(n_predict=9))
    assert [("error" in event) for event in seen] == [False, False, True]
    fake.faults.fail_stream()
    assert await status(fake, "/completion", body()) == 500


async def test_dying_resets_everybody_and_a_restart_has_forgotten_all(
    fake: FakeServer, tasks: TaskOwner
) -> None:
    """Open streams break, new connections are refused; after the restart another marker and empty slots."""
    await fake.post("/completion", body(1))
    fake.hold()
    waiting = tasks.spawn(fake.post("/completion", body(0)), "waiting")
    await fake.wait_for(lambda f: f.slots[0].is_processing)
    marker, port = fake.media_marker, fake.port
    await fake.die()
    with pytest.raises(aiohttp.ClientError):
        await waiting
    with pytest.raises(aiohttp.ClientConnectorError):
        await fake.post("/completion", body())
    await fake.restart()
    assert (fake.port, fake.media_marker == marker) == (port, False)
    assert [slot.n_tokens for slot in fake.slots] == [0, 0, 0, 0]
    assert (await fake.post("/completion", body(0)))["timings"]["cache_n"] == 0


async def test_another_models_snapshot_spoils_the_answer(fake: FakeServer) -> None:
    """It restores without an error and is reused, and what comes is neither model's answer."""

    async def answer(slot: int) -> str:
        text: str = (await fake.post("/completion", body(slot, 8)))["content"]
        return text

    old = await answer(0)
    await fake.post("/slots/0?action=save", {"filename": "a.kv"})
    await fake.restart(FakeModel(weights="B"))
    new = await answer(1)
    await fake.post("/slots/0?action=erase", {})
    await fake.post("/slots/0?action=restore", {"filename": "a.kv"})
    assert len({old, new, await answer(0)}) == 3


async def test_reuse_and_token_counts_are_lied_about_on_order(fake: FakeServer) -> None:
    """``cache_lie`` in every number that tells of reuse; ``miscount`` between /tokenize and the completion."""
    fake.faults.cache_lie = 5
    answer = await fake.post("/completion", body())
    assert (answer["timings"]["cache_n"], answer["timings"]["prompt_n"]) == (5, len(PROMPT) - 5)
    fake.faults.miscount = 2
    assert (await fake.post("/completion", body(1)))["tokens_evaluated"] == len(PROMPT) + 2


async def test_unified_memory_clears_idle_slots(tmp_path: Path) -> None:
    """Launching any task empties every idle slot."""
    async with FakeServer(tmp_path, unified=True) as fake:
        await fake.post("/completion", body(0))
        await fake.post("/completion", body(1))
        assert [bool(slot.tokens) for slot in fake.slots] == [False, True, False, False]


async def test_a_slow_response_closes_its_connection_on_order(fake: FakeServer) -> None:
    """Without saying so: the next request on the same connection finds it closed."""
    fake.faults.close_after_slow_s = 0.0
    async with aiohttp.ClientSession(fake.url) as session:
        async with session.post("/tokenize", json={"content": "x"}) as answer:
            assert "Connection" not in answer.headers
            assert await answer.json() == {"tokens": [0x78]}
        with pytest.raises(aiohttp.ClientConnectionError):
            async with session.post("/tokenize", json={"content": "x"}):
                pass


async def test_keys_loading_and_missing_directories_are_told_as_the_real_server_does(tmp_path: Path) -> None:
    """401 but for /health, 503 on everything while loading, 501 without a directory for slots."""
    async with FakeServer(None, api_key="k") as fake:
        assert await status(fake, "/tokenize", {}) == 401
        headers = {"Authorization": "Bearer k"}
        async with aiohttp.ClientSession(fake.url, headers=headers) as session:
            async with session.post("/slots/0?action=save", json={"filename": "x"}) as answer:
                assert answer.status == 501
            fake.loading = True
            async with session.get("/health") as answer:
                assert (answer.status, (await answer.json())["error"]["message"]) == (503, "Loading model")


async def test_waiting_tells_what_it_saw(fake: FakeServer) -> None:
    """A condition that does not come is a TimeoutError that shows the slots."""
    with pytest.raises(TimeoutError, match="FakeSlot 0 IDLE"):
        await fake.wait_for(lambda f: f.slots[0].is_processing, timeout_s=0.01)


async def test_many_clients_at_once(tmp_path: Path) -> None:
    """Hundreds of slots and requests in one test's time."""
    async with FakeServer(tmp_path, slots=64) as fake:
        async with asyncio.TaskGroup() as group:
            for n in range(64):
                group.create_task(fake.post("/completion", body(n, 20)))
        assert all(slot.n_tokens == len(PROMPT) + 19 for slot in fake.slots)
        assert not fake.violations
