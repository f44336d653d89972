"""``cache.isolation: per_user``: what one user has computed is found by nobody else, on no way."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answer
from tests.support.fake_model import FakeModel
from tests.support.inprocess import (
    CHAT,
    NATIVE,
    Served,
    Settings,
    letters,
    line_with,
    of_kind,
    right,
    served,
    spawn,
)

MESSAGES = "/v1/messages"
PER_USER: Settings = {"cache": {"isolation": "per_user"}}
KINDS = pytest.mark.parametrize("kind", ["dense", "swa", "recurrent"])


async def ask_as(it: Served, user: str, text: str, **more: object) -> Answer:
    body = {"prompt": text, "n_predict": 4, "temperature": 0, **more}
    return await it.post("/completion", body, **{"x-llamaslot-user": user})


def reused(answer: Answer) -> int:
    """By llama-server's own count."""
    return int(answer.timings["cache_n"])


@KINDS
async def test_a_prompt_that_another_user_has_just_sent_is_computed_whole(tmp_path: Path, kind: str) -> None:
    """And one's own is not."""
    text = letters(1, 600)
    async with served(tmp_path, PER_USER, **of_kind(kind, tmp_path)) as it:
        assert reused(await ask_as(it, "anna", text)) == 0
        bert = await ask_as(it, "bert", text)
        assert (reused(bert), bert.n_reused, bert.source) == (0, 0, "cold")
        assert reused(await ask_as(it, "anna", text + " and more")) > 500
        assert reused(await ask_as(it, "bert", text + " or less")) > 500
        assert bert.text == right(it.fake, text)


async def test_not_even_where_both_must_use_the_same_slot(tmp_path: Path) -> None:
    """llama-server would go on from what is there: it is saved, and emptied first; its owner gets it back."""
    text = letters(1, 600)
    async with served(tmp_path, PER_USER, slots=1) as it:
        await ask_as(it, "anna", text)
        assert reused(await ask_as(it, "bert", text)) == 0
        anna = await ask_as(it, "anna", text + " and more")
        assert (anna.source, reused(anna)) == ("snapshot", 600)
        await it.saved()
        assert len(it.files()) == 2


async def test_a_slot_that_is_only_erased_is_told_as_that(tmp_path: Path) -> None:
    """``: clearing slot``, for nothing is restored into it."""
    settings = {**PER_USER, "stream": {"keepalive_s": 0.02}}
    async with served(tmp_path, settings, slots=1) as it:
        await ask_as(it, "anna", letters(1, 600))
        hang = it.fake.faults.hang("erase")
        asked: dict[str, Any] = {"json": {"prompt": letters(2, 600), "n_predict": 4, "stream": True}}
        async with it.session.post(it.url + NATIVE, headers={"x-llamaslot-user": "bert"}, **asked) as stream:
            await line_with(stream, ": clearing slot")
            hang.release()
            await line_with(stream, '"stop":true')


@pytest.mark.parametrize("backend", [{}, {"slot_save_path": None}], ids=["to save in", "to no end"])
async def test_where_slots_cannot_be_emptied_no_request_is_served(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, backend: Settings
) -> None:
    """Without ``--slot-save-path`` llama-server has no slot actions: whoever asks is told what to do."""
    settings = {**PER_USER, "backend": backend}
    async with served(tmp_path, settings, wait=False, has_save_path=False) as it:
        await it.fake.start()
        await it.start(wait=False)
        await it.until(lambda: "Start it with --slot-save-path DIR" in caplog.text)
        answer = await ask_as(it, "anna", letters(1, 600))
        assert answer.status == 503
        assert "Start it with --slot-save-path DIR" in answer.raw.decode()
        assert it.n_computed(letters(1, 600)) == 0


async def test_slots_can_be_emptied_though_nothing_is_saved(tmp_path: Path) -> None:
    """Where only llama-server has a directory."""
    settings = {**PER_USER, "backend": {"slot_save_path": None}}
    async with served(tmp_path, settings, slots=1) as it:
        await ask_as(it, "anna", letters(1, 600))
        assert reused(await ask_as(it, "bert", letters(1, 600))) == 0


