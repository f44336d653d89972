"""Finds which part of a request's body a position in its rendered prompt comes from.

Templates copy the texts of a body into the prompt unchanged, except for blanks at their ends. So each text is searched
in the prompt, one after the other. The result is only for readers of the log; no decision depends on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msgspec import Struct

from llamaslot.formats.base import Format

#: ``prompt``: the request has no messages.
Where = Literal["system", "tools", "message", "prompt"]

_EDGE = 200  # characters: if a text is not found whole, its beginning and end of this length are searched
_HEADER = 40  # characters: at most so many does a template put before a message
_LEADING = ("system", "developer")


class Whereabouts(Struct, frozen=True):
    """The part of a body that a position in the prompt comes from.

    ``message``: the index of a message in ``messages`` (or ``input``) as the client sent them; None if the part is no
    message. ``role``: of that message. ``is_last_turn``: no answer of the model follows that message.
    """

    where: Where
    message: int | None = None
    role: str | None = None
    is_last_turn: bool = False

    def __str__(self) -> str:
        if self.message is None:
            return self.where
        told = f"message {self.message} ({self.role})"
        return told if self.where == "message" else f"{self.where}: {told}"


class _Span(Struct, frozen=True):
    begin: int
    end: int
    whereabouts: Whereabouts


def whereabouts(text: str, offset: int, body: Mapping[str, Any], format_: Format) -> Whereabouts:
    """Return the part of the body that the character at ``offset`` of the rendered prompt ``text`` comes from. Text
    that the template puts before a message, such as its role, belongs to the message.
    """
    messages = format_.messages(body)
    if messages is None:
        return Whereabouts("prompt")
    spans = list(_spans(text, messages))
    first = spans[0].begin if spans else len(text)
    ahead = [*_system_spans(text[:first], body, format_, messages), *_tools_span(text[:first], body)]
    # The template's own text, for example a date, counts as system prompt.
    is_ahead = offset <= max((span.end for span in ahead), default=first - _HEADER)
    if is_ahead or not spans:
        inside = [span for span in ahead if span.begin <= offset <= span.end]
        below = [span for span in ahead if span.end < offset]
        nearest = inside[:1] or sorted(below, key=lambda span: span.end)[-1:]
        return nearest[0].whereabouts if nearest else Whereabouts("system")
    return next((span for span in spans if offset <= span.end), spans[-1]).whereabouts


def _n_leading(messages: list[Any]) -> int:
    """Return the number of messages at the beginning that form the system prompt."""
    n = 0
    while n < len(messages) and _role(messages[n]) in _LEADING:
        n += 1
    return n


def _role(message: Any) -> str:
    """Return the role of a message. An item of ``input`` that is no message has its type instead, for example
    ``function_call``.
    """
    if not isinstance(message, Mapping):
        return "?"
    return str(message.get("role") or message.get("type") or "?")


def _spans(text: str, messages: list[Any]) -> Iterator[_Span]:
    """Yield where in the prompt the messages behind the system prompt are, in order. A message whose texts are not
    found is left out.
    """
    at = 0
    roles = [_role(message) for message in messages]
    last_answer = max(
        (i for i, role in enumerate(roles) if role in ("assistant", "function_call")), default=-1
    )
    for i in range(_n_leading(messages), len(messages)):
        found = [span for part in _texts(messages[i]) if (span := _look(text, part, at)) is not None]
        if found:
            begin, end = min(begin for begin, _ in found), max(end for _, end in found)
            yield _Span(begin, end, Whereabouts("message", i, roles[i], is_last_turn=i > last_answer))
            at = end


def _texts(message: Any) -> Iterator[str]:
    """Yield the parts of a message that a prompt contains unchanged: texts, names of called tools, results of tools."""
    if isinstance(message, str):
        yield message
    elif isinstance(message, list):
        for part in message:
            yield from _texts(part)
    elif isinstance(message, Mapping):
        for key in ("reasoning_content", "thinking", "text", "content", "output", "name"):
            yield from _texts(message.get(key))
        for call in calls if isinstance(calls := message.get("tool_calls"), list) else ():
            if isinstance(call, Mapping) and isinstance(function := call.get("function"), Mapping):
                yield from _texts(function.get("name"))


def _look(text: str, wanted: str, at: int) -> tuple[int, int] | None:
    wanted = wanted.strip()
    begin = text.find(wanted[:_EDGE], at) if wanted else -1
    if begin < 0:
        return None
    if text.startswith(wanted, begin):
        return begin, begin + len(wanted)
    end = text.find(wanted[-_EDGE:], begin)  # text in between was rendered differently
    return begin, end + len(wanted[-_EDGE:]) if end >= 0 else begin + _EDGE


def _system_spans(
    text: str, body: Mapping[str, Any], format_: Format, messages: list[Any]
) -> Iterator[_Span]:
    beside = {name: value for name, value in body.items() if name != format_.messages_key}
    for holder, key in format_.system_texts(beside):
        if (span := _look(text, holder[key], 0)) is not None:
            yield _Span(*span, Whereabouts("system"))
    for i in range(_n_leading(messages)):
        for part in _texts(messages[i]):
            if (span := _look(text, part, 0)) is not None:
                yield _Span(*span, Whereabouts("system", i, _role(messages[i])))


def _tools_span(text: str, body: Mapping[str, Any]) -> Iterator[_Span]:
    """Yield the part of the prompt from the first to the last tool that is found there, by its description or by its
    name in quotes; nothing if none is found.
    """
    tools = body.get("tools")
    found: list[tuple[int, int]] = []
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            continue
        for part in (f'"{function.get("name")}"', function.get("description")):
            span = _look(text, part, 0) if isinstance(part, str) else None
            found += [span] if span is not None else []
    if found:
        begin, end = min(begin for begin, _ in found), max(end for _, end in found)
        yield _Span(max(begin - _EDGE, 0), min(end + _EDGE, len(text)), Whereabouts("tools"))
