"""Faults that concern several settings together: two keys that exclude each other, a host that requires keys."""

from __future__ import annotations

import importlib.util
import ipaddress
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, ValidationInfo

from llamaslot.config.faults import Loc
from llamaslot.config.sections import BackendConfig
from llamaslot.config.values import address_of, anchored
from llamaslot.errors import LlamaslotError, how_to_add
from llamaslot.llama.managed.process import EMBEDDED_MODEL, smollm2_path


def wrong_together(raw: Any, info: ValidationInfo) -> Iterator[tuple[Loc, str]]:
    """Yield the path and the text of each fault that concerns more than one value of the file.

    ``raw``: the parsed YAML, of any shape. A value of a wrong type is skipped here: its section's model reports it.
    """
    if not isinstance(raw, dict):
        return
    yield from _auth_faults(raw)
    if not isinstance(backends := raw.get("backends"), list | tuple):
        return
    if not backends:
        yield ("backends",), "is empty: one backend is needed, with url or managed"
    yield from _twice(backends)
    yield from _model_faults(raw.get("models"), backends, info)
    yield from _directory_faults(raw, backends, info)
    if not any(_keeps(backend) for backend in backends) and raw.get("prewarm"):
        yield ("prewarm",), "needs backends[0].slot_save_path: what is computed ahead is kept there"
    listen = raw.get("listen")
    own_port = listen.get("port", 8081) if isinstance(listen, dict) else 8081
    for i, backend in enumerate(backends):
        if isinstance(backend, dict):
            for key, message in _backend_faults(backend, own_port, info):
                yield ("backends", i, *key), message


def _keeps(backend: object) -> bool:
    """Return True if a backend has a directory for snapshots. True also if ``backend`` is no mapping: it
    may have one.
    """
    if not isinstance(backend, dict):
        return True
    return bool(backend.get("managed")) or backend.get("slot_save_path") is not None


def _twice(backends: Sequence[object]) -> Iterator[tuple[Loc, str]]:
    """Yield a fault for each backend that has the name, the URL or the port of an earlier one."""
    names, urls, ports = dict[object, int](), dict[object, int](), dict[object, int]()
    for i, backend in enumerate(backends):
        if not isinstance(backend, dict):
            continue
        name = backend.get("name", "llama")
        if not isinstance(name, str):
            continue
        if (other := names.setdefault(name, i)) != i:
            yield (
                ("backends", i, "name"),
                f"is {name}, as that of backends[{other}]: give each backend a name of its own",
            )
        url = backend.get("url")
        address = address_of(url) if isinstance(url, str) else None
        if address is not None and (other := urls.setdefault(address, i)) != i:
            yield (
                ("backends", i, "url"),
                f"is {url}, the same server as that of backends[{other}]: one llama-server is one backend,"
                " whatever its models are called; remove one of the two",
            )
        port = managed.get("port") if isinstance(managed := backend.get("managed"), dict) else None
        if isinstance(port, int) and (other := ports.setdefault(port, i)) != i:
            yield (
                ("backends", i, "managed", "port"),
                f"is {port}, as that of backends[{other}]; without it a free one is taken",
            )


def _model_faults(
    models: object, backends: Sequence[object], info: ValidationInfo
) -> Iterator[tuple[Loc, str]]:
    if not isinstance(models, dict):
        return
    found = models.get("aliases")
    aliases = found if isinstance(found, dict) else {}
    named: list[tuple[Loc, object]] = [(("models", "aliases", alias), its) for alias, its in aliases.items()]
    each = models.get("each")
    named += [(("models", "each", name), name) for name in (each if isinstance(each, dict) else ())]
    known = _known_models(backends, info)
    for loc, target in [*named, (("models", "default"), models.get("default"))]:
        if not isinstance(target, str) or not target:
            continue
        if target in aliases:
            yield loc, f"{target} is an alias too: name the model itself, as its server does, or a backend"
        elif known is not None and target not in known:
            yield loc, f"there is no model {target}; known: {', '.join(known)}"


