"""The running llamaslot of a configuration, asked through its own pages."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamaslot.errors import LlamaslotError

# Slow imports are made where they are needed: ``--help`` took 0.8 s, and takes 0.1.
if TYPE_CHECKING:
    from http.client import HTTPConnection

    from llamaslot.config.load import Config
    from llamaslot.config.sections import ListenConfig

_TIMEOUT_S = 10.0


class NotRunning(LlamaslotError):
    """Nothing answers where the configuration says that llamaslot listens."""


class Refused(LlamaslotError):
    """What answers has refused; the text is its own. ``status`` as in HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Running:
    """The running llamaslot of a configuration, or at an address. If its pages need a key and there is no
    ``auth.admin_key``, the environment variable LLAMASLOT_KEY gives one.
    """

    def __init__(self, where: str, connect: Callable[[], HTTPConnection], key: str | None = None) -> None:
        self.where, self._connect = where, connect
        key = key or os.environ.get("LLAMASLOT_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def with_config(cls, config: Config) -> Running:
        """Raises ConfigError if a key file is not readable any more."""
        listen = config.listen
        return cls(
            f"{listen.host}:{listen.port}", partial(_connection, listen), config.auth.resolve_admin_key()
        )

    @classmethod
    def of(cls, path: Path) -> Running:
        """Raises ConfigError."""
        from llamaslot.config.load import Config

        return cls.with_config(Config.load(path))

    @classmethod
    def at(cls, url: str) -> Running:
        """The one at ``http://host:port``, or https; what follows is left out. Raises ValueError for another text."""
        from http.client import HTTPConnection, HTTPSConnection
        from urllib.parse import urlsplit

        its = urlsplit(url)
        if its.scheme not in ("http", "https") or not its.hostname:
            raise ValueError(f"{url}: an address is wanted, like http://127.0.0.1:8081")
        kind = HTTPSConnection if its.scheme == "https" else HTTPConnection
        return cls(its.netloc, partial(kind, its.hostname, its.port, timeout=_TIMEOUT_S))

    def get(self, page: str) -> dict[str, Any]:
        return self._answer("GET", f"/llamaslot/{page}")

    def post(self, page: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        from urllib.parse import urlencode

        return self._answer("POST", f"/llamaslot/{page}" + (f"?{urlencode(query)}" if query else ""))

    def _answer(self, method: str, target: str) -> dict[str, Any]:
        """Raises NotRunning, and Refused for an error answer."""
        from http.client import HTTPException

        connection = self._connect()
        try:
            connection.request(method, target, headers=self._headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, ValueError, HTTPException) as error:
            raise NotRunning(
                f"no llamaslot answers on {self.where} ({error}): is it running, with this configuration?"
            ) from error
        finally:
            connection.close()
        if response.status != 200:
            told = answer.get("error") if isinstance(answer, dict) else None
            said = told.get("message") if isinstance(told, dict) else None
            raise Refused(
                response.status, said or f"{self.where} answers {response.status}: is that a llamaslot?"
            )
        return answer


def _connection(listen: ListenConfig) -> HTTPConnection:
    import ssl
    from http.client import HTTPConnection, HTTPSConnection

    from llamaslot.config.sections import EVERY_ADDRESS

    host = EVERY_ADDRESS.get(listen.host, listen.host)
    if listen.tls is None:
        return HTTPConnection(host, listen.port, timeout=_TIMEOUT_S)
    context = ssl.create_default_context(cafile=str(listen.tls.cert))
    context.check_hostname = False  # it is asked by its address, on its own machine
    return HTTPSConnection(host, listen.port, timeout=_TIMEOUT_S, context=context)
