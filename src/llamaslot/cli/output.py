"""What commands print: tables, durations, counts, faults. After an error that an operator can fix a command prints a
line, and its exit code is 2; a bug ends with a traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Collection, Coroutine, Iterator, Sequence
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from llamaslot.errors import LlamaslotError

# Slow imports are made where they are needed.
if TYPE_CHECKING:
    from llamaslot.config.sections import ListenConfig

EXIT_FAULT = 2
T = TypeVar("T")

#: Errors of the operating system for `listen`, and how to fix them.
_BIND_FAULTS = {
    errno.EADDRINUSE: "is in use, perhaps by another llamaslot: stop that one or choose another port",
    errno.EADDRNOTAVAIL: "is no address of this machine: 127.0.0.1 is for this machine alone, 0.0.0.0 for all",
    errno.EACCES: "may not be used by this user: ports below 1024 belong to root",
}


def run_to_end(serving: Coroutine[object, object, T], listen: ListenConfig) -> T:
    """Run ``serving`` and return its result. An error that an operator can fix is printed and ends the process."""
    import uvloop

    try:
        return uvloop.run(serving)
    except KeyboardInterrupt:
        sys.exit(130)
    except (LlamaslotError, OSError, BaseExceptionGroup) as error:
        leaves = list(_leaves(error))
        said = [_wording(leaf, listen) for leaf in leaves]
        if None in said:  # a fault of ours: the traceback is what helps
            raise
        fail([line for line in said if line])


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield the errors in an exception group, such as ``asyncio.TaskGroup`` raises; of another error,
    the error itself.
    """
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _wording(error: BaseException, listen: ListenConfig) -> str | None:
    """Return a line that describes an error which an operator can fix; None for other errors."""
    import socket

    if isinstance(error, socket.gaierror):
        return f"listen.host: {listen.host}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in _BIND_FAULTS and error.filename is None:
        return f"listen: {listen.host}:{listen.port} {_BIND_FAULTS[error.errno]}"
    if isinstance(error, OSError) and error.filename is not None:
        return about_file(error)
    return str(error) if isinstance(error, LlamaslotError) else None


def about_file(error: OSError) -> str:
    """Return a line about an error that concerns one file."""
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


@contextlib.contextmanager
def report_faults() -> Iterator[None]:
    """A context manager: if its block raises an error that an operator can fix, such as a file that may not be written,
    print it and exit with ``EXIT_FAULT``.
    """
    try:
        yield
    except LlamaslotError as error:
        fail([str(error)])
    except OSError as error:
        if error.filename is None:
            raise
        fail([about_file(error)])


def fail(lines: list[str]) -> NoReturn:
    """Print the lines on standard error and exit with ``EXIT_FAULT``."""
    for line in lines:
        click.echo(line, err=True)
    sys.exit(EXIT_FAULT)


# -- tables and numbers --------------------------------------------------------------------------------------------


def table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], to_the_right: Collection[str] = ()
) -> list[str]:
    """Return a heading line and one line per row. Each column is as wide as its widest cell; two blanks separate
    columns. Columns named in ``to_the_right`` are right-aligned.
    """
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(len(headings))]
    lines = []
    for row in (headings, *rows):
        cells = [
            cell.rjust(width) if heading in to_the_right else cell.ljust(width)
            for heading, cell, width in zip(headings, row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def span(seconds: float) -> str:
    """Return a time span as text: ``40 s``, ``12 min``, ``5 h``, ``3 d``, rounded down; ``now`` below a second."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return "now"


def several(n: int, one: str, many: str) -> str:
    """Return a number and what it counts, such as ``1 key`` or ``60,211 keys``."""
    return f"{n:,} {one if n == 1 else many}"
