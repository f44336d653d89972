"""``llamaslot drain`` and ``llamaslot undrain``: a backend of the running llamaslot out of service, and back."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from llamaslot.cli.faults import told
from llamaslot.cli.running import Running
from llamaslot.cli.which import which

_LOOK_EVERY_S = 0.5


@click.command()
@which
@click.argument("backend")
def drain(path: Path, backend: str) -> None:
    """Take BACKEND out of service: running answers end, its slots are saved, nothing new begins there.

    Waits until that is done; if it is interrupted, the draining goes on. Exit code 1: slots could not be saved.

    The running llamaslot is found by its configuration. If its pages need a key and that has no auth.admin_key, the
    environment variable LLAMASLOT_KEY gives one.
    """
    with told():
        running = Running.of(path)
        running.post("drain", {"backend": backend})
        while (its := _status_of(running, backend))["drain"] == "draining":
            time.sleep(_LOOK_EVERY_S)
    unsaved = [str(slot["id"]) for slot in its["slots"] if slot["is_worth_saving"]]
    if its["drain"] and unsaved:
        click.echo(
            f"{backend}: drained, but not saved: slots {', '.join(unsaved)}; the log of llamaslot says why"
        )
        sys.exit(1)
    click.echo(f"{backend}: {its['drain'] or 'in service'}")


@click.command()
@which
@click.argument("backend")
def undrain(path: Path, backend: str) -> None:
    """Put BACKEND into service again."""
    with told():
        Running.of(path).post("undrain", {"backend": backend})
    click.echo(f"{backend}: in service")


def _status_of(running: Running, backend: str) -> dict[str, Any]:
    every: list[dict[str, Any]] = running.get("status")["backends"]
    return next(its for its in every if its["name"] == backend)
