"""Which routes a llama-server has for the model at hand. Others are asked unchanged: their answer takes no slot."""

from __future__ import annotations

from llamaslot.llama.client import QUICK_S, LlamaServer

#: No such route in this build; or none for this model (embeddings, rerank, /infill, audio), seen running.
IS_NOT_OFFERED = (404, 501)


class RouteAvailability:
    """Routes of one run of the server. An empty body tells: those that are there answer 400, and take no slot."""

    def __init__(self, server: LlamaServer) -> None:
        self._server = server
        self._known: dict[str, bool] = {}

    def forget(self) -> None:
        """The server was restarted, perhaps with another model."""
        self._known = {}

    async def has(self, path: str) -> bool:
        """Whether the route that takes ``path`` answers with more than that it is not there. Raises BackendDown, also
        when no answer comes: to say what it lacks it needs no slot.

        Asked once. While that is not sure (the server is loading) the answer is yes.
        """
        known = self._known
        if (found := known.get(path)) is None:
            status, _ = await self._server.ask(path, {}, QUICK_S)
            found = status not in IS_NOT_OFFERED
            if status < 500 or not found:
                known[path] = found
        return found
