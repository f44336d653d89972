"""llama-server's own ``/completion``, also ``/completions``: a plain prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from llamaslot.formats.base import Format, PromptKind
from llamaslot.formats.stream_to_json import (
    HARMLESS,
    Assembly,
    PartialAnswer,
    has_only,
    n_answers_to_prompts,
    streamed_with_progress,
    without_nulls,
)
from llamaslot.llama.sse import event_of
from llamaslot.tokens.tokenizer import listed

_EVENT = {
    "index", "content", "tokens", "stop", "id_slot", "tokens_predicted", "tokens_evaluated", "timings",
    "prompt_progress",
}  # fmt: skip
_MISSING: Any = object()


class NativeFormat(Format):
    """The API ``/completion``: the prompt is a text, ids, or a list of prompts; several answers come as a list."""

    name = "native-completion"
    required_key = "prompt"
    prompt_kind = PromptKind.PLAIN
    #: Fields of a body whose answer can be assembled.
    known_fields = HARMLESS | {"prompt", "response_fields"}

    def n_prompts(self, body: Mapping[str, Any]) -> int:
        return len(listed(body.get("prompt")))

    def n_to_assemble(self, given: Mapping[str, Any]) -> int | None:
        """Return the number of answers to all prompts of a body together; None if it is not certain."""
        return n_answers_to_prompts(given)

    def progress_event(self, id_: str, model: str, progress: Mapping[str, int]) -> bytes:
        """The event in the form of llama-server's own progress events (measured on xllamacpp 2026.10.11549)."""
        return event_of(
            {
                "index": 0,
                "content": "",
                "tokens": [0],
                "stop": False,
                "id_slot": -1,
                "tokens_predicted": 0,
                "tokens_evaluated": progress["total"],
                "prompt_progress": progress,
            }
        )

    def can_assemble(self, body: Mapping[str, Any]) -> bool:
        given = without_nulls(body)
        is_clear = self.n_to_assemble(given) is not None and response_fields(given) is not None
        return is_clear and has_only(given, self.known_fields)

    def streamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``body`` as a request for a stream, without ``response_fields``: with them the last event would have
        only these fields, and the assembly needs all of them.
        """
        streamed = streamed_with_progress(body)
        return {name: value for name, value in streamed.items() if name != "response_fields"}

    def assembly(self, body: Mapping[str, Any]) -> Assembly:
        given = without_nulls(body)
        return NativeAssembly(self.n_to_assemble(given) or 1, response_fields(given))


def response_fields(given: Mapping[str, Any]) -> list[str] | None:
    """Return the field names in ``response_fields``, whose slashes separate levels. Empty if the body has none; None if
    the value is no list of such names.
    """
    paths = given.get("response_fields", [])
    if isinstance(paths, list) and all(isinstance(path, str) and all(path.split("/")) for path in paths):
        return paths
    return None


class NativeAssembly(Assembly):
    """Assembles the answer to a native body from its events. ``paths``: the body's ``response_fields``; empty or None
    for all fields.
    """

    def __init__(self, n_answers: int, paths: list[str] | None) -> None:
        super().__init__(n_answers)
        self._paths = paths

    def _take(self, payload: dict[str, Any]) -> None:
        """Take one event. llama-server sends one for each token, even for a token without text. The last event of an
        answer is the whole answer without its text.
        """
        part = self._part(payload["index"])
        part.text += payload["content"]
        if payload["stop"]:
            settings = {**payload["generation_settings"], "stream": False}
            part.totals = {**payload, "generation_settings": settings}
            part.n_tokens = payload["tokens_predicted"]
            self._end(part, payload["stop_type"])
        else:
            self._know(payload, _EVENT)
            part.tell(payload["tokens_predicted"], bool(payload["content"]))

    def _whole(self, parts: list[tuple[int, PartialAnswer]]) -> Any:
        answers = [self._one(part) for _, part in parts]
        return answers if len(answers) > 1 else answers[0]

    def _one(self, part: PartialAnswer) -> dict[str, Any]:
        whole = {**part.totals, "content": part.text}
        return _chosen(whole, self._paths) if self._paths else whole


def _chosen(whole: dict[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return the fields of ``whole`` that ``paths`` name. A slash in a path leads into an object. Missing fields are
    left out (server-common.cpp, json_get_nested_values).
    """
    result: dict[str, Any] = {}
    for path in paths:
        value: Any = whole
        for name in path.split("/"):
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
        if value is not _MISSING:
            result[path] = value
    return result
