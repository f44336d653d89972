"""The page's routes: what goes on, what was, and what an operator can do about it."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from click.testing import CliRunner

from llamaslot import cli
from llamaslot.config.keys import editing, made_now, new_key
from llamaslot.errors import (
    BackendDown,
    DeadlyPrompt,
    LlamaslotError,
    QueueFull,
    TooManyRequests,
    UpstreamError,
)
from llamaslot.http import in_flight, page_api
from llamaslot.http.in_flight import InFlight, Requests, outcome_of
from llamaslot.http.page import FILES
from llamaslot.http.page_api import PageEvents
from llamaslot.observe.history import History
from llamaslot.sizes import readable_size
from llamaslot.tasks import TaskOwner
from tests.support.inprocess import CHAT, NATIVE, Served, letters, served, spawn
from tests.support.real import free_port
from tests.support.turns import with_turns

HOSTILE = '<img src=x onerror="alert(1)">'


async def activity(it: Served, query: str = "") -> Any:
    return (await it.get(f"/llamaslot/activity{query}")).json


async def ended(it: Served, n: int = 1) -> list[Any]:
    """The last requests, once there are ``n``."""
    while len(found := (await activity(it))["ended"]) < n:  # noqa: ASYNC110  # no event tells it
        await asyncio.sleep(0.01)
    return list(found)


# --- what was


async def test_a_request_is_told_as_llama_server_counts_it(tmp_path: Path) -> None:
    """Its tokens, its place, its times, and why: cold, then from its slot, then from the disk."""
    async with served(tmp_path, slots=1) as it:
        text = letters(1, 800)
        await it.post("/completion", {"prompt": text, "n_predict": 4}, **{"User-Agent": "agent/1"})
        await it.ask(text + letters(2, 100))
        await it.ask(letters(3, 300))
        await it.ask(text + letters(2, 100) + letters(4, 50))
        last, other, second, first = await ended(it, 4)
    assert (first["n_reused"], first["n_computed"], first["n_answered"]) == (0, 800, 4)
    assert first["text"] == "nothing of it was cached: all 800 tokens computed"
    assert (first["client"], first["slot"], first["backend"], first["outcome"]) == (
        "agent/1",
        0,
        "gpu0",
        "done",
    )
    assert second["text"] == f"slot 0 held {second['n_reused']} of 900 tokens"
    assert second["n_reused"] + second["n_computed"] == 900
    assert other["n_reused"] == 0
    assert last["source"] == "snapshot"
    assert last["text"].startswith("restored ")
    assert 0 <= last["queued_s"] <= last["total_s"]


@pytest.mark.parametrize("path", [NATIVE, CHAT])
@pytest.mark.parametrize("is_left", [True, False])
async def test_what_was_answered_before_it_was_left(tmp_path: Path, path: str, is_left: bool) -> None:
    """Left by its client or cancelled: the tokens that were sent count, and those of its prompt."""
    async with served(tmp_path, slots=1, step_s=0.002) as it:
        what = {"prompt": letters(1, 300), "n_predict": 2000}
        if path == CHAT:
            what = {"messages": [{"role": "user", "content": letters(1, 300)}], "max_tokens": 2000}
        headers = {"x-request-id": "mine"}
        async with it.session.post(it.url + path, json={**what, "stream": True}, headers=headers) as stream:
            for _ in range(2 * 20):  # a line and an empty one each
                await stream.content.readline()
            if not is_left:
                await it.post("/llamaslot/cancel?request=mine", None)
                await stream.content.read()
        (latest,) = await ended(it)
        assert latest["outcome"] == ("left" if is_left else "cancelled")
        assert 18 <= latest["n_answered"] < 2000
        assert latest["n_computed"] >= 300
        assert (latest["n_reused"], latest["n_prompt"]) == (0, latest["n_computed"])


async def test_the_timeline_of_a_request(tmp_path: Path) -> None:
    """Asked for by its id; what nobody knows is a 404."""
    async with served(tmp_path, slots=1) as it:
        await it.ask(letters(1, 800))
        await it.ask(letters(2, 800))
        latest = (await ended(it, 2))[0]
        told = await activity(it, f"?request={latest['id']}")
        stages = told["stages"]
        assert (stages[0]["name"], stages[-1]["name"]) == ("read", "answer")
        assert [its["begin_s"] for its in stages] == sorted(its["begin_s"] for its in stages)
        assert stages[-1]["begin_s"] + stages[-1]["seconds"] == pytest.approx(told["total_s"], abs=0.001)
        assert (await it.get("/llamaslot/activity?request=nobody")).status == 404


async def test_the_history_survives_a_restart(tmp_path: Path) -> None:
    """With the users whose conversations are on disk."""
    async with served(tmp_path) as it:
        await it.post(
            "/completion", {"prompt": letters(1, 400), "n_predict": 4}, **{"x-llamaslot-user": "ada"}
        )
        await it.stop()
        await it.start()
        (latest,) = await ended(it)
        assert latest["user"] == "named:ada"
        history = (await it.get("/llamaslot/history?span=hour")).json
        assert sum(point["n_computed"] for point in history["lines"][0]["points"]) == 400
        by = (await it.get("/llamaslot/history?span=month&by=backend")).json
        assert [line["name"] for line in by["lines"]] == ["gpu0"]
        for bad in ("span=year", "by=user"):
            assert (await it.get(f"/llamaslot/history?{bad}")).status == 400


@pytest.mark.parametrize(
    ("status", "error", "is_cancelled", "outcome"),
    [
        (200, None, False, "done"),
        (499, None, False, "left"),
        (499, None, True, "cancelled"),
        (200, BackendDown("away"), False, "unserved"),  # an event in its stream
        (503, QueueFull("full", 1.0), False, "unserved"),
        (429, TooManyRequests("yours", 1.0), False, "refused"),
        (400, UpstreamError(400, b"{}"), False, "refused"),
        (500, UpstreamError(500, b"{}"), False, "unserved"),
        (500, DeadlyPrompt(2, 60.0), False, "unserved"),
        (502, None, False, "unserved"),  # relayed
        (500, LlamaslotError("internal error"), False, "fault"),
    ],
)
def test_only_mistakes_of_llamaslot_are_its_faults(
    status: int, error: LlamaslotError | None, is_cancelled: bool, outcome: str
) -> None:
    """What the headline counts, and what it counts beside that."""
    its = InFlight(1, "mine", None, None, 0.0, 0.0, None)  # type: ignore[arg-type]
    its.status, its.error, its.is_cancelled = status, error, is_cancelled
    assert outcome_of(its) == outcome


# --- what goes on


async def event(stream: aiohttp.ClientResponse) -> tuple[str, Any]:
    """The next event."""
    name = ""
    async with asyncio.timeout(10):
        while (line := await stream.content.readline()) or not stream.content.at_eof():
            if line.startswith(b"event: "):
                name = line[7:].decode().strip()
            elif line.startswith(b"data: "):
                return name, json.loads(line[6:])
    raise AssertionError("the stream has ended")


async def test_changes_are_streamed(tmp_path: Path) -> None:
    """First everything, then what has changed; what is over is null, and told with its row."""
    async with served(tmp_path, slots=1) as it, it.session.get(it.url + "/llamaslot/events") as stream:
        name, state = await event(stream)
        assert name == "all"
        assert {"now", "about", "headline", "store", "backend:gpu0"} == state.keys()
        async with it.busy():
            while not (flights := [key for key in state if key.startswith("flight:")]):
                name, state = await event(stream)
            assert name == "change"
            assert state[flights[0]]["route"] == "/completion"
            async with it.asking(letters(2, 50)):
                await it.until(lambda: it.pool.dispatcher.n_waiting)
                first, waiting = (await activity(it))["in_flight"]
                assert (first["backend"], first["slot"], first["n_tokens"]) == ("gpu0", 0, 200)
                assert (waiting["stage"], waiting["position"]) == ("queued 1st", 1)
            it.fake.go()
            while state.get(flights[0], "") is not None:
                _, state = await event(stream)
            every = (await activity(it))["ended"]
            assert state["ended"]
            assert all(row in every for row in state["ended"])


async def test_nobody_watches_nothing_is_computed(tmp_path: Path) -> None:
    """One producer for all who watch; it ends with the last of them, and with llamaslot."""
    async with served(tmp_path) as it:
        name = "watch for the page"

        def producers() -> int:
            return sum(task.get_name() == name for task in asyncio.all_tasks())

        await it.ask(letters(1, 100))
        assert producers() == 0
        async with it.session.get(it.url + "/llamaslot/events") as one:
            await one.content.readline()
            async with it.session.get(it.url + "/llamaslot/events") as two:
                await two.content.readline()
                assert producers() == 1
        await it.until(lambda: producers() == 0)
        async with it.session.get(it.url + "/llamaslot/events") as last:
            await last.content.readline()
            await it.stop()
            assert (await last.content.read()).startswith(b"data: ")


async def test_a_slow_viewer_gets_the_whole_state_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has missed does not pile up; others, and requests, do not wait for it."""
    monkeypatch.setattr(page_api, "_LEAST_S", 0.0)
    n, changed = 0, asyncio.Event()

    async def state() -> AsyncIterator[tuple[str, Any]]:
        nonlocal n
        n += 1
        yield "big", "x" * 100_000 + str(n)
        yield "small", n // 10

    events = PageEvents(state, changed, TaskOwner())
    app = web.Application()
    app.router.add_get("/", events.watch)
    runner = web.AppRunner(app, shutdown_timeout=1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port := free_port())
    await site.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**12)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    try:
        async with asyncio.timeout(20):
            while n < 40 or not any(viewer.is_behind for viewer in events.viewers):
                changed.set()
                await asyncio.sleep(0.01)
            (viewer,) = events.viewers
            assert viewer.events.qsize() <= 16
            told = b""
            while told.count(b"event: all") < 2:
                told += await reader.read(2**16)
        assert told.count(b"event: ") < n
    finally:
        writer.close()
        await events.close()
        await runner.cleanup()


