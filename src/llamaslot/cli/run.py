"""``llamaslot run -- llama-server …``: one llama-server with llamaslot in front of it, without a configuration file."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamaslot.cli.output import fail, run_to_end
from llamaslot.cli.running import RUN_CONFIG

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from llamaslot.config.load import Config
    from llamaslot.llama.managed.given_command import GivenCommand
    from llamaslot.store.shared_store import StorePart

_USAGE = "llamaslot run [OPTIONS] -- llama-server -m model.gguf -np 4 …"
#: llama-swap ends a process group 10 s after its SIGTERM (``unloadTimeout``).
STOP_S = 9.0


class _Run(click.Command):
    """A command whose options end at the first word that is no option. That word and all that follow are llama-server's
    command line, with or without ``--`` before them.
    """

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(context, args)
        except click.NoSuchOption as error:
            raise click.UsageError(
                f"llamaslot run has no option {error.option_name}; llama-server's own command line stands behind "
                f"--: {_USAGE}"
            ) from None


def _finite(context: click.Context, option: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("should be a number of seconds, such as 9", context, option)
    return value


@click.command(cls=_Run, context_settings={"allow_interspersed_args": False})
@click.option(
    "--listen",
    metavar="HOST:PORT",
    help="Where clients connect. Default: the --host and --port of llama-server's command line, else 127.0.0.1:8081.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Directory for snapshots; all models may share it. Default: 'models' in the state directory.",
)
@click.option(
    "--quota", default="20GiB", show_default=True, metavar="SIZE", help="Most bytes of snapshots on disk."
)
@click.option(
    "--stop-s",
    type=click.FloatRange(min=1.0),
    callback=_finite,
    default=STOP_S,
    show_default=True,
    metavar="SECONDS",
    help="Seconds from SIGTERM to the end; less than the supervisor waits before SIGKILL.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least level of llamaslot's own log lines, on standard error.",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="-- COMMAND [ARG]...")
def run(
    listen: str | None,
    store: Path | None,
    quota: str,
    stop_s: float,
    log_level: str,
    command: tuple[str, ...],
) -> None:
    """Start a llama-server, and serve clients in front of it.

    COMMAND is llama-server's command line. It gets a free port of this
    machine and the flags that it lacks. /health is 503 until the model is
    loaded. SIGTERM ends both: running answers end, then contexts are saved.
    If llama-server ends by itself, its exit status is passed on.
    """
    import gc  # as in ``serve``

    gc.disable()
    try:
        _run(listen, store, quota, stop_s, log_level, command)
    finally:
        gc.enable()


def _run(
    listen: str | None, store: Path | None, quota: str, stop_s: float, log_level: str, line: tuple[str, ...]
) -> None:
    from llamaslot.cli.log_lines import set_up_logging
    from llamaslot.errors import LlamaslotError
    from llamaslot.llama.managed.given_command import SAVE_PATH, GivenCommand

    set_up_logging(log_level, "text")  # beside the lines of llama-server
    try:
        given = GivenCommand(line)
        if store is not None and given.said(SAVE_PATH) is not None:
            raise LlamaslotError(
                "--slot-save-path and --store both name the directory of the snapshots: leave one of them out"
            )
        address = _address(listen, given)
        from llamaslot.config.sections import default_meta_dir
        from llamaslot.http.serve import serve_command
        from llamaslot.llama.managed.process import ManagedServer, in_words
        from llamaslot.store.shared_store import claim

        part = claim(store or default_meta_dir() / "models", given.model)
        directory = Path(given.said(SAVE_PATH) or part.directory)
        server = ManagedServer(
            given,
            name="llama",
            slot_save_path=directory,
            log_path=None,
            api_key=next(iter(given.api_keys), None),
        )
        config = _config(given, address, server.url, directory, part, quota, stop_s)
    except LlamaslotError as error:
        fail([str(error)])
    for cost in given.costs():
        click.echo(f"note: {cost}", err=True)
    if part.taken:
        click.echo(
            f"note: another llamaslot (pid {', '.join(part.taken)}) serves this model from the same store: this one "
            f"keeps its contexts apart, in {part.directory}",
            err=True,
        )
    code = run_to_end(serve_command(config, server, stop_s), config.listen)
    if code is not None:
        click.echo(f"llama-server {in_words(code)}", err=True)
        sys.exit(code if code >= 0 else 128 - code)


def _address(listen: str | None, given: GivenCommand) -> tuple[str, str]:
    """Return the host and port to listen on: from ``--listen``, else from llama-server's command line. Raises
    UsageError.
    """
    from llamaslot.llama.managed.given_command import HOST, PORT

    if listen is None:
        return given.said(HOST) or "127.0.0.1", given.said(PORT) or "8081"
    found = re.fullmatch(r"(?:(?:\[([^\]]+)\]|([^:]*)):)?(\d+)", listen)
    if found is None:
        raise click.UsageError(f"--listen {listen}: should be HOST:PORT, such as 127.0.0.1:8081")
    return found[1] or found[2] or "127.0.0.1", found[3]


def _config(
    given: GivenCommand,
    address: tuple[str, str],
    url: str,
    directory: Path,
    part: StorePart,
    quota: str,
    stop_s: float,
) -> Config:
    """Return a configuration for ``serve`` that is equivalent to this command line. Raises ConfigError."""
    from llamaslot.config.load import Config
    from llamaslot.errors import ConfigError
    from llamaslot.http.serve import DRAIN_SHARE

    keys = given.api_keys
    backend: dict[str, Any] = {"name": "llama", "url": url, "slot_save_path": directory}
    auth: dict[str, Any] = {"allow_anonymous": True}  # as llama-server itself on that address
    if keys:
        backend["api_key"] = keys[0]
        auth = {"keys_file": _keys_file(part.meta_dir, keys)}
    settings = {
        "listen": {"host": address[0], "port": address[1]},
        "backends": [backend],
        "auth": auth,
        "store": {"quota": quota, "meta_dir": part.meta_dir},
        "shutdown": {"drain_s": stop_s * DRAIN_SHARE},
    }
    _write_run_config(part.meta_dir / RUN_CONFIG, settings)
    try:
        return Config.of(settings, "llamaslot run", Path.cwd())
    except ConfigError as error:
        lines = [line.replace("store.quota", "--quota", 1) for line in error.faults]
        raise ConfigError("llamaslot run", lines) from None


def _write_run_config(path: Path, settings: dict[str, Any]) -> None:
    """Write ``settings``, without API keys, to ``path``, where commands with ``--store`` find them. Raises ConfigError
    if the file cannot be written.
    """
    import json

    from llamaslot.errors import ConfigError

    backends = [
        {key: value for key, value in backend.items() if key != "api_key"} for backend in settings["backends"]
    ]
    text = json.dumps({**settings, "backends": backends}, default=str, indent=2)
    try:
        path.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be written: {error.strerror}"]) from None


def _keys_file(meta_dir: Path, keys: list[str]) -> Path:
    """Write a file of client keys in ``meta_dir``, with the keys that llama-server would require. Returns its path.
    Raises ConfigError.
    """
    from llamaslot.config.keys import editing, made_now

    path = meta_dir / "keys.json"
    with editing(path) as entries:
        entries[:] = [made_now(f"key{i}", key) for i, key in enumerate(dict.fromkeys(keys), 1)]
    return path
