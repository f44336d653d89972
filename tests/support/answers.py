"""An answer that was read to its end, and the parts of it that tests look at."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.strict import strict


@dataclass(slots=True)
class Answer:
    """One answer read to its end. ``raw``: its body as it came."""

    status: int
    headers: Mapping[str, str]
    raw: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def events(self) -> list[Any]:
        """The data of its events; ``[DONE]``, and the null that announces a further prompt, left out."""
        if not self.headers.get("Content-Type", "").startswith("text/event-stream"):
            return []
        events = [event.data for event in strict(self.raw)]
        return [json.loads(data) for data in events if data not in ("[DONE]", "null")]

    @property
    def comments(self) -> list[str]:
        return [line[2:] for line in self.raw.decode().splitlines() if line.startswith(": ")]

    @property
    def last(self) -> Any:
        """The part with the numbers: the whole answer, or its last event."""
        return self.events[-1] if self.events else self.json

    @property
    def error(self) -> dict[str, Any]:
        """The error object of an OpenAI-shaped error; AssertionError where it is none."""
        error = self.last["error"]
        assert isinstance(error["message"], str), error
        assert error["message"], error
        assert isinstance(error["type"], str), error
        assert "code" in error, error
        return dict(error)

    @property
    def text(self) -> str:
        """What was generated, for the first choice."""
        return "".join(_text(part) for part in (self.events or [self.json]))

    @property
    def timings(self) -> dict[str, Any]:
        """The ``timings`` in the last part that has any."""
        found: dict[str, Any] = next(
            part["timings"] for part in reversed(self.events or [self.json]) if "timings" in part
        )
        return found

    @property
    def told(self) -> dict[str, str]:
        """What llamaslot reports about the request: in its headers, or in comments if these came after the headers were
        sent.
        """
        pairs = [*self.headers.items(), *(line.split(": ", 1) for line in self.comments if ": " in line)]
        return {name.lower(): value for name, value in pairs if name.lower().startswith("x-")}

    @property
    def slot(self) -> int:
        return int(self.told["x-llamaslot-slot"])

    @property
    def source(self) -> str:
        return self.told["x-llamaslot-source"]

    @property
    def n_reused(self) -> int:
        return int(self.told["x-llamaslot-reused-tokens"])


def without_progress(raw: bytes) -> bytes:
    """The events of a stream for a client that has not requested ``return_progress``: llamaslot always requests it from
    llama-server.
    """
    return b"\n\n".join(part for part in raw.split(b"\n\n") if not is_progress(part))


def is_progress(event: bytes) -> bool:
    if not event.startswith(b"data: {"):
        return False
    return "prompt_progress" in json.loads(event.removeprefix(b"data: "))


def untimed(value: Any) -> Any:
    """A JSON value in which ids, dates and durations, which differ from one answer to the next, are replaced by their
    types.
    """
    if isinstance(value, dict):
        return {
            name: type(item).__name__ if name in _OF_ITS_TIME else untimed(item)
            for name, item in value.items()
        }
    return [untimed(item) for item in value] if isinstance(value, list) else value


_OF_ITS_TIME = {
    "id", "id_slot", "created", "prompt_ms", "prompt_per_token_ms", "prompt_per_second", "predicted_ms",
    "predicted_per_token_ms", "predicted_per_second",
}  # fmt: skip


def _text(part: dict[str, Any]) -> str:
    if "content" in part:
        return str(part["content"])
    if not part.get("choices"):
        return ""
    choice = part["choices"][0]
    return str(
        choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
    )
