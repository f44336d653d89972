"""The file of client keys (``auth.keys_file``): the users of llamaslot and their limits.

A key is 256 random bits, so it is enough to store its SHA-256: nobody can guess a key. A salt adds nothing, because no
two keys are equal and no table of 2**256 hashes can exist. A slow hash is for passwords, which people choose. The key
itself is shown once, when it is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
from pydantic import AfterValidator, Field, ValidationError

from llamaslot.config.faults import fault_lines
from llamaslot.config.values import Count, Section
from llamaslot.errors import ConfigError
from llamaslot.file_id import FileId
from llamaslot.scheduling.request import User

PREFIX = "sk-llamaslot-"
_MAX_BYTES = 16 << 20  # some 80,000 keys; a larger file is not a file of keys
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_HINT = "llamaslot keys add NAME"


def name_of_key(name: str) -> str:
    """Return ``name``. Raises ValueError if it cannot be the name of a key."""
    if not _NAME.fullmatch(name):
        raise ValueError(
            "a name should be 1 to 63 letters, digits, '.', '_' and '-', the first a letter or digit"
        )
    return name


def _digest(text: str) -> str:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", text):
        raise ValueError(f"should be sha256: and 64 digits from 0 to f, as written by {_HINT}")
    return text


class Key(Section):
    """One entry of the file of keys. ``digest``: ``sha256:`` and the hexadecimal SHA-256 of the key. ``max_running``
    and ``max_waiting``: limits of requests of this key, None for those of ``queue``. ``is_admin``: the key opens
    ``/llamaslot/…`` too.
    """

    name: Annotated[str, AfterValidator(name_of_key)]
    digest: Annotated[str, AfterValidator(_digest)]
    created: datetime | None = None
    max_running: Annotated[Count, Field(gt=0)] | None = None
    max_waiting: Count | None = None
    is_admin: bool = False

    @property
    def user(self) -> User:
        return User(f"key:{self.name}", self.max_running, self.max_waiting, self.is_admin)


class Keys(Section):
    keys: tuple[Key, ...] = ()


def new_key() -> str:
    """Return a new random key of 256 bits, in characters that need no quotes in a shell, YAML or JSON."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[tuple[Key, ...], FileId]:
    """Read a file of keys. Returns its entries, and the id of the file that was read, by which a change is noticed.
    Raises ConfigError with all faults of the file.
    """
    try:
        raw, mark = _read(path)
    except FileNotFoundError:
        raise ConfigError(str(path), [f"there is no such file; make it with: {_HINT}"]) from None
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from None
    if not raw.strip():
        raise ConfigError(
            str(path), [f"is empty; a file without keys is {{}}, and {_HINT} adds the first one"]
        )
    return _parsed(path, raw), mark


def _read(path: Path) -> tuple[bytes, FileId]:
    # Reading must not block on a pipe: O_NONBLOCK, which regular files ignore.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(str(path), ["is not a regular file"])
        if status.st_mode & stat.S_IWOTH:
            raise ConfigError(str(path), [f"every user may write to it, and so add keys: chmod 600 {path}"])
        if status.st_size > _MAX_BYTES:
            raise ConfigError(str(path), [f"is not a file of keys: it has {status.st_size:,} bytes"])
        return file.read(_MAX_BYTES), FileId.of(status)


def _parsed(path: Path, raw: bytes) -> tuple[Key, ...]:
    try:
        keys = Keys.model_validate(orjson.loads(raw)).keys
    except orjson.JSONDecodeError as error:
        raise ConfigError(str(path), [f"is not JSON: {error}"]) from None
    except ValidationError as error:
        raise ConfigError(str(path), fault_lines(error, Keys)) from None
    seen: dict[str, int] = {}
    faults = []
    for i, key in enumerate(keys):
        for what, value in (("name", key.name), ("digest", key.digest)):
            if (first := seen.setdefault(f"{what} {value}", i)) != i:
                shown = f" {value}" if what == "name" else ""
                faults.append(
                    f"keys[{i}].{what}: keys[{first}] has the same {what}{shown}; remove one of them"
                )
    if faults:
        raise ConfigError(str(path), faults)
    return keys


@contextlib.contextmanager
def editing(path: Path) -> Iterator[list[Key]]:
    """A context manager that yields the entries of a file of keys as a list, for the block to change. At the end of the
    block the list is written to the file, unless the block raised. A lock on the directory makes other processes wait
    that edit the file in this way.

    The file is replaced as a whole: a reader finds the old content or the new one. A symbolic link stays a link. A new
    file has mode 0600; an existing one keeps its owner, group and mode, without permissions for others. A missing or
    empty file has no keys. Raises ConfigError if the file cannot be read or written, or has faults.
    """
    path = path.resolve()
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(str(path), [f"its directory cannot be opened: {error.strerror}"]) from None
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)  # the file itself is another one after each change
        keys: list[Key] = []
        with contextlib.suppress(FileNotFoundError):
            raw, _ = _read(path)
            keys = list(_parsed(path, raw)) if raw.strip() else []
        yield keys
        _replace(path, _written(keys), directory)
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be written: {error.strerror}"]) from None
    finally:
        os.close(directory)


def _written(keys: list[Key]) -> bytes:
    entries = [key.model_dump(mode="json", exclude_defaults=True) for key in keys]
    option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
    return orjson.dumps({"keys": entries}, option=option)


def _replace(path: Path, data: bytes, directory: int) -> None:
    """Write ``data`` to a new file and rename it to ``path``. ``directory``: descriptor of its directory, which is
    synced. Raises OSError, and ConfigError if the old file's owner cannot be kept.
    """
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    before = _status(path)
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        try:
            if before is not None:
                ours = os.fstat(file.fileno())
                if (before.st_uid, before.st_gid) != (ours.st_uid, ours.st_gid):
                    _give(file.fileno(), path, before)
                os.fchmod(file.fileno(), before.st_mode & 0o640 | 0o600)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.rename(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
    os.fsync(directory)


def _give(file: int, path: Path, to: os.stat_result) -> None:
    """Give the open ``file`` the owner and group of ``to``. Raises ConfigError, with ``path``, if this
    process may not.
    """
    try:
        os.fchown(file, to.st_uid, to.st_gid)
    except PermissionError:
        raise ConfigError(
            str(path),
            [f"belongs to user {to.st_uid} and group {to.st_gid}: do this as that user, or as root"],
        ) from None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def made_now(name: str, key: str, **more: Any) -> Key:
    """Return the entry for a key made now; ``more``: limits and ``is_admin``. Raises ValidationError."""
    now = datetime.now(UTC).replace(microsecond=0)
    return Key(name=name, digest=digest_of(key), created=now, **more)