async def test_what_was_restored_is_not_found_where_the_server_falls_silent(tmp_path: Path) -> None:
    """The slot holds it, though nobody could ask whether that is still the same server."""
    text = letters(1, 600)
    async with served(tmp_path, PER_USER, slots=1) as it:
        await ask_as(it, "anna", text)
        await ask_as(it, "bert", letters(2, 600))  # anna's is on disk now
        restore = it.fake.faults.hang("restore")
        anna = spawn(ask_as(it, "anna", text + " and more"))
        await restore.reached.wait()
        for _ in range(2):  # aiohttp asks a second time
            it.fake.faults.disconnect_before_headers("/props")
        restore.release()
        await anna
        await it.at_rest()
        assert reused(await ask_as(it, "carl", text)) == 0


async def test_others_go_on_while_a_request_waits_for_another_users_answer(tmp_path: Path) -> None:
    """Also if a request for several slots waits for him, who is between two steps."""
    body = {"messages": [{"role": "user", "content": letters(1, 300)}], "max_tokens": 4000, "stream": True}
    several = {"prompt": "y", "n_predict": 1, "n_cmpl": 2}
    async with served(tmp_path, PER_USER, slots=6) as it:
        turns, dispatcher = it.backend.exclusive, it.pool.dispatcher
        it.fake.hold()
        clients = [spawn(it.post(MESSAGES, body, **{"x-llamaslot-user": "anna"}))]
        while not any(lease.is_running for lease in dispatcher.leases):
            await it.fake.step()
        clients.append(spawn(it.post(MESSAGES, body, **{"x-llamaslot-user": "bert"})))
        while not turns._clearing:
            await it.fake.step()
        assert not any(lease.is_latency_sensitive for lease in turns._clearing), (
            "nobody's prefill is held up for so long"
        )
        clients.append(spawn(it.post(NATIVE, several, **{"x-llamaslot-user": "carl"})))
        await it.until(lambda: it.backend.leases.exclusive is not None)
        dave = spawn(ask_as(it, "dave", letters(5, 50)))
        while not dave.done():
            await it.fake.step()
        assert (await dave).status == 200
        assert not any(client.done() for client in clients)
        for client in clients:
            client.cancel()
        await asyncio.wait(clients)
        it.fake.go()
        await it.at_rest()


async def test_what_is_on_disk_is_not_found_by_others_either(tmp_path: Path) -> None:
    """Also not after a restart of llamaslot, when only the files are left."""
    text = letters(1, 600)
    async with served(tmp_path, PER_USER) as it:
        await ask_as(it, "anna", text)
        await it.restart()
        await it.fake.restart()
        bert = await ask_as(it, "bert", text)
        assert (bert.source, reused(bert)) == ("cold", 0)
        anna = await ask_as(it, "anna", text + " and more")
        assert (anna.source, reused(anna)) == ("snapshot", 600)


async def test_no_request_waits_for_what_another_user_computes(tmp_path: Path) -> None:
    """Two new conversations that begin alike, at once: each computes its own."""
    settings = {**PER_USER, "prefill": {"chunk_threshold_s": 0}}
    text = letters(1, 2000)
    async with served(tmp_path, settings, slots=2) as it:
        both = await asyncio.gather(
            *(spawn(ask_as(it, user, text + letters(n, 50))) for n, user in enumerate(("anna", "bert"), 2))
        )
        assert all(answer.status == 200 for answer in both)
        assert it.n_computed(text) >= 2 * 2000


async def test_what_one_computes_oneself_is_waited_for(tmp_path: Path) -> None:
    """Two new conversations of the same user: what they begin with is computed once, and found on its way."""
    settings = {**PER_USER, "prefill": {"chunk_threshold_s": 0}}
    text = letters(1, 2000)
    async with served(tmp_path, settings, slots=2) as it:
        it.backend.rates.prefill.observe(0, 2000, 20.0)  # so dear that waiting is cheaper
        both = await asyncio.gather(*(spawn(ask_as(it, "anna", text + letters(n, 50))) for n in (2, 3)))
        assert all(answer.status == 200 for answer in both)
        assert it.n_computed(text) < 2 * 2000


