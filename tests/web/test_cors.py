"""Which web pages may use llamaslot from a browser."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from llamaslot.errors import Forbidden
from llamaslot.http.auth import Cors
from tests.support.inprocess import CHAT, NATIVE, Served, letters, served
from tests.support.keys import KeyFile

PAGE = "https://a.page"
ORIGIN = {"Origin": PAGE}
ASKS = {
    **ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, x-a",
}


def said(headers: object) -> dict[str, str]:
    assert hasattr(headers, "items")
    return {name: value for name, value in headers.items() if name.startswith("Access-Control-")}


async def every_kind(it: Served) -> list[dict[str, str]]:
    """What is said to a page with answers, early headers, refusals and what llama-server answers itself."""
    body = {"prompt": letters(1, 200), "n_predict": 2}
    told = []
    for method, path, sent in (
        ("POST", NATIVE, body),
        ("POST", NATIVE, {**body, "stream": True}),
        ("POST", "/infill", {"input_prefix": "x", "input_suffix": "", "n_predict": 1}),
        ("POST", NATIVE, {"prompt": 5}),
        ("POST", "/slots/0?action=erase", {}),
        ("GET", "/v1/models", None),
        ("GET", "/health", None),
    ):
        told.append(said((await it.send(method, path, body=sent, headers=ORIGIN)).headers))
    async with it.busy():
        request = it.session.post(it.url + NATIVE, json={**body, "stream": True}, headers=ORIGIN)
        async with request as stream:
            told.append(said(stream.headers))
            it.fake.go()
            await stream.read()
    return told


async def test_no_page_is_let_in_unless_configured(tmp_path: Path) -> None:
    """What llama-server says to every page ends here, its answer to OPTIONS included."""
    async with served(tmp_path, {"stream": {"keepalive_s": 0.02}}, slots=1) as it:
        assert all(told == {} for told in await every_kind(it))
        asked = await it.send("OPTIONS", CHAT, headers=ASKS)
        assert (asked.status, said(asked.headers)) == (200, {})
        assert said((await it.send("OPTIONS", CHAT, headers=ASKS, to=it.fake.url)).headers)


async def test_configured_pages_may_read_every_answer(tmp_path: Path) -> None:
    """Also early headers and errors; without a key they are asked for one as all are. Own pages are for none."""
    file = KeyFile(tmp_path / "keys.json")
    settings = {"stream": {"keepalive_s": 0.02}, "listen": {"cors": [PAGE, "http://b.page:81"]}}
    async with served(tmp_path, {**settings}, slots=1) as it:
        expected = {"Access-Control-Allow-Origin": PAGE, "Access-Control-Expose-Headers": "*"}
        assert all(told == expected for told in await every_kind(it))
        n_before = len(it.fake.sent(CHAT))
        asked = await it.send("OPTIONS", CHAT, headers=ASKS)
        assert len(it.fake.sent(CHAT)) == n_before
        own = [await it.send(method, "/llamaslot/status", headers=ASKS) for method in ("GET", "OPTIONS")]
        refused = await it.send("OPTIONS", CHAT, headers={**ASKS, "Origin": "https://c.page"})
    assert asked.status == 204
    assert said(asked.headers) == {
        **expected,
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "authorization, x-a",
        "Access-Control-Max-Age": "600",
    }
    assert [said(page.headers) for page in own] == [{}, {}]
    assert (refused.status, said(refused.headers)) == (403, {})
    assert "listen.cors" in refused.error["message"]
    async with served(
        tmp_path / "b", {"listen": {"cors": [PAGE]}, "auth": {"keys_file": str(file.path)}}, slots=1
    ) as it:
        refused = await it.send("POST", CHAT, body={}, headers=ORIGIN)
        assert (refused.status, said(refused.headers)) == (401, expected)
        assert (await it.send("OPTIONS", CHAT, headers=ASKS)).status == 204, (
            "a browser sends no key with that"
        )


@pytest.mark.parametrize(
    ("origins", "origin", "allowed", "vary"),
    [
        ([PAGE], PAGE, PAGE, "Origin"),
        ([PAGE], "https://A.page", "https://A.page", "Origin"),
        ([PAGE], "https://a.page.evil", None, "Origin"),
        ([PAGE], "http://a.page", None, "Origin"),
        ([PAGE], "null", None, "Origin"),
        ([PAGE], None, None, "Origin"),
        (["*"], "https://any.page", "*", None),
        (["*"], "null", "*", None),
        ([], PAGE, None, None),
    ],
)
async def test_which_origins_are_let_in(
    origins: Collection[str], origin: str | None, allowed: str | None, vary: str | None
) -> None:
    """Compared whole. Caches are told that answers differ."""
    request = make_mocked_request("GET", "/v1/models", headers={"Origin": origin} if origin else {})
    response = web.Response()
    Cors(origins).allow(request, response)
    assert response.headers.get("Access-Control-Allow-Origin") == allowed
    assert response.headers.get("Vary") == vary
    assert "Access-Control-Allow-Credentials" not in response.headers


def test_what_is_no_preflight_goes_its_way() -> None:
    """OPTIONS of a program, or of a page that asks nothing."""
    for method, headers in (("OPTIONS", ORIGIN), ("GET", ASKS), ("OPTIONS", {})):
        assert Cors([PAGE]).preflight(make_mocked_request(method, CHAT, headers=headers)) is None
    with pytest.raises(Forbidden):
        Cors([PAGE]).preflight(make_mocked_request("OPTIONS", CHAT, headers={**ASKS, "Origin": "null"}))
