"""``llamaslot status``: the running llamaslot in one table; ``llamaslot top``: the same, live in a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamaslot.cli.output import report_faults, several, span, table
from llamaslot.cli.running import NotRunning, Running, with_config_or_store
from llamaslot.sizes import readable_seconds, readable_size

# Slow imports are made where they are needed: rich takes 0.1 s, and only ``top`` uses it.
if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

Json = Mapping[str, Any]

_EVERY_S = 1.0
_REQUESTS = 40
_WAITED_S = 0.05  # less is no wait
HEADINGS = ("SLOT", "STATE", "TOKENS", "USED", "SAVED", "USER", "DOING")
ENDED = ("ENDED", "USER", "WAITED", "FIRST TOKEN", "WHY")
RIGHT = frozenset({"TOKENS", "USED", "ENDED", "WAITED", "FIRST TOKEN"})
_NARROW = 60  # columns
_LEFT_OUT = frozenset({"TOKENS", "USED", "SAVED", "WAITED", "FIRST TOKEN"})

_url = click.option(
    "--url", metavar="URL", help="Address of llamaslot, instead of --config: http://127.0.0.1:8081."
)


@click.command(short_help="Show what the running llamaslot does now.")
@with_config_or_store
@_url
@click.option("--json", "is_json", is_flag=True, help="Print the JSON of /llamaslot/status.")
def status(path: Path, url: str | None, is_json: bool) -> None:
    """Show slots, queue, users, snapshots and warnings of the running llamaslot.

    It is found by its configuration, or at --url. If its pages need a key, and the configuration
    has no auth.admin_key, set the environment variable LLAMASLOT_KEY.
    """
    with report_faults():
        running = _running(path, url)
        found = running.get("status")
        activity = running.get("activity?n=0")
        if is_json:
            import json

            click.echo(json.dumps(found, indent=2))
            return
        with running.understood():
            slots = table(HEADINGS, list(rows(found, activity["in_flight"])), RIGHT)
            lines = [headline(found), today(activity.get("today")), "", *slots, *remarks(found)]
    for line in lines:
        click.echo(line)


@click.command(short_help="Show the status once a second, and the last requests.")
@with_config_or_store
@_url
@click.option("--every", "every_s", type=click.FloatRange(min=0.2), default=_EVERY_S, show_default=True)
def top(path: Path, url: str | None, every_s: float) -> None:
    """Show what 'llamaslot status' shows, and below it why each of the last requests cost what it did.

    In a terminal the table is renewed once a second, elsewhere printed again. Ctrl-C ends it.
    """
    from rich.console import Console
    from rich.live import Live

    with report_faults():
        running = _running(path, url)
        running.get("status")  # a fault that does not pass: a wrong key
        console = Console()
        try:
            with contextlib.ExitStack() as shown:
                show = console.print
                if console.is_terminal:
                    live = shown.enter_context(Live(console=console, screen=True, auto_refresh=False))
                    show = partial(live.update, refresh=True)
                while True:
                    show(_drawn(running, console.width))
                    time.sleep(every_s)
        except KeyboardInterrupt:
            pass


def _running(path: Path, url: str | None) -> Running:
    """Return the client for the llamaslot at ``url``, or of the configuration at ``path`` if ``url`` is None. Raises
    ConfigError, and BadParameter if ``url`` is no address.
    """
    if url is None:
        return Running.of(path)
    try:
        return Running.at(url)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--url") from None


# -- what is shown ---------------------------------------------------------------------------------------------------


def headline(found: Json) -> str:
    snapshots = found["snapshots"]
    used = f"{readable_size(snapshots['size_bytes'])} of {readable_size(snapshots['quota_bytes'])}"
    kept = f"{several(snapshots['n'], 'snapshot', 'snapshots')}, {used}"
    slots = [slot for backend in found["backends"] for slot in backend["slots"]]
    n_busy = sum(slot["state"] == "LEASED" for slot in slots)
    return f"llamaslot {found['version']}: {n_busy} of {len(slots)} slots work, {found['queue']} wait; {kept}"


def today(sums: Json | None) -> str:
    """Return a line about the requests since midnight: tokens reused, seconds saved, waits, failures. ``sums``: None if
    an older llamaslot answers, which does not report them.
    """
    if sums is None:
        return "today: unknown; restart llamaslot, which is older than this command"
    if not sums["n"]:
        return "today: no request yet"
    said = [several(sums["n"], "request", "requests")]
    if sums["share_reused"] is not None:
        saved = f"{readable_seconds(sums['saved_s'])} ± {readable_seconds(sums['saved_error_s'])} of prefill saved"
        said.append(f"{sums['share_reused']:.0%} of prompt tokens reused, {saved}")
    if sums["first_p50_s"] is not None:
        half, most = readable_seconds(sums["first_p50_s"]), readable_seconds(sums["first_p95_s"])
        said.append(f"half of the first tokens within {half}, 95% within {most}")
    if sums["n_faults"]:
        said.append(f"{sums['n_faults']} failed because of llamaslot")
    if sums["n_unserved"]:
        said.append(f"{sums['n_unserved']} not served")
    return f"today: {'; '.join(said)}"


def rows(found: Json, in_flight: Sequence[Json]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: one per slot, with what its request does now (from ``in_flight``); for a backend
    without slots one row with its health.
    """
    flights = {(flight["backend"], flight["slot"]): flight for flight in in_flight}
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
            yield _row(backend, slot, flights.get((backend["name"], slot["id"])))


