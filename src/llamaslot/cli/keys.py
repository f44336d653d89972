"""``llamaslot keys``: the keys of clients. A running llamaslot uses a change within a second."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click

from llamaslot.cli.output import report_faults, several, span, table
from llamaslot.config.faults import read_yaml
from llamaslot.config.keys import editing, made_now, name_of_key, new_key, read_keys
from llamaslot.errors import ConfigError, LlamaslotError


@click.group()
def keys() -> None:
    """Make, list and revoke the keys of clients."""


_config = click.option(
    "--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True
)
_file = click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    help="File of keys.  [default: auth.keys_file of --config]",
)
_at_least_1, _at_least_0 = click.IntRange(min=1), click.IntRange(min=0)


@keys.command()
@_config
@_file
@click.option("--max-running", type=_at_least_1, help="Most slots that requests with this key use at a time.")
@click.option("--max-waiting", type=_at_least_0, help="Most requests with this key that wait at a time.")
@click.option("--admin", "is_admin", is_flag=True, help="The key also opens llamaslot's own pages.")
@click.argument("name")
def add(
    path: Path,
    file: Path | None,
    max_running: int | None,
    max_waiting: int | None,
    is_admin: bool,
    name: str,
) -> None:
    """Make a key for NAME and print it once. The file stores only a hash of it."""
    with report_faults():
        try:
            name_of_key(name)
        except ValueError as error:
            raise LlamaslotError(f"{name}: {error}") from None
        place = _place(path, file)
        key = new_key()
        is_new = not place.exists()
        with editing(place) as entries:
            if any(entry.name == name for entry in entries):
                raise LlamaslotError(
                    f"{name} has a key already: choose another name, or remove the old key first: "
                    f"llamaslot keys rm {name}"
                )
            entries.append(
                made_now(name, key, max_running=max_running, max_waiting=max_waiting, is_admin=is_admin)
            )
        click.echo(key)
        _note(f"the key of {name}; it is not shown again, and works within a second")
        if is_new and os.geteuid() == 0:
            _note(f"{place} belongs to root: chown it to the user that llamaslot runs as, if that is another")


@keys.command()
@_config
@_file
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def rm(path: Path, file: Path | None, names: tuple[str, ...]) -> None:
    """Remove keys. They stop working within a second; running answers are completed."""
    with report_faults():
        with editing(_place(path, file)) as entries:
            known = {entry.name for entry in entries}
            if missing := [name for name in names if name not in known]:
                raise LlamaslotError(f"there is no key of {', '.join(missing)}; nothing was changed")
            entries[:] = [entry for entry in entries if entry.name not in names]
        _note(f"taken away: {', '.join(names)}")


@keys.command()
@_config
@_file
def ls(path: Path, file: Path | None) -> None:
    """List names and limits. The file does not contain the keys themselves."""
    with report_faults():
        place = _place(path, file)
        entries, _ = read_keys(place)
        now = time.time()
        rows = [
            (
                entry.name,
                span(now - entry.created.timestamp()) if entry.created is not None else "-",
                "-" if entry.max_running is None else str(entry.max_running),
                "-" if entry.max_waiting is None else str(entry.max_waiting),
                "yes" if entry.is_admin else "",
            )
            for entry in entries
        ]
        if rows:
            headings = ("NAME", "AGE", "MAX RUNNING", "MAX WAITING", "ADMIN")
            for line in table(headings, rows, {"AGE", "MAX RUNNING", "MAX WAITING"}):
                click.echo(line)
        click.echo(f"{several(len(entries), 'key', 'keys')} in {place}")


def _place(path: Path, file: Path | None) -> Path:
    """Return the path of the file of keys: ``file``, else ``auth.keys_file`` of the configuration at ``path``. The rest
    of the configuration is not checked, since it may name files that do not exist yet. Raises ConfigError.
    """
    if file is not None:
        return file
    raw = read_yaml(path)
    auth = raw.get("auth") if isinstance(raw, dict) else None
    named = auth.get("keys_file") if isinstance(auth, dict) else None
    if not isinstance(named, str) or not named:
        raise ConfigError(str(path), ["auth.keys_file: is missing; name the file there, or with --file"])
    return path.resolve().parent / os.path.expanduser(named)


def _note(line: str) -> None:
    click.echo(line, err=True)
