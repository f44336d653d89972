"""``serve --check``: checks the configuration, and whether the service's user can use the files that it names.

Root may read and write everything, so root does not notice what the service's user may not use. ``--as USER`` checks in
a process of that user. Without it, root is told which files only root can use, by their owners and modes.
"""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct, field

from llamaslot.config.faults import read_yaml
from llamaslot.config.load import Config
from llamaslot.config.sections import ManagedModelsConfig
from llamaslot.errors import ConfigError
from llamaslot.store.directory_lock import LOCK_NAME
from llamaslot.store.learned import HITS_NAME
from llamaslot.store.quota import beyond_disk
from llamaslot.store.scan import list_own, size_bytes

_ROOTS_META_DIR = "/var/lib/llamaslot"  # of the systemd unit: made by StateDirectory=
_SHARED = (
    "docs/install.md has the commands: a group for both processes, directories with mode 2770, umask 0007"
)
_WORDS = {os.R_OK: "read", os.W_OK: "write", os.X_OK: "enter"}


class Checked(Struct):
    """The result of a check, as lines of text. ``faults`` prevent llamaslot from serving, or from saving; ``notes`` are
    hints; ``only_root``: files that no other user can use, by owner and mode, if root checks.
    """

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    only_root: list[str] = field(default_factory=list)


def check(path: Path) -> Checked:
    """Check the configuration file at ``path``, and whether the user of this process can use the files that it names.
    Raises ConfigError if the file has faults; then the directory of the first backend is checked as far as it can be
    read.
    """
    try:
        config = Config.load(path)
    except ConfigError as error:
        raise ConfigError(error.source, [*error.faults, *_unusable_as_written(path)]) from None
    checked = Checked(list(_unusable(config)))
    store = config.store
    for directory in dict.fromkeys(config.directory_of(backend) for backend in config.backends):
        if directory is None or not directory.is_dir() or not os.access(directory, os.R_OK | os.X_OK):
            continue
        n_held = sum(size_bytes(directory, id_) for id_ in list_own(directory).suffixes)
        note = beyond_disk(store.quota, store.min_free, directory, n_held)
        checked.notes += [note] if note else []
    if config.managed != ManagedModelsConfig() and not any(backend.managed for backend in config.backends):
        checked.notes.append(
            "managed.max_loaded and managed.idle_unload_s are for backends with 'managed', and there is none: a router"
            " has --models-max, every llama-server --sleep-idle-seconds"
        )
    if os.geteuid() == 0:
        checked.only_root += _only_for_root(path, config)
        checked.only_root.append(
            "checked as root, who may use everything: --as USER checks as the user that will serve (llamaslot, in"
            " docs/llamaslot.service)"
        )
    return checked


# -- as this user ------------------------------------------------------------------------------------------------


def _unusable(config: Config) -> Iterator[str]:
    """Yield the faults of directories, and of model files, that this user cannot use. Other files were read with the
    configuration.
    """
    made = [("store.meta_dir", config.store.meta_dir)]  # at the start
    if config.store.directory is not None:
        made.append(("store.directory", config.store.directory))
    for i, backend in enumerate(config.backends):
        directory, key = backend.slot_save_path, f"backends[{i}].slot_save_path"
        if directory is None or directory in (before.slot_save_path for before in config.backends[:i]):
            continue
        if backend.managed is not None:
            made.append((key, directory))
        elif fault := _closed(directory, os.R_OK | os.W_OK | os.X_OK):
            yield f"{key}: {fault}"
        else:
            yield from _closed_within(key, directory, ("ls-", LOCK_NAME, HITS_NAME))
    names = tuple(f"{backend.name}." for backend in config.backends)
    for key, path in made:
        above = next((at for at in (path, *path.parents) if os.path.lexists(at)), path)
        if fault := _closed(above, os.W_OK | os.X_OK | (os.R_OK if above == path else 0)):
            is_made = "" if above == path else f"{path} is made at the start, and "
            yield f"{key}: {is_made}{fault}"
        elif above == path:
            yield from _closed_within(key, path, names)
    for i, backend in enumerate(config.backends):
        if backend.managed is not None and backend.managed.command is None:
            model = Path(backend.managed.model)
            if model.is_absolute() and (fault := _closed(model, os.R_OK)):
                yield f"backends[{i}].managed.model: {fault}"


def _unusable_as_written(path: Path) -> Iterator[str]:
    """Yield the fault of the first backend's ``slot_save_path``, read from a file that has other faults, such as a key
    file that cannot be read.
    """
    try:
        backend = read_yaml(path)["backends"][0]
        named = backend["slot_save_path"] if "url" in backend else None  # of a managed server it is created
    except (ConfigError, LookupError, TypeError):
        return
    if isinstance(named, str) and named:
        directory = path.absolute().parent / os.path.expanduser(named)
        if fault := _closed(directory, os.R_OK | os.W_OK | os.X_OK):
            yield f"backends[0].slot_save_path: {fault}"


def _closed(path: Path, need: int) -> str | None:
    """Return why this user cannot use ``path``; None if it can. ``need``: bits of ``os.R_OK``, ``W_OK``, ``X_OK``."""
    if not path.exists():
        if any(not os.access(above, os.X_OK) for above in path.parents if above.exists()):
            return f"{_user()} cannot reach {path}: it may not enter a directory above it. {_SHARED}"
        return f"there is no {path}: make it, or mount it here. {_SHARED}"
    if need & os.W_OK and not path.is_dir():
        return f"{path} is not a directory"
    if os.access(path, need):
        return None
    missing = [word for bit, word in _WORDS.items() if need & bit and not os.access(path, bit)]
    return f"{_user()} may not {' and '.join(missing)} {path} ({_owner(path)}). {_SHARED}"