async def test_other_tasks_run_between_the_parts_of_a_look() -> None:
    """One look in one piece would hold up all streams of answers."""

    async def state() -> AsyncIterator[tuple[str, Any]]:
        for n in range(50):
            yield f"flight:{n}", n

    event, n_turns = await with_turns(PageEvents(state, asyncio.Event(), TaskOwner())._look())
    assert event.startswith(b"event: change\n")
    assert n_turns >= 50


async def test_streams_end_if_the_state_cannot_be_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that pages ask again, and are not shown what is no longer so."""
    states = [1]
    monkeypatch.setattr(page_api, "_LEAST_S", 0.0)
    monkeypatch.setattr(page_api, "_EVERY_S", 0.01)

    async def state() -> AsyncIterator[tuple[str, Any]]:
        yield "n", states.pop()

    events = PageEvents(state, asyncio.Event(), TaskOwner())
    app = web.Application()
    app.router.add_get("/", events.watch)
    async with TestClient(TestServer(app)) as client:
        for told in (1, 0):
            assert (await (await client.get("/")).read()).count(b"data: ") == told
    assert len([text for text in caplog.messages if "watch for the page died" in text]) == 2


async def test_a_restore_is_told_with_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whose conversation was saved for it, while it still runs: that of the request just before it."""
    monkeypatch.setattr(in_flight, "_DIGEST_S", 60.0)  # looked at when it is asked for
    async with served(tmp_path, slots=1) as it:
        first, other = letters(1, 800), letters(2, 700)
        await it.post("/completion", {"prompt": first, "n_predict": 4}, **{"x-llamaslot-user": "ada"})
        await activity(it)
        await it.post("/completion", {"prompt": other, "n_predict": 4}, **{"x-llamaslot-user": "ben"})
        hang = it.fake.faults.hang("restore")
        async with it.asking(first + letters(3, 50)) as asked:
            await hang.reached.wait()
            await it.saved()
            (flight,) = (await activity(it))["in_flight"]
            told = {row["user"]: row for row in (await it.get("/llamaslot/snapshots")).json["snapshots"]}
            assert flight["stage"] == f"restoring {readable_size(told['named:ada']['size_bytes'])}"
            assert {user: row["n_tokens"] // 100 for user, row in told.items()} == {
                "named:ada": 8,
                "named:ben": 7,
            }
            hang.release()
            assert (await asked).status == 200


