"""Routes that are no completions: passed on, answered by llamaslot itself, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import CHAT, letters, served, spawn


@pytest.mark.parametrize(
    "path", ["/v1/models", "/props", "/slots", "/metrics", "/lora-adapters", "/nothing?a=%20b"]
)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS"])
async def test_questions_pass_through(tmp_path: Path, path: str, method: str) -> None:
    """Status, body and headers are the server's, but for what it says to web pages; the path is not rewritten."""
    async with served(tmp_path) as it:
        answer = await it.send(method, path)
        seen = it.fake.requests[-1]
        direct = await it.send(method, path, to=it.fake.url)
    assert answer.status == direct.status
    assert seen.method == method
    assert seen.path + ("?" if "?" in path else "") in path + "?"
    assert seen.query == ({"a": " b"} if "?" in path else {})
    if path not in ("/metrics", "/v1/models"):
        assert answer.raw == direct.raw
    ours = {"Server", "Date", "Connection", "Keep-Alive"}
    ours |= {name for name in direct.headers if name.startswith("Access-Control-")}
    assert {
        k: v for k, v in answer.headers.items() if k not in ours | {"Content-Length", "Transfer-Encoding"}
    } == {k: v for k, v in direct.headers.items() if k not in ours | {"Content-Length", "Transfer-Encoding"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"content": "hi"}),
        ("/detokenize", {"tokens": [104, 105]}),
        ("/apply-template", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/messages/count_tokens", {"messages": []}),
    ],
)
async def test_posts_pass_through(tmp_path: Path, path: str, body: Any) -> None:
    """With their bodies, while all slots are at work."""
    async with served(tmp_path, slots=1) as it, it.busy():
        answer = await it.post(path, body)
        assert it.fake.sent(path)[-1].body == body
        direct = await it.post(path, body, to=it.fake.url)
        it.fake.go()
    assert (answer.status, answer.raw) == (direct.status, direct.raw)


FORBIDDEN = [
    ("POST", "/slots/0?action=erase", "slots belong to llamaslot"),
    ("POST", "/slots/1?action=save", "slots belong to llamaslot"),
    ("POST", "/slots%2f0?action=erase", "slots belong to llamaslot"),
    ("POST", "//slots/../slots/0?action=erase", "slots belong to llamaslot"),
    ("POST", "/predict", "other routes"),
]
GATED = [
    ("POST", "/props", "POST /props"),
    ("POST", "/lora-adapters", "/lora-adapters"),
    ("POST", "/models/load", "/models"),
    ("GET", "/tools", "/tools"),
    ("GET", "/cors-proxy?url=http://x", "/cors-proxy"),
]


@pytest.mark.parametrize(("method", "path", "said"), FORBIDDEN)
async def test_what_would_change_slots_is_refused(tmp_path: Path, method: str, path: str, said: str) -> None:
    """403 that says why; llama-server never hears of it, whatever is allowed."""
    allow = {"passthrough": {"allow": ["POST /props", "/lora-adapters", "/models", "/tools", "/cors-proxy"]}}
    async with served(tmp_path, allow) as it:
        n_before = len(it.fake.requests)
        answer = await it.send(method, path, body={"filename": "x"})
        assert len(it.fake.requests) == n_before
    assert answer.status == 403
    assert said in answer.error["message"]
    assert answer.error["type"] == "permission_error"


@pytest.mark.parametrize(("method", "path", "gate"), GATED)
async def test_what_changes_the_server_needs_leave(tmp_path: Path, method: str, path: str, gate: str) -> None:
    """403 that says what to write into the configuration; with that it passes."""
    async with served(tmp_path / "a") as it:
        n_before = len(it.fake.requests)
        refused = await it.send(method, path)
        assert len(it.fake.requests) == n_before
    assert refused.status == 403
    assert f"add '{gate}' to passthrough.allow" in refused.error["message"]
    async with served(tmp_path / "b", {"passthrough": {"allow": [gate]}}) as it:
        await it.send(method, path, body={} if method == "POST" else None)
        assert it.fake.requests[-1].path == path.partition("?")[0]


