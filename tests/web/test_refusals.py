"""What llama-server refuses before it takes a slot is refused in its words, and in llamaslot's own while it is away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llamaslot.llama.dry_run import Verdict
from llamaslot.scheduling.slots import SlotState
from tests.support.inprocess import CHAT, NATIVE, TEXT, Served, letters, right, served

BASE, MORE = letters(11, 600), letters(12, 400)


@pytest.mark.parametrize("body", [{}, {"prompt": None}, {"prompt": [[None]]}, {"prompt": {"a": 1}}])
@pytest.mark.parametrize("path", [TEXT, NATIVE])
async def test_no_prompt_is_refused_at_once(tmp_path: Path, path: str, body: Any) -> None:
    """In llama-server's words, also while all slots are at work."""
    async with served(tmp_path, slots=1) as it, it.busy():
        answer = await it.post(path, body)
        direct = await it.post(path, body, to=it.fake.url)
        it.fake.go()
    assert answer.status == direct.status == 400
    assert answer.json == direct.json


async def test_without_llama_server_what_is_no_json_is_still_a_fault_of_the_client(tmp_path: Path) -> None:
    """In llamaslot's own words: a 503 would have it sent again and again."""
    async with served(tmp_path) as it:
        await it.fake.kill()
        for path in (CHAT, "/infill"):
            answer = await it.send("POST", path, data=b'{"messages": ')
            assert answer.status == 400
        await it.fake.start()


async def test_a_nul_behind_a_body_hides_nothing_from_llamaslot(tmp_path: Path) -> None:
    """llama-server would read on to the NUL, and take a slot: it is not asked."""
    async with served(tmp_path) as it:
        n_before = len(it.fake.requests)
        answer = await it.send("POST", NATIVE, data=b'{"prompt": "x"}\0')
        assert answer.status == 400
        assert len(it.fake.requests) == n_before


async def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    """As llama-server does it."""
    async with served(tmp_path) as it:
        data = b'\xef\xbb\xbf{"prompt": "' + letters(1, 50).encode() + b'", "n_predict": 1}'
        assert (await it.send("POST", NATIVE, data=data)).status == 200


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("fault", [{"temperature": "hot"}, {"max_tokens": 2**31}, {"n_predict": -5}])
async def test_a_wrong_field_is_refused_while_all_slots_are_at_work(
    tmp_path: Path, fault: dict[str, Any], is_stream: bool
) -> None:
    """It waits for no slot: a stream that has begun could only tell it as an event."""
    body = {"prompt": letters(1, 600), "stream": is_stream, **fault}
    async with served(tmp_path, {"stream": {"keepalive_s": 0.01}}, slots=1) as it, it.busy():
        answer = await it.post(NATIVE, body)
        direct = await it.post(NATIVE, body, to=it.fake.url)
        it.fake.go()
    assert answer.status == direct.status == 400
    assert answer.json == direct.json


# -- what a slot holds after an error ----------------------------------------------------------------------------------


def contents(it: Served) -> list[tuple[SlotState, int]]:
    table = it.backend.leases.table
    assert table is not None
    return [(slot.state, slot.content.n_tokens) for slot in table.slots]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_500_of_the_door_leaves_the_slot_as_it_is(tmp_path: Path, is_stream: bool) -> None:
    """llama-server calls some mistakes of clients so: what the slot holds is asked for, and found again."""
    async with served(tmp_path) as it:
        await it.ask(BASE)
        before = contents(it)
        it.fake.faults.fail(NATIVE)
        assert (await it.ask(BASE + "more", stream=is_stream)).status == 500
        await it.at_rest()
        assert contents(it) == before
        assert (await it.ask(BASE + "more")).json["timings"]["cache_n"] >= len(BASE)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_500_of_a_slot_discredits_it(tmp_path: Path, is_stream: bool) -> None:
    """It was cut back for another prompt, and computed in: nobody knows how far."""
    async with served(tmp_path, slots=1) as it:
        it.backend.streams_are_known = False  # else an answer in one piece is one, too
        await it.ask(BASE)
        it.fake.faults.fail_stream("failed to decode", after_tokens=1)
        await it.ask(MORE, stream=is_stream)
        await it.at_rest()
        assert contents(it) == [(SlotState.SUSPECT, 0)]


async def test_a_refused_prefill_leaves_the_slot_as_it_is(tmp_path: Path) -> None:
    """The request itself goes on from there."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0}}) as it:
        await it.ask(BASE)
        it.fake.faults.fail("/completion")
        answer = await it.ask(BASE + MORE, path=TEXT)
        assert answer.json["timings"]["cache_n"] >= len(BASE)


async def test_a_refused_request_with_several_answers_gives_the_slots_back(tmp_path: Path) -> None:
    """All that it might have taken, with what they hold."""
    async with served(tmp_path, slots=3) as it:
        for seed in (1, 2, 3):
            await it.ask(letters(seed, 500))
        before = contents(it)
        it.fake.faults.fail(NATIVE, 400)
        assert (await it.ask("short", n_cmpl=2)).status == 400
        await it.at_rest()
        assert [state for state, _ in contents(it)] == [SlotState.HOT] * 3
        assert sorted(n for _, n in contents(it)) >= sorted(n for _, n in before)


# -- dry runs that were wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", [NATIVE, CHAT])
@pytest.mark.parametrize("verdict", [Verdict.REFUSED, Verdict.RUNS])
async def test_what_is_taken_after_all_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdict: Verdict, path: str, is_stream: bool
) -> None:
    """llama-server refuses a dry run, or computes it, and takes the request: it gets its answer."""

    async def wrong(*_: Any, **__: Any) -> Verdict:
        return verdict

    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0}}) as it:
        await it.ask(letters(1, 500))
        monkeypatch.setattr(it.backend.dry_runs, "ask", wrong)
        ask = it.chat if path == CHAT else it.ask
        answer = await ask(BASE, stream=is_stream)
        assert answer.status == 200
        if path == NATIVE:
            assert answer.text == right(it.fake, BASE)
        assert (await ask(BASE + "more")).status == 200