async def test_a_slot_at_work_has_the_tokens_of_its_request(tmp_path: Path) -> None:
    """Not those of the conversation that was there before."""
    async with served(tmp_path, slots=1, step_s=0.002) as it:
        await it.ask(letters(1, 800))
        body = {"prompt": letters(2, 300), "n_predict": 2000, "stream": True}
        async with it.session.post(it.url + NATIVE, json=body) as stream:
            await stream.content.readline()
            (slot,) = (await it.get("/llamaslot/status")).json["backends"][0]["slots"]
    assert (slot["n_tokens"], slot["is_dirty"]) == (300, True)


# --- what can be done


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_is_cancelled(tmp_path: Path, stream: bool) -> None:
    """Its client is told so, with a status that it does not retry; its slot serves others."""
    async with served(tmp_path, slots=1) as it:
        it.fake.hold()
        body = {"prompt": letters(1, 200), "n_predict": 50, "stream": stream}
        asked = spawn(it.post("/completion", body, **{"x-request-id": "mine"}))
        await it.until(lambda: it.pool.dispatcher.leases)
        assert (await it.post("/llamaslot/cancel?request=other", None)).status == 404
        told = await it.post("/llamaslot/cancel?request=mine", None)
        assert told.json == {"request": "mine"}
        answer = await asked
        it.fake.go()
        assert answer.status == 410
        assert "operator" in answer.error["message"]
        (latest,) = await ended(it)
        assert latest["outcome"] == "cancelled"
        assert (await it.ask(letters(2, 50))).status == 200
        assert await it.count("clients_left_total") == 0


