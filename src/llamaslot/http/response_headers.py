"""llamaslot's own headers in answers: ``x-llamaslot-…`` in those to requests that got a slot, and the server's name.
``App._add_headers`` in ``app`` adds what every answer has.
"""

from __future__ import annotations

from llamaslot.scheduling.plan import Source
from llamaslot.scheduling.slots import SlotKey

NAME = {"Server": "llamaslot"}  # without versions

#: The backend that has answered.
BACKEND = "x-llamaslot-backend"
#: In the answer to a request whose slot llama-server has chosen, because assist is off.
ASSIST_OFF = {"x-llamaslot-assist": "off"}


def of_placement(slot: SlotKey, n_prompt: int) -> dict[str, str]:
    """Return the headers that are known before llama-server has received the request: backend, slot, and ``n_prompt``,
    the tokens of the prompt.
    """
    return {
        BACKEND: slot.backend,
        "x-llamaslot-slot": str(slot.id),
        "x-llamaslot-prompt-tokens": str(n_prompt),
    }


def of_expected_reuse(n_expected: int) -> dict[str, str]:
    """Return the header with the forecast of reused tokens, for streams in which llama-server reports the real number
    only at the end.
    """
    return {"x-llamaslot-expected-tokens": str(n_expected)}


def of_reuse(source: Source, n_reused: int) -> dict[str, str]:
    """Return the headers with the source and the number of reused tokens."""
    return {"x-llamaslot-source": source.value, "x-llamaslot-reused-tokens": str(n_reused)}
