"""Requests of commands to the running llamaslot, at its own pages, ``/llamaslot/…``. Also the commands that change what
it does: ``llamaslot drain``, ``undrain``, ``reload``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llamaslot.cli.output import report_faults
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
    """No llamaslot answers at the address at which the configuration says that it listens."""


class Refused(LlamaslotError):
    """The running llamaslot has answered with an error. ``status``: the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Running:
    """The client of a running llamaslot. ``where``: its address, for messages. ``connect`` returns a new connection.
    ``key``: the key for its pages; None: that in the environment variable LLAMASLOT_KEY, if it is set.
    """

    def __init__(self, where: str, connect: Callable[[], HTTPConnection], key: str | None = None) -> None:
        self.where, self._connect = where, connect
        key = key or os.environ.get("LLAMASLOT_KEY", "").strip()
        if not key.isascii() or not key.isprintable():
            raise LlamaslotError(
                "LLAMASLOT_KEY: should be letters, digits and signs: it has other characters"
            )
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @classmethod
    def with_config(cls, config: Config) -> Running:
        """Return the client for the llamaslot that this configuration describes. Raises ConfigError if its key file
        cannot be read.
        """
        listen = config.listen
        return cls(
            f"{listen.host}:{listen.port}", partial(_connection, listen), config.auth.resolve_admin_key()
        )

    @classmethod
    def of(cls, path: Path) -> Running:
        """Return the client for the llamaslot of the configuration file at ``path``. Raises ConfigError."""
        return cls.with_config(load(path))

    @classmethod
    def at(cls, url: str) -> Running:
        """Return the client for the llamaslot at ``host:port``, with or without ``http://`` or ``https://``; a path in
        ``url`` is ignored. Raises ValueError if ``url`` is no such address.
        """
        from http.client import HTTPConnection, HTTPSConnection
        from urllib.parse import urlsplit

        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: an address is wanted, like http://127.0.0.1:8081")
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        return cls(parts.netloc, partial(kind, parts.hostname, parts.port, timeout=_TIMEOUT_S))

    def get(self, page: str) -> dict[str, Any]:
        return self._answer("GET", f"/llamaslot/{page}")

    def post(self, page: str, query: Mapping[str, str] | None = None) -> dict[str, Any]:
        from urllib.parse import urlencode

        return self._answer("POST", f"/llamaslot/{page}" + (f"?{urlencode(query)}" if query else ""))

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """A context manager for a block that reads an answer. Raises NotRunning if the block finds a field missing, or
        of another type: a program that is no llamaslot has answered, or a llamaslot of another version.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise NotRunning(
                f"what answers on {self.where} is no llamaslot, or one of another version ({error!r})"
            ) from error

    def _answer(self, method: str, target: str) -> dict[str, Any]:
        """Send one request and return the JSON of its answer. Raises NotRunning if no llamaslot answers, Refused after
        an error.
        """
        from http.client import HTTPException

        try:
            with contextlib.closing(self._connect()) as connection:
                connection.request(method, target, headers=self._headers)
                response = connection.getresponse()
                answer: dict[str, Any] = json.loads(response.read())
        except (ValueError, RecursionError):
            raise NotRunning(f"what answers on {self.where} is no llamaslot") from None
        except (OSError, HTTPException) as error:
            raise NotRunning(
                f"no llamaslot answers on {self.where} ({_reason(error)}): is it running there?"
            ) from error
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


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def load(path: Path) -> Config:
    """Load the configuration at ``path``. Raises ConfigError. If there is no such file, the error's text also names
    the other options by which the command can find a llamaslot.
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
    """A decorator that adds the options ``--config`` and ``--store`` to a command. Both name the configuration of a
    llamaslot; the command gets its path as ``path``.
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


@click.command(short_help="Take a backend out of service, and save its slots.")
@with_config_or_store
@click.argument("backend")
def drain(path: Path, backend: str) -> None:
    """Take BACKEND out of service: no request begins there, running answers end, then its slots are saved.

    Waits until that is done. If this command is interrupted, llamaslot goes on. Exit code 1: slots could not be saved.

    The running llamaslot is found by its configuration. If its pages need a key, and the configuration has no
    auth.admin_key, set the environment variable LLAMASLOT_KEY.
    """
    with report_faults():
        running = Running.of(path)
        running.post("drain", {"backend": backend})
        with running.understood():
            while (status := _status_of(running, backend))["drain"] == "draining":
                time.sleep(_LOOK_EVERY_S)
            unsaved = [str(slot["id"]) for slot in status["slots"] if slot["is_worth_saving"]]
    if status["drain"] and unsaved:
        click.echo(
            f"{backend}: drained, but some slots could not be saved: {', '.join(unsaved)}; llamaslot's log says why"
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
    return {found["name"]: found for found in every}[backend]


@click.command(short_help="Make the running llamaslot read its configuration.")
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
def reload(path: Path) -> None:
    """Make the running llamaslot read its configuration again, as SIGHUP does.

    Prints which changes are in force now, and which need a restart. If the file has
    faults, nothing changes, and the exit code is 2.
    """
    with report_faults():
        running = Running.of(path)
        answer = running.post("reload")
        with running.understood():
            in_force, needs_restart = ", ".join(answer["in_force"]), ", ".join(answer["needs_restart"])
    click.echo(f"in force: {in_force or 'nothing new'}")
    if needs_restart:
        click.echo(f"needs a restart: {needs_restart}")
