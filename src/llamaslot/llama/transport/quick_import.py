"""Imports aiohttp without loading the certificates of the system.

When aiohttp is imported, it makes two TLS contexts for outgoing connections and loads all certificates into each. That
takes 70 ms of a start, and llama-server is nearly always reached over plain HTTP. For an ``https`` address,
``AiohttpFallback`` makes its own context, so the two without certificates are never used.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

_SOURCES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # OpenSSL's names for where its default certificates are
_NOWHERE = "/nonexistent"


def import_aiohttp() -> None:
    """Import aiohttp if it is not imported yet. Changes environment variables meanwhile, and restores them."""
    if "aiohttp" not in sys.modules:
        with environment(dict.fromkeys(_SOURCES, _NOWHERE)):
            import aiohttp  # noqa: F401


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables of this process to ``values`` within the ``with`` block, and restore them after it. No
    child process may be started in the block.
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
