"""The texts of all SSE comments that tell a waiting client what happens to its request."""

from __future__ import annotations

import enum


class Comment(enum.StrEnum):
    """One text each. ``format`` fills in the parts in braces."""

    TOKENIZING = "tokenizing"
    LOADING = "loading the model"  # on demand
    QUEUED = "queued {position}"  # position 1 is the next request to get a slot
    SAVING = "saving"  # llama-server writes the slot's content, or a shared prefix, to disk
    CLEARING = "clearing slot"  # llama-server erases the slot, and restores nothing into it
    RESTORING = "restoring"  # llama-server erases the slot, and reads a snapshot into it
    WAITING_TO_PREFILL = "waiting to prefill {n_tokens} tokens"  # other prompts are computed first
    PREFILL = "prefill {n_done} of {n_tokens}"
    WAITING_FOR_TURN = "waiting for its turn"  # llama-server chooses the slot, so other requests are held up
    WAITING_FOR_SERVER = "waiting for llama-server"  # the request is sent; its answer has not begun
