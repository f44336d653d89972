"""HTTPS through the whole application."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from pathlib import Path

import aiohttp
import pytest

from tests.support.certificates import Made
from tests.support.inprocess import CHAT, served
from tests.support.wire import wire

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


async def test_llamaslot_serves_https(tmp_path: Path) -> None:
    """Streams and all; who speaks plain HTTP to it gets no answer."""
    made = Made.anew(tmp_path / "tls", "first")
    tls = {"cert": str(made.cert), "key": str(made.key)}
    async with served(tmp_path, {"listen": {"tls": tls}}) as it:
        url = it.url.replace("http://", "https://")
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2, "stream": True}
        async with it.session.post(
            url + CHAT, json=body, ssl=ssl.create_default_context(cafile=made.cert)
        ) as answer:
            assert answer.status == 200
            assert b"[DONE]" in await answer.read()
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await it.session.get(url + "/health")
        with pytest.raises(aiohttp.ClientError):
            await it.get("/health")


async def test_a_client_that_begins_no_handshake_is_cut_off_in_time(tmp_path: Path) -> None:
    """After listen.read_timeout_s, as without TLS; by default asyncio waits for a minute."""
    made = Made.anew(tmp_path / "tls", "first")
    listen = {"tls": {"cert": str(made.cert), "key": str(made.key)}, "read_timeout_s": 0.2}
    async with served(tmp_path, {"listen": listen}) as it, wire(it) as client, asyncio.timeout(30):
        assert await client.reader.read() == b""
