"""Imports aiohttp without the certificates of the system.

aiohttp makes two TLS contexts for outgoing connections when it is imported, each with all certificates: 70 ms of a
start, for a llama-server that is nearly always reached over plain HTTP. ``LlamaServer`` makes a context of its own for
an ``https`` address, so the empty ones are never used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

_SOURCES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # OpenSSL's names for where its default certificates are
_NOWHERE = "/nonexistent"


def import_aiohttp() -> None:
    """Import aiohttp, unless that was done before. The environment variables are as before afterwards."""
    if "aiohttp" not in sys.modules:
        with environment(dict.fromkeys(_SOURCES, _NOWHERE)):
            import aiohttp  # noqa: F401


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Within the ``with`` block, environment variables of this process have other values. No child may be started
    meanwhile.
    """
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
