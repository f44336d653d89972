"""Who may come in, and as whom; what is open; keys that come and go."""

from __future__ import annotations

import hmac
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from llamaslot.config.sections import AuthConfig
from llamaslot.errors import BadRequest, Forbidden, Unauthorized
from llamaslot.http.auth import Authenticator, Keyring
from llamaslot.scheduling.request import User
from tests.support.keys import KeyFile

ADMIN_KEY = "an-operators-own-key"


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    file = KeyFile(tmp_path / "keys.json", "ada", "bob")
    file.add("eve", is_admin=True, max_running=2, max_waiting=0)
    return file


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def request(
    path: str = "/v1/models", method: str = "GET", remote: str | None = "10.0.0.7", **headers: str
) -> web.Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request(method, path, headers=named).clone(remote=remote or "")


def authenticator(file: KeyFile | None = None, **settings: Any) -> Authenticator:
    return Authenticator(AuthConfig.model_validate({"keys_file": file.path if file else None, **settings}))


# --- whose a request is


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer {ada}"}, "ada"),
        ({"Authorization": "bearer  {ada}"}, "ada"),
        ({"Authorization": "{ada}"}, "ada"),
        ({"x-api-key": "{bob}"}, "bob"),
        ({"api-key": "{bob}"}, "bob"),
        ({"Authorization": "Bearer {ada}", "x-api-key": "wrong"}, "ada"),
        ({"Authorization": "Bearer ", "x-api-key": "{bob}"}, "bob"),
        ({"Authorization": "Basic eDp5", "x-api-key": "{bob}"}, "bob"),
        ({"Authorization": "Bearer {ada}", "x-llamaslot-user": "bob"}, "ada"),
    ],
)
def test_a_user_is_its_key(file: KeyFile, headers: dict[str, str], name: str) -> None:
    """Wherever the SDKs put it; with a key, nothing else that a client says of itself counts."""
    named = {header: value.format(**file.keys) for header, value in headers.items()}
    assert authenticator(file).authenticate(request(**named)) == User(f"key:{name}")


def test_limits_come_with_the_key(file: KeyFile) -> None:
    """As the file has them."""
    assert authenticator(file).authenticate(request(x_api_key=file.keys["eve"])) == User(
        "key:eve", 2, 0, True
    )


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer wrong", "x-api-key": "{ada}"},
        {"x-api-key": "{ada}x"},
        {"Authorization": "Basic {ada}"},
        {"Authorization": "Bearer"},
        {"x-llamaslot-user": "ada"},
    ],
)
def test_without_a_right_key_nobody_comes_in(file: KeyFile, headers: dict[str, str]) -> None:
    """Of two keys the first counts, as at llama-server."""
    named = {header: value.format(**file.keys) for header, value in headers.items()}
    with pytest.raises(Unauthorized, match="Invalid API Key"):
        authenticator(file).authenticate(request(**named))


