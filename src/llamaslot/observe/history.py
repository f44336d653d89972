"""The history of requests, which a SQLite file keeps over restarts. All of it is in memory too. One thread reads the
file once, and writes to it five seconds after a change. Requests never wait for the file.

Why not aiosqlite: it uses a thread too, with a future for every statement. Here a whole batch is one call.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import msgspec
from msgspec.structs import replace

from llamaslot.observe.activity import Activity
from llamaslot.observe.series import KEPT_S, Key, Series, Sums
from llamaslot.tasks import TaskOwner

if TYPE_CHECKING:
    import sqlite3

log = logging.getLogger(__name__)
T = TypeVar("T")

KEPT = 2000  # requests
KEPT_OWNERS = 20_000
VERSION = 1  # of the schema: PRAGMA user_version
_WRITE_AFTER_S = 5.0
_BUSY_S = 0.5  # how long a write waits for another process; then it is tried again with the next
_SCHEMA = """
CREATE TABLE requests (serial INTEGER PRIMARY KEY, at REAL NOT NULL, request BLOB NOT NULL);
CREATE TABLE sums (step INTEGER, at INTEGER, backend TEXT, model TEXT, sums BLOB NOT NULL,
                   PRIMARY KEY (step, at, backend, model)) WITHOUT ROWID;
