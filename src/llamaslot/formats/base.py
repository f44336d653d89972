"""What llamaslot needs to know of a client API. Each API has one file in this package, and one line in its
``__init__``.

To add an API: write a file with a subclass of ``Format``, and add its line in ``__init__`` and a line for each of its
routes in ``llama/routes``. The methods of ``Format`` are the defaults.
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
    """Encodes errors as events of one stream. ``id``: the id of the request.

    The default is llama-server's form, ``data: {"error": {"message", "type", "code"}}``: the client libraries of OpenAI
    and Vercel raise an exception for an event with ``error`` at its root.
    """

    #: Whether llama-server's own error events are converted to the form of ``event`` too.
    is_translated = False

    def __init__(self, id_: str) -> None:
        self.id = id_

    def saw(self, event: bytes) -> None:
        """Called with the events that the client receives; of several that are sent in one piece, perhaps only with the
        last. A format whose error event continues the stream (with the next sequence number, for example) overrides
        this.
        """

    def event(self, error: Mapping[str, Any]) -> bytes:
        """Return the SSE event that reports ``error`` to the client. ``error`` has message, type and code, as in the
        body of an error answer.
        """
        return event_of({"error": error})

    def translated(self, event: bytes) -> bytes:
        """Return ``event``, an error event of llama-server, in the form of ``event()``. Returns the same bytes if the
        format's clients understand llama-server's form, or if the event has no message.
        """
        payload = data_of(event)
        if not self.is_translated or not isinstance(payload, dict):
            return event
        error = payload.get("error", payload)
        return self.event(error) if isinstance(error, dict) and "message" in error else event


def translated_all(errors: ErrorEvents, events: bytes) -> bytes:
    """Return ``events`` with each error event among them replaced by ``errors.translated`` of it. Bytes after the last
    whole event stay unchanged.
    """
    if b"error" not in events:
        return events
    splitter = EventSplitter()
    told = b"".join(errors.translated(event) if is_error(event) else event for event in splitter.feed(events))
    return told + splitter.rest


def is_error(event: bytes) -> bool:
    """True if an event is an error of llama-server: its name is ``error``, or the first field of its data
    is ``error``.
    """
    return event.startswith((b"event: error", b'data: {"error":'))


LAST_EVENTS = (b"data: [DONE]", b"event: error")
_SYSTEM = ("system", "developer")


class PromptKind(enum.Enum):
    """How a request's body becomes tokens."""

    #: The body is a chat: llama-server's template renders it, and refuses a faulty one.
    CHAT = "chat"
    #: llama-server converts the body to a chat. ``Format.chat_body`` does the same, and may be wrong.
    CONVERTED = "converted"
    #: The field ``prompt``: text, ids, or a list of these.
    PLAIN = "plain"
    #: The parts of a file, which llama-server combines as the model requires.
    INFILL = "infill"


class UsageCounts(Struct, frozen=True):
    """The token counts in one ``usage`` object; None or 0 where it has none."""

    n_cached: int | None = None  # reused tokens of the prompt
    n_prompt: int | None = None  # tokens of the whole prompt
    n_predicted: int = 0


