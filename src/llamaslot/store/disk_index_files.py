"""The files of a *generation*, the prefix index on disk (``cache/disk_index.py``): writing, opening and verification.

They are in a directory of their own: ``<id>.trie`` (marisa), ``<id>.columns`` (int32, one column after the other),
``<id>.names`` (a line for each holder) and ``manifest.json``, which names the valid generation. The manifest is
written as ``<id>.manifest`` when all other files are on disk, and renamed when the generation has been opened and
verified. A file is never rewritten under the same name, because a process may have mapped it. marisa does not validate
what it maps (after one flipped byte 10,357 of 35,791 keys were left, without an error), so the checksum of every file
is verified first.

Like slot files, these files hold the tokens of conversations, also of dropped snapshots until the next generation.
Only llamaslot's user may read them.

``python -m llamaslot.store.disk_index_files <directory> <id>`` makes the generation ``<id>`` from the valid one and
from ``<id>.input``. marisa holds the GIL while it builds (a second at 24 million tokens), so this must not run in the
proxy's process.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import struct
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import marisa_trie  # type: ignore[import-not-found]  # compiled, without stubs
import orjson
from msgspec import Struct
from xxhash import xxh3_128, xxh3_128_hexdigest

from llamaslot.cache.disk_index import Columns, DiskIndex, freeze, is_freezable
from llamaslot.cache.ids import WIDTH
from llamaslot.cache.prefix_index import Branch, PrefixIndex
from llamaslot.errors import LlamaslotError
from llamaslot.store.copying import sync_directory

VERSION = 1
MANIFEST = "manifest.json"
TRIE, COLUMNS, NAMES, INPUT, DRAFT = ".trie", ".columns", ".names", ".input", ".manifest"
_OURS = re.compile(r"(gen-[0-9a-f]{16})(\.trie|\.columns|\.names|\.input|\.manifest)")
_BRANCH = struct.Struct("<III")  # tokens above, bytes of the edge, holders
_LENGTH = struct.Struct("<I")


class GenerationUnusable(LlamaslotError):
    """The generation on disk is incomplete, damaged, of another model or of another format. It is not used."""


class Generation(Struct, frozen=True):
    """An open generation. ``size_bytes``: of all its files. ``namespace``: names what its token sequences are valid
    for, such as the fingerprint of a model.
    """

    id: str
    namespace: str
    index: DiskIndex
    size_bytes: int


class Recipe(Struct, frozen=True):
    """What a new generation takes from the generation ``base``: all sequences except those of the holders ``gone``.
    ``base`` is None for the first generation.
    """

    namespace: str
    base: str | None
    gone: tuple[str, ...]


def new_id() -> str:
    """A unique name for a generation: ``gen-`` and 16 hexadecimal digits."""
    return "gen-" + secrets.token_hex(8)


# -- reading ---------------------------------------------------------------------------------------------------------


def open_generation(
    directory: Path, is_wanted: Callable[[str], bool], manifest_name: str = MANIFEST
) -> Generation | None:
    """Open the generation that the manifest names; None without a manifest. Blocking: reads its files once, 20 ms for
    44 MiB. ``is_wanted(namespace)`` must be true for the generation's namespace. Raises GenerationUnusable.
    """
    try:
        manifest = _read_manifest(directory / manifest_name)
        if manifest is None:
            return None
        namespace = manifest["namespace"]
        if not is_wanted(namespace):
            raise GenerationUnusable("it is of another model")
        id_, counts = manifest["id"], manifest["counts"]
        for name, proof in manifest["files"].items():
            if _proof(directory / name) != proof:
                raise GenerationUnusable(f"{name} is not what was written")
        trie = marisa_trie.BinaryTrie()
        # Not ``map``: marisa keeps no reference to the buffer that it maps, and a later query is a segmentation fault.
        trie.mmap(str(directory / (id_ + TRIE)))
        columns = _map_columns(directory / (id_ + COLUMNS), counts)
        names = (directory / (id_ + NAMES)).read_text("utf-8").splitlines()
        if len(names) != len(columns.end) or len(trie) != len(columns.point):
            raise GenerationUnusable(f"the files of {id_} do not belong together")
        size = sum(size for size, _ in manifest["files"].values())
        return Generation(id_, namespace, DiskIndex(trie, columns, names), size)
    except OSError as error:
        raise GenerationUnusable(f"cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise GenerationUnusable(f"not of this format: {error!r}") from error


def accept(directory: Path, id_: str, namespace: str) -> Generation:
    """Open and verify the newly written generation ``id_``, and make it the valid one. Blocking; raises as
    ``open_generation``.
    """
    made = open_generation(directory, namespace.__eq__, id_ + DRAFT)
    if made is None or made.id != id_:
        raise GenerationUnusable(f"{id_} was not written")
    try:
        os.rename(directory / (id_ + DRAFT), directory / MANIFEST)
        sync_directory(directory)
    except OSError as error:
        raise GenerationUnusable(f"{MANIFEST} cannot be written: {error.strerror or error}") from error
    return made


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    sealed = orjson.loads(data)
    manifest: dict[str, Any] = sealed["manifest"]
    if sealed["checksum"] != _checksum(manifest):
        raise GenerationUnusable(f"{path.name} is not what was written")
    if manifest["version"] != VERSION or manifest["byteorder"] != sys.byteorder:
        raise GenerationUnusable(f"{path.name} is of another version or another kind of machine")
    return manifest


def _checksum(manifest: dict[str, Any]) -> str:
    return xxh3_128_hexdigest(orjson.dumps(manifest, option=orjson.OPT_SORT_KEYS))


def _proof(path: Path) -> list[int | str]:
    """The size and the checksum of a file, as the manifest records them. Blocking; raises OSError."""
    hashed, size = xxh3_128(), 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            hashed.update(block)
            size += len(block)
    return [size, hashed.hexdigest()]


def _map_columns(path: Path, counts: list[int]) -> Columns:
    with open(path, "rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).cast("i")
    if len(mapped) != sum(counts):
        raise GenerationUnusable(f"{path.name} has {len(mapped)} numbers in place of {sum(counts)}")
    columns, at = [], 0
    for n in counts:
        columns.append(mapped[at : at + n])
        at += n
    return Columns(*columns)


# -- writing ---------------------------------------------------------------------------------------------------------


def write_generation(directory: Path, id_: str, namespace: str, index: DiskIndex) -> None:
    """Write and sync the files of a generation, then its manifest as ``<id>.manifest``, which ``accept`` renames.
    Blocking; raises OSError.
    """
    numbers = [column if isinstance(column, array) else array("i", column) for column in index.columns]
    lines = "".join(f"{name}\n" for name in index.names)
    contents = {
        id_ + TRIE: [index.trie.tobytes()],
        id_ + COLUMNS: [column.tobytes() for column in numbers],
        id_ + NAMES: [lines.encode()],
    }
    files = {}
    for name, content in contents.items():
        write(directory / name, content)
        files[name] = _proof(directory / name)
    manifest = {
        "version": VERSION,
        "byteorder": sys.byteorder,
        "id": id_,
        "namespace": namespace,
        "counts": [len(column) for column in numbers],
        "files": files,
    }
    write(directory / (id_ + DRAFT), [orjson.dumps({"checksum": _checksum(manifest), "manifest": manifest})])
    sync_directory(directory)  # the names of the data files must be on disk before the manifest's


def write(path: Path, content: Iterable[bytes]) -> None:
    """Write a new file and sync it (fsync). Raises OSError, also if the file exists."""
    with create(path) as file:
        file.writelines(content)
        file.flush()
        os.fsync(file.fileno())


def create(path: Path) -> BinaryIO:
    """Create a file that only llamaslot's user may read. Raises OSError, also if the file exists."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")


