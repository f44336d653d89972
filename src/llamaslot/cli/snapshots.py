"""``llamaslot snapshots``: list, check and remove the snapshots on disk.

Commands that only read work while llamaslot runs. Commands that remove need its lock; if it is taken, they name the
process to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import orjson
from msgspec import Struct
from msgspec.structs import replace
from xxhash import xxh3_64_hexdigest

from llamaslot.cli.output import report_faults, several, span, table
from llamaslot.cli.running import load, with_config_or_store
from llamaslot.config.load import Config
from llamaslot.llama.identity import Identity
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.snapshot_value import ByValue, HitRateModel, SnapshotStats
from llamaslot.sizes import readable_size
from llamaslot.store.directory_lock import DirectoryLock, DirectoryUnusable
from llamaslot.store.inventory import FileState, Item, Stock, read_headers, remove, take_stock
from llamaslot.store.quota import Limits, free_bytes_of
from llamaslot.store.snapshot_table import SnapshotTable

EXIT_BROKEN = 1

_SORTS = {
    "used": lambda item: -item.last_used,
    "age": lambda item: item.noted.created_at if item.noted else 0.0,
    "size": lambda item: -item.size_bytes,
    "tokens": lambda item: -item.noted.n_tokens if item.noted else 0,
    "hits": lambda item: -item.n_hits,
}


@click.group()
def snapshots() -> None:
    """List, check and remove the snapshots on disk."""


_json = click.option("--json", "is_json", is_flag=True, help="Print JSON with all fields.")
_dry_run = click.option("--dry-run", is_flag=True, help="Print what would be removed, and remove nothing.")


@snapshots.command()
@with_config_or_store
@_json
@click.option(
    "--sort",
    "order",
    type=click.Choice(list(_SORTS)),
    default="used",
    show_default=True,
    help="Which snapshots come first.",
)
def ls(path: Path, is_json: bool, order: str) -> None:
    """List all snapshots.

    The most recently used comes first, unless --sort says otherwise.
    """
    with report_faults():
        store = _store_of(path)
        stock = take_stock(store.directory)
        items = sorted(stock.items.values(), key=_SORTS[order])
        if is_json:
            _say_json([_fields(item, store) for item in items])
            return
        if items:
            headings = ("ID", "KIND", "TOKENS", "SIZE", "SHARED", "HITS", "AGE", "USED", "MODEL", "STATE")
            rows = [_row(item, store) for item in items]
            _say(table(headings, rows, to_the_right={"TOKENS", "SIZE", "SHARED", "HITS", "AGE", "USED"}))
        _say([_summary(len(items), stock, store)])


@snapshots.command()
@with_config_or_store
@_json
@click.argument("name", metavar="ID")
def show(path: Path, is_json: bool, name: str) -> None:
    """Show what is known about one snapshot, without its text. The beginning of its ID is enough."""
    with report_faults():
        store = _store_of(path)
        item = _chosen(store, [name])[0]
        (item,) = asyncio.run(read_headers(store.directory, [item]))
        fields = _fields(item, store)
        if is_json:
            _say_json(fields)
            return
        fields["size"] = f"{readable_size(item.size_bytes)} ({item.size_bytes:,} bytes)"
        del fields["size_bytes"]
        for key in ("created_at", "last_used"):
            if fields[key] is not None:
                when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(fields[key]))
                fields[key] = f"{when} ({span(store.now - fields[key])} ago)"
        width = max(map(len, fields))
        labels = {key: key.removeprefix("n_").replace("_", " ") for key in fields}
        _say([f"{labels[key]:<{width}}  {_plain(value)}" for key, value in fields.items()])


@snapshots.command()
@with_config_or_store
@_dry_run
@click.argument("names", metavar="ID...", nargs=-1, required=True)
def rm(path: Path, dry_run: bool, names: Sequence[str]) -> None:
    """Remove the snapshots named, pinned ones too.

    A unique beginning of each ID is enough.
    """
    with report_faults():
        store = _store_of(path)
        with _locked(store, dry_run):
            removals = [Removal(item, "as asked") for item in _chosen(store, names)]
            _remove(store, removals, dry_run)


@snapshots.command()
@with_config_or_store
@_dry_run
@click.option(
    "--others", is_flag=True, help="Also remove snapshots of models other than the last served one."
)
def gc(path: Path, dry_run: bool, others: bool) -> None:
    """Remove leftovers, and what exceeds the configured limits.

    Leftovers are unfinished and broken snapshots. Beyond a limit the least valuable ones go.

    Only sizes and headers are compared. The command verify reads whole files, and so finds damaged data too. A file
    that an unreadable sidecar may need is kept.
    """
    with report_faults():
        store = _store_of(path)
        if others and not store.models:
            raise DirectoryUnusable("which model is served is not known yet: start llamaslot with it once")
        with _locked(store, dry_run):
            stock = take_stock(store.directory)
            items = asyncio.run(read_headers(store.directory, list(stock.items.values())))
            useless = (FileState.UNFINISHED, FileState.BROKEN)
            removals = [Removal(item, item.why) for item in items if item.state in useless]
            whole = [item for item in items if item.state is FileState.WHOLE]
            if others:
                removals += [Removal(item, "of another model") for item in whole if not store.is_ours(item)]
                whole = [item for item in whole if store.is_ours(item)]
            _remove(store, [*removals, *over_limits(store, whole)], dry_run)
            if any(item.noted is not None and item.noted.parts for item in items):
                _say(["only sizes and headers were compared: verify reads the files, and finds damaged rows"])


@snapshots.command()
@with_config_or_store
@_dry_run
@click.option("--remove", "removes", is_flag=True, help="Remove the broken snapshots.")
@click.argument("names", metavar="[ID]...", nargs=-1)
def verify(path: Path, dry_run: bool, removes: bool, names: Sequence[str]) -> None:
    """Read snapshots and list the broken ones.

    All are read, or those named. Exit code 1 if a broken one is left.

    A slot file that only one snapshot needs has no checksums: only its header is read.
    """
    with report_faults():
        store = _store_of(path)
        with _locked(store, dry_run or not removes):
            chosen = _chosen(store, names) if names else list(take_stock(store.directory).items.values())
            items = asyncio.run(read_headers(store.directory, chosen, with_checksums=True))
            broken = [Removal(item, item.why) for item in items if item.state is FileState.BROKEN]
            unreadable = [Removal(item, item.why) for item in items if item.state is FileState.UNREADABLE]
            n = Counter(item.state for item in items)
            if removes and broken:
                _remove(store, broken, dry_run)
            if rows := [each.row for each in ([] if removes else broken) + unreadable]:
                _say(table(("ID", "SIZE", "WHAT IS WRONG"), rows, {"SIZE"}))
            more = f", {len(unreadable):,} unreadable" if unreadable else ""
            if n[FileState.UNFINISHED]:
                more += f", {n[FileState.UNFINISHED]:,} unfinished (gc removes them)"
            _say([f"{n[FileState.WHOLE]:,} whole, {len(broken):,} broken{more}"])
    if unreadable or (broken and (dry_run or not removes)):
        sys.exit(EXIT_BROKEN)


# -- output ------------------------------------------------------------------------------------------------------


def _row(item: Item, store: OfflineStore) -> tuple[str, ...]:
    noted = item.noted
    if noted is None:
        used = span(store.now - item.last_used)
        return (
            item.id,
            "-",
            "-",
            readable_size(item.size_bytes),
            "-",
            "-",
            "-",
            used,
            "-",
            f"{item.state}: {item.why}",
        )
    kind = noted.kind.value
    kind += ", pinned" if noted.is_pinned else ""
    return (
        item.id,
        kind,
        f"{noted.n_tokens:,}",
        readable_size(item.size_bytes),
        readable_size(item.shared_bytes),
        f"{item.n_hits:,}",
        span(store.now - noted.created_at),
        span(store.now - item.last_used),
        _short(noted.fingerprint) + ("" if store.is_ours(item) else " (other)"),
        "" if item.state is FileState.WHOLE else f"{item.state}: {item.why}",
    )


def _summary(n_items: int, stock: Stock, store: OfflineStore) -> str:
    size, n_foreign = readable_size(stock.size_bytes), stock.n_foreign
    quota = readable_size(store.limits.quota_bytes)
    said = f"{several(n_items, 'snapshot', 'snapshots')}, {size} of {quota}, in {store.directory}"
    return said + (f"; {several(n_foreign, 'other file', 'other files')} left alone" if n_foreign else "")


def _fields(item: Item, store: OfflineStore) -> dict[str, Any]:
    noted = item.noted
    return {
        "id": item.id,
        "state": item.state.value,
        "why": item.why or None,
        "kind": noted.kind.value if noted else None,
        "is_pinned": noted.is_pinned if noted else None,
        "n_tokens": noted.n_tokens if noted else None,
        "size_bytes": item.size_bytes,
        "shared_bytes": item.shared_bytes,
        "n_hits": item.n_hits,
        "created_at": noted.created_at if noted else None,
        "last_used": item.last_used,
        "checkpoints": list(noted.checkpoints) if noted else [],
        "source": noted.source if noted else None,
        "model": _short(noted.fingerprint) if noted else None,
        "is_of_model_served_last": store.is_ours(item) if noted and store.models else None,
        "file": str(store.directory / f"{item.id}.kv"),
    }


def _short(fingerprint: str) -> str:
    return xxh3_64_hexdigest(fingerprint.encode())[:8]


def _plain(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case list():
            return ", ".join(map(str, value)) or "-"
        case _:
            return str(value)


def _say(lines: list[str]) -> None:
    for line in lines:
        click.echo(line)


def _say_json(data: object) -> None:
    click.echo(orjson.dumps(data, option=orjson.OPT_INDENT_2).decode())


# -- actions -----------------------------------------------------------------------------------------------------


def _store_of(path: Path) -> OfflineStore:
    return OfflineStore.of(load(path), time.time())


def _chosen(store: OfflineStore, names: Sequence[str]) -> list[Item]:
    """Return one snapshot for each name: the only one whose id begins with it. ``ls-`` may be left out. Raises
    DirectoryUnusable if a name matches no snapshot or several.
    """
    items = take_stock(store.directory).items
    chosen = {}
    for name in names:
        found = [
            id_
            for id_ in items
            if id_ == name or id_.removeprefix("ls-").startswith(name.removeprefix("ls-"))
        ]
        if len(found) != 1 or not name.removeprefix("ls-"):
            many = (
                "several snapshots have such ids; give more characters"
                if found
                else "there is no such snapshot"
            )
            raise DirectoryUnusable(f"{name}: {many}")
        chosen[found[0]] = items[found[0]]
    return list(chosen.values())


@contextlib.contextmanager
def _locked(store: OfflineStore, only_reads: bool) -> Iterator[None]:
    """A context manager that holds the lock of the snapshot directory, so that no llamaslot uses it. With
    ``only_reads`` it takes no lock. Raises DirectoryUnusable if another process has the lock.
    """
    if only_reads:
        yield
        return
    lock = DirectoryLock(store.directory)
    try:
        lock.acquire()
    except DirectoryUnusable as error:
        raise DirectoryUnusable(
            f"{error}. Without changes: --dry-run, ls, show and verify work at any time"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _remove(store: OfflineStore, removals: list[Removal], dry_run: bool) -> None:
    if not removals:
        _say(["nothing to remove"])
        return
    _say(table(("ID", "SIZE", "WHY"), [each.row for each in removals], {"SIZE"}))
    n_left, stock = 0, take_stock(store.directory)
    for each in () if dry_run else removals:
        left, error = remove(store.directory, stock, each.item)
        n_left += left
        if error is not None:
            raise DirectoryUnusable(f"{each.item.id} cannot be removed: {error.strerror or error}")
    done = "would be removed" if dry_run else "removed"
    size = readable_size(sum(each.item.size_bytes for each in removals) - n_left)
    _say([f"{several(len(removals), 'snapshot', 'snapshots')} {done}, {size}"])


# -- gc: which snapshots exceed the configured limits, in the order of their value ------------------------------

_OURS, _OTHERS = "served last", "another"


class Removal(Struct, frozen=True):
    """A snapshot to remove, and the reason that the table shows."""

    item: Item
    why: str

    @property
    def row(self) -> tuple[str, str, str]:
        return self.item.id, readable_size(self.item.size_bytes), self.why


class OfflineStore(Struct, frozen=True):
    """A snapshot directory, its limits, and what llamaslot has learned there: rates and hit rates. ``models``: the
    model last served by each backend with this directory; empty if that of any backend is unknown.
    """

    directory: Path
    limits: Limits
    now: float
    models: tuple[Identity, ...]
    rates: Rates
    hit_rates: HitRateModel

    @classmethod
    def of(cls, config: Config, now: float) -> OfflineStore:
        """Return the first snapshot directory that the configuration names, at the time ``now``. Raises
        DirectoryUnusable if it names none. Blocking.
        """
        store = config.store
        named = [backend for backend in config.backends if backend.slot_save_path is not None]
        if not named:
            raise DirectoryUnusable("backends[0].slot_save_path is not set: nothing is kept on disk")
        backend, directory = named[0], os.path.realpath(str(config.directory_of(named[0])))
        that_share_it = [
            each for each in named if os.path.realpath(str(config.directory_of(each))) == directory
        ]
        learned = [
            Rates.from_json(_read(store.meta_dir / f"{each.name}.rates.json")) for each in that_share_it
        ]
        rates = learned[0]
        models = [Identity.from_text(rates.model) for rates in learned]
        known = tuple(model for model in models if model is not None) if None not in models else ()
        hit_rates = HitRateModel.from_json(_read(store.meta_dir / f"{backend.name}.returns.json"))
        limits = Limits(store.quota, max_files=store.max_files, min_free_bytes=store.min_free)
        return cls(Path(str(config.directory_of(backend))), limits, now, known, rates, hit_rates)

    def is_ours(self, item: Item) -> bool:
        """True if a model that was served last can use the snapshot. True also if those models are not known."""
        if item.noted is None or not self.models:
            return True
        other = Identity.from_text(item.noted.fingerprint)
        return other is not None and any(model.is_same(other) for model in self.models)

    def saves_s(self, stats: SnapshotStats) -> float:
        """Return the seconds that one hit of the snapshot saves: its prefill, less its restore."""
        return stats.saves_s(self.rates.prefill.seconds, self.rates.restore.seconds)


def over_limits(store: OfflineStore, items: list[Item]) -> list[Removal]:
    """Return those of ``items`` that must be removed so that the others keep to the limits of bytes, files and free
    space: the least valuable ones.
    """
    order = ByValue(store.hit_rates)
    order.saves_s = store.saves_s
    table = SnapshotTable(order)
    table.eviction.fingerprints = frozenset({_OURS} if store.models else ())
    for item in items:
        noted = item.noted
        assert noted is not None, "what is whole has a sidecar"
        snapshot = replace(noted.snapshot(""), fingerprint=_OURS if store.is_ours(item) else _OTHERS)
        table.add(snapshot, store.now, last_used=item.last_used, n_hits=item.n_hits)
    size_bytes = table.files.size_bytes
    free_bytes = free_bytes_of(store.directory)
    short = {
        "store.quota": size_bytes - store.limits.quota_bytes,
        "store.min_free": 0 if free_bytes is None else store.limits.min_free_bytes - free_bytes,
    }
    n_short = len(items) - store.limits.max_files
    over = [key for key, n in (*short.items(), ("store.max_files", n_short)) if n > 0]
    why = f"worth least: {' and '.join(over)}"
    by_id = {item.id: item for item in items}
    victims = table.eviction.victims(max(short.values()), n_short, (), store.now)
    return [Removal(by_id[victim.id], why) for victim in victims]


def _read(file: Path) -> Any:
    try:
        return orjson.loads(file.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        return None
