"""Requests with images or audio: placed by what comes before them, and never downloaded twice."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_model import FakeModel
from tests.support.inprocess import CHAT, NATIVE, Served, letters, of_kind, served, spawn
from tests.web.test_leaving import leave

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TEXT, OTHER = letters(1, 700), letters(2, 700)
IMAGES = {
    CHAT: {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
    RESPONSES: {"type": "input_image", "image_url": "http://127.0.0.1:9/a.png"},
    MESSAGES: {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1:9/a.png"}},
}
MARKER = "<__media_told__>"  # as /props tells it
AHEAD = {"prefill": {"chunk_threshold_s": 0}}
SEEING: dict[str, Any] = {"model": FakeModel(takes_media=True)}


@pytest.fixture(autouse=True)
def marker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for every process of the fake."""
    monkeypatch.setattr("tests.support.fake.random_name", lambda: "told")


def said(path: str, text: str, *behind: str, **more: Any) -> dict[str, Any]:
    """``text``, an image, and what comes behind it."""
    if path == NATIVE:
        whole = MARKER.join([text, "".join(behind)])
        return {"prompt": {"prompt_string": whole, "multimodal_data": ["aGk="]}, "n_predict": 4, **more}
    kind = "input_text" if path == RESPONSES else "text"
    parts = [{"type": kind, "text": text}, IMAGES[path], *({"type": kind, "text": one} for one in behind)]
    name = "input" if path == RESPONSES else "messages"
    limit = "max_output_tokens" if path == RESPONSES else "max_tokens"
    return {name: [{"role": "user", "content": parts}], limit: 4, "temperature": 0, **more}


def n_ahead(it: Served) -> list[int]:
    """The lengths of what was computed ahead, by llamaslot's own requests."""
    own = (seen for seen in it.fake.sent(NATIVE) if seen.body.get("n_predict") == 0)
    return [len(seen.body["prompt"]) for seen in own if len(seen.body["prompt"]) > 300]


async def saved(it: Served) -> list[Path]:
    await it.backend.idle_save.save_all()
    await it.saved()
    return it.files()


@pytest.mark.parametrize("path", [CHAT, NATIVE, RESPONSES])
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("settings", [{}, AHEAD], ids=["at once", "ahead"])
async def test_it_goes_where_its_text_is(tmp_path: Path, path: str, stream: bool, settings: Any) -> None:
    """Also the next turn, which has the same image: nothing of both is computed again. The answer is the server's."""
    async with served(tmp_path, settings, slots=3, **SEEING) as it:
        bodies = [said(path, TEXT, *more, stream=stream) for more in ((), ("and more",))]
        direct = [await it.post(path, {**body, "id_slot": 2}, to=it.fake.url) for body in bodies]
        first = await it.post(path, bodies[0])
        others = [await it.ask(letters(n, 400)) for n in (8, 9)]
        second = await it.post(path, bodies[1])
        assert [first.text, second.text] == [one.text for one in direct]
        assert first.slot == second.slot
        assert first.slot not in {other.slot for other in others}
        task = it.fake.sent(path)[-1].tasks[0]
        assert task.n_cache >= 800, "the text and the image"
        ahead = n_ahead(it)
        assert ahead[:1] in ([], [699], [705])
        assert ahead[1:] == ([399, 399] if settings else []), (
            "nothing of the next turn, for its media are there"
        )
        if stream and path == RESPONSES:  # tells at its end only what was reused
            assert int(second.headers["x-llamaslot-expected-tokens"]) > 0
        else:
            assert second.source == "resident"


@pytest.mark.parametrize("path", [CHAT, NATIVE, RESPONSES])
async def test_its_text_comes_back_from_disk(tmp_path: Path, path: str) -> None:
    """Where a conversation without media was saved that begins so."""
    async with served(tmp_path, AHEAD, slots=1, **SEEING) as it:
        body = said(path, TEXT)
        if path == NATIVE:
            await it.ask(TEXT)
        else:
            await it.chat(TEXT)
        await it.ask(OTHER)
        answer = await it.post(path, body)
        assert answer.source == "snapshot"
        assert answer.n_reused is not None
        assert answer.n_reused >= 690