def test_how_long_it_takes_tells_nothing_of_the_admin_key(
    file: KeyFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared to its end; the keys of clients are found by their hashes."""
    its, compared, real = authenticator(file, admin_key=ADMIN_KEY), list[str](), hmac.compare_digest

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert its.authenticate(request("/llamaslot/status", x_api_key=ADMIN_KEY)).is_admin
    with pytest.raises(Unauthorized):
        its.authenticate(request("/llamaslot/status", x_api_key="wrong"))
    assert len(compared) == 2


def test_anonymous_clients_beside_keys(file: KeyFile) -> None:
    """Who has no key comes in if the operator wants that; a wrong key is never taken for none."""
    its = authenticator(file, allow_anonymous=True)
    assert its.authenticate(request()) == User("at:10.0.0.7")
    assert its.authenticate(request(x_api_key=file.keys["ada"])).id == "key:ada"
    with pytest.raises(Unauthorized):
        its.authenticate(request(x_api_key="wrong"))


def test_without_keys_any_key_is_as_good_as_none() -> None:
    """Most clients must send some."""
    assert authenticator().authenticate(request(authorization="Bearer anything")) == User("at:10.0.0.7")


@pytest.mark.parametrize(
    ("remote", "id_"),
    [("10.0.0.7", "at:10.0.0.7"), ("::ffff:10.0.0.7", "at:10.0.0.7"), ("fe80::1%eth0", "at:fe80::1%eth0")],
)
def test_without_a_name_a_user_is_an_address(remote: str, id_: str) -> None:
    """The same over IPv6."""
    assert authenticator().authenticate(request(remote=remote)).id == id_


def test_a_user_may_be_named() -> None:
    """By a program that asks for several people; a name that is none is said to be so."""
    assert (
        authenticator().authenticate(request(x_llamaslot_user="ada@lab.example")).id
        == "named:ada@lab.example"
    )
    for name in ("a b", "-", "x" * 65, "\u00e4", "key:ada"):
        with pytest.raises(BadRequest, match="x-llamaslot-user should be"):
            authenticator().authenticate(request(x_llamaslot_user=name))


# --- what is open


@pytest.mark.parametrize(
    "path",
    ["/health", "/v1/health", "/", "/index.html", "/sw.js", "/favicon.ico", "/manifest.webmanifest",
     "/_app/version.json", "/_app/immutable/assets/bundle.DeU5_J36.css", "/pwa-192x192.png", "/he%61lth"],
)  # fmt: skip
def test_what_llama_server_leaves_open_is_open(file: KeyFile, path: str) -> None:
    """Health and the files of the web UI, to read; a wrong key does not matter there."""
    for headers in ({}, {"x-api-key": "wrong"}):
        for method in ("GET", "HEAD"):
            assert authenticator(file).authenticate(request(path, method, **headers)).id == "at:10.0.0.7"
    with pytest.raises(Unauthorized):
        authenticator(file).authenticate(request(path, "POST"))


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/props", "/slots", "/metrics", "/nothing", "/health/", "//health", "/_app/../slots",
     "/_app/", "/_app//x", "/_app/%2e%2e/slots", "/v1/x.json", "/models/x.js", "/tools", "/slots/0.png"],
)  # fmt: skip
def test_all_else_needs_a_key(file: KeyFile, path: str) -> None:
    """Under whatever spelling."""
    with pytest.raises(Unauthorized):
        authenticator(file).authenticate(request(path))


def test_options_is_open(file: KeyFile) -> None:
    """A browser asks it without a key; but not of llamaslot's own pages."""
    assert authenticator(file).authenticate(request("/v1/chat/completions", "OPTIONS"))
    with pytest.raises(Unauthorized):
        authenticator(file).authenticate(request("/llamaslot/status", "OPTIONS"))


# --- llamaslot's own pages

PAGE = "/llamaslot/status"


def test_own_pages_are_for_admins(file: KeyFile) -> None:
    """Other keys are told what to do."""
    its = authenticator(file, allow_anonymous=True)
    assert its.authenticate(request(PAGE, x_api_key=file.keys["eve"])).id == "key:eve"
    with pytest.raises(Forbidden, match="llamaslot keys add NAME --admin"):
        its.authenticate(request(PAGE, x_api_key=file.keys["ada"]))
    for headers in ({}, {"x-api-key": "wrong"}):
        with pytest.raises(Unauthorized):
            its.authenticate(request("/%6clamaslot/status", remote="127.0.0.1", **headers))


@pytest.mark.parametrize("has_keys", [False, True])
def test_the_admin_key_opens_own_pages_only(file: KeyFile, tmp_path: Path, has_keys: bool) -> None:
    """It may come from a file."""
    (tmp_path / "admin").write_text(ADMIN_KEY + "\n")
    its = authenticator(file if has_keys else None, admin_key_file=tmp_path / "admin")
    assert its.authenticate(request(PAGE, authorization=f"Bearer {ADMIN_KEY}")).is_admin
    for headers in ({}, {"x-api-key": ADMIN_KEY + "x"}):
        with pytest.raises(Unauthorized):
            its.authenticate(request(PAGE, remote="127.0.0.1", **headers))
    if has_keys:
        with pytest.raises(Unauthorized):
            its.authenticate(request(authorization=f"Bearer {ADMIN_KEY}"))
        with pytest.raises(Forbidden):
            its.authenticate(request(PAGE, x_api_key=file.keys["ada"]))


def test_without_any_key_own_pages_are_for_this_machine() -> None:
    """Others are told what to do."""
    its = authenticator(allow_anonymous=True)
    for remote in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert its.authenticate(request(PAGE, remote=remote)).is_admin
    with pytest.raises(Forbidden, match=r"auth\.admin_key_file"):
        its.authenticate(request(PAGE))


# --- changes while it runs


def test_keys_come_and_go_while_it_runs(file: KeyFile) -> None:
    """Looked at once a second at most."""
    clock = Clock()
    ring = Keyring(file.path, clock)
    assert ring.find("\udcff") is None, "bytes that are no text"
    carl = file.add("carl")
    file.remove("ada")
    assert (ring.find(carl), ring.find(file.keys["ada"])) == (None, User("key:ada"))
    clock.now = 1.0
    assert (ring.find(carl), ring.find(file.keys["ada"])) == (User("key:carl"), None)


def test_a_file_whose_owner_or_mode_is_mended_is_read(file: KeyFile) -> None:
    """Without a change of what is in it."""
    clock = Clock()
    ring = Keyring(file.path, clock)
    carl = file.add("carl")
    file.path.chmod(0o666)
    clock.now = 1.0
    assert ring.find(carl) is None
    file.path.chmod(0o600)
    clock.now = 2.0
    assert ring.find(carl) == User("key:carl")


@pytest.mark.parametrize("how", ["cut off", "emptied", "removed", "open to all"])
def test_a_broken_file_changes_nothing(file: KeyFile, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """The keys read last stay in force; it is said once, and mended by the next good file."""
    clock = Clock()
    ring = Keyring(file.path, clock)
    whole = file.path.read_bytes()
    match how:
        case "cut off":
            file.path.write_bytes(whole[:-20])
        case "emptied":
            file.path.write_bytes(b"")
        case "removed":
            file.path.unlink()
        case _:
            file.path.write_bytes(whole + b"\n")
            file.path.chmod(0o666)
    for clock.now in (1.0, 2.0, 3.0):
        assert ring.find(file.keys["ada"]) == User("key:ada")
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 1
    assert "stay in force" in caplog.text
    caplog.clear()
    file.path.unlink(missing_ok=True)
    file.path.write_bytes(whole.replace(b'"ada"', b'"zoe"'))
    clock.now = 4.0
    assert ring.find(file.keys["ada"]) == User("key:zoe")
