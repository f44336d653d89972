"""The table of llama-server's routes, and that nothing gets past it under another spelling."""

from __future__ import annotations

from typing import get_args

import pytest

from llamaslot.llama.routes import ROUTES, Gate, Route, RouteKind, classify, origin_form, server_path


@pytest.mark.parametrize(
    ("path", "its_format"),
    [
        ("/v1/chat/completions", "chat"),
        ("/chat/completions", "chat"),
        ("/v1/completions", "openai-completion"),
        ("/completions", "native-completion"),
        ("/completion", "native-completion"),
    ],
)
def test_completions_get_the_full_path_in_their_own_format(path: str, its_format: str) -> None:
    """Without /v1, /completions speaks llama-server's native format."""
    route = classify("POST", path)
    assert (route.kind, route.format) == ("completion", its_format)


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("POST", "/infill", "completion"),
        ("POST", "/embedding", "exclusive"),
        ("POST", "/embeddings", "exclusive"),
        ("POST", "/v1/embeddings", "exclusive"),
        ("POST", "/rerank", "exclusive"),
        ("POST", "/reranking", "exclusive"),
        ("POST", "/v1/rerank", "exclusive"),
        ("POST", "/v1/reranking", "exclusive"),
        ("POST", "/v1/audio/transcriptions", "exclusive"),
        ("POST", "/v1/messages?beta=true", "completion"),
        ("POST", "/v1/messages/count_tokens", "passthrough"),
        ("POST", "/v1/responses/input_tokens", "passthrough"),
        ("GET", "/health", "own"),
        ("HEAD", "/v1/health", "own"),
        ("POST", "/health", "passthrough"),
        ("GET", "/llamaslot/metrics", "own"),
        ("GET", "/slots", "passthrough"),
        ("POST", "/slots", "forbidden"),
        ("POST", "/slots/3?action=save", "forbidden"),
        ("DELETE", "/slots/3", "forbidden"),
        ("POST", "/predict", "forbidden"),
        ("GET", "/props", "passthrough"),
        ("POST", "/props", "gated"),
        ("GET", "/lora-adapters", "passthrough"),
        ("POST", "/lora-adapters", "gated"),
        ("GET", "/models", "passthrough"),
        ("GET", "/models/sse", "passthrough"),
        ("POST", "/models/load", "gated"),
        ("DELETE", "/models", "gated"),
        ("GET", "/tools", "gated"),
        ("POST", "/tools", "gated"),
        ("GET", "/cors-proxy?url=http://10.0.0.1/", "gated"),
        ("HEAD", "/cors-proxy", "gated"),
    ],
)
def test_every_kind_of_route_is_told_apart(method: str, target: str, kind: str) -> None:
    """A route's kind depends on its method; what only reads is let through, except what reaches out."""
    route = classify(method, target)
    assert route.kind == kind
    assert route in ROUTES or kind == "passthrough"


@pytest.mark.parametrize(
    "target", ["/nope", "/v1/completion", "/_app/version.json", "/v1/chat/completions/x", "/"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_path_passes_so_that_llama_server_answers_itself(method: str, target: str) -> None:
    """Its own 404, and the files of its web UI."""
    assert classify(method, target).kind == "passthrough"


@pytest.mark.parametrize(
    "target", ["/Completion", "//completion", "/completion/", "/v1//chat/completions", "/completion%20"]
)
def test_a_path_that_llama_server_would_not_take_is_no_completion(target: str) -> None:
    """It compares exactly: such a request gets its 404, and no slot is prepared for it."""
    route = classify("POST", target)
    assert route.kind == "passthrough"
    assert route not in ROUTES


def test_an_encoded_completion_is_a_completion() -> None:
    """llama-server decodes before it routes, so this takes a slot."""
    assert classify("POST", "/v1%2Fchat/%63ompletions?x=1").path == "/v1/chat/completions"


@pytest.mark.parametrize(
    "target",
    [
        # llama-server itself takes these for /slots/0
        "/slots/0",
        "/slots/0/",
        "/slots/",
        "/slots/-1",
        "/slots/0x;y",
        "/%73lots/0?action=erase",
        "/slots%2f0",
        "/slots%2F0",
        "/slots/%30",
        "/%u0073lots/0",
        "/slots%u002f0",
        "/sl%ud800ots/0",
        "/slots/0%00",
        "/slots/0%3faction=erase",
        "/slots/0#x",
        "http://127.0.0.1:8080/slots/0",
        "slots/0",
        # a proxy in between that mends paths would make /slots/0 of these
        "//slots/0",
        "/slots//0",
        "/x/../slots/0",
        "/./slots/./0",
        "/%2e%2e/slots/0",
        "/%2573lots/0",
        "/%252573lots/0",
        "/SLOTS/0",
        "/slots\\0",
        "/slots%5c0",
        "/slots;x/0",
        "/ slots/0",
        "/%09slots/0",
        "/slots/0/x",
    ],
)
@pytest.mark.parametrize("method", ["POST", "post", "PUT"])
def test_no_spelling_of_a_slot_action_gets_through(method: str, target: str) -> None:
    """Neither one that llama-server decodes, nor one that a rewriting proxy could mend."""
    assert classify(method, target).kind == "forbidden"


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("POST", "/p%72ops"),
        ("POST", "//props"),
        ("POST", "/props/"),
        ("POST", "/lora%2dadapters"),
        ("POST", "/v1/../models/load"),
        ("POST", "/models%2funload"),
        ("GET", "/TOOLS"),
        ("GET", "/cors%2Dproxy?url=x"),
        ("GET", "//cors-proxy/"),
    ],
)
def test_no_spelling_of_a_gated_route_gets_through(method: str, target: str) -> None:
    """The gates hold under every spelling, too."""
    assert classify(method, target).kind == "gated"


