"""A directory that several llamaslots share, one for each model: a part for each, and its user.

``<root>/<part>/`` has slot files, ``<root>/.meta/<part>/`` llamaslot's own files. A part is claimed by an flock on a
file in the latter, which the kernel releases when the process ends. One quota holds for all parts: ``neighbours``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from msgspec import Struct

from llamaslot.errors import LlamaslotError

META = ".meta"
CLAIM = "in-use"
QUOTA_LOCK = "quota.lock"  # in META: held while parts are claimed or space is reserved


class StoreUnusable(LlamaslotError):
    """The shared directory cannot be made or written to."""


class Part(Struct):
    """A model's part of a shared store, claimed by this process until ``release``. ``taken``: process ids of others
    that hold the model's earlier parts.
    """

    name: str
    directory: Path
    meta_dir: Path
    taken: tuple[str, ...]
    _claim: int

    def release(self) -> None:
        os.close(self._claim)


def name_of(model: str) -> str:
    """The name of a model's part: legible, and different for each ``model`` (a path, or where it is loaded from)."""
    legible = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-.") or "model"
    return f"{legible[:48]}-{hashlib.sha256(model.encode(errors='surrogateescape')).hexdigest()[:8]}"


def claim(root: Path, model: str) -> Part:
    """The first free part of a model. A second llamaslot with the same model gets a part of its own: two in one
    directory would remove each other's files. Blocking. Raises StoreUnusable.
    """
    try:
        (root / META).mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(root / META / QUOTA_LOCK):
            return _first_free(root, name_of(model))
    except OSError as error:
        raise StoreUnusable(
            f"the store {root} cannot be used: {error.strerror} ({error.filename})"
        ) from error


def _first_free(root: Path, first: str) -> Part:
    taken: list[str] = []
    for name in _names(first):
        directory, meta_dir = root / name, root / META / name
        for path in (directory, meta_dir):
            path.mkdir(mode=0o700, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise StoreUnusable(f"the store {path} cannot be written to by this user")
        if (lock := try_claim(meta_dir)) is not None:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
            return Part(name, directory, meta_dir, tuple(taken), lock)
        taken.append((meta_dir / CLAIM).read_text(encoding="ascii", errors="replace").strip() or "unknown")
    raise AssertionError("there is no end of names")


def try_claim(meta_dir: Path) -> int | None:
    """The open file of a claim; None if another process has it. Only while the quota is locked: a llamaslot that
    starts must not meet a claim that was only tried. Blocking; raises OSError.
    """
    return try_lock(meta_dir / CLAIM)


def try_lock(path: Path) -> int | None:
    """The open file that is locked until it is closed; None if another process has it locked. Blocking; raises
    OSError.
    """
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _names(first: str) -> Iterator[str]:
    yield first
    for n in count(2):
        yield f"{first}.{n}"