async def test_llamaslot_tells_of_itself(tmp_path: Path) -> None:
    """Slots, snapshots and queue; never what they hold."""
    async with served(tmp_path) as it:
        slot = (await it.ask(letters(1, 800))).slot
        status = (await it.get("/llamaslot/status")).json
        missing = await it.get("/llamaslot/nothing")
    assert status["backends"][0]["health"] == "up"
    assert status["backends"][0]["model"] == it.fake.model.path
    assert status["backends"][0]["n_ctx"] == 8192
    told = dict(status["backends"][0]["slots"][slot])
    assert told.pop("is_worth_saving") in (True, False), "that depends on how fast this machine is"
    assert told == {
        "id": slot,
        "state": "HOT",
        "n_tokens": 800,
        "is_dirty": True,
        "prefill": None,
        "user": None,
    }
    assert status["queue"] == 0
    assert status["snapshots"]["quota_bytes"] == 1 << 30
    assert missing.status == 404
    assert "/llamaslot/status" in missing.error["message"]


async def test_llamaslot_tells_of_itself_while_the_server_chooses_a_slot(tmp_path: Path) -> None:
    """A turn has no slot until it has landed."""
    unread = {"messages": [{"role": "user", "content": [{"type": "what"}]}], "max_tokens": 1}
    async with served(tmp_path, slots=1) as it:
        it.fake.hold()
        turn = spawn(it.post("/v1/messages", unread))
        await it.until(lambda: any(lease.slot is None for lease in it.pool.dispatcher.leases))
        answer = await it.get("/llamaslot/status")
        it.fake.go()
        await turn
    assert (answer.status, len(answer.json["backends"][0]["slots"])) == (200, 1)


@pytest.mark.parametrize("path", ["/health", "/v1/health"])
async def test_health_is_llamaslots_own(tmp_path: Path, path: str) -> None:
    """llama-server is not asked."""
    async with served(tmp_path) as it:
        n_before = len(it.fake.sent(path))
        for method in ("GET", "HEAD"):
            assert (await it.send(method, path)).status == 200
        assert len(it.fake.sent(path)) == n_before


async def test_every_request_is_counted(tmp_path: Path) -> None:
    """By the kind of its route and its status."""
    async with served(tmp_path) as it:
        await it.ask("hello")
        await it.ask("hello")
        await it.post(CHAT, {})
        await it.get("/v1/models")
        await it.get("/nothing")
        await it.post("/slots/0?action=erase", {})
        await it.post("/props", {})
        await it.post("/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 1})
        await it.post("/v1/embeddings", {"input": "x"})
        await it.get("/health")
        metrics = await it.metrics()
    counted = {
        ("completion", 200): 3, ("completion", 400): 1, ("passthrough", 200): 1, ("passthrough", 404): 1,
        ("forbidden", 403): 1, ("gated", 403): 1, ("exclusive", 501): 1, ("own", 200): 1,
    }  # fmt: skip
    for (kind, status), n in counted.items():
        assert metrics[f'llamaslot_requests_total{{kind="{kind}",status="{status}"}}'] == n, (kind, status)


async def test_a_mistake_of_llamaslots_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """500 of the OpenAI shape, an event once headers went; the log has the traceback, and the slot comes back."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.02}}, slots=1) as it:

        def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(it.backend.executor, "settle", broken)
        whole = await it.ask("hello")
        streamed = await it.ask("hello", stream=True)
        monkeypatch.undo()
        await it.at_rest()
        assert (await it.ask("hello")).status == 200
    assert whole.status == 500
    assert "internal error" in whole.error["message"]
    assert "internal error" in streamed.error["message"]
    assert b"ZeroDivision" not in whole.raw + streamed.raw
    assert "ZeroDivisionError" in caplog.text
    caplog.clear()


async def test_what_concerns_a_backend_names_it(tmp_path: Path) -> None:
    """The answer by a header, also one whose slot llama-server chose; metrics by a label, the journal by a field."""
    async with served(tmp_path) as it:
        it.fake.overrides = {"/v1/embeddings": (200, {"data": []})}
        answers = [await it.ask(letters(1, 300)), await it.post("/v1/embeddings", {"input": "one"})]
        assert [answer.headers["x-llamaslot-backend"] for answer in answers] == ["gpu0", "gpu0"]
        samples = (await it.get("/llamaslot/metrics")).raw.decode()
        labels = f'backend="gpu0",model="{it.fake.model.path}"'
        assert f'llamaslot_completions_total{{{labels},source="cold"}} 1.0' in samples
        assert 'llamaslot_backend_up{backend="gpu0"} 1.0' in samples
        assert f"llamaslot_queue_seconds_count{{{labels}}} 1.0" in samples
        decision = (await it.get("/llamaslot/journal")).json["decisions"][-1]
    assert (decision["backend"], decision["chosen"]["backend"]) == ("gpu0", "gpu0")
    assert f"slot gpu0/{decision['slot']} cold" in decision["text"]
