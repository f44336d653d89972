"""The files of the operator page at ``/llamaslot/``, the same for every user. They hold no data, so they need no key.
The page gets its data from llamaslot's other pages, which may need one.
"""

from __future__ import annotations

import functools
from importlib import resources

from aiohttp import web
from xxhash import xxh3_64_hexdigest

ROOT = "/llamaslot/"
_JS = "text/javascript; charset=utf-8"
FILES = {
    ROOT: ("index.html", "text/html; charset=utf-8"),
    ROOT + "page.css": ("page.css", "text/css; charset=utf-8"),
    ROOT + "icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"{ROOT}{name}.js": (f"{name}.js", _JS)
        for name in ("page", "server", "words", "parts", "activity", "outages", "store", "plots")
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
    """True if the request asks for one of the files of the operator page, or for ``/llamaslot``."""
    return request.method in ("GET", "HEAD") and (request.path in FILES or request.path == ROOT[:-1])


def page_file(request: web.Request) -> web.Response:
    """Return one of the files of the operator page; 304 if the browser has it already. ``/llamaslot`` is redirected to
    ``/llamaslot/``, by a relative address that also works behind a proxy with a prefix.
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
