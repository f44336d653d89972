"""``llamaslot reload``: the running llamaslot reads its configuration again."""

from __future__ import annotations

from pathlib import Path

import click

from llamaslot.cli.faults import told
from llamaslot.cli.running import Running


@click.command()
@click.option("--config", "path", type=click.Path(path_type=Path), default="config.yaml", show_default=True)
def reload(path: Path) -> None:
    """Read the configuration again; SIGHUP does the same.

    Says what is in force now, and what needs a restart. With a fault in the file
    nothing changes, and the exit code is 2.
    """
    with told():
        answer = Running.of(path).post("reload")
    click.echo(f"in force: {', '.join(answer['in_force']) or 'nothing new'}")
    if answer["needs_restart"]:
        click.echo(f"needs a restart: {', '.join(answer['needs_restart'])}")
