"""llama-server's routes as a table: what llamaslot does with a request to each, by the route's effect on slots.

The table has the routes of all tested builds (docs/llama-server.md, "Routes"). If a build lacks a route, clients get
that server's 404. tests/real/test_routes.py compares the table with the real server. ``--api-prefix`` is not supported.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

#: completion   has a prompt whose tokens llamaslot finds out: it is queued and placed in a slot
#: exclusive    llama-server chooses the slot: it is sent while no other request on that backend is between two steps
#: passthrough  takes no slot: llamaslot forwards it unchanged
#: own          llamaslot answers it itself
#: forbidden    403: it would change slots without llamaslot's knowledge
#: gated        403 unless ``passthrough.allow`` names its gate: it changes the server, or lets it send requests
#: elsewhere
RouteKind = Literal["completion", "exclusive", "passthrough", "own", "forbidden", "gated"]

#: The values that ``passthrough.allow`` accepts.
Gate = Literal["POST /props", "/lora-adapters", "/models", "/tools", "/cors-proxy"]


class Route(Struct, frozen=True):
    """One line of the table, or an unknown path, whose kind is ``passthrough``.

    ``path``: as llama-server registers it, for instance ``/slots/:id``. ``format``: the client API whose bodies a
    completion accepts, by its name in ``formats/``; on a passthrough route, the API of a body whose tokens the route
    counts. ``may_be_missing``: some builds or models lack the route, so llamaslot asks (``RouteAvailability``) before
    it prepares a slot.
    """

    method: str  # "GET" answers HEAD too; "*" is any
    path: str
    kind: RouteKind
    format: str | None = None
    gate: str | None = None
    may_be_missing: bool = False

    @property
    def refusal(self) -> str:
        """The message of the 403 for a forbidden or gated request: why it is refused, and what to do instead."""
        if self.gate is not None:
            return (
                f"{self.gate} changes llama-server for all users, or reaches out from it: to let it through, "
                f"add '{self.gate}' to passthrough.allow in llamaslot's configuration"
            )
        if self.path.startswith("/slots"):
            return "the slots belong to llamaslot, which saves and restores them by itself: send completions only"
        return f"{self.path} reaches llama-server's other routes, slots included; use those routes directly"


def _completion(path: str, its_format: str, may_be_missing: bool = False) -> Route:
    return Route("POST", path, "completion", its_format, may_be_missing=may_be_missing)


def _exclusive(path: str) -> Route:
    return Route("POST", path, "exclusive", may_be_missing=True)


ROUTES: tuple[Route, ...] = (
    _completion("/v1/chat/completions", "chat"),
    _completion("/chat/completions", "chat"),
    _completion("/v1/completions", "openai-completion"),
    _completion("/completions", "native-completion"),  # without /v1 it is the native format
    _completion("/completion", "native-completion"),
    _completion("/v1/responses", "responses"),
    _completion("/responses", "responses"),
    _completion("/infill", "infill", may_be_missing=True),
    _completion("/api/chat", "chat", may_be_missing=True),  # older builds: a chat body under another name
    _completion("/v1/messages", "messages"),  # Anthropic
    # The body is a form, in which id_slot would be a string: llama-server ignores any that is not a number.
    _exclusive("/v1/audio/transcriptions"),
    _exclusive("/audio/transcriptions"),
    # One task and one slot for each input or document.
    _exclusive("/embedding"),
    _exclusive("/embeddings"),
    _exclusive("/v1/embeddings"),
    _exclusive("/rerank"),
    _exclusive("/reranking"),
    _exclusive("/v1/rerank"),
    _exclusive("/v1/reranking"),
    _exclusive("/v1/systemone"),  # decision models, newer builds
    Route("GET", "/health", "own"),
    Route("GET", "/v1/health", "own"),
    Route("*", "/llamaslot", "own"),
    Route("*", "/llamaslot/*", "own"),
    Route("POST", "/slots/:id", "forbidden"),
    # Google Vertex AI (environment AIP_MODE=PREDICTION): "@requestFormat" names any other route, "slots" too.
    Route("POST", "/predict", "forbidden"),
    Route("POST", "/props", "gated", gate="POST /props"),
    Route("POST", "/lora-adapters", "gated", gate="/lora-adapters"),
    Route("POST", "/models", "gated", gate="/models"),
    Route("POST", "/models/*", "gated", gate="/models"),  # load, unload
    Route("*", "/tools", "gated", gate="/tools"),
    Route("*", "/tools/*", "gated", gate="/tools"),
    Route("*", "/cors-proxy", "gated", gate="/cors-proxy"),  # a GET is enough to fetch any URL
    Route("*", "/cors-proxy/*", "gated", gate="/cors-proxy"),
    Route("POST", "/tokenize", "passthrough"),
    Route("POST", "/detokenize", "passthrough"),
    Route("POST", "/apply-template", "passthrough"),
    # These accept a completion's body, and return the number of its prompt tokens.
    Route("POST", "/chat/completions/input_tokens", "passthrough", "chat"),
    Route("POST", "/v1/chat/completions/input_tokens", "passthrough", "chat"),
    Route("POST", "/responses/input_tokens", "passthrough", "responses"),
    Route("POST", "/v1/responses/input_tokens", "passthrough", "responses"),
    Route("POST", "/v1/messages/count_tokens", "passthrough", "messages"),
    # Ends the reasoning of a running answer by its id.
    Route("POST", "/v1/chat/completions/control", "passthrough"),
    Route("GET", "/slots", "passthrough"),
    Route("GET", "/props", "passthrough"),
    Route("GET", "/metrics", "passthrough"),
    Route("GET", "/models", "passthrough"),
    Route("GET", "/v1/models", "passthrough"),
    Route("GET", "/models/sse", "passthrough"),
    Route("GET", "/lora-adapters", "passthrough"),
    # For answers that continue after their client has left: that needs X-Conversation-Id, which llamaslot does not
    # forward.
    Route("GET", "/v1/stream", "passthrough"),
    Route("GET", "/v1/stream/:id", "passthrough"),
    Route("DELETE", "/v1/stream", "passthrough"),
    Route("DELETE", "/v1/stream/:id", "passthrough"),
    Route("POST", "/v1/streams/lookup", "passthrough"),
    Route("GET", "/v1/streams", "passthrough"),
    Route("GET", "/api/tags", "passthrough"),
    Route("POST", "/api/show", "passthrough"),
    Route("GET", "/", "passthrough"),
    Route("GET", "/index.html", "passthrough"),
)

_EXACT = {(route.method, route.path): route for route in ROUTES}
_PATTERNS = tuple(route for route in ROUTES if route.path.endswith(("/*", "/:id")))
_REFUSED = tuple(route for route in ROUTES if route.kind in ("forbidden", "gated"))

#: llama-server has no handlers for these methods, or (OPTIONS) answers before it looks at the path.
_INERT = ("OPTIONS", "TRACE", "CONNECT")


def classify(method: str, target: str, allow: Collection[str] = ()) -> Route:
    """The route that llama-server would use for a request. Unknown paths are ``passthrough``.

    ``target``: the raw request target, percent-encoded, with or without its query (aiohttp: ``request.raw_path``),
    which is also what to forward (``origin_form``). ``allow``: the open gates; their routes become ``passthrough``.

    llama-server compares paths exactly, after decoding them (``server_path``): ``/Completion`` and ``//completion`` get
    its 404. Forbidden and gated routes are found in other spellings too, because a proxy between llamaslot and
    llama-server might normalize them.
    """
    found = _classified(method.upper(), target)  # aiohttp's client sends methods in upper case too
    return replace(found, kind="passthrough") if allow and found.gate in allow else found


@functools.lru_cache(maxsize=256)
def _classified(method: str, target: str) -> Route:
    """As ``classify``, with all gates closed. Cached, because it takes 50 us."""
    path = server_path(target)
    found = None if method in _INERT else _refused(method, _mended(path)) or _find(method, path)
    return found or Route(method, path, "passthrough")


def _find(method: str, path: str) -> Route | None:
    """The table's line for a decoded path, compared as llama-server compares; None without one."""
    for verb in ("GET" if method == "HEAD" else method, "*"):
        if route := _EXACT.get((verb, path)):
            return route
        for route in _PATTERNS:
            if route.method == verb and _matches(route.path, path):
                return route
    return None


