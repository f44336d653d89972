"""The same handler under several names, and a model under any: one context for all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import make_mocked_request

from llamaslot.http.passthrough import named_model
from tests.support.inprocess import CHAT, NATIVE, TEXT, letters, served

SAID = letters(1, 600)
MESSAGES, RESPONSES, INFILL = "/v1/messages", "/v1/responses", "/infill"


def body(path: str, text: str = SAID) -> dict[str, Any]:
    """A request of four tokens."""
    if path in (TEXT, NATIVE, "/completions"):
        return {"prompt": text, "max_tokens": 4}
    if path == INFILL:
        return {"input_prefix": text, "input_suffix": "", "n_predict": 4}
    if path in (RESPONSES, "/responses"):
        return {"input": text, "max_output_tokens": 4}
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4}


@pytest.mark.parametrize(
    ("path", "alias"),
    [
        (CHAT, "/chat/completions"),
        (CHAT, "/api/chat"),
        (NATIVE, "/completions"),
        (RESPONSES, "/responses"),
    ],
)
async def test_what_one_name_has_computed_is_found_under_the_other(
    tmp_path: Path, path: str, alias: str
) -> None:
    """The answer is in the words of the route, as llama-server gives it there."""
    async with served(tmp_path, slots=3) as it:
        it.fake.missing.clear()
        first = await it.post(path, body(path))
        await it.ask(letters(2, 500))
        again = await it.post(alias, body(alias))
        assert (again.slot, again.source) == (first.slot, "resident")
        assert again.n_reused is not None
        assert again.n_reused >= 599
        assert again.json.keys() == first.json.keys()
        assert it.fake.sent(alias)[-1].landed == [again.slot]


async def test_a_route_of_another_build_is_that_builds_404(tmp_path: Path) -> None:
    """Nothing is rendered, saved or computed for it. It is asked for once, and once more after a restart."""
    async with served(tmp_path, {"prefill": {"chunk_threshold_s": 0}}, slots=1) as it:
        kept = await it.ask(SAID)
        n_before = len(it.fake.sent(NATIVE))
        for _ in range(2):
            answer = await it.post("/api/chat", body(CHAT, letters(3, 900)))
            direct = await it.post("/api/chat", body(CHAT), to=it.fake.url)
            assert (answer.status, answer.json) == (direct.status, direct.json)
            assert answer.status == 404
            assert [seen.body for seen in it.fake.sent("/api/chat")].count({}) == 1
        assert it.fake.sent("/apply-template") == []
        assert len(it.fake.sent(NATIVE)) == n_before
        assert (await it.ask(SAID + "more")).slot == kept.slot
        it.fake.missing.clear()
        await it.fake.restart()
        assert (await it.post("/api/chat", body(CHAT))).status == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/tags"), ("POST", "/api/show")])
async def test_what_only_tells_passes(tmp_path: Path, method: str, path: str) -> None:
    """404 here."""
    async with served(tmp_path) as it:
        sent: dict[str, Any] | None = {} if method == "POST" else None
        answer = await it.send(method, path, body=sent)
        direct = await it.send(method, path, body=sent, to=it.fake.url)
    assert (answer.status, answer.raw) == (direct.status, direct.raw)
    assert answer.status == 404


@pytest.mark.parametrize("path", [CHAT, TEXT, NATIVE, MESSAGES, RESPONSES, INFILL])
@pytest.mark.parametrize("stream", [True, False])
async def test_any_model_is_the_one_that_runs(tmp_path: Path, path: str, stream: bool) -> None:
    """As for llama-server, whatever a client calls it: its context is the same one."""
    async with served(tmp_path, slots=3) as it:
        first = await it.post(path, {**body(path), "model": "claude-sonnet-4-5", "stream": stream})
        await it.ask(letters(2, 500))
        for model in ("gpt-4o", "", None, "no/such:model@1"):
            answer = await it.post(path, {**body(path), "model": model, "stream": stream})
            assert answer.status == 200
            assert answer.slot == first.slot
            # What tells at its end only what was reused is told in advance what is expected.
            assert answer.told.get("x-llamaslot-source", "resident") == "resident"
            assert it.fake.sent(path)[-1].body["model"] == model


FIELD = b'--x\r\nContent-Disposition: form-data; name="model"\r\n'


@pytest.mark.parametrize(
    ("type_", "raw", "model"),
    [
        ("application/json", b'{"model": "a"}', "a"),
        ("application/json", b"[" + b"[]," * 1_100_000 + b"1]", None),  # too many parts to be parsed
        ("text/plain", b'{"model": "a"', None),
        ("multipart/form-data; boundary=x", FIELD + b"\r\na\r\n--x--", "a"),
        ("multipart/form-data; boundary=x", FIELD + b"Content-Type: text/plain\r\n\r\na\r\n--x--", "a"),
        ("multipart/form-data; boundary=x", b"name=model\r\n" * 200_000, None),  # without quadratic time
    ],
)
def test_the_model_that_a_body_names(type_: str, raw: bytes, model: str | None) -> None:
    """JSON or a form. A body that no server accepts names none, and holds up nothing."""
    request = make_mocked_request("POST", "/v1/embeddings", headers={"Content-Type": type_})
    assert named_model(request, raw) == model