async def test_where_llama_server_chooses_it_is_ones_own_slot(tmp_path: Path) -> None:
    """Of two that have the prompt of ``/v1/messages`` it would take the other user's: that is saved and emptied."""
    body = {"messages": [{"role": "user", "content": letters(1, 600)}], "max_tokens": 4}
    async with served(tmp_path, PER_USER) as it:
        anna, bert, again = [
            await it.post(MESSAGES, body, **{"x-llamaslot-user": user}) for user in ("anna", "bert", "anna")
        ]
        landed = [seen.tasks[0].landed for seen in it.fake.sent(MESSAGES)]
    assert [answer.status for answer in (anna, bert, again)] == [200] * 3
    assert landed == [answer.slot for answer in (anna, bert, again)]
    assert anna.slot != bert.slot
    assert (bert.n_reused, again.source) == (0, "snapshot")


UNREAD = {"type": "document", "source": {}}  # with it nobody knows the tokens: llama-server chooses the slot


@pytest.mark.parametrize("more", [(), (UNREAD,)], ids=["steered", "in turn"])
async def test_a_slot_that_cannot_be_emptied_is_not_for_the_next_user(tmp_path: Path, more: Any) -> None:
    """llama-server would go on from it: nothing is sent, and the client learns what to do. Later it can be had."""
    text = {"type": "text", "text": letters(1, 600)}
    body = {"messages": [{"role": "user", "content": [text, *more]}], "max_tokens": 4}
    annas = {"messages": [{"role": "user", "content": [text]}], "max_tokens": 4}
    async with served(tmp_path, PER_USER) as it:
        await it.post(CHAT, annas, **{"x-llamaslot-user": "anna"})
        it.fake.faults.fail("erase")
        refused = await it.post(MESSAGES, body, **{"x-llamaslot-user": "bert"})
        assert refused.status == 503
        assert "Try again" in refused.raw.decode()
        assert "Retry-After" in refused.headers
        assert it.fake.sent(MESSAGES) == []
        await it.at_rest()
        again = await it.post(MESSAGES, body, **{"x-llamaslot-user": "bert"})
        assert again.status == 200
        assert it.n_computed(f"<|im_start|>user\n{text['text']}") >= 2 * 600


@pytest.mark.parametrize("more", [(), (UNREAD,)], ids=["steered", "in turn"])
async def test_where_all_share_a_slot_that_cannot_be_emptied_blocks_no_request(
    tmp_path: Path, more: Any
) -> None:
    """A request that lands there costs time at most."""
    async with served(tmp_path) as it:
        it.fake.faults.fail_stream("failed to decode", after_tokens=1)
        await it.ask(letters(1, 600))  # and now nobody knows what its slot holds
        it.fake.faults.fail("erase", times=10)
        text = {"type": "text", "text": letters(2, 600)}
        body = {"messages": [{"role": "user", "content": [text, *more]}], "max_tokens": 4}
        assert (await it.post(MESSAGES, body)).status == 200


@pytest.mark.parametrize(("settings", "status"), [(PER_USER, 503), ({}, 200)], ids=["isolated", "shared"])
async def test_a_prompt_that_could_not_be_computed_ahead(
    tmp_path: Path, settings: Settings, status: int
) -> None:
    """Its own slot has nothing of it, so llama-server would choose one that begins alike, whosever that is."""
    async with served(tmp_path, settings) as it:
        annas, berts = (
            {"messages": [{"role": "user", "content": letters(1, 500) + letters(n, 50)}], "max_tokens": 4}
            for n in (2, 3)
        )
        await it.post(MESSAGES, annas, **{"x-llamaslot-user": "anna"})
        it.fake.faults.fail(NATIVE)
        answer = await it.post(MESSAGES, berts, **{"x-llamaslot-user": "bert"})
        assert answer.status == status
        assert ("could not prefill" in answer.raw.decode()) == (status == 503)
        assert len(it.fake.sent(MESSAGES)) == 1 + (status == 200)
        assert (await it.post(MESSAGES, berts, **{"x-llamaslot-user": "bert"})).status == 200