@pytest.mark.parametrize("kind", ["swa", "recurrent"])
@pytest.mark.parametrize("settings", [{}, AHEAD], ids=["at once", "ahead"])
async def test_models_that_cannot_go_back(tmp_path: Path, kind: str, settings: Any) -> None:
    """Nothing is expected that is not found, and answers are right."""
    options = of_kind(kind, tmp_path)
    options["model"] = replace(options.get("model", FakeModel()), takes_media=True)
    async with served(tmp_path, settings, slots=3, **options) as it:
        bodies = [said(CHAT, TEXT, *more) for more in ((), ("and more",), ("or else",))]
        direct = [await it.post(CHAT, {**body, "id_slot": 2}, to=it.fake.url) for body in bodies]
        answers = [await it.post(CHAT, body) for body in bodies]
        assert [one.text for one in answers] == [one.text for one in direct]
        assert n_ahead(it).count(705) == bool(settings), "where the text is, its image is left in the slot"
        assert await it.count("reuse_mispredictions_total") == 0
        assert await it.count("completions_untokenized_total") == 0


async def test_a_slot_with_media_is_not_saved(tmp_path: Path) -> None:
    """Neither before it is overwritten nor at the end; nor is it predicted to hold more than its text."""
    async with served(tmp_path, slots=1, **SEEING) as it:
        await it.post(CHAT, said(CHAT, TEXT))
        assert it.backend.leases.table is not None
        assert not it.backend.leases.table.slots[0].content.is_dirty, "nothing waits to be saved"
        assert await saved(it) == []
        content = it.backend.leases.table.slots[0].content
        assert (content.has_media, content.is_exact, content.n_more) == (True, False, 0)
        n_text = content.n_tokens
        assert 700 < n_text < 740
        await it.ask(OTHER)
        assert len(await saved(it)) == 1, "the other one's"
        again = await it.chat(TEXT + "more")
        assert again.n_reused == 0


async def test_a_text_that_takes_the_slot_over_is_saved(tmp_path: Path) -> None:
    """What begins as it did goes on from the text, and then nothing but text is there."""
    async with served(tmp_path, slots=1, **SEEING) as it:
        await it.post(CHAT, said(CHAT, TEXT))
        again = await it.chat(TEXT + "more")
        assert again.timings["cache_n"] >= 700
        assert len(await saved(it)) == 1


async def test_who_leaves_leaves_its_text(tmp_path: Path) -> None:
    """In the middle of the answer: the slot is known up to the image, and not saved."""
    async with served(tmp_path, slots=1, **SEEING) as it:
        it.fake.hold()
        leaver = spawn(it.post(CHAT, said(CHAT, TEXT, stream=True, max_tokens=50)))
        await it.fake.wait_for(lambda f: f.slots[0].is_processing)
        await it.fake.step(3)
        await leave(leaver)
        it.fake.go()
        await it.at_rest()
        assert it.backend.leases.table is not None
        content = it.backend.leases.table.slots[0].content
        assert (content.has_media, content.n_more) == (True, 0), "tokens of the image are no answer's"
        assert await saved(it) == []
        again = await it.chat(TEXT + "more")
        assert again.n_reused is not None
        assert 700 <= again.n_reused <= 740


async def test_messages_with_images_take_a_turn(tmp_path: Path) -> None:
    """llama-server chooses their slot, by the share that it has of a prompt of which nobody knows the length."""
    async with served(tmp_path, slots=2, **SEEING) as it:
        for _ in range(2):
            assert (await it.post(MESSAGES, said(MESSAGES, TEXT))).status == 200
        (task,) = it.fake.sent(MESSAGES)[-1].tasks
        assert task.n_cache > 700
        assert it.backend.leases.table is not None
        assert task.landed is not None
        assert it.backend.leases.table.slots[task.landed].content.has_media
        assert await it.count('completions_untokenized_total{kind="messages",reason="media"}') == 2