def _closed_within(key: str, directory: Path, prefixes: tuple[str, ...]) -> Iterator[str]:
    """Yield a fault if ``directory`` has files of llamaslot (names with ``prefixes``) that this user may not use,
    because they belong to another user: for example to root, because root has started llamaslot once.
    """
    closed = [
        Path(entry.path)
        for entry in os.scandir(directory)
        if entry.name.startswith(prefixes)
        and entry.is_file()
        and not os.access(entry.path, os.R_OK | (0 if entry.name.startswith("ls-") else os.W_OK))
    ]
    if closed:
        first = min(closed)
        more = f" and {len(closed) - 1} more files" if len(closed) > 1 else ""
        yield f"{key}: {_user()} may not use {first}{more} ({_owner(first)}): give them to it, or remove them"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


def _owner(path: Path) -> str:
    status = path.stat()
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        user = str(status.st_uid)
    try:
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        group = str(status.st_gid)
    return f"it belongs to {user}:{group}, mode {stat.S_IMODE(status.st_mode):o}"


# -- for root, by owners and modes -------------------------------------------------------------------------------


def _only_for_root(path: Path, config: Config) -> Iterator[str]:
    """Yield a line for each file and directory of the configuration that only root can use."""
    auth, tls = config.auth, config.listen.tls
    read = {
        "the configuration": path.absolute(),
        "auth.keys_file": auth.keys_file,
        "auth.admin_key_file": auth.admin_key_file,
        **{f"backends[{i}].api_key_file": backend.api_key_file for i, backend in enumerate(config.backends)},
        "listen.tls.cert": tls.cert if tls is not None else None,
        "listen.tls.key": tls.key if tls is not None else None,
        **{f"prewarm[{i}]": file for i, file in enumerate(config.prewarm)},
    }
    for key, file in read.items():
        if file is not None and _is_roots_alone(file, os.R_OK):
            yield f"{key}: only root can read {file} ({_owner(file)})"
    written = {
        "store.meta_dir": config.store.meta_dir,
        "store.directory": config.store.directory,
        **{
            f"backends[{i}].slot_save_path": backend.slot_save_path
            for i, backend in enumerate(config.backends)
        },
    }
    for key, directory in written.items():
        if directory is not None and directory.exists() and _is_roots_alone(directory, os.W_OK):
            yield f"{key}: only root can write to {directory} ({_owner(directory)})"
    if _is_roots_alone(python := Path(sys.executable).resolve(), os.X_OK):
        yield _no_python("only root can run", python)


def _no_python(who_cannot: str, python: Path) -> str:
    return (
        f"{who_cannot} {python}, the Python of this llamaslot: make its venv with one outside of a home directory"
        " (apt install python3-venv; /usr/bin/python3 -m venv --clear /opt/llamaslot)"
    )


def _is_roots_alone(path: Path, need: int) -> bool:
    """True if no user but root can use ``path`` (``need``: a bit such as ``os.R_OK``), by its mode and those of the
    directories above it.
    """
    wanted = [(path, need), *((above, os.X_OK) for above in path.absolute().parents)]
    return not all(_is_open(at, bit) for at, bit in wanted)


def _is_open(path: Path, bit: int) -> bool:
    """True if the mode of ``path`` gives the access ``bit`` to a user other than root: as owner, group or other."""
    status = path.stat()
    of_group = bit << 3 if status.st_gid != 0 else 0
    of_owner = bit << 6 if status.st_uid != 0 else 0
    return bool(status.st_mode & (bit | of_group | of_owner))


# -- as another user ---------------------------------------------------------------------------------------------


def check_as(path: Path, who: str) -> tuple[int, str]:
    """Run ``serve --check`` as the user ``who``. Returns and raises as ``run_as``."""
    return run_as(who, path, "serve", "--check")


def run_as(who: str, path: Path, *words: str) -> tuple[int, str]:
    """Run ``llamaslot`` with the arguments ``words`` and the configuration at ``path`` as ``who`` (``USER`` or
    ``USER:GROUP``). Returns the exit code, and what it printed.

    The process has that user's groups and home directory. Its state directory is that of the systemd unit,
    /var/lib/llamaslot, unless $STATE_DIRECTORY names another. Raises ConfigError if there is no such user, if this
    process is neither that user nor root, or if the user cannot run llamaslot at all.
    """
    name, _, group = who.partition(":")
    try:
        user = pwd.getpwnam(name)
        gid = grp.getgrnam(group).gr_gid if group else user.pw_gid
    except KeyError:
        raise ConfigError("--as", [f"there is no user or group {who!r} on this machine"]) from None
    if os.geteuid() not in (0, user.pw_uid):
        raise ConfigError("--as", [f"only root can check as {name}: sudo, or run it as {name} without --as"])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "SUDO_"))
    }
    environment |= {"HOME": user.pw_dir, "USER": name, "LOGNAME": name}
    environment.setdefault("STATE_DIRECTORY", _ROOTS_META_DIR)
    is_other_user = os.geteuid() != user.pw_uid
    python = Path(sys.executable)
    try:
        done = subprocess.run(
            [python, "-m", "llamaslot", *words, "--config", path.absolute()],
            user=user.pw_uid if is_other_user else None,
            group=gid if is_other_user else None,
            extra_groups=os.getgrouplist(name, gid) if is_other_user else None,
            cwd="/",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        raise ConfigError(f"as {name}", [_no_python(f"{name} cannot run", python.resolve())]) from None
    said = done.stdout + done.stderr
    # That user may not use Python itself, or a module that it imports.
    if done.returncode not in (0, 2) and not done.stdout:
        raise ConfigError(
            f"as {name}", [f"llamaslot cannot be run by {name}: {(said.splitlines() or ['?'])[-1]}"]
        )
    return done.returncode, said
