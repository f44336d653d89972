"""Which headers pass through."""

from __future__ import annotations

from typing import Any, cast

import pytest
from aiohttp.test_utils import make_mocked_request
from multidict import CIMultiDict

from llamaslot.http.forwarded_headers import to_client, to_server

ENDS_HERE = [
    "Connection", "Keep-Alive", "TE", "Trailer", "Transfer-Encoding", "Upgrade", "Proxy-Authorization",
    "Proxy-Authenticate", "Proxy-Connection",
]  # fmt: skip


class Upstream:
    def __init__(self, headers: dict[str, str]) -> None:
        self.headers = CIMultiDict(headers)


@pytest.mark.parametrize(
    "name", [*ENDS_HERE, "Host", "Content-Length", "Expect", "Content-Encoding", "Range", "If-Range"]
)
def test_what_belongs_to_the_clients_connection_ends_here(name: str) -> None:
    """In any spelling. An answer that was computed is sent whole."""
    for spelling in (name, name.lower(), name.upper()):
        request = make_mocked_request("POST", "/", headers={spelling: "x", "X-Other": "kept"})
        assert to_server(request) == CIMultiDict({"X-Other": "kept"})


@pytest.mark.parametrize(
    "name", ["Authorization", "X-Api-Key", "Api-Key", "X-Llamaslot-User", "X-Llamaslot-Any"]
)
def test_what_is_said_to_llamaslot_ends_here(name: str) -> None:
    """Keys above all: llama-server gets the one that the configuration has for it."""
    for spelling in (name, name.lower(), name.upper()):
        request = make_mocked_request("POST", "/", headers={spelling: "x", "Cookie": "kept"})
        assert to_server(request) == CIMultiDict({"Cookie": "kept"})


@pytest.mark.parametrize("name", ["Access-Control-Allow-Origin", "access-control-allow-credentials"])
def test_what_llama_server_says_to_web_pages_ends_here(name: str) -> None:
    """It lets in every page; that is for the operator to decide."""
    assert to_client(cast(Any, Upstream({name: "*", "X-Other": "kept"}))) == CIMultiDict({"X-Other": "kept"})


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