CREATE TABLE owners (serial INTEGER PRIMARY KEY, snapshot TEXT UNIQUE NOT NULL, user TEXT NOT NULL);
CREATE TABLE began (at REAL NOT NULL);
"""


class WrongVersion(Exception):
    """The history file was written by a later llamaslot."""


class History:
    """The last ``KEPT`` requests, newest last, and sums over all requests. ``path``: the SQLite file; None: a restart
    forgets the history. ``clock`` returns seconds since 1970.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self.latest: deque[Activity] = deque(maxlen=KEPT)
        self.series = Series()
        self.owners: dict[str, str] = {}  # the users whose conversations snapshots hold, oldest first
        self._new_owners: dict[str, str] = {}
        self.began = clock()  # of the first request ever
        self._serial = 0
        self._unwritten: deque[Activity] = deque(maxlen=KEPT)
        self._file = _File(path) if path is not None else None
        self._thread: ThreadPoolExecutor | None = None
        self._tasks = TaskOwner()
        self._reads, self._writes = asyncio.Lock(), asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._is_told = False
        self.is_loaded = path is None

    def add(self, activity: Activity, *, is_model_known: bool = True) -> None:
        """Add a request that has ended, and give it its ``serial``. Takes some microseconds: the file is written later.
        Unless ``is_model_known``, the sums have no model: its name is the client's, and clients can make up any number
        of names, whose sums are kept for ever.
        """
        self._serial += 1
        activity.serial = self._serial
        self.latest.append(activity)
        self.series.count(activity, None if is_model_known else "")
        self._unwritten.append(activity)
        self._write_soon()

    def own(self, snapshot: str, user: str) -> None:
        """Record that ``snapshot`` (its id) holds a conversation of ``user``."""
        self.owners[snapshot] = self._new_owners[snapshot] = user
        if len(self.owners) > KEPT_OWNERS:
            del self.owners[next(iter(self.owners))]

    def stored(self, size_bytes: int) -> None:
        """Record that snapshots take ``size_bytes`` on disk now."""
        self.series.stored(self._clock(), size_bytes)

    @property
    def is_kept(self) -> bool:
        """True if a restart keeps the history: there is a file, and it has not failed yet."""
        return self._file is not None and not self._is_told

    def activity(self, id_: str) -> Activity | None:
        """Return the latest request with the id ``id_``; None if it is not among the last ``KEPT``."""
        return next((one for one in reversed(self.latest) if one.id == id_), None)

    # -- the file ------------------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Read the file, once, and put its requests before those in memory. If it cannot be read, that is logged once,
        and the file stays as it is. Canceling is safe.
        """
        async with (
            self._reads
        ):  # at a stop soon after the start, ``write`` reads too: the sums would count twice
            if self.is_loaded or self._file is None:
                return
            if (found := await self._in_thread(self._file.read)) is not None:
                self._take(*found)

    def _take(
        self, requests: list[Activity], sums: list[tuple[Key, Sums]], owners: dict[str, str], began: float
    ) -> None:
        mine = list(self.latest)
        for activity in mine:  # ended while the file was read
            activity.serial += requests[-1].serial if requests else 0
        self.latest = deque([*requests, *mine][-KEPT:], maxlen=KEPT)
        self._serial = max((one.serial for one in self.latest), default=0)
        self.series.load(sums)
        self.owners = owners | self.owners
        self.began = min(self.began, began)
        self.is_loaded = True

    def _write_soon(self) -> None:
        if self._timer is None and self._file is not None:
            self._timer = asyncio.get_running_loop().call_later(_WRITE_AFTER_S, self._write)

    def _write(self) -> None:
        self._timer = None
        self._tasks.spawn(self.write(), "write the history")

    async def write(self) -> None:
        """Write to the file what has changed since the last write. If that fails, the next write tries the same again.
        Canceling is safe.
        """
        async with self._writes:
            if not self.is_loaded:
                await self.load()
            if self._file is None or not self.is_loaded:
                return
            self.series.sweep(self._clock())
            requests, sums = list(self._unwritten), self.series.take_dirty()
            owners, self._new_owners = self._new_owners, {}
            if not (requests or sums or owners):
                return
            self._unwritten.clear()
            rows = [(key, msgspec.msgpack.encode(its_sums)) for key, its_sums in sums]
            blobs = [(one.serial, one.at, msgspec.msgpack.encode(_without_texts(one))) for one in requests]
            file, began, now = self._file, self.began, self._clock()
            if await self._in_thread(lambda: file.write(blobs, rows, owners, began, now)) is None:
                self._unwritten.extendleft(reversed(requests))
                self._new_owners = owners | self._new_owners
                self.series.dirty |= {key for key, _ in sums}

    async def _in_thread(self, call: Callable[[], T]) -> T | None:
        """Run ``call`` in the file's thread and return its result. None if it raised, which is logged once. After an
        error other than a locked database the file is not used any more.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "history")
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))
        except Exception as error:  # a history is worth no request
            if not self._is_told:
                self._is_told = True
                log.warning(
                    "history: %s cannot be used (%s), so the page forgets its history at a restart; %s",
                    self._path, error, _remedy(error),
                )  # fmt: skip
            if not isinstance(error, _locked_errors()):
                self._file = None
            return None

    async def close(self) -> None:
        """Write what has changed since the last write, and close the file. Blocks until its thread has ended."""
        if self._timer is not None:
            self._timer.cancel()
        await self._tasks.all_ended()
        await self.write()
        if self._thread is not None:
            if self._file is not None:
                await self._in_thread(self._file.close)
            self._thread.shutdown()


def _without_texts(activity: Activity) -> Activity:
    """Return ``activity`` without texts of prompts. ``log.prompts`` lets the journal quote them, but they are never
    written to disk.
    """
    if activity.diverged is None or "text" not in activity.diverged:
        return activity
    told = {name: value for name, value in activity.diverged.items() if name != "text"}
    return replace(activity, diverged=told)


def _locked_errors() -> tuple[type[Exception], ...]:
    import sqlite3

    return (sqlite3.OperationalError,)


def _remedy(error: Exception) -> str:
    if isinstance(error, WrongVersion):
        return "an older llamaslot does not change it"
    if isinstance(error, _locked_errors()):
        return "is another llamaslot using this directory, is it writable, is the disk full?"
    return "remove it to begin a new one"