async def test_a_second_cancellation_changes_nothing() -> None:
    """The first one lets the handler go on, to send the error; another one would end it before that."""
    task = spawn(asyncio.sleep(60))
    requests = Requests(None, History(None))  # type: ignore[arg-type]
    requests.running[1] = InFlight(1, "mine", None, None, 0.0, 0.0, task)  # type: ignore[arg-type]
    assert requests.cancel("mine")
    assert requests.cancel("mine")
    assert task.cancelling() == 1
    await asyncio.wait([task])


async def test_requests_to_which_clients_give_one_id(tmp_path: Path) -> None:
    """Each has an id of its own, that its client is told: to cancel one ends no other, in flight or later."""
    async with served(tmp_path, slots=2) as it:
        it.fake.hold()
        asked = []
        for i in range(2):  # one after the other: the first one keeps the id
            body = {"prompt": letters(i, 200)}
            asked.append(spawn(it.post("/completion", body, **{"x-request-id": "mine"})))
            await it.until(lambda: len(it.pool.dispatcher.leases) == len(asked))
        ids = [its["id"] for its in (await activity(it))["in_flight"]]
        assert ids[0] == "mine"
        assert ids[1].startswith("mine~")
        assert (await it.post("/llamaslot/cancel?request=mine", None)).status == 200
        assert (await asked[0]).status == 410
        it.fake.go()
        answer = await asked[1]
        assert (answer.status, answer.headers["x-request-id"]) == (200, ids[1])
        later = await it.post("/completion", {"prompt": "hello"}, **{"x-request-id": "mine"})
        assert later.headers["x-request-id"] not in ids
        told = await activity(it, "?request=mine")
        assert told["outcome"] == "cancelled"


