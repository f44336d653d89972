"""Takes a slot file that llama-server has written into the store, and writes only those rows and states that the store
does not have yet.

llama-server writes the whole slot at each save. If a conversation goes on, all rows but those of the last turn are in
the store already; in a new conversation, often those of the system part. These rows stay where they are. The new rows
become an *extent*, a file of its own. So does each state (checkpoints, recurrent state, attention window), so that it
can be left out later without the others. On a dense model, a slot file that shares no rows with the store is kept
whole. It need not be copied, and other snapshots can use its rows as it is.

All functions block: call them in threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.cache.ids import MIN_SHARED_TOKENS, NEGLIGIBLE_TOKENS, WIDTH
from llamaslot.errors import SnapshotInvalid
from llamaslot.file_id import FileId
from llamaslot.store import sidecar
from llamaslot.store.checkpoint_choice import states_to_keep
from llamaslot.store.copying import sync_directory
from llamaslot.store.extent import Piece, Source, checksum_of_file, differing_tokens, write_extent
from llamaslot.store.scan import bad_files
from llamaslot.store.sidecar import Sidecar
from llamaslot.store.slot_file import slot_file_head
from llamaslot.store.slot_layout import LayoutUnknown, SlotLayout, read_layout
from llamaslot.store.snapshot import EXT, KV, Part, Snapshot

# Of the 32 tokens that are compared, one may have other rows: llama-server computes a token again where it goes back to
# a checkpoint.
ROUNDED = 1
MAX_ROWS = 64  # a snapshot whose base has rows in so many files gets all its rows written anew
_FOOTER_BYTES, _TENSOR_BYTES = 1024, 128  # the most bytes of an extent's footer, and more for each tensor


class RowsDiffer(SnapshotInvalid):
    """The rows of a save differ from those in the snapshot that the slot was restored from or saved as. So none of them
    is taken from that snapshot.
    """


class DataLost(SnapshotInvalid):
    """The disk has lost data of ``file`` (EIO). The kernel reports that only once: a later sync would succeed."""

    def __init__(self, file: str) -> None:
        super().__init__(f"the disk has lost data of {file}")
        self.file = file


class Base(Struct, frozen=True):
    """The snapshot whose rows and states a new one may use: both have the first ``n_shared`` tokens in common.
    ``is_lineage``: the slot was restored from it, or saved as it, so its rows must be equal bit for bit. ``checksum``:
    of its slot file, None if no snapshot has recorded it.
    """

    snapshot: Snapshot
    n_shared: int
    is_lineage: bool = False
    checksum: int | None = None


class Intake(Struct, frozen=True):
    """What to write of a slot file. ``known``: the parts that are in the store already; ``start``: the first token
    whose rows are not; ``states``: token counts of the states to write; ``own_from``: as in ``Snapshot``.
    """

    layout: SlotLayout
    known: tuple[Part, ...]
    start: int
    states: tuple[int, ...]
    own_from: int

    @property
    def size_bytes(self) -> int:
        """An upper bound of the bytes of all files to write."""
        states = [state for state in self.layout.states if state.n_tokens in self.states]
        n_files, n_tokens = len(states) + 2, self.layout.n_tokens
        shape = self.layout.shape
        n_tensors = len(shape.tensors) + len(shape.recurrent)
        n_tensors += len(shape.window.tensors) if shape.window is not None else 0
        footers = n_files * (_FOOTER_BYTES + _TENSOR_BYTES * n_tensors)
        rows = (n_tokens - self.start) * (shape.bytes_per_token + WIDTH) + WIDTH * n_tokens
        return rows + sum(state.size_bytes for state in states) + footers


def look(directory: Path, landing: Path, base: Base | None, marks: Collection[int]) -> Intake | None:
    """Find out which rows and states of the slot file ``landing`` must be written; None if the file is to be kept
    whole: on a dense model if it shares no rows with ``base``, on others if it has no checkpoints. ``marks``: token
    counts to which a later request may rewind.

    Raises LayoutUnknown if llamaslot cannot find the rows in the file, RowsDiffer, and SnapshotInvalid if a file of
    ``base`` is gone or damaged.
    """
    layout = read_layout(landing)
    rows, states = _known(directory, layout, base)
    start = rows[-1].end if rows else 0
    own_from = min(start, base.snapshot.own_from) if base is not None and base.is_lineage else start
    if base is not None and base.is_lineage:
        n_sure = start - NEGLIGIBLE_TOKENS  # later rows may have been computed again, in other batches
        if layout.shape.has_states:
            n_sure = max((at for at in states if at <= n_sure), default=0)
        pieces = [
            Piece(directory / part.file, max(part.start, own_from), min(part.end, n_sure)) for part in rows
        ]
        if (n_different := differing_tokens(landing, layout, pieces)) > ROUNDED:
            raise RowsDiffer(
                f"the rows of {n_different} of its tokens are not those of {base.snapshot.id}, which it goes on from"
            )
    if not layout.shape.has_states:
        return Intake(layout, tuple(rows), start, (), own_from) if rows else None
    if not layout.checkpoints:  # perhaps a build that neither writes nor reads checkpoints in slot files
        return None
    # The conversation came back with what an earlier save has kept, so these states count as marks: the last one is at
    # the end of an answer, before a message that may be edited. They need not be written again.
    marks = {*marks, *states}
    there = {state.n_tokens: state.size_bytes for state in layout.states}
    kept = states_to_keep(
        there.keys() | states.keys(),
        marks,
        state_bytes=max(there.values(), default=0),
        row_bytes=layout.shape.bytes_per_token,
    )
    known = [states[at] for at in kept if at in states]
    return Intake(layout, (*rows, *known), start, tuple(at for at in kept if at not in states), own_from)


def _known(directory: Path, layout: SlotLayout, base: Base | None) -> tuple[list[Part], dict[int, Part]]:
    """The parts of ``base`` that a slot file with that ``layout`` shares: its rows, and its states by token count.
    Empty without a base, if too few tokens are shared, or if the shapes differ. Raises SnapshotInvalid if a file is
    damaged.
    """
    if base is None or base.n_shared < MIN_SHARED_TOKENS:
        return [], {}
    snapshot, n_shared = base.snapshot, min(base.n_shared, layout.n_tokens)
    whole = Part(snapshot.id + KV, 0, snapshot.n_tokens, snapshot.size_bytes, base.checksum)
    parts = snapshot.parts or (whole,)
    rows = [
        part._replace(end=min(part.end, n_shared))
        for part in parts
        if not part.is_state and part.start < n_shared
    ]
    if len(rows) >= MAX_ROWS:
        return [], {}
    states = {part.end: part for part in parts if part.is_state and part.end <= n_shared}
    for part in (*rows, *states.values()):
        with Source(directory / part.file) as source:
            if source.size_bytes != part.size_bytes:
                raise SnapshotInvalid(f"{part.file}: has {source.size_bytes} bytes, not {part.size_bytes}")
            try:
                shape = source.extent().shape
            except LayoutUnknown as error:  # that type would say that all files of this server are unknown
                raise SnapshotInvalid(f"the file it goes on from is not what it was: {error}") from error
            if shape != layout.shape:
                return [], {}
    return rows, states


def take_in(
    directory: Path, landing: Path, intake: Intake, noted: Sidecar, new_file: Callable[[], str]
) -> Sidecar:
    """Write the new rows and states of ``landing`` as extents, then the header and the sidecar of the snapshot. Returns
    the content of the sidecar, with all parts. All files are synced. Call ``let_go`` then.

    ``new_file()`` returns an id for a new extent. If a slot file gives rows to another snapshot for the first time, it
    is read whole for its checksum, which takes a second or more for several GB. Raises SnapshotInvalid, DataLost and
    OSError: then the snapshot is not valid, and files of ids from ``new_file`` may be left.
    """
    layout, known = intake.layout, list(intake.known)
    rows = [part for part in known if not part.is_state]
    states = {part.end: part for part in known if part.is_state}

    def write(start: int, end: int, keep: Collection[int]) -> Part:
        target = directory / (new_file() + EXT)
        write_extent(landing, layout, start, end, keep, target)
        return Part(target.name, start, end, os.stat(target).st_size)

    for n, part in enumerate(rows):
        if part.file.endswith(KV):  # written by llama-server, so it may not be synced yet
            try:
                sidecar.sync_data(directory / part.file)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise DataLost(part.file) from error
                raise
            if part.checksum is None:
                rows[n] = part._replace(checksum=checksum_of_file(directory / part.file))
    if intake.start < layout.n_tokens:
        rows.append(write(intake.start, layout.n_tokens, ()))
    for at in intake.states:
        states[at] = write(at, at, (at,))
    head = slot_file_head(layout.tokens)
    noted = replace(
        noted,
        size_bytes=len(head),
        boot=None,
        parts=(*rows, *(states[at] for at in sorted(states))),
        row_bytes=layout.shape.bytes_per_token,
        own_from=intake.own_from,
        checkpoints=tuple(sorted(states)),
    )
    sidecar.write_data(directory / (noted.id + KV), head, is_durable=True)
    sidecar.write(directory, noted, noted.created_at)
    sync_directory(directory)
    return noted


def let_go(directory: Path, landing: Path | None, noted: Sidecar) -> FileId:
    """Check that all files of the new snapshot ``noted`` exist, and remove ``landing``, if given: llama-server's file,
    from which it was made. Returns the FileId of the snapshot's .kv file. Raises SnapshotInvalid and OSError; then
    ``landing`` is still there.

    Another llamaslot of a shared store may evict a file that the snapshot needs. Call this within ``Quota.turn``: an
    eviction before is found here, and a later one spares the files that the sidecar names.
    """
    if gone := bad_files(directory, noted):
        raise SnapshotInvalid(f"{', '.join(sorted(gone))} has vanished")
    file_id = FileId.of(os.lstat(directory / (noted.id + KV)))
    if landing is not None:
        os.unlink(landing)
    return file_id
