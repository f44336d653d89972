"""Predicts how a chat template renders a short body that differs from earlier ones only in its last text.

A template writes the same before and after such a text, so llama-server need not be asked each time: a title or a
completion of code costs it one request less, which otherwise waits beside the decoding of others. A wrong prediction
costs time and never changes an answer, because llama-server renders each request itself. To keep it rare:

1. Only plain text is predicted: templates look for markup and words like /no_think, and drop spaces at both ends.
2. The same beginning and end must have been seen with several texts.
3. Every 10 seconds llama-server is asked again: a template may write the date.
4. A body in which llama-server counts another number of tokens is not predicted again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any

import orjson
from msgspec import Struct

_LONGEST = (
    8_000  # bytes of a body, and characters of a text: finding the body's shape takes a few microseconds
)
_AGREED = 3  # so many texts in a row were rendered as predicted
_TRUSTED_S = 10.0
_KEPT = 256  # shapes
_MARKUP = re.compile(r"[<>\[\]{}|/\\~`\x00-\x08\x0b-\x1f]")
# Fields that no template shows, and that clients change with each request.
_NOT_SHOWN = {"max_tokens", "max_completion_tokens", "n_predict", "seed", "temperature", "user", "stream"}


class Shape(Struct, frozen=True):
    """A chat body in two parts: the ``text`` of its last message, and as ``key`` a hash of everything else that a
    template may show.
    """

    key: bytes
    text: str


class _Rendering(Struct):
    """What a template writes before and after the last text of a shape. ``last``: the text that was rendered last.
    ``n_agreed``: texts that were rendered as predicted. ``asked_at``: when llama-server was asked last.
    """

    before: str
    after: str
    last: str
    asked_at: float
    n_agreed: int = 0


def shape_of(body: Mapping[str, Any], raw: bytes, whose: str) -> Shape | None:
    """The shape of a chat body in the namespace ``whose``; ``raw``: the body as JSON. None if it is long, or its last
    message is not plain text.
    """
    messages = body.get("messages")
    if len(raw) > _LONGEST or not (isinstance(messages, list) and messages):
        return None
    last = messages[-1]
    text = last.get("content") if isinstance(last, Mapping) else None
    if not (isinstance(text, str) and text) or text != text.strip() or _MARKUP.search(text):
        return None
    others = {name: value for name, value in body.items() if name not in _NOT_SHOWN and name != "messages"}
    key = orjson.dumps([whose, others, messages[:-1], {**last, "content": None}])
    return Shape(blake2b(key, digest_size=16).digest(), text)


class Renderings:
    """The renderings of the shapes that were asked for most recently."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._known: dict[bytes, _Rendering] = {}  # the last asked one last
        self._wrong = set[bytes]()

    def predicted(self, shape: Shape) -> str | None:
        """The rendered prompt; None if llama-server must be asked. One request that asks is enough: until it has its
        answer, others get the prediction.
        """
        known = self._known.get(shape.key)
        if known is None or known.n_agreed < _AGREED:
            return None
        now = self._now()
        if now - known.asked_at > _TRUSTED_S:
            known.asked_at = now
            return None
        return known.before + shape.text + known.after

    def learn(self, shape: Shape, rendered: str) -> None:
        """Record how llama-server has rendered a body of this shape."""
        if shape.key in self._wrong:
            return
        known = self._known.pop(shape.key, None)
        if known is not None and known.before + shape.text + known.after == rendered:
            known.n_agreed += shape.text != known.last
            known.last, known.asked_at = shape.text, self._now()
        elif rendered.count(shape.text) == 1:
            before, _, after = rendered.partition(shape.text)
            known = _Rendering(before, after, shape.text, self._now())
        else:
            return  # where the text stands is not clear
        self._known[shape.key] = known
        if len(self._known) > _KEPT:
            del self._known[next(iter(self._known))]

    def was_wrong(self, shape: Shape) -> None:
        """Do not predict bodies of this shape again."""
        self._known.pop(shape.key, None)
        if len(self._wrong) >= _KEPT:
            self._wrong.clear()
        self._wrong.add(shape.key)