class _File:
    """The SQLite file. Only one thread may use it. Every method blocks, and raises sqlite3.Error and WrongVersion."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._fd: int | None = None  # while the file is locked

    def read(self) -> tuple[list[Activity], list[tuple[Key, Sums]], dict[str, str], float]:
        """Read the whole file. Returns the last ``KEPT`` requests, oldest first; the sums; the user of each snapshot
        id; and the time of the first request ever, in seconds since 1970 (now if there is no file).
        """
        if not self._path.exists():
            return [], [], {}, time.time()
        with self._open() as db:
            blobs = db.execute(
                "SELECT request FROM requests ORDER BY serial DESC LIMIT ?", (KEPT,)
            ).fetchall()
            requests = [msgspec.msgpack.decode(blob, type=Activity) for (blob,) in reversed(blobs)]
            rows = db.execute("SELECT step, at, backend, model, sums FROM sums").fetchall()
            sums = [(Key(*row[:4]), msgspec.msgpack.decode(row[4], type=Sums)) for row in rows]
            owners = dict(db.execute("SELECT snapshot, user FROM owners ORDER BY serial").fetchall())
            began = db.execute("SELECT min(at) FROM began").fetchone()[0]
        return requests, sums, owners, time.time() if began is None else began

    def write(
        self,
        requests: list[tuple[int, float, bytes]],
        sums: list[tuple[Key, bytes]],
        owners: dict[str, str],
        began: float,
        now: float,
    ) -> bool:
        """Write requests, sums and owners in one transaction, and delete those that are too old by ``now``. ``began``:
        the time of the first request ever, written only once. Returns True, so that the caller can tell it
        from the None that ``_in_thread`` returns after a failure.
        """
        with self._open() as db:
            db.executemany("INSERT OR REPLACE INTO requests VALUES (?, ?, ?)", requests)
            db.executemany(
                "INSERT OR REPLACE INTO sums VALUES (?, ?, ?, ?, ?)",
                [(*key, its_sums) for key, its_sums in sums],
            )
            db.executemany("INSERT OR REPLACE INTO owners (snapshot, user) VALUES (?, ?)", owners.items())
            db.execute(
                "DELETE FROM owners WHERE serial <= (SELECT max(serial) FROM owners) - ?", (KEPT_OWNERS,)
            )
            db.execute("INSERT INTO began SELECT ? WHERE NOT EXISTS (SELECT * FROM began)", (began,))
            if requests:
                db.execute("DELETE FROM requests WHERE serial <= ?", (requests[-1][0] - KEPT,))
            for step, kept_s in KEPT_S.items():
                if step:
                    db.execute("DELETE FROM sums WHERE step = ? AND at < ?", (step, now - kept_s))
        return True

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A context manager that yields the connection in a transaction, and opens the file if needed."""
        import sqlite3  # 10 ms, which the start of llamaslot does not wait for

        if self._db is None:
            self._lock()
            try:
                db = sqlite3.connect(self._path, timeout=_BUSY_S)
            except BaseException:  # too many open files, for example
                self._unlock()
                raise
            try:
                # A write costs no fsync, and a power cut loses no file.
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                (version,) = db.execute("PRAGMA user_version").fetchone()
                if version > VERSION:
                    raise WrongVersion(f"its schema has version {version}, this llamaslot knows {VERSION}")
                if version == 0:
                    db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version = {VERSION};COMMIT;")
            except BaseException:
                db.close()
                self._unlock()
                raise
            self._db = db
        with self._db:
            yield self._db

    def _lock(self) -> None:
        """Lock the file against other llamaslots, which would replace the rows of this one, until ``_unlock``. Readers
        are not kept out: SQLite has locks of its own. A new file gets mode 0600, and with it the files that SQLite puts
        beside it (-wal, -shm), which hold the same.
        """
        import sqlite3

        try:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise sqlite3.OperationalError("it is locked") from None
        except OSError:
            pass  # SQLite says why; some network file systems have no such locks

    def _unlock(self) -> None:
        """Only while no connection is open: closing any descriptor of a file drops SQLite's own locks on it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def close(self) -> bool:
        if self._db is not None:
            self._db.close()
            self._db = None
        self._unlock()
        return True
