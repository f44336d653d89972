"""The errors of llamaslot. Each has an HTTP status, an OpenAI error type, and a message that says what to do next.

Exceptions of other libraries (aiohttp's client, the operating system's) are translated into these in ``llama/`` and
``store/``, and nowhere else.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

#: What Retry-After tells, but for a full queue (``QueueLimits.retry_after_s``).
RETRY_AFTER_S = 5.0


def shortened(text: str) -> str:
    """``text`` for use in an error message: above 100 characters its first 80 and its length."""
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


class LlamaslotError(Exception):
    """The base class. ``str(error)`` is the message for the client or operator."""

    status = 500
    type = "server_error"
    code: str | None = None
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """The OpenAI-shaped body: ``{"error": {"message", "type", "code"}}``."""
        return {"error": {"message": str(self), "type": self.type, "code": self.code or self.status}}

    @property
    def inner(self) -> dict[str, Any]:
        """The ``error`` object of the body: message, type and code."""
        return dict(self.body()["error"])


class ConfigError(LlamaslotError):
    """The configuration has faults. ``faults`` has one line for each, with its path in the file."""

    def __init__(self, source: str, faults: list[str]) -> None:
        self.source, self.faults = source, faults
        lines = "\n".join(f"  {fault}" for fault in faults)
        super().__init__(f"{source}: {len(faults)} fault{'s' * (len(faults) > 1)}\n{lines}")


class BadRequest(LlamaslotError):
    """The client's request is malformed; nothing was sent upstream."""

    status = 400
    type = "invalid_request_error"


class NotReloaded(LlamaslotError):
    """The configuration was not read again, or has faults: the old one stays in force."""

    status = 409
    type = "invalid_request_error"


class BodyTooLarge(BadRequest):
    """The body is larger than ``listen.max_body``."""

    status = 413


class Unauthorized(LlamaslotError):
    """A key is missing or wrong; text and type as in llama-server."""

    status = 401
    type = "authentication_error"


class TooSlow(BadRequest):
    """The request was not completely received in time."""

    status = 408


class Unpackable(BadRequest):
    """The body has an unsupported content encoding, or is corrupt."""

    status = 415


class Cancelled(BadRequest):
    """An operator has cancelled the request. Its HTTP status is one after which clients do not repeat a request by
    themselves.
    """

    status = 410


class NotImplementedHere(BadRequest):
    """A method that llamaslot does not support."""

    status = 501


class Forbidden(LlamaslotError):
    """A route that only llamaslot may use, or that the operator has not allowed."""

    status = 403
    type = "permission_error"


class Unavailable(LlamaslotError):
    """The request cannot be served just now: the client may try again after ``retry_after_s``."""

    status = 503
    type = "unavailable_error"
    retry_after_s = RETRY_AFTER_S


class QueueFull(Unavailable):
    """Too many requests are waiting already, or this one has waited for too long."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(QueueFull):
    """Too many requests of the same user are waiting already."""

    status = 429
    type = "rate_limit_error"


class DeadlinePassed(LlamaslotError):
    """The request did not get its first token, or the end of its answer, within the configured time."""

    status = 504
    type = "timeout_error"


class SlotWedged(LlamaslotError):
    """llama-server has reported no progress for too long. The content of its slot is unknown."""

    status = 504
    type = "timeout_error"


class BackendDown(Unavailable):
    """llama-server does not answer, or is still loading its model."""


class NotReady(BackendDown):
    """llama-server answers, but llamaslot cannot work with it yet."""


class NotUnderstood(BackendDown):
    """A server answers, but not like llama-server: another build, a router, a proxy's page."""


JSON_TYPE = "application/json; charset=utf-8"  # as sent by llama-server


class UpstreamError(LlamaslotError):
    """llama-server answered with an error. Its status and body are passed on to the client."""

    def __init__(self, status: int, payload: bytes, content_type: str = JSON_TYPE) -> None:
        text = payload.decode("utf-8", "replace")
        super().__init__(f"llama-server answered {status}: {text[:300]}")
        self.status, self.payload, self.content_type = status, payload, content_type

    @property
    def inner(self) -> dict[str, Any]:
        """The ``error`` object of llama-server."""
        try:
            import json  # rarely needed, and a tenth of what --help takes

            error = json.loads(self.payload)["error"]
        except (ValueError, KeyError, TypeError):
            return super().inner
        return (
            {"code": self.status, **error}
            if isinstance(error, dict) and "message" in error
            else super().inner
        )


def is_servers_own(status: int) -> bool:
    """Whether an error status may be the fault of the server: any 5xx except 501 (this server does not have the
    route).
    """
    return status >= 500 and status != 501


class DeadlyPrompt(LlamaslotError):
    """llama-servers have ended while they computed this prompt: it is not sent on."""

    code = "server_ended"

    def __init__(self, n_ended: int, rest_s: float) -> None:
        super().__init__(
            f"llama-server has ended {n_ended} times while it computed this prompt, so it is not sent on again for"
            f" {max(1, round(rest_s))} s; llama-server's log may say why"
        )


class SlotActionFailed(LlamaslotError):
    """A save, erase or restore of a slot failed. ``status_upstream``: llama-server's status."""

    def __init__(self, message: str, status_upstream: int = 0) -> None:
        super().__init__(message)
        self.status_upstream = status_upstream


class SlotNotEmptied(Unavailable):
    """llama-server might choose a slot whose content the request must not use, so nothing was sent."""


class SnapshotInvalid(LlamaslotError):
    """A slot file is missing, truncated, foreign, or does not match its sidecar."""


class OtherConversation(SnapshotInvalid):
    """A slot file is valid, but holds other tokens than llamaslot assumed: the assumption is wrong."""


class BackendRestarted(Unavailable):
    """llama-server is another process than the one that the slot was leased on: the request is placed again."""

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
    """llamaslot has no page of its own at this path below ``/llamaslot/``."""

    status = 404


class ModelNotFound(BadRequest):
    """No backend serves a model of that name; status and code as in OpenAI."""

    status = 404
    code = "model_not_found"


class NotAllowed(BadRequest):
    """A page of llamaslot's own was requested with a method that it does not accept."""

    status = 405

    def __init__(self, message: str, methods: Sequence[str]) -> None:
        super().__init__(message)
        self.methods = methods


class ClientGone(Exception):
    """The client has closed its connection, so there is no answer to send. Not a LlamaslotError, because it is no
    fault.
    """


class Reason(enum.StrEnum):
    """Why the tokens of a prompt are not known."""

    #: The body has a field or a part whose rendering is not known for sure.
    SHAPE = "shape"
    #: The template refuses the converted body, or renders it in an unexpected way.
    TEMPLATE = "template"
    #: Images, audio, video: their tokens are made inside llama-server, and no text comes before the first of them.
    MEDIA = "media"
    #: It is unknown how this llama-server combines the parts of /infill.
    INFILL = "infill"
    #: The server has counted other tokens in such a prompt.
    MISCOUNTED = "miscounted"


class PromptNotTokenizable(LlamaslotError):
    """The tokens of a prompt are made inside llama-server and cannot be known outside.

    This is no fault of the request: the caller catches the error and runs the request without known tokens. ``str``
    of the error may contain words of the request; ``reason`` does not.
    """

    def __init__(self, message: str, reason: Reason = Reason.SHAPE) -> None:
        super().__init__(message)
        self.reason = reason
