"""Prompts whose tokens are not known outside of llama-server, and why not."""

from __future__ import annotations

import enum

from llamaslot.errors import LlamaslotError


class Reason(enum.StrEnum):
    """Why the tokens of a prompt are not known."""

    #: The body has a field or a part that is not known to be rendered in one way.
    SHAPE = "shape"
    #: The template refuses what the body was converted to, or shows it otherwise than was thought.
    TEMPLATE = "template"
    #: Images, audio, video: their tokens are made inside llama-server, and no text comes before the first of them.
    MEDIA = "media"
    #: How this llama-server puts the parts of /infill together could not be found out.
    INFILL = "infill"
    #: The server has counted other tokens in such a prompt.
    MISCOUNTED = "miscounted"


class OpaquePrompt(LlamaslotError):
    """The tokens of a prompt are made inside llama-server and cannot be known outside.

    Not a fault of the request: whoever catches it runs the request without knowing its tokens. ``str`` may have words
    of the request in it; ``reason`` has none.
    """

    def __init__(self, message: str, reason: Reason = Reason.SHAPE) -> None:
        super().__init__(message)
        self.reason = reason
