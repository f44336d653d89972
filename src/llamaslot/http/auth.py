"""Who may use llamaslot: from the headers of a request to its user, and which web pages may send requests.

As in llama-server with ``--api-key``, these need no key: health, the files of its web UI, and OPTIONS. llamaslot's own
pages need an admin key.

Web pages of other origins may not use llamaslot from a browser, unless ``listen.cors`` names them, and never its own
pages below ``/llamaslot/``. llama-server allows every page, so its ``Access-Control-*`` headers are removed
(``http.forwarded_headers.to_client``). Keys travel in headers, so no answer allows credentials (cookies).
https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from msgspec.structs import replace

from llamaslot.config.keys import Key, digest_of, read_keys
from llamaslot.config.sections import AuthConfig
from llamaslot.errors import BadRequest, ConfigError, Forbidden, Unauthorized
from llamaslot.file_id import Watch
from llamaslot.http.page import is_page_file
from llamaslot.llama.routes import server_path
from llamaslot.scheduling.request import SYSTEM_USER, User

log = logging.getLogger(__name__)

_HEALTH = ("/health", "/v1/health")

# Names of the web UI's files, which change with each build: /, /index.html, /sw.js, /favicon.ico,
# /_app/immutable/bundle.CheKa0wg.js. No route of llama-server's API has a dot in it.
_WEB_UI = re.compile(
    r"/(?:[\w-]+\.(?:html|js|css|json|webmanifest|ico|svg|png)|_app/(?:[\w-][\w.-]*/)*[\w-][\w.-]*)?",
    re.ASCII,
)

_REMEMBERED_S = 600
_METHODS = "GET, POST, DELETE, OPTIONS"  # as llama-server sends it
_USER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")

USER = web.RequestKey("user", User)


class Keyring:
    """The valid keys. They are read again from their file when it has changed.

    A key is looked up by its SHA-256. No client can choose that, so the time of a lookup tells nothing of other keys.

    The file is looked at when a key is checked, at most once a second, which takes some microseconds; so a removed key
    is valid for one second at most. Reading a thousand keys takes some milliseconds, on the event loop. If the file
    cannot be read, the keys read before stay valid, and the log says so once.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Read the file. Raises ConfigError."""
        self._path = path
        keys, mark = read_keys(path)
        self._watch = Watch(path, clock=clock, known=(mark,))
        self._take(keys)
        log.info("keys: %d client keys read from %s", len(keys), path)

    def _take(self, keys: tuple[Key, ...]) -> None:
        self._users = {key.digest: key.user for key in keys}

    def find(self, key: str) -> User | None:
        """Return the user of ``key``, None if the key is not valid."""
        self._reload_if_changed()
        return self._users.get(digest_of(key))

    def _reload_if_changed(self) -> None:
        if not self._watch.has_changed():
            return
        try:
            keys, mark = read_keys(self._path)
        except ConfigError as error:
            faults = "; ".join(error.faults)
            log.error(
                "keys: %s has changed and cannot be used: %s; the keys read before stay in force",
                self._path, faults,
            )  # fmt: skip
            return
        self._watch.known = (mark,)  # the id of the file as it was read: it may have changed since
        self._take(keys)
        log.info("keys: %s has changed: its %d client keys are in force", self._path, len(keys))


class Authenticator:
    """Applies the ``auth`` section of the configuration to requests."""

    def __init__(self, settings: AuthConfig) -> None:
        """Read the configured keys. Raises ConfigError if a configured file has become unreadable since the
        configuration was loaded.
        """
        self._keyring = Keyring(settings.keys_file) if settings.keys_file is not None else None
        admin_key = settings.resolve_admin_key()
        self._admin_digest = digest_of(admin_key) if admin_key is not None else None
        self._allows_anonymous = settings.allow_anonymous or self._keyring is None

    def authenticate(self, request: web.Request) -> User:
        """Return the user of a request. Raises Unauthorized if the request needs a key and has no valid one, Forbidden
        if it may not use llamaslot's own pages, and BadRequest for an invalid user name.

        If no keys are configured, a key that the client sends is ignored, because most clients must send one. If keys
        are configured, a wrong one is refused, even with ``auth.allow_anonymous``; only routes that need no key ignore
        it.
        """
        if is_page_file(request):
            return anonymous(request)
        key = key_of(request.headers)
        if is_own_page(request):
            return self._admit_admin(request, key)
        if self._keyring is None:
            return anonymous(request)
        if key is not None and (user := self._keyring.find(key)) is not None:
            return user
        if is_open(request) or (key is None and self._allows_anonymous):
            return anonymous(request)
        raise _unauthorized(key)

    @property
    def needs_admin_key(self) -> bool:
        """True if llamaslot's own pages need a key. If not, only this machine may use them."""
        return self._admin_digest is not None or self._keyring is not None

    def _admit_admin(self, request: web.Request, key: str | None) -> User:
        user = self._keyring.find(key) if self._keyring is not None and key is not None else None
        if user is not None and user.is_admin:
            return user
        if key is not None and self._is_admin_key(key):
            return replace(anonymous(request), is_admin=True)
        if user is not None:
            raise Forbidden(
                "llamaslot's own pages are for its operators: use auth.admin_key_file of its configuration, "
                "or a key made with: llamaslot keys add NAME --admin"
            )
        if self.needs_admin_key:
            raise _unauthorized(key)
        if not _is_loopback(request.remote):
            raise Forbidden(
                "without a key llamaslot's own pages are for its own machine: set auth.admin_key_file"
            )
        return replace(anonymous(request), is_admin=True)

    def _is_admin_key(self, key: str) -> bool:
        return self._admin_digest is not None and hmac.compare_digest(self._admin_digest, digest_of(key))