async def test_a_stream_that_has_begun_is_cancelled(tmp_path: Path) -> None:
    """Its last event is the error, in its client's form."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.05}}, slots=1) as it, it.busy():
        body = {"messages": [{"role": "user", "content": letters(2, 60)}], "stream": True}
        async with it.session.post(it.url + CHAT, json=body, headers={"x-request-id": "mine"}) as stream:
            assert await stream.content.readline() == b": queued 1\n"
            await it.post("/llamaslot/cancel?request=mine", None)
            last = (await stream.content.read()).split(b"data: ")[-1]
            assert json.loads(last)["error"]["code"] == 410


async def test_snapshots_are_listed_pinned_and_deleted(tmp_path: Path) -> None:
    """With their users, those with the same beginning side by side; what is deleted is gone from the disk."""
    async with served(tmp_path, slots=1) as it:
        common = letters(9, 640)
        for name in ("ada", "ben", "cleo"):
            prompt = common + letters(len(name) + ord(name[0]), 300)
            await it.post("/completion", {"prompt": prompt, "n_predict": 4}, **{"x-llamaslot-user": name})
        store = it.backend.store
        assert store is not None
        every = store.catalog.snapshots
        await it.until(lambda: sum(its.kind.value == "leaf" for its in every.values()) == 2)
        await ended(it, 3)
        told = (await it.get("/llamaslot/snapshots")).json
        rows = [row for row in told["snapshots"] if row["kind"] == "leaf"]
        assert {row["user"] for row in rows} == {"named:ada", "named:ben"}
        assert sorted(row["n_common"] for row in rows)[-1] == 640
        id_ = rows[0]["id"]
        assert (await it.post(f"/llamaslot/pin?snapshot={id_}", None)).json == {
            "snapshot": id_,
            "is_pinned": True,
        }
        told = (await it.get("/llamaslot/snapshots?max_age_s=60")).json
        assert [row["id"] for row in told["snapshots"] if row["is_pinned"]] == [id_]
        # What `prewarm` has pinned becomes the user's own pin, and stays when `prewarm` names it no longer.
        await store.catalog.change_kind(id_, every[id_].kind, is_pinned=True, is_prewarmed=True)
        await it.post(f"/llamaslot/pin?snapshot={id_}", None)
        assert (every[id_].is_pinned, every[id_].is_prewarmed) == (True, False)
        assert (await it.post(f"/llamaslot/unpin?snapshot={id_}", None)).json["is_pinned"] is False
        assert (await it.post(f"/llamaslot/delete?snapshot={id_}", None)).json["is_pinned"] is None
        assert id_ not in {path.stem for path in it.files()}
        for action in ("pin", "unpin", "delete"):
            assert (await it.post(f"/llamaslot/{action}?snapshot={id_}", None)).status == 404
            assert (await it.post(f"/llamaslot/{action}", None)).status == 400


async def test_pages_that_open_together_share_one_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a restart of llamaslot: twenty lists of 2,000 requests at once would hold up all streams. An answer is
    made again as soon as it would be another.
    """
    n_made = 0

    async def counted(items: Iterable[Any]) -> AsyncGenerator[Any]:
        nonlocal n_made
        n_made += 1
        await asyncio.sleep(0)  # all others ask meanwhile
        for item in items:
            yield item

    monkeypatch.setattr(page_api, "_HISTORY_S", math.inf)
    async with served(tmp_path) as it:
        await it.ask(letters(1, 50))
        await ended(it)
        monkeypatch.setattr(page_api, "in_slices", counted)
        for n, path in enumerate(("activity?n=2000", "history?span=hour", "snapshots?max_age_s=60"), start=1):
            answers = await asyncio.gather(*(it.get(f"/llamaslot/{path}") for _ in range(20)))
            assert (n_made, {answer.status for answer in answers}) == (n, {200}), path
        await it.ask(letters(2, 50))
        await ended(it, 2)
        n_made = 0
        for query in ("?n=2000", "?n=1", "?n=2000&after=1"):
            serials = [[row["serial"] for row in (await activity(it, query))["ended"]] for _ in range(2)]
            assert serials == [[2, 1][: 2 if query == "?n=2000" else 1]] * 2
        assert n_made == 3
        (line,) = (await it.get("/llamaslot/history?span=hour")).json["lines"]
        assert sum(point["n"] for point in line["points"]) == 2


