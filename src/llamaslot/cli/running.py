"""Requests to the running llamaslot through its own pages: which llamaslot a command is about, and the commands that
change it: ``llamaslot drain``, ``undrain``, ``reload``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llamaslot.cli.faults import report_faults
from llamaslot.errors import ConfigError, LlamaslotError

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from http.client import HTTPConnection

    from llamaslot.config.load import Config
    from llamaslot.config.sections import ListenConfig

F = TypeVar("F", bound=Callable[..., Any])

#: Written by ``llamaslot run`` for each model, in that model's part of its store: what it was started with.
RUN_CONFIG = "config.yaml"
_LOOK_EVERY_S = 0.5
_TIMEOUT_S = 10.0


class NotRunning(LlamaslotError):
    """Nothing answers where the configuration says that llamaslot listens."""


class Refused(LlamaslotError):
    """The running llamaslot has refused a request; the text is the server's own. ``status`` as in HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Running:
    """The running llamaslot of a configuration, or at an address. If its pages need a key and there is no
    ``auth.admin_key``, the environment variable LLAMASLOT_KEY gives the key.
    """

    def __init__(self, where: str, connect: Callable[[], HTTPConnection], key: str | None = None) -> None:
        self.where, self._connect = where, connect
        key = key or os.environ.get("LLAMASLOT_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def with_config(cls, config: Config) -> Running:
        """The running llamaslot that this configuration describes. Raises ConfigError if a key file is not readable
        any more.
        """
        listen = config.listen
        return cls(
            f"{listen.host}:{listen.port}", partial(_connection, listen), config.auth.resolve_admin_key()
        )

    @classmethod
    def of(cls, path: Path) -> Running:
        """The running llamaslot of the configuration file at ``path``. Raises ConfigError."""
        return cls.with_config(load(path))

    @classmethod
    def at(cls, url: str) -> Running:
        """The running llamaslot at ``http://host:port``, or https; the rest of the URL is left out. Raises ValueError
        for another text.
        """
        from http.client import HTTPConnection, HTTPSConnection
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: an address is wanted, like http://127.0.0.1:8081")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return cls(parts.netloc, partial(kind, parts.hostname, parts.port, timeout=_TIMEOUT_S))

    def get(self, page: str) -> dict[str, Any]:
        return self._answer("GET", f"/llamaslot/{page}")

    def post(self, page: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        from urllib.parse import urlencode

        return self._answer("POST", f"/llamaslot/{page}" + (f"?{urlencode(query)}" if query else ""))

    def _answer(self, method: str, target: str) -> dict[str, Any]:
        """The body of the answer to one request. Raises NotRunning, and Refused for an error answer."""
        from http.client import HTTPException

        connection = self._connect()
        try:
            connection.request(method, target, headers=self._headers)
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        except ValueError:
            raise NotRunning(f"what answers on {self.where} is no llamaslot") from None
        except (OSError, HTTPException) as error:
            raise NotRunning(
                f"no llamaslot answers on {self.where} ({error}): is it running, with this configuration?"
            ) from error
        finally:
            connection.close()
        if response.status != 200 or not isinstance(answer, dict):
            raise Refused(
                response.status, self._why_refused(response.status, response.getheader("Server"), answer)
            )
        return answer

    def _why_refused(self, status: int, server: str | None, answer: Any) -> str:
        told = answer.get("error") if isinstance(answer, dict) else None
        said = told.get("message") if isinstance(told, dict) else None
        if status in (401, 403):
            return f"{self.where} answers {status}: {said}; set LLAMASLOT_KEY to a key of an administrator"
        if said is None or server != "llamaslot":
            return f"{self.where} answers {status}{f': {said}' if said else ''}: is that a llamaslot?"
        return str(said)


def load(path: Path) -> Config:
    """Load the configuration at ``path``. Raises ConfigError: if there is no such file, with the other ways to say
    which llamaslot the command is about.
    """
    from llamaslot.config.load import Config

    if os.path.exists(path):
        return Config.load(path)
    options = {option for each in click.get_current_context().command.params for option in each.opts}
    said = ["there is no such file. --config FILE names the configuration of 'llamaslot serve'"]
    if "--url" in options:
        said.append("--url http://127.0.0.1:8081 is the address at which a running llamaslot listens")
    if "--store" in options:
        said.append("--store DIR is the store of 'llamaslot run'")
    raise ConfigError(str(path), ["; ".join(said)])


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


def with_config_or_store(command: F) -> F:
    """A decorator that adds ``--config`` and ``--store``, which say what llamaslot a command is about. The command
    gets the path of the configuration as ``path``.
    """
    config = click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        default="config.yaml",
        show_default=True,
        callback=lambda context, _, path: context.meta.get(__name__, path),
    )
    store = click.option(
        "--store",
        type=click.Path(path_type=Path, file_okay=False, exists=True),
        metavar="DIR",
        help="Instead of --config: the store of 'llamaslot run', or the part of one model in it.",
        callback=_of_run,
        expose_value=False,
        is_eager=True,
    )
    return config(store(command))


def _of_run(context: click.Context, option: click.Parameter, store: Path | None) -> None:
    from llamaslot.store.shared_store import META

    if store is None:
        return
    found = {path.parent.name: path for path in sorted(store.glob(f"{META}/*/{RUN_CONFIG}"))}
    part = store.parent / META / store.name / RUN_CONFIG
    if part.exists():
        found = {store.name: part}
    if not found:
        raise click.BadParameter(f"no 'llamaslot run' has used {store}", context, option)
    if len(found) > 1:
        there_are = ", ".join(str(store / name) for name in found)
        raise click.BadParameter(f"which model? There are {there_are}", context, option)
    context.meta[__name__] = next(iter(found.values()))


@click.command()
@with_config_or_store
@click.argument("backend")
def drain(path: Path, backend: str) -> None:
    """Take BACKEND out of service: running answers end, its slots are saved, nothing new begins there.

    Waits until that is done; if it is interrupted, the draining goes on. Exit code 1: slots could not be saved.

    The running llamaslot is found by its configuration. If its pages need a key and that has no auth.admin_key, the
    environment variable LLAMASLOT_KEY gives one.
    """
    with report_faults():
        running = Running.of(path)
        running.post("drain", {"backend": backend})
        while (status := _status_of(running, backend))["drain"] == "draining":
            time.sleep(_LOOK_EVERY_S)
    unsaved = [str(slot["id"]) for slot in status["slots"] if slot["is_worth_saving"]]
    if status["drain"] and unsaved:
        click.echo(
            f"{backend}: drained, but not saved: slots {', '.join(unsaved)}; the log of llamaslot says why"
        )
        sys.exit(1)
    click.echo(f"{backend}: {status['drain'] or 'in service'}")


@click.command()
@with_config_or_store
@click.argument("backend")
def undrain(path: Path, backend: str) -> None:
    """Put BACKEND into service again."""
    with report_faults():
        Running.of(path).post("undrain", {"backend": backend})
    click.echo(f"{backend}: in service")


def _status_of(running: Running, backend: str) -> dict[str, Any]:
    every: list[dict[str, Any]] = running.get("status")["backends"]
    return next(found for found in every if found["name"] == backend)


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
def reload(path: Path) -> None:
    """Read the configuration again; SIGHUP does the same.

    Says what is in force now, and what needs a restart. With a fault in the file
    nothing changes, and the exit code is 2.
    """
    with report_faults():
        answer = Running.of(path).post("reload")
    click.echo(f"in force: {', '.join(answer['in_force']) or 'nothing new'}")
    if answer["needs_restart"]:
        click.echo(f"needs a restart: {', '.join(answer['needs_restart'])}")
