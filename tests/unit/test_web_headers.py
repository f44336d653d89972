"""Which headers pass through."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from llamaslot.web.headers import allow_origin, to_client, to_server

ENDS_HERE = [
    "Connection", "Keep-Alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Proxy-Authorization",
]  # fmt: skip


class Upstream:
    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = CIMultiDict(headers)


@pytest.mark.parametrize("name", [*ENDS_HERE, "Host", "Content-Length", "Expect", "Content-Encoding"])
def test_what_belongs_to_the_clients_connection_ends_here(name: str) -> None:
    """In any spelling."""
    for spelling in (name, name.lower(), name.upper()):
        request = make_mocked_request("POST", "/", headers={spelling: "x", "X-Other": "kept"})
        assert to_server(request) == CIMultiDict({"X-Other": "kept"})


@pytest.mark.parametrize("name", [*ENDS_HERE, "Content-Length", "Server", "Date"])
def test_what_belongs_to_the_servers_connection_ends_here(name: str) -> None:
    """llamaslot writes its own length, server and date."""
    upstream = cast(Any, Upstream({name: "x", "X-Other": "kept"}))
    assert to_client(upstream) == CIMultiDict({"X-Other": "kept"})


def test_a_conversation_id_never_reaches_the_server() -> None:
    """It would let a generation survive its client."""
    request = make_mocked_request("POST", "/", headers={"X-Conversation-Id": "c"})
    assert not to_server(request)


def test_repeated_headers_stay_repeated() -> None:
    """Order and number are kept."""
    headers = CIMultiDict([("Accept", "a"), ("X", "1"), ("Accept", "b")])
    request = make_mocked_request("GET", "/", headers=headers)
    assert list(to_server(request).items()) == list(headers.items())


def test_a_body_written_anew_has_its_own_type_and_is_answered_readably() -> None:
    """Events are read in passing: no compression."""
    given = {"Content-Type": "text/plain", "Accept-Encoding": "gzip, br"}
    headers = to_server(make_mocked_request("POST", "/", headers=given), content_type="application/json")
    assert headers.getall("Content-Type") == ["application/json"]
    assert headers.getall("Accept-Encoding") == ["identity"]


@pytest.mark.parametrize(
    ("path", "given", "said", "expected"),
    [
        ("/v1/models", "http://page", None, "http://page"),
        ("/v1/models", None, None, None),
        ("/v1/models", "http://page", "http://only-this", "http://only-this"),
        ("/llamaslot/status", "http://page", None, None),
    ],
)
async def test_pages_of_any_origin_may_read_answers_of_llamaslots_own(
    path: str, given: str | None, said: str | None, expected: str | None
) -> None:
    """As llama-server says it; what llama-server itself has said stays; llamaslot's own pages are not for them."""
    request = make_mocked_request("GET", path, headers={"Origin": given} if given else {})
    response = web.Response(headers={"Access-Control-Allow-Origin": said} if said else {})
    await allow_origin(request, response)
    assert response.headers.get("Access-Control-Allow-Origin") == expected
