"""Certificates: which are none, and how one is renewed."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
import uvloop

from llamaslot.config.tls import Certificate, TlsConfig, load_certificate
from llamaslot.errors import ConfigError
from tests.support.certificates import Made

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made.anew(tmp_path_factory.mktemp("tls"), "first")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trusting(*trusted: Made) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for each in trusted:
        context.load_verify_locations(each.cert)
    return context


def subject(certificate: Certificate, client: ssl.SSLContext, name: str | None = "localhost") -> str:
    """Whose certificate a client gets that connects now; the handshake in memory. Raises SSLError."""
    client.check_hostname = name is not None
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = certificate.context.wrap_bio(up, down, server_side=True)
    theirs = client.wrap_bio(down, up, server_hostname=name)
    for end in (theirs, ours, theirs):
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
    peer = theirs.getpeercert()
    assert peer is not None
    return str(dict(part[0] for part in peer["subject"])["commonName"])  # type: ignore[misc]


@pytest.mark.parametrize("name", ["localhost", None])
def test_a_renewed_certificate_is_used_from_the_next_connection_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str | None
) -> None:
    """Also by who names no host. While only one of its files is there, the old one is used, and it is said once."""
    now, later = Made.anew(tmp_path / "now", "first"), Made.anew(tmp_path / "later", "second")
    client, clock = trusting(now, later), Clock()
    certificate = Certificate(TlsConfig(cert=now.cert, key=now.key), clock)
    with caplog.at_level(logging.INFO):
        assert subject(certificate, client, name) == "first"
        later.cert.replace(now.cert)
        for clock.now in (1.0, 2.0, 3.0):
            assert subject(certificate, client, name) == "first"
        assert caplog.text.count("stays in use") == 1
        later.key.replace(now.key)
        assert subject(certificate, client, name) == "first", "looked at once a second"
        clock.now = 4.0
        assert subject(certificate, client, name) == "second"
    assert "is in use" in caplog.text


def test_uvloop_asks_for_the_latest_too(tmp_path: Path) -> None:
    """The loop that ``llamaslot serve`` runs on has a TLS of its own."""
    now, later = Made.anew(tmp_path / "now", "first"), Made.anew(tmp_path / "later", "second")
    clock = Clock()
    certificate = Certificate(TlsConfig(cert=now.cert, key=now.key), clock)
    client = trusting(now, later)

    async def seen() -> str:
        async def closed(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(closed, "127.0.0.1", 0, ssl=certificate.context) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client)
            await reader.read()
            peer = writer.get_extra_info("peercert")
            writer.close()
            await writer.wait_closed()
        return str(dict(part[0] for part in peer["subject"])["commonName"])

    assert uvloop.run(seen()) == "first"
    later.move_to(now)
    clock.now = 1.0
    assert uvloop.run(seen()) == "second"


def test_what_is_no_certificate_says_which_file(tmp_path: Path, made: Made) -> None:
    """Each with what is wrong with it."""
    other = Made.anew(tmp_path / "other", "other")
    text = tmp_path / "text.pem"
    text.write_text("hello")
    locked = tmp_path / "locked.pem"
    command = f"openssl pkey -in {made.key} -aes256 -passout pass:x -out {locked}"
    subprocess.run(command.split(), check=True, capture_output=True)
    for cert, key, said in (
        (made.cert, other.key, "is not the key of"),
        (text, made.key, "text.pem has no certificate"),
        (made.key, made.key, "has no certificate"),
        (made.cert, text, "text.pem has no private key"),
        (made.cert, made.cert, "has no private key"),
        (made.cert, locked, "locked.pem is encrypted"),
        (tmp_path / "none", made.key, "none cannot be read: No such file"),
        (made.cert, tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(ValueError, match=said):
            TlsConfig(cert=cert, key=key)


def test_files_that_have_gone_since_the_check(tmp_path: Path) -> None:
    """A fault that the operator can mend, not a traceback."""
    made = Made.anew(tmp_path, "gone")
    settings = TlsConfig(cert=made.cert, key=made.key)
    load_certificate(settings)
    made.key.unlink()
    with pytest.raises(ConfigError, match=r"listen\.tls"):
        Certificate(settings)