def _known_models(backends: Sequence[object], info: ValidationInfo) -> list[str] | None:
    """Return the names of all models and backends. None unless every backend is managed: else a server
    tells its names.
    """
    known = dict[str, None]()
    for raw in backends:
        try:
            backend = BackendConfig.model_validate(raw, context=info.context)
        except ValidationError:
            return None
        if backend.managed is None:
            return None
        known |= dict.fromkeys((backend.managed.model_name, backend.name))
    return list(known)


def _directory_faults(
    raw: dict[str, Any], backends: Sequence[object], info: ValidationInfo
) -> Iterator[tuple[Loc, str]]:
    """Yield the faults of directories that are used for two purposes: slot files and llamaslot's own files, or two
    directories of slot files one inside the other. Each side would take the other's files for foreign.
    """
    store = raw.get("store")
    meta = _real(store.get("meta_dir"), info) if isinstance(store, dict) else None
    kept = _real(store.get("directory"), info) if isinstance(store, dict) else None
    if kept is not None and kept == meta:
        yield (
            ("store", "directory"),
            "is store.meta_dir too: llamaslot's own files and slot files need a directory each",
        )
    seen = dict[Path, int]()
    for i, backend in enumerate(backends):
        path = _real(backend.get("slot_save_path"), info) if isinstance(backend, dict) else None
        if path is None and isinstance(backend, dict) and backend.get("managed"):
            path = kept  # the default
        if path is None:
            continue
        loc: Loc = ("backends", i, "slot_save_path")
        if path == meta != kept:
            yield loc, "is store.meta_dir too: llamaslot's own files and slot files need a directory each"
        for other, j in seen.items():
            if kept is not None and path != other:
                yield loc, f"with store.directory it must be that of backends[{j}]: all save into one place"
            elif path != other and (path in other.parents or other in path.parents):
                yield (
                    loc,
                    f"and that of backends[{j}] are one inside the other: give them the same, or one beside",
                )
        seen.setdefault(path, i)


def _real(path: object, info: ValidationInfo) -> Path | None:
    """Return ``path`` as absolute path without links. None if it is no text; the check of its section reports that."""
    try:
        return anchored(Path(path), info).resolve() if isinstance(path, str) and path else None
    except ValueError:
        return None


def _auth_faults(raw: dict[str, Any]) -> Iterator[tuple[Loc, str]]:
    """Yield the faults of ``auth`` and ``listen.host``. A host that other machines can reach requires
    ``auth.keys_file`` or ``auth.allow_anonymous``.
    """
    listen, auth = (
        section if isinstance(section := raw.get(name), dict) else {} for name in ("listen", "auth")
    )
    if auth.get("admin_key") is not None and auth.get("admin_key_file") is not None:
        yield (
            ("auth", "admin_key_file"),
            "not together with admin_key; the file keeps the key out of this one",
        )
    host = listen.get("host", "127.0.0.1")
    # The values that pydantic reads as true; a value that is neither true nor false is reported as a fault of its
    # own.
    is_anonymous = str(auth.get("allow_anonymous", "")).lower() in ("true", "1", "1.0", "on", "yes", "y", "t")
    if not isinstance(host, str) or not host or auth.get("keys_file") is not None or is_anonymous:
        return
    try:
        if not _is_loopback(host):
            yield (
                ("listen", "host"),
                f"{host} can be reached from other machines, and no key is required: make keys with 'llamaslot keys "
                "add NAME' and set auth.keys_file to their file, or set auth.allow_anonymous: true",
            )
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not a host name"
        if host.startswith("["):
            why = "an IPv6 address is written without brackets here"
        elif host.count(":") == 1:
            why = "a port goes into listen.port"
        yield ("listen", "host"), f"{host} is not known: {why}"