def _matches(pattern: str, path: str) -> bool:
    """True if ``path`` matches ``pattern``. At its end, ``/*`` matches a slash and anything after it. ``/:id`` matches
    a slash and any text without a slash, even none; one more slash may follow.
    """
    if pattern.endswith("/*"):
        return path.startswith(pattern[:-1])
    prefix = pattern.removesuffix(":id")
    return path.startswith(prefix) and "/" not in path[len(prefix) :].removesuffix("/")


def _refused(method: str, path: str) -> Route | None:
    """The forbidden or gated route with the normalized ``path``; None without one. The method does not matter, except
    that GET and HEAD match no route of POST.
    """
    for route in _REFUSED:
        if route.method == "POST" and method in ("GET", "HEAD"):
            continue
        line = route.path.removesuffix(":id").removesuffix("*")
        if path == line.rstrip("/") or (line.endswith("/") and path.startswith(line)):
            return route
    return None


def origin_form(target: str) -> str:
    """The path and query of a raw request target, without scheme, host and fragment: the target to send to
    llama-server.
    """
    target = target.partition("#")[0]
    if not target.startswith("/") and (found := re.match(r"https?://[^/?]*", target, re.IGNORECASE)):
        target = target[found.end() :]
    return target if target.startswith("/") else "/" + target


def server_path(target: str) -> str:
    """The decoded path of ``target``, as llama-server compares it with its routes.

    llama-server's HTTP library (cpp-httplib, ``Server::parse_request_line`` and ``decode_path_component``) cuts the
    target at ``#``, then at ``?``, and decodes ``%XX`` and ``%uXXXX`` once: ``/slots%2f0`` and ``/%u0073lots/0`` are
    ``/slots/0``. Invalid codes stay unchanged, and surrogates (``%ud800``) vanish. It resolves no ``..``, merges no
    slashes, and distinguishes case. Measured on xllamacpp 2026.10.11549.
    """
    path = origin_form(target).partition("?")[0]
    return _decode(path.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


_CODE = re.compile(rb"%u([0-9a-fA-F]{4})|%([0-9a-fA-F]{2})")


def _decode(path: bytes) -> bytes:
    def byte(match: re.Match[bytes]) -> bytes:
        if match[1] is None:
            return bytes([int(match[2], 16)])
        return chr(int(match[1], 16)).encode("utf-8", "ignore")  # a surrogate alone becomes nothing

    return _CODE.sub(byte, path)


def _mended(path: str) -> str:
    """The path as a proxy might normalize it: decoded repeatedly, without ``.``, ``..`` and double slashes, in lower
    case.
    """
    raw = path.encode("utf-8", "surrogateescape")
    for _ in range(8):
        raw = _decode(raw)
    text = raw.decode("utf-8", "replace").replace("\\", "/").lower()
    parts: list[str] = []
    for part in re.sub(r"[\x00-\x20\x7f]", "", text).split("/"):
        part = part.partition(";")[0]
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)
