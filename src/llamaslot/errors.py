"""The errors of llamaslot. Each class has an HTTP status, an OpenAI error type, and a message that says what to do
next.

Only ``llama/`` and ``store/`` translate exceptions of other libraries (aiohttp's client, the operating system's) into
these classes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

#: The Retry-After header of a 503. A full queue has its own value (``QueueLimits.retry_after_s``).
RETRY_AFTER_S = 5.0


def shortened(text: str) -> str:
    """Return ``text`` for use in an error message: if it has more than 100 characters, only its first 80 and its
    length.
    """
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


def how_to_add(packages: str) -> str:
    """Return the command that installs ``packages`` (names, separated by blanks) into llamaslot's environment."""
    return f"pipx inject llamaslot {packages} (in a venv: pip install {packages})"


class LlamaslotError(Exception):
    """The base class. ``str(error)`` is the message for the client or operator.

    ``status`` is the HTTP status of the answer. ``type`` and ``code`` go into the ``error`` object of its body; a
    ``code`` of None stands for the status. ``retry_after_s``: seconds for the Retry-After header; None for no such
    header.
    """

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """Return the body of the error answer in OpenAI's form: ``{"error": {"message", "type", "code"}}``."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code or self.status}}

    @property
    def inner(self) -> dict[str, Any]:
        """The ``error`` object of ``body``: message, type and code."""
        return dict(self.body()["error"])


class ConfigError(LlamaslotError):
    """The configuration has faults. ``faults`` has one line for each fault, with its path in the configuration file.
    ``source`` names the file.
    """

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source, self.faults = source, faults
        lines = "\n".join(f"  {fault}" for fault in faults)
        super().__init__(f"{source}: {len(faults)} fault{'s' * (len(faults) > 1)}\n{lines}")


class BadRequest(LlamaslotError):
    """The client's request is malformed, or asks for something that llamaslot does not offer."""

    status = 400
    type = "invalid_request_error"


class NotReloaded(LlamaslotError):
    """A reload failed, because llamaslot has no configuration file or the file has faults. The old configuration stays
    in force.
    """

    status = 409
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    """The request's body, decompressed, is larger than ``listen.max_body``."""

    status = 413


class Unauthorized(LlamaslotError):
    """The request needs an API key, and its key is missing or wrong. Text and type are those of llama-server's own
    error.
    """

    status = 401
    type = "authentication_error"


class TooSlow(BadRequest):
    """The client has not sent the whole header or body of its request within ``listen.read_timeout_s``."""

    status = 408


class Unpackable(BadRequest):
    """The body has a Content-Encoding other than gzip and deflate. A corrupt gzip or deflate body is a plain
    BadRequest.
    """

    status = 415


class Cancelled(BadRequest):
    """An operator has cancelled the request. The HTTP status is 410, after which client libraries do not repeat the
    request.
    """

    status = 410


class NotImplementedHere(BadRequest):
    """The request has the method CONNECT or TRACE, or the target ``*``. llamaslot serves none of these."""

    status = 501


class Forbidden(LlamaslotError):
    """The client may not make this request: the route is not allowed, its key is no admin key, or another site's web
    page sent it.
    """

    status = 403
    type = "permission_error"


class Unavailable(LlamaslotError):
    """The request cannot be served now. The client may send it again after ``retry_after_s`` seconds."""

    status = 503
    type = "unavailable_error"
    retry_after_s = RETRY_AFTER_S


class QueueFull(Unavailable):
    """The queue is full, or the request has waited in it for longer than ``queue.max_wait_s``."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(QueueFull):
    """The user of the request already has as many requests in the queue as it may have."""

    status = 429
    type = "rate_limit_error"


class DeadlinePassed(LlamaslotError):
    """The first token of the answer did not come within ``timeouts.first_token_s``, or its end not within
    ``timeouts.total_s``.
    """

    status = 504
    type = "timeout_error"


class SlotWedged(LlamaslotError):
    """llama-server has made no progress with the request for ``timeouts.watchdog_s``. The content of its slot is
    unknown.
    """

    status = 504
    type = "timeout_error"


class BackendDown(Unavailable):
    """llama-server does not answer, or is still loading its model."""


class NotReady(BackendDown):
    """llama-server answers, but llamaslot cannot work with it yet. The message says why."""


class NotUnderstood(BackendDown):
    """The server at the backend's URL answers, but not as a llama-server does: it is another build, a router or a
    proxy.
    """


JSON_TYPE = "application/json; charset=utf-8"  # as sent by llama-server


class UpstreamError(LlamaslotError):
    """llama-server answered with an error. The client gets its ``status``, and its body (``payload``) with its content
    type.
    """

    def __init__(self, status: int, payload: bytes, content_type: str = JSON_TYPE) -> None:
        text = payload.decode("utf-8", "replace")
        super().__init__(f"llama-server answered {status}: {text[:300]}")
        self.status, self.payload, self.content_type = status, payload, content_type

    @property
    def without_text(self) -> str:
        """The error without llama-server's message, which may quote the prompt: for the log and the history."""
        return f"llama-server answered {self.status} ({self.inner.get('type')})"

    @property
    def inner(self) -> dict[str, Any]:
        """The ``error`` object in llama-server's body, with its status as ``code`` if it has none. If the body has no
        such object, the one of the base class.
        """
        try:
            import json  # needed rarely; at the top it would take a tenth of the time of --help

            error = json.loads(self.payload)["error"]
        except (ValueError, KeyError, TypeError):
            return super().inner
        return (
            {"code": self.status, **error}
            if isinstance(error, dict) and "message" in error
            else super().inner
        )


