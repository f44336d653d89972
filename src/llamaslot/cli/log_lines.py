"""The formats of log lines: text, text for systemd's journal, and JSON."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime

#: Priorities of the journal (syslog's); systemd shows them as levels.
_JOURNAL_LEVELS = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _JournalFormatter(logging.Formatter):
    """Formats log lines for systemd's journal: without the time, which the journal adds, and with the level as a number
    in front, such as ``<4>``.
    """

    def format(self, record: logging.LogRecord) -> str:
        level = _JOURNAL_LEVELS.get(record.levelno, 6)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


class _JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line: ``time`` (UTC, ISO 8601), ``level``, ``logger``, ``message``, and
    ``exception`` (a traceback) if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        import orjson

        told = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(told).decode()


def set_up_logging(level: str, kind: str) -> None:
    """Set up the log: one line per record on stderr, from ``level`` on. ``kind``: ``text`` (without the time if stderr
    goes to systemd's journal), ``json``, or ``auto``: text for a terminal and for the journal, else JSON.
    """
    handler = logging.StreamHandler()
    if kind == "json" or (kind == "auto" and not (sys.stderr.isatty() or _is_journal())):
        handler.setFormatter(_JsonFormatter())
    elif _is_journal():
        handler.setFormatter(_JournalFormatter("%(name)s: %(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _is_journal() -> bool:
    """True if stderr goes to systemd's journal: ``$JOURNAL_STREAM`` names its device and inode. A terminal inside a
    service inherits the variable, but is another file.
    """
    try:
        stream = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"
