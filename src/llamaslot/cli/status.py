"""``llamaslot status``: the running llamaslot in one table; ``llamaslot top``: the same, live in a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamaslot.cli.faults import report_faults
from llamaslot.cli.format import number, several, span, table
from llamaslot.cli.running import NotRunning, Running, which

# Slow imports are made where they are needed: rich takes 0.1 s, and only ``top`` uses it.
if TYPE_CHECKING:
    from rich.console import RenderableType

Json = Mapping[str, Any]

_EVERY_S = 1.0
_DECISIONS = 12
HEADINGS = ("SLOT", "STATE", "TOKENS", "USED", "SAVED", "USER", "DOING")
RIGHT = frozenset({"TOKENS", "USED"})

_url = click.option(
    "--url", metavar="URL", help="Instead of --config: its address, like http://127.0.0.1:8081."
)


@click.command()
@which
@_url
@click.option("--json", "is_json", is_flag=True, help="All that /llamaslot/status tells.")
def status(path: Path, url: str | None, is_json: bool) -> None:
    """Show slots, queue, users, snapshots and warnings of the running llamaslot.

    It is found by its configuration, or at --url. If its pages need a key and that has no
    auth.admin_key, the environment variable LLAMASLOT_KEY gives one.
    """
    with report_faults():
        found = _running(path, url).get("status")
    if is_json:
        import json

        click.echo(json.dumps(found, indent=2))
        return
    click.echo(headline(found))
    for line in ("", *table(HEADINGS, list(rows(found)), RIGHT), *remarks(found)):
        click.echo(line)


@click.command()
@which
@_url
@click.option("--every", "every_s", type=click.FloatRange(min=0.2), default=_EVERY_S, show_default=True)
def top(path: Path, url: str | None, every_s: float) -> None:
    """Show what ``status`` shows, and the last decisions, once a second. Ctrl-C ends it."""
    from rich.console import Console
    from rich.live import Live

    with report_faults():
        running = _running(path, url)
        running.get("status")  # a fault that does not pass: a wrong key
        console = Console()
        try:
            with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
                while True:
                    live.update(_drawn(running), refresh=True)
                    time.sleep(every_s)
        except KeyboardInterrupt:
            pass


def _running(path: Path, url: str | None) -> Running:
    """Raises ConfigError, and BadParameter for what is no address."""
    if url is None:
        return Running.of(path)
    try:
        return Running.at(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None


# -- what is shown ---------------------------------------------------------------------------------------------------


def headline(found: Json) -> str:
    snapshots = found["snapshots"]
    size = f"{_gb(snapshots['size_bytes'])} of {_gb(snapshots['quota_bytes'])}"
    kept = f"{several(snapshots['n'], 'snapshot', 'snapshots')}, {size}"
    slots = [slot for backend in found["backends"] for slot in backend["slots"]]
    n_busy = sum(slot["state"] == "LEASED" for slot in slots)
    return f"llamaslot {found['version']}: {n_busy} of {len(slots)} slots work, {found['queue']} wait; {kept}"


def rows(found: Json) -> Iterator[tuple[str, ...]]:
    """One per slot; one for a backend that has none to show."""
    for backend in found["backends"]:
        state = backend["drain"] or backend["health"]
        if not backend["slots"]:
            aside = backend["assist"] is not None and not backend["assist"]["is_on"]
            yield (
                backend["name"],
                "assist is off" if aside else state,
                "",
                "",
                "",
                "",
                backend["model"] or "",
            )
        for slot in backend["slots"]:
            yield _row(backend, slot)


def _row(backend: Json, slot: Json) -> tuple[str, ...]:
    n_tokens, prefill = slot["n_tokens"], slot["prefill"]
    doing = f"prefill {number(prefill['n_done'])} of {number(prefill['n_tokens'])}" if prefill else ""
    used = f"{n_tokens / backend['n_ctx']:.0%}" if n_tokens and backend["n_ctx"] else ""
    is_saved = "" if not n_tokens else "no" if slot["is_dirty"] else "yes"
    state = slot["state"].lower()
    if backend["drain"]:
        state += f", {backend['drain']}"
    return (
        f"{backend['name']}/{slot['id']}",
        state,
        number(n_tokens) if n_tokens else "",
        used,
        is_saved,
        slot["user"] or "",
        doing,
    )


def remarks(found: Json) -> list[str]:
    """Who waits, why assist is off, warnings."""
    said = []
    if waiting := [f"{user['id']} {user['waiting']}" for user in found["users"] if user["waiting"]]:
        said.append(f"waiting: {', '.join(waiting)}")
    for backend in found["backends"]:
        name, assist = backend["name"], backend["assist"]
        if assist is not None and not assist["is_on"]:
            said.append(f"{name}: {assist['why']}. {assist['remedy']}")
        said += [f"{name}: {warning}" for warning in backend["warnings"]]
    return ["", *said] if said else []


def decisions(found: Sequence[Json], now: float) -> list[str]:
    """The last decisions, newest first, each with its age."""
    return [
        f"{span(now - decision['at']):>6}  {decision['user'] or '-'}  {decision['text']}"
        for decision in found
    ]


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.1f} GB"


def _drawn(running: Running) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    try:
        found = running.get("status")
        latest = running.get(f"journal?n={_DECISIONS}")["decisions"]
    except NotRunning as error:
        return Text(str(error), style="bold red")
    grid = Table(*HEADINGS, box=None, pad_edge=False, header_style="bold")
    for heading, column in zip(HEADINGS, grid.columns, strict=True):
        column.justify = "right" if heading in RIGHT else "left"
    for row in rows(found):
        style = "green" if row[1].startswith("leased") else "dim" if row[1].startswith("free") else ""
        grid.add_row(*map(Text, row), style=style)
    lines = [Text(line, no_wrap=True, overflow="ellipsis") for line in decisions(latest, time.time())]
    return Group(
        Text(headline(found), style="bold"), Text(), grid, *map(Text, remarks(found)), Text(), *lines
    )