def is_servers_own(status: int) -> bool:
    """True if an error ``status`` may be the server's fault and not the request's: any 5xx except 501, which means that
    this server does not have the route.
    """
    return status >= 500 and status != 501


class DeadlyPrompt(LlamaslotError):
    """Several llama-server processes ended while they computed this prompt, so llamaslot refuses to send it for a
    while.

    ``n_ended``: the number of those processes. ``rest_s``: seconds until the prompt is accepted again.
    """

    code = "server_ended"

    def __init__(self, n_ended: int, rest_s: float) -> None:
        super().__init__(
            f"llama-server has ended {n_ended} times while it computed this prompt, so it is not sent on again for"
            f" {max(1, round(rest_s))} s; llama-server's log may say why"
        )


class SlotActionFailed(LlamaslotError):
    """A save, erase or restore of a slot failed. ``status_upstream``: llama-server's HTTP status, 0 if
    there was none.
    """

    def __init__(self, message: str, status_upstream: int = 0) -> None:
        super().__init__(message)
        self.status_upstream = status_upstream


class SlotNotEmptied(Unavailable):
    """llama-server might choose a slot whose content the request must not use, and llamaslot could not prevent that.
    The request was not sent.
    """


class SnapshotInvalid(LlamaslotError):
    """A snapshot's files cannot be used: one is missing, truncated or damaged, or does not match the sidecar."""


class OtherConversation(SnapshotInvalid):
    """The slot file that llama-server has just written is valid, but does not hold the tokens that llamaslot expected
    in the slot.
    """


class BackendRestarted(Unavailable):
    """The request cannot go on with the llama-server process that it was given, usually because that process has ended.
    The request is placed again.
    """

    def __init__(self, message: str = "llama-server has restarted") -> None:
        super().__init__(message)


class PromptTooLong(BadRequest):
    """The prompt does not fit into a slot; text and type as in llama-server."""

    type = "exceed_context_size_error"

    def __init__(self, n_prompt_tokens: int, n_ctx: int) -> None:
        self.n_prompt_tokens, self.n_ctx = n_prompt_tokens, n_ctx
        super().__init__(
            f"request ({n_prompt_tokens} tokens) exceeds the available context size ({n_ctx} tokens), try increasing it"
        )

    def body(self) -> dict[str, Any]:
        body = super().body()
        body["error"] |= {"n_prompt_tokens": self.n_prompt_tokens, "n_ctx": self.n_ctx}
        return body


class NotFound(BadRequest):
    """A request below ``/llamaslot/`` names a page, backend, request or snapshot that does not exist."""

    status = 404


class ModelNotFound(BadRequest):
    """No backend serves a model of the requested name. Status and code are those of OpenAI."""

    status = 404
    code = "model_not_found"


class NotAllowed(BadRequest):
    """The page below ``/llamaslot/`` does not accept the request's method. ``methods``: the methods that it accepts."""

    status = 405

    def __init__(self, message: str, methods: Sequence[str]) -> None:
        super().__init__(message)
        self.methods = methods


class ClientGone(Exception):
    """The client has closed its connection, so no answer can be sent. Not a LlamaslotError, because it is no fault."""


class Reason(enum.StrEnum):
    """Why llamaslot does not know the tokens of a prompt."""

    #: llamaslot does not know for sure how llama-server renders a field or a part of the body.
    SHAPE = "shape"
    #: The template refuses the chat that llamaslot has converted the body to, or renders it in an unexpected way.
    TEMPLATE = "template"
    #: The prompt has images, audio or video, whose tokens only llama-server can make, and the text before the first
    #: of them is of no use: there is none, it is too long, or llama-server chooses the slot.
    MEDIA = "media"
    #: llamaslot does not know in which order and with which limits this llama-server combines the parts of /infill.
    INFILL = "infill"
    #: llama-server has counted another number of tokens than llamaslot in a body of the same shape.
    MISCOUNTED = "miscounted"


class PromptNotTokenizable(LlamaslotError):
    """Only llama-server can make the tokens of this prompt; llamaslot cannot compute the same tokens.

    This is no fault of the request: the caller catches the error and serves the request without known tokens. ``str``
    of the error may contain words of the request; ``reason`` does not.
    """

    def __init__(self, message: str, reason: Reason = Reason.SHAPE) -> None:
        super().__init__(message)
        self.reason = reason
