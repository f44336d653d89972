"""Which web pages may use llamaslot from a browser. Pages of other origins may not, unless ``listen.cors`` names them.

llama-server allows every page, so its ``Access-Control-*`` headers are removed (``http.headers.to_client``).
llamaslot's own pages below ``/llamaslot/`` are never available to pages of other origins. Keys travel in headers, so no
answer allows credentials (cookies). https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from urllib.parse import urlsplit

from aiohttp import web

from llamaslot.errors import Forbidden
from llamaslot.http.auth import is_own_page

_REMEMBERED_S = 600
_METHODS = "GET, POST, DELETE, OPTIONS"  # as llama-server sends it


class Cors:
    """The headers and preflight answers for pages of ``origins``; "*" means every page."""

    def __init__(self, origins: Collection[str]) -> None:
        self._origins, self._is_open = frozenset(origins), "*" in origins

    def allow(self, request: web.Request, response: web.StreamResponse) -> None:
        """Handler of the signal ``on_response_prepare``: add the CORS headers to an answer. That covers error answers,
        and headers that are sent before the answer.
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
        """Return the answer to a browser's preflight request, None for any other request. Raises Forbidden for a
        preflight of a page that ``listen.cors`` does not name.
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


def refuse_foreign_page(request: web.Request, *, needs_key: bool) -> None:
    """Raise Forbidden if another site's web page may have sent this request for one of llamaslot's own pages. Any page
    in a browser on this machine could send one. There are three cases:

    1. The pages need a key (``needs_key``). A browser sends no key to another site without CORS, so the request's key
       proves that no foreign page sent it: it is accepted.
    2. The Host is a DNS name. Others can point such a name to this machine, and a browser then takes their page for
       llamaslot's: it is refused.
    3. The request has an Origin. Browsers send one with each POST, and when a page's script asks another site. If it is
       not the Host, the request is refused.
    """
    if needs_key:
        return
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if host and not _is_address(host):
        raise Forbidden(
            f"{request.path}: without keys it is answered under 127.0.0.1 or localhost only, not under a name"
        )
    if origin is not None and origin.partition("://")[2] != host:
        raise Forbidden(f"{request.path} is for llamaslot's own page: use that, or curl")


def _is_address(host: str) -> bool:
    """True if the value of a Host header names an IP address or localhost, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or bool(ipaddress.ip_address(name))
    except ValueError:
        return False
