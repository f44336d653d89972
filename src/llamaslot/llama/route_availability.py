"""Which routes a llama-server has for its model. A request to a missing route takes no slot."""

from __future__ import annotations

from llamaslot.llama.client import QUICK_S, LlamaServer

#: 404: this build has no such route. 501: the model does not support it (embeddings, rerank, /infill, audio).
#: Measured.
IS_NOT_OFFERED = (404, 501)


class RouteAvailability:
    """Which routes this run of the server has. An existing route answers an empty body with 400, and takes no slot."""

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self._known: dict[str, bool] = {}

    def forget(self) -> None:
        """Forget everything: the server was restarted, perhaps with another model."""
        self._known = {}

    async def has(self, path: str) -> bool:
        """Whether the server has the route ``path``. Raises BackendDown, also if there is no answer: a refusal needs
        no slot.

        Checked once. While it is unknown (the server is loading) the result is True.
        """
        known = self._known
        if (found := known.get(path)) is None:
            status, _ = await self._server.ask(path, {}, QUICK_S)
            found = status not in IS_NOT_OFFERED
            if status < 500 or not found:
                known[path] = found
        return found
