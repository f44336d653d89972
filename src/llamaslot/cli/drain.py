"""``llamaslot drain`` and ``llamaslot undrain``: a backend of the running llamaslot out of service, and back."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from llamaslot.cli.faults import fail
from llamaslot.errors import ConfigError

# Slow imports are made where they are needed: ``--help`` took 0.8 s, and takes 0.1.
if TYPE_CHECKING:
    from http.client import HTTPConnection

    from llamaslot.config.sections import ListenConfig

_TIMEOUT_S = 10.0

_config = click.option(
    "--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True
)


@click.command()
@_config
@click.argument("backend")
def drain(path: Path, backend: str) -> None:
    """Take BACKEND out of service: running answers end, its slots are saved, nothing new begins there.

    The running llamaslot is found by its configuration. If its pages need a key and that has no auth.admin_key, the
    environment variable LLAMASLOT_KEY gives one.
    """
    click.echo(_told(path, "drain", backend))


@click.command()
@_config
@click.argument("backend")
def undrain(path: Path, backend: str) -> None:
    """Put BACKEND into service again."""
    click.echo(_told(path, "undrain", backend))


def _told(path: Path, verb: str, backend: str) -> str:
    """What the running llamaslot says. Ends the process with its fault."""
    from http.client import HTTPException
    from urllib.parse import quote

    from llamaslot.config.load import Config

    try:
        config = Config.load(path)
        key = config.auth.resolve_admin_key() or os.environ.get("LLAMASLOT_KEY")
    except ConfigError as error:
        fail([str(error)])
    connection = _connection(config.listen)
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        connection.request("POST", f"/llamaslot/{verb}?backend={quote(backend)}", headers=headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    except (OSError, ValueError, HTTPException) as error:
        where = f"{config.listen.host}:{config.listen.port}"
        fail([f"no llamaslot answers on {where} ({error}): is it running, with this configuration?"])
    finally:
        connection.close()
    if response.status != 200:
        fail([answer["error"]["message"]])
    return f"{backend}: {answer['drain'] or 'in service'}"


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
