"""What llamaslot needs to know of a client API. Each API has one file in this package, and one line in ``registry``.

To add one: a file with a subclass of ``Format``, its line in ``registry``, and a line for each of its routes in
``llama/routes``. The methods of ``Format`` are the defaults.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from msgspec import Struct

from llamaslot.formats.stream_to_json import Assembly, streamed_with_progress
from llamaslot.llama.dry_run import DryRun, dry_run
from llamaslot.llama.sse import EventSplitter, data_of, event_of


class ErrorEvents:
    """Encodes the errors of one stream as llama-server does: ``data: {"error": {"message", "type", "code"}}``. The
    libraries of OpenAI and Vercel raise on an ``error`` at the root. ``id``: the request's.
    """

    #: Whether llama-server's own error events are converted to the form of ``event`` too.
    is_translated = False

    def __init__(self, id_: str) -> None:
        self.id = id_

    def saw(self, event: bytes) -> None:
        """Called with each event that the client receives. Formats whose error events continue the stream (by a
        number, say) override this.
        """

    def event(self, error: Mapping[str, Any]) -> bytes:
        """The SSE event for ``error``, which has message, type and code, as in the body of an error answer."""
        return event_of({"error": error})

    def translated(self, event: bytes) -> bytes:
        """``event``, an error event of llama-server, in the form of this format; the same bytes if the format's
        clients understand llama-server's form.
        """
        payload = data_of(event)
        if not self.is_translated or not isinstance(payload, dict):
            return event
        error = payload.get("error", payload)
        return self.event(error) if isinstance(error, dict) and "message" in error else event


def translated_all(errors: ErrorEvents, events: bytes) -> bytes:
    """``events`` with the error events among them translated; see ``ErrorEvents.translated``."""
    if b"error" not in events:
        return events
    splitter = EventSplitter()
    told = b"".join(errors.translated(event) if is_error(event) else event for event in splitter.feed(events))
    return told + splitter.rest


def is_error(event: bytes) -> bool:
    """Whether an event is an error of llama-server: it is named ``error``, or has nothing but an error in it."""
    return event.startswith((b"event: error", b'data: {"error":'))


LAST_EVENTS = (b"data: [DONE]", b"event: error")
_SYSTEM = ("system", "developer")


class PromptKind(enum.Enum):
    """How a request's body becomes tokens."""

    #: The body is a chat: llama-server's template renders it, and refuses faults.
    CHAT = "chat"
    #: llama-server converts the body to a chat; so does ``chat_body``, which may be wrong.
    CONVERTED = "converted"
    #: The field ``prompt``: text, ids, or a list of these.
    PLAIN = "plain"
    #: The parts of a file, which llama-server combines as the model requires.
    INFILL = "infill"


class UsageCounts(Struct, frozen=True):
    """The token counts in one ``usage`` object; None or 0 where it has none."""

    n_cached: int | None = None  # of the prompt, reused
    n_prompt: int | None = None  # of the whole prompt
    n_predicted: int = 0


