"""The page at ``/llamaslot/``: a few files, the same for all. They hold no data, so they need no key; what they show
comes from llamaslot's other pages, which do.
"""

from __future__ import annotations

import functools
import ipaddress
from importlib import resources
from urllib.parse import urlsplit

from aiohttp import web
from xxhash import xxh3_64_hexdigest

from llamaslot.errors import Forbidden

ROOT = "/llamaslot/"
_JS = "text/javascript; charset=utf-8"
FILES = {
    ROOT: ("index.html", "text/html; charset=utf-8"),
    ROOT + "page.css": ("page.css", "text/css; charset=utf-8"),
    ROOT + "icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"{ROOT}{name}.js": (f"{name}.js", _JS)
        for name in ("page", "server", "words", "parts", "activity", "store", "plots")
    },
}
_HEADERS = {
    "Cache-Control": "no-cache",
    # Nothing from outside, nothing inline, no form, no frame; no text can become markup or code.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_page_file(request: web.Request) -> bool:
    """Whether the request asks for one of the files of the operator page."""
    return request.method in ("GET", "HEAD") and (request.path in FILES or request.path == ROOT[:-1])


def page_file(request: web.Request) -> web.Response:
    """One of the files of the operator page. ``/llamaslot`` leads to ``/llamaslot/``, also behind a proxy with a
    prefix.
    """
    if request.path == ROOT[:-1]:
        return web.Response(status=308, headers={"Location": "llamaslot/"})
    name, type_ = FILES[request.path]
    body, tag = _content(name)
    headers = {**_HEADERS, "ETag": tag, "Content-Type": type_}
    if request.headers.get("If-None-Match") == tag:
        return web.Response(status=304, headers=headers)
    return web.Response(body=body, headers=headers)


@functools.cache
def _content(name: str) -> tuple[bytes, str]:
    body = (resources.files("llamaslot.http") / "static" / name).read_bytes()
    return body, f'"{xxh3_64_hexdigest(body)}"'


def refuse_foreign_page(request: web.Request, *, needs_key: bool) -> None:
    """Raise Forbidden if another web page than llamaslot's own may have sent the request: any page in a browser on
    this machine could. There are three cases:

    1. Keys are needed (``needs_key``): no browser sends one to another site without CORS, so the key proves that the
       request is no foreign page's.
    2. The Host is a name of the DNS, which others can point to this machine: a browser then takes their page for
       llamaslot's.
    3. An action, or a question across sites, has an Origin: it must be the Host.
    """
    if needs_key:
        return
    host, origin = request.headers.get("Host", ""), request.headers.get("Origin")
    if host and not _is_address(urlsplit(f"//{host}").hostname):
        raise Forbidden(
            f"{request.path}: without keys it is answered under 127.0.0.1 or localhost only, not under a name"
        )
    if origin is not None and urlsplit(origin).netloc != host:
        raise Forbidden(f"{request.path} is for llamaslot's own page: use that, or curl")


def _is_address(name: str | None) -> bool:
    try:
        return name == "localhost" or bool(ipaddress.ip_address(name or ""))
    except ValueError:
        return False
