"""The texts of all SSE comments that tell a waiting client what happens to its request."""

from __future__ import annotations

import enum


class Comment(enum.StrEnum):
    """One text each; ``format`` fills in the parts in braces."""

    LOADING = "loading the model"  # on demand
    QUEUED = "queued {position}"  # 1 is the next request to get a slot
    SAVING = "saving"  # the slot's content, or a shared prefix
    CLEARING = "clearing slot"  # an erase that no restore follows
    RESTORING = "restoring"  # an erase and the restore after it
    WAITING_TO_PREFILL = "waiting to prefill {n_tokens} tokens"
    PREFILL = "prefill {n_done} of {n_tokens}"
    WAITING_FOR_TURN = "waiting for its turn"  # llama-server chooses the slot
    WAITING_FOR_SERVER = "waiting for llama-server"  # everything is sent; no event has come yet