def sweep(directory: Path, id_: str | None) -> None:
    """Remove the files of all generations except ``id_`` (None: of all), and the input and draft of ``id_``. Blocking;
    files that cannot be removed stay. A file that a process has mapped stays readable in that process.
    """
    with suppress(OSError):
        for path in list(directory.iterdir()):
            ours = _OURS.fullmatch(path.name)
            if ours and (ours[1] != id_ or ours[2] in (INPUT, DRAFT)):
                with suppress(OSError):
                    path.unlink()


# -- making ----------------------------------------------------------------------------------------------------------


def encode_recipe(recipe: Recipe) -> bytes:
    """A recipe as bytes. The input file of a new generation begins with them; branches follow."""
    fields = {"version": VERSION, "namespace": recipe.namespace, "base": recipe.base, "gone": recipe.gone}
    data = orjson.dumps(fields)
    return _LENGTH.pack(len(data)) + data


def encode_branch(branch: Branch[str]) -> list[bytes]:
    """A branch of the tree as bytes for ``sequences``, in pieces, so that the edge is not copied."""
    pieces = [_BRANCH.pack(branch.n_above, len(branch.edge), len(branch.holders))]
    for holder in branch.holders:
        name = holder.encode()
        pieces += (_LENGTH.pack(len(name)), name)
    pieces.append(branch.edge)
    return pieces


def _read(file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) != n:
        raise GenerationUnusable("the input ends too soon")
    return data


def decode_recipe(file: BinaryIO) -> Recipe:
    """Read a recipe from the beginning of ``file``. Raises GenerationUnusable, KeyError and ValueError."""
    fields = orjson.loads(_read(file, *_LENGTH.unpack(_read(file, _LENGTH.size))))
    if fields["version"] != VERSION:
        raise GenerationUnusable(f"the input is of version {fields['version']}")
    return Recipe(fields["namespace"], fields["base"], tuple(fields["gone"]))


def sequences(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Read the branches that follow the recipe in ``file``, and yield each holder with its tokens. Raises
    GenerationUnusable if the file is cut short.
    """
    path = b""
    while head := file.read(_BRANCH.size):
        n_above, n_edge, n_holders = _BRANCH.unpack(head)
        holders = [_read(file, *_LENGTH.unpack(_read(file, _LENGTH.size))).decode() for _ in range(n_holders)]
        path = path[: n_above * WIDTH] + _read(file, n_edge)
        for holder in holders:
            yield holder, path


def grow(directory: Path, id_: str) -> None:
    """Make the generation ``id_`` from its input file and the previous generation, and write it. Blocking, for seconds.

    Leaves out sequences that are not ``is_freezable`` and holders whose names are not one line. Raises
    GenerationUnusable, OSError, and ValueError for a hash collision.
    """
    index: PrefixIndex[str] = PrefixIndex()
    with open(directory / (id_ + INPUT), "rb") as file:
        recipe = decode_recipe(file)
        if recipe.base is not None:
            base = open_generation(directory, recipe.namespace.__eq__)
            if base is None or base.id != recipe.base:
                raise GenerationUnusable(f"{recipe.base} is no longer there")
            for holder in recipe.gone:
                base.index.drop(holder)
            for holder, tokens in base.index.sequences():
                index.insert(holder, tokens)
        for holder, tokens in sequences(file):
            if holder.splitlines() == [holder] and is_freezable(tokens):
                index.insert(holder, tokens)
    write_generation(directory, id_, recipe.namespace, freeze(index))


def main() -> int:
    os.nice(10)  # requests of users have priority
    try:
        grow(Path(sys.argv[1]), sys.argv[2])
    except (LlamaslotError, OSError, ValueError, MemoryError) as error:
        sys.stderr.write(f"{error!r}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