@pytest.mark.parametrize("target", ["/slots/0", "/tools", "/v1/chat/completions"])
def test_a_preflight_passes(target: str) -> None:
    """llama-server answers OPTIONS before it looks at the path; browsers send no key with it."""
    assert classify("OPTIONS", target).kind == "passthrough"


@pytest.mark.parametrize(
    ("method", "target", "gate"),
    [
        ("POST", "/props", "POST /props"),
        ("POST", "/lora-adapters", "/lora-adapters"),
        ("POST", "/models/unload", "/models"),
        ("GET", "/tools", "/tools"),
        ("POST", "/cors-proxy", "/cors-proxy"),
    ],
)
def test_an_open_gate_lets_its_routes_through_and_no_other(method: str, target: str, gate: str) -> None:
    """passthrough.allow names gates; slot actions have none."""
    assert classify(method, target, (gate,)).kind == "passthrough"
    assert classify(method, target, tuple(set(get_args(Gate)) - {gate})).kind == "gated"
    assert classify("POST", "/slots/0", get_args(Gate)).kind == "forbidden"


def test_a_refusal_says_what_to_do() -> None:
    """The message of the 403 names the gate, or whose the slots are."""
    assert "'/tools' to passthrough.allow" in classify("POST", "/tools").refusal
    assert "belong to llamaslot" in classify("POST", "/slots/1").refusal
    assert "/predict" in classify("POST", "/predict").refusal


def test_the_gates_are_those_of_the_configuration() -> None:
    """Every gate in the table can be opened by the configuration, and the configuration names no other."""
    assert set(get_args(Gate)) == {route.gate for route in ROUTES if route.gate}


def test_the_table_is_consistent() -> None:
    """Each line is there once; formats are the completions', and gates the gated ones'."""
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)
    for route in ROUTES:
        assert route.kind in get_args(RouteKind)
        counts = route.path.endswith("_tokens")
        assert (route.format is not None) == (route.kind == "completion" or counts)
        assert (route.gate is not None) == (route.kind == "gated")


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_each_line_of_the_table_is_found(route: Route) -> None:
    """A concrete path of each line is classified as that line says."""
    method = "PATCH" if route.method == "*" else route.method
    found = classify(method, route.path.replace("/*", "/x/y").replace(":id", "7"))
    assert (found.kind, found.format) == (route.kind, route.format)


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/a?b#c", "/a"),
        ("/a#b?c", "/a"),
        ("/a%3fb", "/a?b"),
        ("/a+b", "/a+b"),
        ("/100%", "/100%"),
        ("/%zz%4", "/%zz%4"),
        ("/%%41", "/%A"),
        ("/%u00e9%C3%A9", "/éé"),
        ("/%u12", "/%u12"),
        ("/%2541", "/%41"),
        ("/\udcff", "/\udcff"),
        ("HTTPS://host:1/a", "/a"),
        ("http://host", "/"),
    ],
)
def test_paths_are_decoded_once_as_llama_server_does(target: str, path: str) -> None:
    """Codes that are none stay; nothing is normalised."""
    assert server_path(target) == path


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        ("/a%2Fb?c=%41", "/a%2Fb?c=%41"),
        ("http://host/a?b", "/a?b"),
        ("/a?b#c", "/a?b"),
        ("http://host?b", "/?b"),
        ("a", "/a"),
    ],
)
def test_what_is_sent_on_is_what_was_classified(target: str, sent: str) -> None:
    """The path and query stay byte for byte; scheme, host and fragment go."""
    assert origin_form(target) == sent
    assert server_path(origin_form(target)) == server_path(target)
