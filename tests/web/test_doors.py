"""Keys through the whole application: what is refused how, what goes no further, what no log ever holds."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import CHAT, NATIVE, letters, served
from tests.support.keys import KeyFile

PAGE = "/llamaslot/status"


def guarded(file: KeyFile) -> dict[str, Any]:
    """Keys on both sides."""
    return {"auth": {"keys_file": str(file.path)}, "backend": {"api_key": "upstream"}}


async def test_keys_end_at_llamaslot(tmp_path: Path) -> None:
    """A wrong one is answered as llama-server would, on every route; of a right one llama-server never hears."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    async with served(tmp_path, guarded(file), api_key="upstream") as it:
        wrong = await it.send("GET", "/v1/models", headers={"x-api-key": "wrong"}, to=it.fake.url)
        n_before = len(it.fake.requests)
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        routes: list[tuple[str, str, Any]] = [
            ("POST", CHAT, chat),
            ("POST", NATIVE, {"prompt": "hi", "n_predict": 2, "stream": True}),
            ("POST", "/v1/messages", chat),
            ("POST", "/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 1}),
            ("POST", "/tokenize", {"content": "x"}),
            ("GET", "/v1/models", None),
        ]
        for method, path, body in (*routes, ("GET", "/nothing", None), ("GET", PAGE, None)):
            refused = await it.send(method, path, body=body, headers={"Authorization": "Bearer wrong"})
            assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, "Bearer"), path
            assert refused.json == wrong.json
            unnamed = await it.send(method, path, body=body)
            assert (unnamed.status, unnamed.error["type"]) == (401, "authentication_error")
        assert {seen.path for seen in it.fake.requests[n_before:]} <= {"/props"}, "but for the watch"
        for name in ("Authorization", "x-api-key", "api-key"):
            for method, path, body in routes:
                answer = await it.send(method, path, body=body, headers={name: file.keys["ada"]})
                assert answer.status == 200, path
        theirs = it.fake.requests[n_before:]
    assert {seen.headers["Authorization"] for seen in theirs} == {"Bearer upstream"}
    assert file.keys["ada"] not in str([seen.headers for seen in theirs])


async def test_what_is_open_needs_no_key(tmp_path: Path) -> None:
    """Whoever watches llamaslot, and a browser that wants the web UI."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    async with served(tmp_path, guarded(file), api_key="upstream") as it:
        assert (await it.get("/health")).status == 200
        assert (await it.get("/index.html")).status == 404, "the fake has none"
        assert (await it.send("OPTIONS", CHAT)).status == 200


async def test_own_pages_with_an_admins_key(tmp_path: Path) -> None:
    """They name users by their ids; no key is shown, nor what it was hashed to."""
    file = KeyFile(tmp_path / "keys.json", "ada")
    admin = file.add("eve", is_admin=True)
    async with served(tmp_path, guarded(file), api_key="upstream") as it:
        asked = await it.post(
            NATIVE, {"prompt": letters(1, 300), "n_predict": 2}, Authorization=file.keys["ada"]
        )
        assert asked.status == 200
        pages = [
            await it.send("GET", f"/llamaslot/{page}", headers={"x-api-key": admin})
            for page in ("status", "metrics", "journal")
        ]
        refused = await it.send("GET", PAGE, headers={"x-api-key": file.keys["ada"]})
    assert [page.status for page in pages] == [200, 200, 200]
    assert refused.status == 403
    shown = b"".join(page.raw for page in pages).decode()
    assert not any(secret in shown for secret in (*file.keys.values(), "sha256:", "upstream"))


async def test_the_status_tells_whom_a_slot_works_for(tmp_path: Path) -> None:
    """While it does."""
    async with served(tmp_path) as it, it.busy():
        status = (await it.get(PAGE)).json
        it.fake.go()
    assert {slot["user"] for slot in status["backends"][0]["slots"]} == {"at:127.0.0.1", None}


async def test_no_log_line_holds_a_key_or_a_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At any level: of answers, refusals, bodies and headers that can not be read, and what llama-server refuses."""
    file, word = KeyFile(tmp_path / "keys.json", "ada"), "canary"
    key, secret = file.keys["ada"], f"{word} in the coal mine"
    with caplog.at_level(logging.DEBUG):
        async with served(tmp_path, guarded(file), api_key="upstream") as it:
            for headers in (
                {"Authorization": f"Bearer {key}"},
                {"x-api-key": word},
                {"Authorization": f"Basic {word}"},
            ):
                for body in (
                    {"prompt": secret, "n_predict": 2},
                    {"prompt": secret, "n_predict": 2, "stream": True},
                    {"prompt": {word: secret}},
                    {"prompt": secret, "n_predict": 2, "lora": secret},
                ):
                    await it.send("POST", NATIVE, body=body, headers=headers)
                chat = {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}
                for path in (CHAT, "/v1/messages", "/v1/messages/count_tokens"):
                    await it.send("POST", path, body=chat, headers=headers)
                await it.send("POST", CHAT, data=f'{{"messages": "{secret}'.encode(), headers=headers)
                await it.send(
                    "POST",
                    "/infill",
                    body={"input_prefix": secret, "input_suffix": secret, "n_predict": 1},
                    headers=headers,
                )
                zipped = {"Content-Encoding": "gzip", **headers}
                await it.send("POST", CHAT, data=secret.encode(), headers=zipped)
            raw = f"Authorization: Bearer {key}"
            for sent in (
                f"GET / HTTP/1.1\r\nHost: a\r\n{raw}\x01\r\n\r\n",
                f"GET / HTTP/1.1\r\nHost: a\r\n{raw}{'x' * 9000}\r\n\r\n",
                f"GET / HTTP/1.1\r\nHost: a\r\nx {raw}\r\n\r\n",
                f"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: {word}\r\n\r\n",
                f"POST {CHAT} HTTP/1.1\r\nHost: a\r\n{raw}\r\nTransfer-Encoding: chunked\r\n\r\n{secret}\r\n",
                f"POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nConnection: close\r\n\r\n{secret}",
                f"{secret}\r\n\r\n",
            ):
                reader, writer = await asyncio.open_connection("127.0.0.1", it.config.listen.port)
                writer.write(sent.encode())
                assert (await reader.readline()).split()[1] in (b"400", b"431"), sent
                writer.close()
                await writer.wait_closed()
    lines = [logging.Formatter("%(name)s %(message)s").format(record) for record in caplog.records]
    assert any(
        "answered user key:ada from slot" in line and "prompt tokens computed" in line for line in lines
    )
    assert any("Invalid header value char" in line for line in lines), "why is still said"
    # The tests' own fake logs too.
    assert [line for line in lines if word in line or key in line or "upstream" in line.split()] == []
