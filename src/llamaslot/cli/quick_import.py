"""Imports aiohttp without the certificates of the system.

aiohttp makes two TLS contexts for outgoing connections when it is imported, each with all certificates: 70 ms of a
start, for a llama-server that is nearly always reached over plain HTTP. ``LlamaServer`` makes a context of its own for
an ``https`` address, so the empty ones are never used.
"""

from __future__ import annotations

import os
import sys

_SOURCES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # OpenSSL's names for where its default certificates are
_NOWHERE = "/nonexistent"


def import_aiohttp() -> None:
    """Import it, if that was not done before. The environment is as before afterwards."""
    if "aiohttp" in sys.modules:
        return
    before = {name: os.environ.get(name) for name in _SOURCES}
    os.environ.update(dict.fromkeys(_SOURCES, _NOWHERE))
    try:
        import aiohttp  # noqa: F401
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