class Format(Protocol):
    """One client API: how its bodies become prompts, and the form of its answers and errors. Has no state."""

    #: The name in routes, metrics, log lines and ``rewrite``.
    name: str
    prompt_kind: PromptKind
    #: False: llama-server drops ``id_slot``, ``cache_prompt`` and ``n`` of its bodies, and chooses the slot itself.
    honours_id_slot: bool = True
    #: The names of the fields with the messages and with a separate system prompt; None if the API has no such field.
    messages_key: str | None = None
    system_key: str | None = None
    #: The field without which llama-server refuses a body.
    required_key: str = "messages"
    #: The route that counts the tokens of such a body, and refuses a body that llama-server cannot convert to a
    #: prompt; None if there is none.
    count_path: str | None = None
    #: The route that finds faults of the prompt in a dry run (a request that llama-server is sure to refuse before it
    #: computes anything) with the whole body; None if there is none.
    whole_dry_run_path: str | None = None
    #: The first bytes of the events that end a stream. (A native stream ends with an event that has ``"stop": true``.)
    last_events: tuple[bytes, ...] = LAST_EVENTS
    #: The field of an event that may hold a ``usage``; another may be at the event's root.
    usage_key: str | None = None
    #: The field of a ``usage`` that has the number of reused tokens, as ``cached_tokens``.
    usage_details_key: str = "prompt_tokens_details"

    # -- the request ---------------------------------------------------------------------------------------------

    def chat_body(self, body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the chat body that llama-server renders for ``body``: ``body`` itself, or what llama-server converts
        it to. None if the API has plain prompts. Raises PromptNotTokenizable if llamaslot cannot tell what llama-server
        makes of ``body``.
        """
        return None

    def n_prompts(self, body: Mapping[str, Any]) -> int:
        """Return the number of prompts in ``body``."""
        return 1

    def n_answers(self, body: Mapping[str, Any]) -> int:
        """Return the number of answers that llama-server computes for each prompt: the larger of ``n`` (OpenAI) and
        ``n_cmpl`` (native), at least 1. They are read as an int32, as llama-server reads them: 2.9 is 2, 2**32 + 1 is
        1.

        A value that is no number or below 1 counts as 1 here: llama-server refuses such a body in any case.
        """
        numbers = [1]
        for value in (body.get("n"), body.get("n_cmpl")):
            if isinstance(value, float) and abs(value) < 2**31:
                numbers.append(int(value))
            elif isinstance(value, int) and not isinstance(value, bool):
                numbers.append((value + 2**31) % 2**32 - 2**31)
        return max(numbers)

    def messages(self, body: Mapping[str, Any]) -> list[Any] | None:
        """Return the messages as the client sent them; a string instead of a list is one message of the user. Empty if
        the body has no list of messages, None if the API has no messages.
        """
        if self.messages_key is None:
            return None
        given = body.get(self.messages_key)
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        return given if isinstance(given, list) else []

    def system_texts(self, body: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each text of the system prompt as the object that holds it and its key there, so that the caller can
        replace it.

        These are the texts of ``system_key``, and of messages of role ``system`` or ``developer`` at any position. A
        malformed body yields nothing: llama-server's own 400 explains the fault best.
        """
        if self.system_key is not None:
            yield from _texts(body, self.system_key)
        for message in self.messages(body) or ():
            if isinstance(message, dict) and message.get("role") in _SYSTEM:
                yield from _texts(message, "content")

    def dry_run(
        self, body: Mapping[str, Any], chat: Mapping[str, Any] | None, *, tokens: bytes | None, n: int
    ) -> DryRun:
        """Return the dry run for ``body``: the fields that llama-server may refuse, to be sent with a prompt that is
        never computed.

        ``chat``: the chat that the body is or is converted to, None for a plain prompt. ``tokens``: the prompt's packed
        ids if the client sent ids, else None. ``n``: the number of answers to each prompt.
        """
        return dry_run(body if chat is None else chat, is_chat=chat is not None, tokens=tokens, n=n)

    # -- the answer ----------------------------------------------------------------------------------------------

    def progress_event(self, id_: str, model: str, progress: Mapping[str, int]) -> bytes:
        """Return the event that tells a client with ``return_progress`` how far llamaslot's own prefill is, in
        llama-server's form. One is sent after each batch. Empty if the API has no such event: then SSE comments report
        the progress.

        ``progress`` has total, cache, processed (tokens) and time_ms. ``id_``: the id that llamaslot gave the request,
        because llama-server has not received it yet.
        """
        return b""

    def stream_start(self, id_: str, body: Mapping[str, Any], n_total: int, n_reused: int) -> bytes:
        """Return the event with which llamaslot begins a stream if llama-server omits it; empty if the API needs no
        such event. ``n_total``: tokens of the prompt, of which ``n_reused`` are reused.
        """
        return b""

    def usages(self, payload: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the ``usage`` objects of an answer or an event: those at its root, and in its field ``usage_key``."""
        if self.usage_key is None:
            usage = payload.get("usage")
            return [usage] if isinstance(usage, dict) else []
        holders = payload, payload.get(self.usage_key)
        found = [holder.get("usage") for holder in holders if isinstance(holder, Mapping)]
        return [usage for usage in found if isinstance(usage, dict)]

    def counts(self, usage: Mapping[str, Any]) -> UsageCounts:
        """Return the token counts in ``usage``. This default leaves out the tokens of the whole prompt: in OpenAI's
        chat and completion formats the ``timings`` of the same event have them.
        """
        details = usage.get(self.usage_details_key) or {}
        return UsageCounts(details.get("cached_tokens"), None, int(usage.get("completion_tokens", 0)))

    def correct_usage(self, usage: dict[str, Any], n_reused: int) -> bool:
        """Lower the number of reused tokens in ``usage``, in place, to ``n_reused`` if it is higher. Returns False if
        ``usage`` has no such number.
        """
        details = usage.get(self.usage_details_key)
        if not isinstance(details, dict) or "cached_tokens" not in details:
            return False
        details["cached_tokens"] = min(n_reused, int(details["cached_tokens"]))
        return True

    def errors(self, id_: str) -> ErrorEvents:
        """Return an encoder for the errors of one stream. ``id_``: the id of the request."""
        return ErrorEvents(id_)

    def can_assemble(self, body: Mapping[str, Any]) -> bool:
        """True if the JSON answer to ``body``, which requests no stream, can be assembled from the events of a stream.
        The end of the stream may still leave a ``Doubt``.
        """
        return False

    def streamed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the body that requests the same answer as a stream. Called only if ``can_assemble``."""
        return streamed_with_progress(body)

    def assembly(self, body: Mapping[str, Any]) -> Assembly | None:
        """Return an assembler for the answer to ``body``, the client's own body and not the streamed one. None for a
        format whose answers cannot be assembled.
        """
        return None


def _texts(holder: Any, key: str) -> Iterator[tuple[Any, Any]]:
    """Yield the texts in ``holder[key]``, which is a string or a list of parts, each as the object that holds it and
    its key there.
    """
    match holder.get(key):
        case str():
            yield holder, key
        case list() as parts:
            for part in parts:
                if isinstance(part, dict) and isinstance(part.get("text"), str):
                    yield part, "text"
