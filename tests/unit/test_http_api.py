"""What docs/http-api.md says: every route, every header, every page and every status that llamaslot has."""

from __future__ import annotations

import inspect
import re

from llamaslot import errors
from llamaslot.formats.comments import Comment
from llamaslot.http.openapi import PATHS
from llamaslot.llama.routes import ROUTES, RouteKind
from tests.support.source import SOURCE
from tests.unit.test_docs import GAP, in_code, page, rows, section

PAGE = page("docs/http-api.md")
WHAT: dict[RouteKind, str] = {
    "completion": "completion", "exclusive": "exclusive", "passthrough": "passed through", "own": "own",
    "forbidden": "refused", "gated": "refused",
}  # fmt: skip


def listed_routes() -> dict[tuple[str, str], tuple[str, str]]:
    """What is done with each method and path, and the notes of its row; each is listed once."""
    listed = {}
    for what, routes, notes in rows(section(PAGE, "llama-server's routes")):
        for group in routes.split("; "):
            method = group.partition(" ")[0]
            for path in in_code(group):
                assert (method, path) not in listed
                listed[method, path] = what, notes
    return listed


def test_every_route_is_listed() -> None:
    """With what is done with it, and no other."""
    known = {
        ("any" if route.method == "*" else route.method, route.path): WHAT[route.kind] for route in ROUTES
    }
    assert {route: what for route, (what, _) in listed_routes().items()} == known


def test_what_is_guarded_says_what_lets_it_through() -> None:
    """The name that ``passthrough.allow`` takes; the others that are refused say that nothing does."""
    listed = listed_routes()
    for route in ROUTES:
        _, note = listed["any" if route.method == "*" else route.method, route.path]
        if route.kind == "gated":
            assert f"Allowed by `{route.gate}`" in note
        if route.kind == "forbidden":
            assert note.startswith("Always: ")


def test_every_header_of_its_own_is_listed() -> None:
    """Those that are written anywhere in the source, and no others."""
    written = set()
    for path in SOURCE.rglob("*.py"):
        written |= set(re.findall(r'"(x-(?:llamaslot-[a-z-]*[a-z]|request-id))"', path.read_text()))
    listed = {name for row in rows(section(PAGE, "Headers that llamaslot adds")) for name in in_code(row[0])}
    assert {name for name in listed if name.startswith("x-")} == written - {"x-llamaslot-user"}
    assert "`x-llamaslot-user`" in PAGE


def test_every_page_of_its_own_is_listed() -> None:
    """But for ``/health``, which is llama-server's route."""
    listed = [in_code(row[0])[0] for row in rows(section(PAGE, "llamaslot's own pages"))]
    assert sorted(listed) == sorted(path for path in PATHS if path.startswith("/llamaslot/"))


def test_every_status_and_type_of_an_error_is_listed() -> None:
    """Of those that a client can see."""
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]
    known = {
        (str(kind.status), f"`{kind.type}`") for kind in kinds if issubclass(kind, errors.LlamaslotError)
    }
    told = {
        (status, kind)
        for kind, when in rows(section(PAGE, "Errors"))
        for status in re.findall(r"\b([45]\d\d): ", when)
    }
    assert known <= told


def test_every_comment_is_listed() -> None:
    """What a waiting stream is told, with any numbers in it, and nothing that it is not told."""
    text = " ".join(PAGE.partition("### Comments")[2].partition("## ")[0].split())
    shown = {re.sub(r"\d+", GAP, code[2:]) for code in in_code(text) if code[:2] == ": "}
    assert shown == {re.sub(r"\{\w+\}", GAP, comment) for comment in Comment}