# --- who may


async def test_the_files_need_no_key_and_what_they_show_does(tmp_path: Path) -> None:
    """A browser opens the page, and the page asks for the key."""
    async with served(tmp_path, {"auth": {"admin_key": "a" * 40}}) as it:
        for path, (_, type_) in FILES.items():
            answer = await it.get(path)
            assert (answer.status, answer.headers["Content-Type"]) == (200, type_)
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        for path in ("events", "activity", "history", "snapshots"):
            assert (await it.get(f"/llamaslot/{path}")).status == 401
        for action in ("cancel?request=x", "pin?snapshot=x", "unpin?snapshot=x", "delete?snapshot=x"):
            assert (await it.post(f"/llamaslot/{action}", None)).status == 401
            key = {"Authorization": "Bearer " + "a" * 40}
            assert (await it.post(f"/llamaslot/{action}", None, **key)).status == 404


async def test_the_address_without_a_slash_leads_to_the_page(tmp_path: Path) -> None:
    """Relative, so that it works behind a proxy's prefix; a second look costs no body."""
    async with served(tmp_path) as it:
        assert (await it.get("/llamaslot")).headers["Content-Type"] == "text/html; charset=utf-8"
        first = await it.get("/llamaslot/")
        again = await it.send("GET", "/llamaslot/", headers={"If-None-Match": first.headers["ETag"]})
        assert (again.status, again.raw) == (304, b"")


@pytest.mark.parametrize(
    ("origin", "host", "status"),
    [
        (None, None, 404),
        ("http://127.0.0.1:{port}", None, 404),
        ("http://localhost:{port}", "localhost:{port}", 404),
        ("http://evil.example", None, 403),
        ("http://127.0.0.1:9999", None, 403),
        ("http://evil.example:{port}", "evil.example:{port}", 403),  # DNS rebinding
        ("null", None, 403),
        (None, "[::1", 403),
        ("http://[::1", None, 403),
    ],
)
async def test_other_pages_can_do_nothing(
    tmp_path: Path, origin: str | None, host: str | None, status: int
) -> None:
    """Without a key any page in a browser on this machine could ask."""
    async with served(tmp_path) as it:
        port = it.config.listen.port
        headers = {
            name: value.format(port=port) for name, value in (("Origin", origin), ("Host", host)) if value
        }
        answer = await it.send("POST", "/llamaslot/cancel?request=x", headers=headers)
        assert answer.status == status


@pytest.mark.parametrize(
    "path", ["events?seconds=1", "activity", "history", "snapshots", "status", "metrics", "journal"]
)
async def test_other_pages_read_nothing(tmp_path: Path, path: str) -> None:
    """A GET of a page's own site has no Origin, and DNS rebinding makes this machine a site of others."""
    async with served(tmp_path) as it:
        for host, status in (("evil.example", 403), ("localhost", 200), ("[::1]", 200), ("0.0.0.0", 200)):
            headers = {"Host": f"{host}:{it.config.listen.port}"}
            async with it.session.get(f"{it.url}/llamaslot/{path}", headers=headers) as answer:
                assert answer.status == status


async def test_names_that_clients_make_up_are_no_models_of_the_history(tmp_path: Path) -> None:
    """While no model is known, any name is accepted; the sums of each model are kept for ever."""
    async with served(tmp_path, wait=False) as it:
        await it.start(wait=False)
        for name in ("one", "two", "three"):
            assert (await it.chat("hello", model=name)).status == 503
        told = (await it.get("/llamaslot/activity")).json
        assert [ended["model"] for ended in told["ended"]] == ["three", "two", "one"]
        assert (await it.get("/llamaslot/history?by=model")).json["lines"] == []
        (line,) = (await it.get("/llamaslot/history")).json["lines"]
        assert sum(point["n"] for point in line["points"]) == 3


