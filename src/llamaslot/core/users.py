"""Who asks: people and programs, told apart so that none can starve or read another."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class User:
    """``id``: ``key:<name>`` of an API key, else ``named:<x-llamaslot-user>``, else ``at:<address>``.

    ``max_running``, ``max_waiting``: requests in slots and in the queue; None where the configuration decides.
    ``is_admin``: llamaslot's own pages are open to it.
    """

    id: str
    max_running: int | None = None
    max_waiting: int | None = None
    is_admin: bool = False


NOBODY = User("")  # llamaslot itself