async def test_slots_that_an_earlier_llamaslot_has_filled_are_nobodys(tmp_path: Path) -> None:
    """Whose they are is written nowhere: nothing of them is saved, where all could find it without isolation."""
    text = letters(1, 600)
    async with served(tmp_path, {**PER_USER, "shutdown": {"save_s": 0}}) as it:
        await ask_as(it, "anna", text)
        await it.restart()
        assert it.files() == []
        for user in ("bert", "anna"):
            assert reused(await ask_as(it, user, text)) == 0


async def test_not_even_where_they_could_not_be_emptied_at_the_start(tmp_path: Path) -> None:
    """Nobody knows what they hold: that is emptied before their next use, or not used."""
    text = letters(1, 600)
    async with served(tmp_path, {**PER_USER, "shutdown": {"save_s": 0}}) as it:
        await ask_as(it, "anna", letters(5, 300))
        await ask_as(it, "anna", text)
        await it.stop()
        it.fake.faults.fail("erase", times=3)
        await it.start()
        answers = [await ask_as(it, user, text) for user in ("bert", "carl", "bert")]
        assert [reused(answer) for answer in answers] == [0, 0, 599]


async def test_who_switches_isolation_on_finds_nothing_of_before(tmp_path: Path) -> None:
    """What all have shared may be anybody's."""
    text = letters(1, 600)
    async with served(tmp_path) as it:
        await ask_as(it, "anna", text)
    async with served(tmp_path, PER_USER) as it:
        assert reused(await ask_as(it, "anna", text)) == 0


async def test_who_switches_it_off_finds_nothing_of_before_either(tmp_path: Path) -> None:
    """Not even the owner: what is his is not everybody's, and now he is one of all."""
    text = letters(1, 600)
    async with served(tmp_path, PER_USER) as it:
        await ask_as(it, "anna", text)
    async with served(tmp_path) as it:
        assert len(it.files()) == 1
        assert reused(await ask_as(it, "anna", text)) == 0


@KINDS
async def test_what_prewarm_names_is_for_all(tmp_path: Path, kind: str) -> None:
    """And what users add to it is theirs."""
    system = {"role": "system", "content": letters(1, 1200)}
    (tmp_path / "coder.json").write_text(json.dumps({"messages": [system]}))
    settings: Settings = {**PER_USER, "prewarm": ["coder.json"], "store": {"idle_save_s": 0.05}}
    async with served(tmp_path, settings, **of_kind(kind, tmp_path)) as it:
        await it.until(lambda: len(it.files()) == 1)
        await it.until(lambda: it.backend.leases.table and it.backend.leases.table.prewarmed())
        question = {"role": "user", "content": letters(2, 300)}
        answers = {}
        for user in ("anna", "bert"):
            body = {"messages": [system, question], "max_tokens": 4, "temperature": 0}
            answers[user] = await it.post(CHAT, body, **{"x-llamaslot-user": user})
        for answer in answers.values():
            assert 1200 <= reused(answer) < 1300, "the system part, and nothing of the question"


QUESTION: dict[str, Any] = {"role": "user", "content": "and now?"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}
TURNS = [{"role": "user", "content": letters(1, 900)}, {"role": "assistant", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [*TURNS, QUESTION]}),
        (CHAT, {"messages": [*TURNS, {**QUESTION, "content": [{"type": "text", "text": "and?"}, IMAGE]}]}),
        (NATIVE, {"prompt": f"<|im_start|>{letters(1, 900)}<|im_end|>\n<|im_start|>and now?"}),
    ],
    ids=["chat", "image", "prompt"],
)
async def test_tokens_of_texts_are_remembered_for_each_user(tmp_path: Path, path: str, body: Any) -> None:
    """Tokenizing takes 7 ms per 1,000 tokens: who has it done already could be told by that."""
    async with served(tmp_path, PER_USER, model=FakeModel(takes_media=True)) as it:

        async def tokenized(user: str) -> int:
            n_before = len(it.fake.sent("/tokenize"))
            await it.post(path, {**body, "max_tokens": 2}, **{"x-llamaslot-user": user})
            sent = it.fake.sent("/tokenize")[n_before:]
            return max(len(seen.body["content"]) for seen in sent)

        first = await tokenized("anna")  # and special tokens are learned, at which texts can be cut
        await tokenized("anna")
        assert await tokenized("anna") < 0.5 * first
        assert await tokenized("bert") == first
