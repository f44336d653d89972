"""A start reads no certificates, and a connection over TLS has them all the same."""

from __future__ import annotations

import ssl
import subprocess
import sys

import pytest

from llamaslot.llama.client import LlamaServer

_TELL = """
import os
os.environ["SSL_CERT_DIR"] = "/here"
before = dict(os.environ)
from llamaslot.llama.transport.quick_import import import_aiohttp
import_aiohttp()
import_aiohttp()
assert dict(os.environ) == before, os.environ
from aiohttp import connector
print(connector._SSL_CONTEXT_VERIFIED.cert_store_stats()["x509"])
"""


def test_aiohttp_is_imported_without_certificates() -> None:
    """If this fails, aiohttp makes its contexts in another way, and ``quick_import`` may go."""
    told = subprocess.run([sys.executable, "-c", _TELL], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "0"


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_server_over_tls_is_verified(scheme: str) -> None:
    """With the certificates of the system, read when the first connection is made."""
    server = LlamaServer(f"{scheme}://localhost:1")
    connector = server._aiohttp_fallback().session.connector
    context = getattr(connector, "_ssl")  # noqa: B009
    if scheme == "https":
        assert isinstance(context, ssl.SSLContext)
        assert context.verify_mode is ssl.CERT_REQUIRED
        assert context.check_hostname
    else:
        assert context is True
    await server.close()