def _row(backend: Json, slot: Json, flight: Json | None) -> tuple[str, ...]:
    n_tokens = slot["n_tokens"]
    used = f"{n_tokens / backend['n_ctx']:.0%}" if n_tokens and backend["n_ctx"] else ""
    is_saved = "" if not n_tokens else "no" if slot["is_dirty"] else "yes"
    state = slot["state"].lower()
    if backend["drain"]:
        state += f", {backend['drain']}"
    return (
        f"{backend['name']}/{slot['id']}",
        state,
        f"{n_tokens:,}" if n_tokens else "",
        used,
        is_saved,
        person(slot["user"]),
        _doing(flight) if flight is not None else "",
    )


def _doing(flight: Json) -> str:
    """Return what a request does now, such as ``answering, 43 tokens, 31/s``."""
    said = [flight["stage"]]
    if flight["n_answered"]:
        said.append(several(flight["n_answered"], "token", "tokens"))
    if flight["gives_way_to"]:
        said.append(f"gives way to {flight['gives_way_to']}")
    elif flight["tokens_per_s"]:
        said.append(f"{flight['tokens_per_s']:,.0f}/s")
    return ", ".join(said)


def person(user: str | None) -> str:
    """Return a user id without its kind: ``ada`` for ``key:ada`` and ``named:ada``, ``10.0.0.5`` for
    ``at:10.0.0.5``.
    """
    return user.partition(":")[2] or user if user else ""


def remarks(found: Json) -> list[str]:
    """Return the lines below the table: which users wait, why a backend is down, why assist is off, warnings."""
    said = []
    waiting = [(person(user["id"]), user["waiting"]) for user in found["users"] if user["waiting"]]
    if waiting:
        said.append(f"waiting: {', '.join(who if n == 1 else f'{who} {n}' for who, n in waiting)}")
    for backend in found["backends"]:
        name, assist = backend["name"], backend["assist"]
        if why := backend.get("why_down"):  # older ones do not tell
            said.append(f"{name}: {why}")
        if assist is not None and not assist["is_on"]:
            said.append(f"{name}: {assist['why']}. {assist['remedy']}")
        said += [f"{name}: {warning}" for warning in backend["warnings"]]
    return ["", *said] if said else []


def _drawn(running: Running, width: int = 80) -> RenderableType:
    """Ask the running llamaslot, and return all that ``top`` shows. ``width``: columns of the terminal; a narrow one
    gets fewer columns of the tables.
    """
    from rich.console import Group
    from rich.text import Text

    try:
        found = running.get("status")
        activity = running.get(f"activity?n={_REQUESTS}")
        with running.understood():
            now, past = _table(HEADINGS, width), _table(ENDED, width)
            for row in rows(found, activity["in_flight"]):
                style = "green" if row[1].startswith("leased") else "dim" if row[1].startswith("free") else ""
                now.add_row(*_cells(HEADINGS, row, width), style=style)
            for row in _ended(activity["ended"], time.time()):
                past.add_row(*_cells(ENDED, row, width))
            first = Text(headline(found), style="bold"), _cut(today(activity.get("today"))), Text()
            return Group(*first, now, *map(Text, remarks(found)), Text(), past)
    except NotRunning as error:
        return Text(str(error), style="bold red")


def _table(headings: Sequence[str], width: int) -> Table:
    """Return an empty table with the headings that fit into ``width`` columns. The last column gets the width that is
    left.
    """
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for heading in _cells(headings, headings, width):
        name = str(heading)
        made.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=name != headings[-1])
    return made


def _cells(headings: Sequence[str], row: Sequence[str], width: int) -> list[Text]:
    shown = zip(headings, row, strict=True)
    return [_cut(text) for heading, text in shown if width >= _NARROW or heading not in _LEFT_OUT]


def _cut(text: str) -> Text:
    """Return ``text`` as one line that is cut at the width of its column."""
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ellipsis")


def _ended(found: Sequence[Json], now: float) -> Iterator[tuple[str, ...]]:
    """Yield a row for each of the last requests, newest first: how long ago it ended, its user, its waits, and why it
    cost what it did.
    """
    for request in found:
        ended = span(now - request["at"] - request["total_s"])
        # An older llamaslot does not report the waits in a slot.
        waited_s = request["queued_s"] + request.get("waited_s", 0.0)
        waited = readable_seconds(waited_s) if waited_s >= _WAITED_S else ""
        first = readable_seconds(request["first_s"]) if request["first_s"] is not None else ""
        yield ended, person(request["user"]), waited, first, request["error"] or request["text"]