def is_own_page(request: web.Request) -> bool:
    """True if the request is for ``/llamaslot`` or a path below it, percent-encoded or not."""
    return request.path.partition("/")[2].partition("/")[0] == "llamaslot"


def is_open(request: web.Request) -> bool:
    """True if llama-server answers such a request without a key: OPTIONS, health, and the files of its web UI."""
    if request.method == "OPTIONS":
        return True
    if request.method not in ("GET", "HEAD"):
        return False
    path = server_path(request.raw_path)
    return path in _HEALTH or _WEB_UI.fullmatch(path) is not None


def key_of(headers: Mapping[str, str]) -> str | None:
    """Return the key in the headers, None if there is none. As in llama-server it is in ``Authorization``, with or
    without ``Bearer``, else in ``x-api-key``; Azure's clients send ``api-key``.

    An ``Authorization`` of another scheme (``Basic``, for a proxy in between) holds no key for llamaslot.
    """
    words = headers.get("Authorization", "").split()
    if len(words) == 2 and words[0].lower() == "bearer":
        return words[1]
    if len(words) == 1 and words[0].lower() != "bearer":
        return words[0]
    return headers.get("x-api-key", "").strip() or headers.get("api-key", "").strip() or None


def anonymous(request: web.Request) -> User:
    """Return the user of a request without a key: named by its header ``x-llamaslot-user``, else by the client's
    address. Raises BadRequest for an invalid name.
    """
    name = request.headers.get("x-llamaslot-user", "").strip()
    if not name:
        return User(f"at:{_address(request.remote)}")
    if not _USER_NAME.fullmatch(name):
        raise BadRequest(
            "x-llamaslot-user should be 1 to 64 letters, digits, '.', '_', '@', '+' and '-', "
            "the first a letter or digit"
        )
    return User(f"named:{name}")


@functools.lru_cache(maxsize=1024)
def _address(remote: str | None) -> str:
    """Return the address of a client in one form: an IPv4 address inside IPv6 (``::ffff:10.0.0.1``) becomes
    plain IPv4.
    """
    try:
        address = ipaddress.ip_address(remote or "")
    except ValueError:
        return remote or "unknown"
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)


def _is_loopback(remote: str | None) -> bool:
    try:
        return ipaddress.ip_address(_address(remote)).is_loopback
    except ValueError:
        return False


def _unauthorized(key: str | None) -> Unauthorized:
    """Return the error for a missing (None) or wrong key, in llama-server's words. For a missing key it also says how
    to send one.
    """
    if key is not None:
        return Unauthorized("Invalid API Key")
    return Unauthorized(
        "Invalid API Key: none was sent; send yours as 'Authorization: Bearer …' or 'x-api-key: …'"
    )


def user_of(request: web.Request) -> User:
    user: User = request.get(USER, SYSTEM_USER)
    return user


# -- web pages of other origins --------------------------------------------------------------------------------------


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
