"""What ``llamaslot doctor`` looks at on this machine: the configuration's files, limits, clocks."""

from __future__ import annotations

import fcntl
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

from llamaslot.cli.check import Checked
from llamaslot.cli.doctor.findings import Finding
from llamaslot.config.load import Config
from llamaslot.store.directory_lock import LOCK_NAME
from llamaslot.store.scan import list_own
from llamaslot.store.snapshot import JSON, PROBE, new_id

_FEW_FILES = 4096
_CLOCK_S = 2.0  # a file system that is ahead or behind by more
_FUTURE_S = 60.0
_BUILT = 1_735_689_600  # 2025-01-01: no clock that is set shows less


def of_check(checked: Checked) -> Iterator[Finding]:
    """Yield the result of ``serve --check`` as findings."""
    for fault in checked.faults:
        yield Finding("files", "fault", fault)
    for note in checked.notes:
        yield Finding("files", "warning", note)
    for note in checked.only_root:
        yield Finding("files", "note", note)
    if not checked.faults and not checked.notes and not checked.only_root:
        yield Finding("files", "ok", "this user can use all files and directories that are named")


def of_machine(config: Config) -> Iterator[Finding]:
    yield _open_files(config)
    directories = dict.fromkeys(filter(None, map(config.directory_of, config.backends)))
    yield _clock(
        [directory for directory in directories if os.access(directory, os.R_OK | os.W_OK | os.X_OK)]
    )


def holder(directory: Path) -> int | None:
    """Return the pid of the llamaslot that has the lock of ``directory`` now; None if none has it. Changes nothing."""
    try:
        with (directory / LOCK_NAME).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read(32) or b"0")
    except (OSError, ValueError):
        pass
    return None


def _open_files(config: Config) -> Finding:
    """Return a finding about the limit of open files of the running llamaslot; if none runs, of this process."""
    check, directory = "open files", config.backend.slot_save_path
    pid = holder(directory) if directory is not None else None
    whose, limit = "this shell's limit", resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if pid is not None and (its_limit := _limit_of(pid)) is not None:
        whose, limit = f"the limit of llamaslot (pid {pid})", its_limit
    wanted = 2 * (config.listen.max_connections or 0)
    if 0 <= limit < max(_FEW_FILES, wanted):
        return Finding(
            check, "warning",
            f"{whose} is {limit:,}: a client takes one, a running request two; more clients get 503",
            "LimitNOFILE=65536 in the unit ([Service]), or ulimit -Hn 65536",
        )  # fmt: skip
    return Finding(check, "ok", f"{whose} is {limit:,}" if limit >= 0 else f"{whose}: none")


def _limit_of(pid: int) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
        hard = next(line for line in lines if line.startswith("Max open files")).split()[4]
    except (OSError, StopIteration, IndexError):
        return None
    return -1 if hard == "unlimited" else int(hard)


def _clock(directories: list[Path]) -> Finding:
    """Return a finding about this machine's clock: its date, and how it compares with the times of files in
    ``directories``.
    """
    check, now = "clock", time.time()
    cost = "snapshots are evicted by the time of their last use, so the wrong ones go"
    if now < _BUILT:
        told = f"this machine's clock shows {time.strftime('%Y-%m-%d', time.gmtime(now))}: {cost}"
        return Finding(check, "warning", told, "timedatectl set-ntp true")
    for directory in directories:
        if abs(ahead_s := _ahead_s(directory)) > _CLOCK_S:
            way = "ahead" if ahead_s > 0 else "behind"
            told = f"files in {directory} get a time {abs(ahead_s):.0f} s {way}: {cost}"
            return Finding(
                check, "warning", told, "run NTP on the machine that exports this directory, and here"
            )
        newest_s = max(
            (_mtime(directory / (id_ + JSON)) for id_ in list_own(directory).suffixes), default=0.0
        )
        if newest_s > now + _FUTURE_S:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(newest_s))
            told = f"{directory} has snapshots last used in the future, at {used}: {cost}"
            return Finding(check, "warning", told, "timedatectl set-ntp true")
    return Finding(check, "ok", "this machine and the snapshots' file system agree")


def _ahead_s(directory: Path) -> float:
    """Return the seconds by which the time of a new file in ``directory`` is ahead of this machine's clock; negative if
    it is behind. If this process dies, the next start of llamaslot removes the file.
    """
    probe = directory / (new_id() + PROBE)
    before = time.time()
    try:
        probe.touch()
        made = probe.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)
    after = time.time()
    return made - after if made > after else min(made - before, 0.0)


def _mtime(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
