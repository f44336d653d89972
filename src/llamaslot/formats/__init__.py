"""The client APIs whose tokens llamaslot knows: their bodies, their answers, and all of them by name."""

from __future__ import annotations

from llamaslot.formats.base import Format
from llamaslot.formats.chat import ChatFormat
from llamaslot.formats.completion import CompletionFormat
from llamaslot.formats.infill import InfillFormat
from llamaslot.formats.messages import MessagesFormat
from llamaslot.formats.native import NativeFormat
from llamaslot.formats.responses import ResponsesFormat

CHAT = ChatFormat()
_ALL: tuple[Format, ...] = (
    CHAT,
    CompletionFormat(),
    NativeFormat(),
    InfillFormat(),
    ResponsesFormat(),
    MessagesFormat(),
)
FORMATS: dict[str, Format] = {each.name: each for each in _ALL}


def format_named(name: str | None) -> Format | None:
    """Return the format with this name, which a route gives; None if ``name`` is None, as for routes
    without a format.
    """
    return FORMATS[name] if name is not None else None