class Format(Protocol):
    """One client API: how its bodies become prompts, and the form of its answers and errors. Stateless."""

    #: The name in routes, metrics, log lines and ``rewrite``.
    name: str
    prompt_kind: PromptKind
    #: False: llama-server drops ``id_slot``, ``cache_prompt`` and ``n`` of its bodies, and chooses the slot itself.
    honours_id_slot: bool = True
    #: The field with the messages, if there is one, and the one with a separate system prompt.
    messages_key: str | None = None
    system_key: str | None = None
    #: The field without which llama-server refuses a body.
    required_key: str = "messages"
    #: The route that counts the tokens of such a body; it refuses a body that llama-server cannot convert to a
    #: prompt.
    count_path: str | None = None
    #: The route on which a dry run with the whole body finds faults of its prompt.
    whole_dry_run_path: str | None = None
    #: How the events begin of which each ends a stream. (The native format's last has ``stop``.)
    last_events: tuple[bytes, ...] = LAST_EVENTS
    #: The field of an event that may hold a ``usage``, beside its root; and where a usage tells of reused tokens.
    usage_key: str | None = None
    usage_details_key: str = "prompt_tokens_details"
    #: Whether its streams have events for the progress of a prompt; others report it in comments.
    has_progress_events: bool = False

    # -- the request ---------------------------------------------------------------------------------------------

    def chat_body(self, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The chat that ``body`` is, or that llama-server converts it to; None for a plain prompt. Raises
        PromptNotTokenizable if that is unknown.
        """
        return None

    def n_prompts(self, body: Mapping[str, Any]) -> int:
        """The number of prompts in ``body``."""
        return 1

    def n_answers(self, body: Mapping[str, Any]) -> int:
        """The number of answers to each prompt: ``n`` (OpenAI) or ``n_cmpl`` (native), read as an int32 as
        llama-server does: 2.9 is 2, 2**32 + 1 is 1. llama-server refuses values that are no number or too small, in
        whatever slot.
        """
        numbers = [1]
        for value in (body.get("n"), body.get("n_cmpl")):
            if isinstance(value, float) and abs(value) < 2**31:
                numbers.append(int(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                numbers.append((value + 2**31) % 2**32 - 2**31)
        return max(numbers)

    def messages(self, body: Mapping[str, Any]) -> list[Any] | None:
        """The messages as the client sent them, empty for a body of another shape; None if the format has none."""
        if self.messages_key is None:
            return None
        given = body.get(self.messages_key)
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        return given if isinstance(given, list) else []

    def system_texts(self, body: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """The texts of the system prompt, each as the object that holds it and its key there.

        Those of ``system_key``, and messages of role ``system`` or ``developer`` at any position. A body of another
        shape has none: llama-server's own 400 explains it best.
        """
        if self.system_key is not None:
            yield from _texts(body, self.system_key)
        for message in self.messages(body) or ():
            if isinstance(message, dict) and message.get("role") in _SYSTEM:
                yield from _texts(message, "content")

    def dry_run(
        self, body: Mapping[str, Any], chat: Mapping[str, Any] | None, *, tokens: bytes | None, n: int
    ) -> DryRun:
        """The fields of ``body`` that llama-server may refuse, for a dry run.

        ``chat``: the chat that the body is or is converted to, None for a plain prompt. ``tokens``: the prompt, if it
        was sent as ids. ``n``: the number of answers to each prompt.
        """
        return dry_run(body if chat is None else chat, is_chat=chat is not None, tokens=tokens, n=n)

    # -- the answer ----------------------------------------------------------------------------------------------

    def progress_event(self, id_: str, model: str, progress: Mapping[str, int]) -> bytes:
        """The event sent after each batch of llamaslot's own prefill to a client that sets ``return_progress``, in
        llama-server's form. ``progress``: total, cache, processed (tokens) and time_ms; ``id_``: llamaslot's, because
        llama-server has not received the request yet. Only if ``has_progress_events``.
        """
        return b""

    def stream_start(self, id_: str, body: Mapping[str, Any], n_total: int, n_reused: int) -> bytes:
        """The event that a stream must begin with, for a prompt of ``n_total`` tokens, if llama-server omits it;
        empty if none is needed.
        """
        return b""

    def usages(self, payload: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The ``usage`` objects of an answer or an event."""
        if self.usage_key is None:
            usage = payload.get("usage")
            return [usage] if isinstance(usage, dict) else []
        holders = payload, payload.get(self.usage_key)
        found = [holder.get("usage") for holder in holders if isinstance(holder, Mapping)]
        return [usage for usage in found if isinstance(usage, dict)]

    def counts(self, usage: Mapping[str, Any]) -> UsageCounts:
        """The token counts in ``usage``. OpenAI's chat and completion formats give no count of the prompt here, as the
        timings in the same event have it.
        """
        details = usage.get(self.usage_details_key) or {}
        return UsageCounts(details.get("cached_tokens"), None, int(usage.get("completion_tokens", 0)))

    def correct_usage(self, usage: dict[str, Any], n_reused: int) -> bool:
        """Lower the number of reused tokens in ``usage`` to ``n_reused`` where it is higher. False if ``usage`` has no
        such number.
        """
        details = usage.get(self.usage_details_key)
        if not isinstance(details, dict) or "cached_tokens" not in details:
            return False
        details["cached_tokens"] = min(n_reused, int(details["cached_tokens"]))
        return True

    def errors(self, id_: str) -> ErrorEvents:
        """An encoder for the errors of one stream. ``id_``: the request's."""
        return ErrorEvents(id_)

    def can_assemble(self, body: Mapping[str, Any]) -> bool:
        """Whether the JSON answer to ``body``, whose client does not stream, can be assembled from a stream (unless
        there is a ``Doubt`` at its end).
        """
        return False

    def streamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body that requests the same answer as a stream. Only if ``can_assemble``."""
        return streamed_with_progress(body)

    def assembly(self, body: Mapping[str, Any]) -> Assembly | None:
        """An assembler of the answer to ``body`` (the client's own body, not the streamed one); None for a format
        whose answers cannot be assembled.
        """
        return None


def _texts(holder: Any, key: str) -> Iterator[tuple[Any, Any]]:
    """The texts in ``holder[key]``: a string itself, or the texts of its parts. Each as the object that holds it and
    its key there.
    """
    match holder.get(key):
        case str():
            yield holder, key
        case list() as parts:
            for part in parts:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part, "text"