async def test_behind_a_proxy_the_key_is_enough(tmp_path: Path) -> None:
    """Which browsers send to no other site; a proxy may change the Host, and then the Origin is another."""
    async with served(tmp_path, {"auth": {"admin_key": "a" * 40}}) as it:
        headers = {"Origin": "https://llm.example.com", "Authorization": "Bearer " + "a" * 40}
        assert (await it.send("POST", "/llamaslot/cancel?request=x", headers=headers)).status == 404
        asked = await it.send("POST", "/llamaslot/cancel?request=" + "x" * 5000, headers=headers)
        assert (asked.status, len(asked.error["message"]) < 200) == (404, True)


async def test_a_removed_key_watches_no_longer(tmp_path: Path) -> None:
    """Its stream ends within about a second, before it tells what others do; that of another key goes on."""
    file = tmp_path / "keys.json"
    ops, gone = new_key(), new_key()
    with editing(file) as keys:
        keys += [made_now("ops", ops, is_admin=True), made_now("gone", gone, is_admin=True)]
    async with served(tmp_path, {"auth": {"keys_file": str(file)}}) as it:
        url = it.url + "/llamaslot/events"
        async with (
            it.session.get(url, headers={"Authorization": f"Bearer {ops}"}) as stays,
            it.session.get(url, headers={"Authorization": f"Bearer {gone}"}) as leaves,
        ):
            await event(stays)
            await event(leaves)
            with editing(file) as keys:
                keys[:] = [key for key in keys if key.name == "ops"]
            async with asyncio.timeout(5):
                await leaves.content.read()
            assert not stays.content.at_eof()


async def test_a_status_is_found_at_an_address(tmp_path: Path) -> None:
    """``llamaslot demo`` has no file of configuration; where none answers, one line says so."""
    async with served(tmp_path) as it:
        for url, code, said in (
            (it.url, 0, "llamaslot "),
            (it.url + "/", 0, "gpu0/0"),
            (f"http://127.0.0.1:{free_port()}", 2, "no llamaslot answers on"),
            (it.fake.url, 2, "is that a llamaslot?"),
            (it.url.removeprefix("http://"), 0, "llamaslot "),
            ("ftp://127.0.0.1:8081", 2, "an address is wanted"),
        ):
            result = await asyncio.to_thread(CliRunner().invoke, cli.main, ["status", "--url", url])
            assert (result.exit_code, said in result.output) == (code, True), result.output


async def test_top_without_a_terminal_prints_again_and_again(tmp_path: Path) -> None:
    """Into a pipe or a file: it showed nothing there until its end."""
    async with served(tmp_path) as it:
        words = ("-m", "llamaslot", "top", "--url", it.url, "--every", "0.2")
        process = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=asyncio.subprocess.PIPE)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                heads = [line async for line in firsts(process.stdout, b"llamaslot ", 2)]
        finally:
            process.kill()
            await process.wait()
    assert all(b"of 2 slots work" in head for head in heads)


async def firsts(lines: asyncio.StreamReader, start: bytes, n: int) -> AsyncIterator[bytes]:
    """The first ``n`` lines that begin so."""
    while n:
        line = await lines.readline()
        assert line, "it has ended"
        if line.startswith(start):
            n -= 1
            yield line


async def test_names_of_others_are_only_text(tmp_path: Path) -> None:
    """A User-Agent and a model's name with markup, cut to a length that a table bears."""
    async with served(tmp_path) as it:
        body = {"prompt": letters(1, 50), "n_predict": 1, "model": HOSTILE}
        await it.post("/completion", body, **{"User-Agent": HOSTILE + "x" * 1000})
        (latest,) = await ended(it)
        assert latest["client"].startswith(HOSTILE)
        assert len(latest["client"]) == 200
        answer = await it.get("/llamaslot/activity")
        assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