def _is_loopback(host: str) -> bool:
    """Return True if all addresses of ``host`` are loopback addresses. Raises OSError or UnicodeError if the host is
    unknown.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(address[0])).is_loopback for *_, address in found)


def _backend_faults(
    backend: dict[str, Any], own_port: object, info: ValidationInfo
) -> Iterator[tuple[Loc, str]]:
    url, managed = backend.get("url"), backend.get("managed")
    if url is not None and managed is not None:
        yield (
            ("managed",),
            "not together with url: llamaslot starts a llama-server (managed) or finds one (url)",
        )
    if url is None and managed is None:
        yield (), "needs url (where a llama-server runs) or managed (how to run one)"
    if backend.get("api_key") is not None and backend.get("api_key_file") is not None:
        yield ("api_key_file",), "not together with api_key; the file keeps the key out of this one"
    if isinstance(url, str) and address_of(url) in [("127.0.0.1", own_port, ""), ("::1", own_port, "")]:
        yield (
            ("url",),
            f"is llamaslot's own address: llama-server needs another port than listen.port {own_port}",
        )
    if isinstance(managed, dict):
        for key, message in _wrong_in_managed(managed, own_port, info):
            yield ("managed", key), message


def _wrong_in_managed(
    managed: dict[str, Any], own_port: object, info: ValidationInfo
) -> Iterator[tuple[str, str]]:
    if managed.get("port") is not None and managed["port"] == own_port:
        yield "port", "is listen.port too; without it a free one is taken"
    command, model = managed.get("command"), managed.get("model")
    if command is None:
        if importlib.util.find_spec("xllamacpp") is None:
            yield (
                "command",
                f"is not set, and the embedded engine is not installed: {how_to_add('xllamacpp')}",
            )
        # With a command, the model's path may exist only for that command (a container).
        if isinstance(model, str) and model not in ("", EMBEDDED_MODEL):
            file = anchored(Path(model), info)
            if not file.is_file():
                yield "model", f"there is no such file: {file}"
            elif (instead := _instead_of_gguf(file)) is not None:
                yield "model", f"{file} is no GGUF: it {instead}"
    elif (program := _first_word(command)) and shutil.which(program) is None:
        yield "command", f"there is no program {program} (in PATH, if it has no slash)"
    if model == EMBEDDED_MODEL:
        try:
            smollm2_path()
        except LlamaslotError as error:
            yield "model", str(error)


_BEGINNINGS = (
    (b"", "is empty"),
    (b"version https://git-lfs", "is a pointer of Git LFS: `git lfs pull` fetches the file itself"),
    (b"<", "is HTML or XML, an error page perhaps: fetch it again"),
    (
        b"PK\x03\x04",
        "is a ZIP archive or a PyTorch checkpoint: llama.cpp's convert_hf_to_gguf.py makes a GGUF",
    ),
    (b"qsgg", "is a slot file of llama-server"),
    (b"tjgg", "is a model in the format before GGUF, which llama-server does not read any more"),
)


def _instead_of_gguf(file: Path) -> str | None:
    """Return what a model file is instead of a GGUF, by its first bytes. None for a GGUF, and for a file that cannot be
    read, which ``serve --check`` reports.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(32)
    except OSError:
        return None
    if start.startswith(b"GGUF"):
        return None
    if start[8:10] == b'{"':
        return "looks like safetensors: llama.cpp's convert_hf_to_gguf.py makes a GGUF"
    known = (what for magic, what in _BEGINNINGS if (start.startswith(magic) if magic else not start))
    return next(known, f"begins with {start[:4].decode('latin-1')!r}, not with 'GGUF'")


def _first_word(command: object) -> str | None:
    """Return the program of a command, which is a line or a list of words; None if it is neither, or empty."""
    words = command.split() if isinstance(command, str) else command
    return words[0] if isinstance(words, list) and words and isinstance(words[0], str) else None
