"""``llamaslot drain`` and ``llamaslot undrain``: a backend of the running llamaslot out of service, and back."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamaslot.cli.faults import fail
from llamaslot.errors import ConfigError

# Slow imports are made where they are needed: ``--help`` took 0.8 s, and takes 0.1.
if TYPE_CHECKING:
    from http.client import HTTPConnection

    from llamaslot.config.sections import ListenConfig

_TIMEOUT_S = 10.0
_LOOK_EVERY_S = 0.5

_config = click.option(
    "--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True
)


@click.command()
@_config
@click.argument("backend")
def drain(path: Path, backend: str) -> None:
    """Take BACKEND out of service: running answers end, its slots are saved, nothing new begins there.

    Waits until that is done; if it is interrupted, the draining goes on. Exit code 1: slots could not be saved.

    The running llamaslot is found by its configuration. If its pages need a key and that has no auth.admin_key, the
    environment variable LLAMASLOT_KEY gives one.
    """
    running = _Running(path)
    running.ask("drain", backend)
    while (its := running.status_of(backend))["drain"] == "draining":
        time.sleep(_LOOK_EVERY_S)
    unsaved = [str(slot["id"]) for slot in its["slots"] if slot["is_worth_saving"]]
    if its["drain"] and unsaved:
        click.echo(
            f"{backend}: drained, but not saved: slots {', '.join(unsaved)}; the log of llamaslot says why"
        )
        sys.exit(1)
    click.echo(f"{backend}: {its['drain'] or 'in service'}")


@click.command()
@_config
@click.argument("backend")
def undrain(path: Path, backend: str) -> None:
    """Put BACKEND into service again."""
    _Running(path).ask("undrain", backend)
    click.echo(f"{backend}: in service")


class _Running:
    """The running llamaslot of a configuration. Faults end the process."""

    def __init__(self, path: Path) -> None:
        from llamaslot.config.load import Config

        try:
            config = Config.load(path)
            key = config.auth.resolve_admin_key() or os.environ.get("LLAMASLOT_KEY")
        except ConfigError as error:
            fail([str(error)])
        self._listen = config.listen
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def ask(self, verb: str, backend: str) -> dict[str, Any]:
        from urllib.parse import quote

        return self._answer("POST", f"/llamaslot/{verb}?backend={quote(backend)}")

    def status_of(self, backend: str) -> dict[str, Any]:
        every: list[dict[str, Any]] = self._answer("GET", "/llamaslot/status")["backends"]
        return next(its for its in every if its["name"] == backend)

    def _answer(self, method: str, target: str) -> dict[str, Any]:
        from http.client import HTTPException

        connection = _connection(self._listen)
        try:
            connection.request(method, target, headers=self._headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except (OSError, ValueError, HTTPException) as error:
            where = f"{self._listen.host}:{self._listen.port}"
            fail([f"no llamaslot answers on {where} ({error}): is it running, with this configuration?"])
        finally:
            connection.close()
        if response.status != 200:
            fail([answer["error"]["message"]])
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
