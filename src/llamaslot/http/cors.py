"""Which web pages of other origins may use llamaslot from a browser: none, unless ``listen.cors`` names them.

llama-server allows every page: its ``Access-Control-*`` headers end here (``http.headers.to_client``). llamaslot's
own pages are never available to others. Keys travel in headers, so credentials (cookies) are not mentioned.
https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

from collections.abc import Collection

from aiohttp import web

from llamaslot.errors import Forbidden
from llamaslot.http.auth import is_own_page

_REMEMBERED_S = 600
_METHODS = "GET, POST, DELETE, OPTIONS"  # as llama-server sends it


class Cors:
    """The headers and preflight answers for pages of ``origins``; "*" is every page."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins, self._is_open = frozenset(origins), "*" in origins

    def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Handler of the signal ``on_response_prepare``: add the CORS headers to answers, early headers and errors
        alike.
        """
        if not self._origins or is_own_page(request):
            return
        if not self._is_open:
            response.headers.add("Vary", "Origin")
        if self._has(request):
            response.headers["Access-Control-Allow-Origin"] = (
                "*" if self._is_open else request.headers["Origin"]
            )
            response.headers["Access-Control-Expose-Headers"] = "*"

    def preflight(self, request: web.Request) -> web.Response | None:
        """The answer to a browser's preflight request; None for any other request. Raises Forbidden for a page that
        ``listen.cors`` does not name.
        """
        if not self._origins or request.method != "OPTIONS" or is_own_page(request):
            return None
        if "Access-Control-Request-Method" not in request.headers or "Origin" not in request.headers:
            return None
        if not self._has(request):
            raise Forbidden("pages of this origin may not use llamaslot: listen.cors does not name it")
        headers = {"Access-Control-Allow-Methods": _METHODS, "Access-Control-Max-Age": str(_REMEMBERED_S)}
        if asked := request.headers.get("Access-Control-Request-Headers"):
            headers["Access-Control-Allow-Headers"] = asked  # "*" would not include Authorization
        return web.Response(status=204, headers=headers)

    def _has(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is not None and (self._is_open or origin.lower() in self._origins)