@pytest.mark.parametrize("is_on_disk", [True, False])
async def test_a_long_text_before_an_image_of_messages(tmp_path: Path, is_on_disk: bool) -> None:
    """Is restored, or computed ahead, as of any prompt; and of the next turn nothing is."""
    async with served(tmp_path, AHEAD, slots=2, **SEEING) as it:
        if is_on_disk:
            await it.chat(TEXT)
        for n in (8, 9):
            await it.ask(letters(n, 400))
        before, asked = len(n_ahead(it)), said(MESSAGES, TEXT)
        direct = await it.post(MESSAGES, asked)
        assert it.fake.sent(MESSAGES)[-1].tasks[0].n_cache >= 690
        assert n_ahead(it)[before:] == ([] if is_on_disk else [705])
        assert (await it.post(MESSAGES, asked)).text == direct.text
        assert it.fake.sent(MESSAGES)[-1].tasks[0].n_cache > 800, "the image, too"
        assert len(n_ahead(it)) == before + (not is_on_disk)


@pytest.mark.parametrize("path", [CHAT, NATIVE, RESPONSES, MESSAGES])
async def test_a_server_that_takes_none_says_so(tmp_path: Path, path: str) -> None:
    """In its own words; nobody loses a slot, and no text is computed for it."""
    async with served(tmp_path, AHEAD, slots=1) as it:
        kept = await it.ask(OTHER)
        answer = await it.post(path, said(path, TEXT))
        direct = await it.post(path, said(path, TEXT), to=it.fake.url)
        assert (answer.status, answer.json) == (direct.status, direct.json)
        assert answer.status == (400 if path == NATIVE else 500)
        if path != MESSAGES:
            assert len(n_ahead(it)) == 1
            assert (await it.ask(OTHER + "more")).n_reused == kept.json["tokens_cached"] - 3


async def test_an_image_that_comes_first_of_all(tmp_path: Path) -> None:
    """Nothing is known then, but what the template puts in front."""
    async with served(tmp_path, **SEEING) as it:
        assert (await it.post(CHAT, said(CHAT, ""))).status == 200
        assert (await it.post(NATIVE, said(NATIVE, ""))).status == 200
        assert await it.count('completions_untokenized_total{kind="native-completion",reason="media"}') == 1


async def test_what_was_computed_ahead_and_not_found(tmp_path: Path) -> None:
    """The template shows media in front of all text: that is counted, and the answer is right all the same."""
    async with served(tmp_path, AHEAD, model=FakeModel(takes_media=True, moves_media=True)) as it:
        direct = await it.post(CHAT, said(CHAT, TEXT), to=it.fake.url)
        answer = await it.post(CHAT, said(CHAT, TEXT))
        assert answer.text == direct.text
        assert await it.count('completions_untokenized_total{kind="chat",reason="template"}') == 1


async def test_a_list_of_prompts_with_media_keeps_its_slot_to_the_last(tmp_path: Path) -> None:
    """Each has an end in the stream; llama-server is through with the slot after the last."""
    prompts = [said(NATIVE, text)["prompt"] for text in (TEXT, OTHER)]
    async with served(tmp_path, slots=2, step_s=0.005, **SEEING) as it:
        body = {"prompt": prompts, "n_predict": 30, "stream": True}
        n_ends, n_leases = 0, list[int]()
        async with it.session.post(it.url + NATIVE, json=body) as response:
            async for line in response.content:
                if b'"stop":true' in line.replace(b" ", b""):
                    n_ends += 1
                    n_leases.append(len(it.pool.dispatcher.leases))
        assert n_ends == 2
        assert n_leases[0] >= 1


async def test_other_slots_before_the_text_ahead_of_an_image_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that is another one by then: the request is served all the same."""
    async with served(tmp_path, AHEAD, slots=2, **SEEING) as it:
        steps, n_prepared = it.backend.executor, itertools.count()
        prepare = steps.prepare

        async def late(*given: Any, **more: Any) -> Any:
            if next(n_prepared) == 0:
                it.backend.changed("/lora-adapters was called")
            return await prepare(*given, **more)

        monkeypatch.setattr(steps, "prepare", late)
        assert (await it.post(MESSAGES, said(MESSAGES, TEXT))).status == 200
