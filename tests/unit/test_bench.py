"""``llamaslot bench``: workloads, what follows from the answers, and what is said when a server cannot be measured."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from llamaslot import cli
from llamaslot.bench.report import report
from llamaslot.bench.result import Request, Result, Run, Side, figures, load, rows, save, verdict
from llamaslot.bench.target import BenchError, ContextTooSmall, Target
from llamaslot.bench.workload import Measurement, Texts, Workload, chars_per_token, recorded, team

Answerer = Callable[[web.Request], Awaitable[web.StreamResponse]]
TEAM = {"users": 4, "turns": 3, "context": 2000, "question": 100, "answer": 20, "think_s": 1.0, "shared": 500}


# --- workloads


def test_a_team_has_contexts_of_several_lengths() -> None:
    """Half to one and a half times the mean; a seed gives the same team again."""
    it = team(**TEAM, seed=3)  # type: ignore[arg-type]
    firsts = sorted(its.turns[0].n_new + it.n_shared for its in it.conversations)
    assert (firsts[0], firsts[-1]) == (1000, 3000)
    assert (it.n_users, it.n_requests) == (4, 12)
    assert it == team(**TEAM, seed=3)  # type: ignore[arg-type]
    assert it != team(**TEAM, seed=4)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_ctx", [400, 1024, 2048, 1 << 20])
def test_a_workload_is_made_to_fit(n_ctx: int) -> None:
    """With room to spare, as lengths are estimates; what fits is left alone."""
    it = team(**TEAM, seed=1)  # type: ignore[arg-type]
    fitted = it.fitted(n_ctx)
    assert fitted.n_context <= n_ctx * 0.95
    assert fitted.n_requests == it.n_requests
    assert (fitted is it) == (n_ctx > 4000)


def test_a_context_that_the_answers_fill_is_refused() -> None:
    """Shorter texts would not help."""
    with pytest.raises(ValueError, match="fewer --turns"):
        team(**{**TEAM, "answer": 400}, seed=1).fitted(1000)  # type: ignore[arg-type]


def test_a_recorded_shape_has_its_conversations() -> None:
    """Two conversations of one user, told apart by their lengths; pauses are shortened; idle saves are no requests,
    and users have no names."""
    journal = [
        {"at": 1000.0, "user": "key:ada", "n_tokens": 10_000},
        {"at": 1003.0, "user": "key:ada", "n_tokens": 200},
        {"at": 1500.0, "user": "key:ada", "n_tokens": 10_500},
        {"at": 1501.0, "user": "key:bob", "n_tokens": 5000},
        {"at": 1502.0, "user": "", "n_tokens": 5000},
    ]
    it = recorded(reversed(journal), answer=50, longest_pause_s=10.0)
    assert [(its.user, [turn.n_new for turn in its.turns]) for its in it.conversations] == [
        ("user1", [9984, 500 - 50]),
        ("user1", [184]),
        ("user2", [4984]),
    ]
    assert [turn.after_s for its in it.conversations for turn in its.turns] == [0.0, 13.0, 3.0, 14.0]
    with pytest.raises(ValueError, match="no request"):
        recorded([{"at": 1.0, "user": "", "n_tokens": 9}], answer=1, longest_pause_s=1.0)


def test_texts_have_the_wanted_length(tmp_path: Path) -> None:
    """Made up, or from a folder, over and over if that is small; an empty folder is said."""
    (tmp_path / "a.py").write_text("print('hello')\n" * 100)
    for texts in (Texts(), Texts(tmp_path)):
        assert len(texts.take(5000, random.Random(1))) == 5000
        assert texts.take(50, random.Random(1)) != texts.take(50, random.Random(2))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="less than 1,000 characters"):
        Texts(tmp_path / "empty")


# --- what follows


def side(name: str, *requests: Request, n_counted: int | None = None) -> Side:
    return Side(name, "http://x/v1", "m", runs=[Run(10.0, list(requests), n_counted)])


def two_turns(user: str, wait_s: float, n_reused: int | None) -> list[Request]:
    return [
        Request(user, 1, 0.0, 2.0, 3.0, n_prompt=1000, n_reused=0, n_answer=11),
        Request(
            user, 2, 4.0, 4.0 + wait_s, 9.0, n_prompt=1110, n_reused=n_reused, n_answer=11, n_unlimited=1010
        ),
    ]


def test_the_figures_of_a_side() -> None:
    """Reuse of follow-ups against an unlimited cache, waits in order, and how far off the server's counter is."""
    it = side("a", *two_turns("u1", 1.0, 505), *two_turns("u2", 3.0, 1010), n_counted=2700)
    its = figures(it)
    assert (its.n_answered, its.n_prompt, its.n_reused, its.n_computed) == (4, 4220, 1515, 2705)
    assert its.follow_up_reuse == 0.75
    assert (its.first_s, its.follow_up_s) == ([2.0, 2.0], [1.0, 3.0])
    assert its.answer_per_s == 4.4
    assert its.unfairness == pytest.approx(2.5 / 2.0)
    assert its.disagreement == pytest.approx(2700 / 2705 - 1)
    assert verdict([it]) == []


def test_what_is_not_known_is_not_made_up() -> None:
    """Failed requests count as failed only; reuse that a server does not tell is no reuse of zero."""
    failed = Request("u1", 1, 0.0, end_s=1.0, error="503 no slot")
    it = side("a", failed, Request("u2", 1, 0.0, 1.0, 2.0, n_prompt=10))
    its = figures(it)
    assert (its.n_answered, its.n_failed, its.reuse, its.n_counted) == (1, 1, None, None)
    assert its.errors == {"503 no slot": 1}
    said = " ".join(verdict([it]))
    assert "1 request failed (50%): 503 no slot" in said
    assert "does not tell what it reused" in said
    assert all("?" in row.cells or row.cells for row in rows([it]))


def test_a_comparison_says_who_is_sooner(tmp_path: Path) -> None:
    """In the first lines; the result survives its file, and the report needs nothing from outside."""
    sides = [side("a", *two_turns("u1", 1.0, 1010)), side("<b>", *two_turns("u1", 2.0, 0), n_counted=99_000)]
    said = verdict(sides)
    assert "2.0 times sooner" in said[0]
    assert "100.0%" in said[2]
    assert "other clients used it" in said[-1]
    result = Result("words", "now", sides)
    save(result, path := tmp_path / "result.json")
    assert load(path) == result
    path.write_text("{}")
    with pytest.raises(ValueError, match="no result of llamaslot bench"):
        load(path)
    page = report(result)
    before, _, after = page.partition("<script>")
    own = before + after.partition("</script>")[2]  # without plotly's own text
    assert "https:" not in own
    assert "<b>" not in own.replace("<li><b>", "")
    assert own.count("plotly-graph-div") == 5


# --- servers


Serve = Callable[..., Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """A server with these routes; its address."""
    servers: list[TestServer] = []

    async def start(**routes: Any) -> str:
        app = web.Application()

        async def answer(request: web.Request) -> web.StreamResponse:
            found = routes.get(request.path.strip("/").replace("/", "_"))
            if found is None:
                return web.Response(status=404, text="none")
            if callable(found):
                result: web.StreamResponse = await found(request)
                return result
            status, body = found
            return web.json_response(body, status=status)

        app.router.add_route("*", "/{path:.*}", answer)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        return f"http://127.0.0.1:{server.port}"

    yield start
    for server in servers:
        await server.close()


def target(url: str, **more: Any) -> Target:
    return Target(url, name="it", **{"keys": (), "model": None, "timeout_s": 5.0, **more})


async def test_a_model_of_any_name(serve: Serve) -> None:
    """It is quoted where the size of its context is asked for."""

    async def props(request: web.Request) -> web.StreamResponse:
        n_ctx = 4096 if request.query == {"model": "a&b=c/d#e"} else 1
        return web.json_response({"default_generation_settings": {"n_ctx": n_ctx}})

    url = await serve(v1_models=(200, {"data": [{"id": "a&b=c/d#e"}]}), props=props)
    async with target(url) as it:
        await it.look()
        assert it.n_ctx == 4096


MODELS = (200, {"data": [{"id": "m", "max_model_len": 4096}]})


@pytest.mark.parametrize(
    ("models", "said"),
    [
        ((401, {"error": {"message": "no"}}), "a key is needed \\(--key\\)"),
        ((503, {"error": {"message": "Loading model"}}), "is not ready: Loading model"),
        ((404, {}), "should be an OpenAI base URL"),
        ((200, {"data": []}), "serves no model"),
        ((200, {"data": [{"id": "a"}, {"id": "b"}]}), "choose with --model: a, b"),
    ],
)
async def test_what_cannot_be_measured_is_said(serve: Serve, models: Any, said: str) -> None:
    """Before anything is asked."""
    async with target(await serve(v1_models=models)) as it:
        with pytest.raises(BenchError, match=said):
            await it.look()


async def test_an_address_with_nothing_there(unused_tcp_port: int) -> None:
    """Is said in one line."""
    async with target(f"127.0.0.1:{unused_tcp_port}") as it:
        with pytest.raises(BenchError, match="cannot be reached"):
            await it.look()
    with pytest.raises(BenchError, match="should be an address"):
        target("ftp://x")


def streamed(*events: str) -> Answerer:
    """Chats are answered with these events."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in (*events, "[DONE]"):
            await response.write(f"data: {event}\n\n".encode())
        return response

    return answer


async def test_reuse_is_taken_from_the_usage(serve: Serve) -> None:
    """As any OpenAI server tells it; a counter of vLLM is found, less what it did not compute."""
    usage = '{"prompt_tokens": 900, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 600}}'
    page = 'vllm:prompt_tokens_total{m="a"} 1000.0\nvllm:prompt_tokens_total{m="b"} 500\n'
    page += "vllm:prefix_cache_hits_total 300\n"

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(text=page)

    chat = streamed('{"choices": [{"delta": {"content": "Hi"}}]}', f'{{"choices": [], "usage": {usage}}}')
    url = await serve(v1_models=MODELS, v1_chat_completions=chat, metrics=metrics)
    async with target(url + "/v1/") as it:
        await it.look()
        assert (it.model, it.n_ctx) == ("m", 4096)
        assert await it.computed() == ("vllm:prompt_tokens_total", 1200)
        request = Request("u", 1, 0.0)
        assert await it.ask([{"role": "user", "content": "x"}], 5, request, 0.0) == "Hi"
        assert (request.n_prompt, request.n_reused, request.n_answer, request.error) == (900, 600, 2, "")
        assert request.first_s is not None


@pytest.mark.parametrize(
    ("chat", "error"),
    [
        ((503, {"error": {"message": "no slot became free"}}), "503 no slot became free"),
        (streamed('{"error": {"message": "it broke", "code": 500}}'), "it broke"),
        (streamed(), "the answer has no token"),
    ],
)
async def test_a_failed_request_is_told(serve: Serve, chat: Any, error: str) -> None:
    """And raises nothing; as a probe it ends the measurement."""
    async with target(await serve(v1_models=MODELS, v1_chat_completions=chat)) as it:
        await it.look()
        request = Request("u", 1, 0.0)
        await it.ask([{"role": "user", "content": "x"}], 5, request, 0.0)
        assert request.error == error
        with pytest.raises(BenchError, match="does not answer a chat"):
            await chars_per_token(it, Texts(), "salt")


@pytest.mark.parametrize(
    "error",
    [
        {"error": {"message": "exceeds", "type": "exceed_context_size_error", "n_ctx": 4096}},
        {"error": {"message": "This model's maximum context length is 4096 tokens."}},
    ],
)
async def test_a_prompt_that_does_not_fit_ends_the_run(serve: Serve, error: Any) -> None:
    """With the size of the context, so that it can begin again with shorter texts."""
    async with target(await serve(v1_models=MODELS, v1_chat_completions=(400, error))) as it:
        await it.look()
        workload: Workload = team(**{**TEAM, "think_s": 0.0}, seed=1)  # type: ignore[arg-type]
        answers: list[Request] = []
        run = Measurement(it, workload, Texts(), chars=4.0, salt="s", on_answer=answers.append)
        with pytest.raises(ContextTooSmall, match="4096"):
            async with asyncio.timeout(10):
                await run.run()
        assert answers == []


def test_faults_of_the_command_are_one_line(tmp_path: Path) -> None:
    """Exit code 2, as for every fault that the operator can mend."""
    shape = tmp_path / "shape.json"
    shape.write_text('{"decisions": []}')
    for words, said in (
        (["127.0.0.1:9"], "cannot be reached"),
        (["127.0.0.1:9", "--shape", str(shape)], "is no journal"),
        (["127.0.0.1:9", "--context", "100"], "cannot be reached"),  # its --shared is 50
        (["127.0.0.1:9", "--context", "100", "--shared", "51"], "--shared 51: at most 50"),
        (["127.0.0.1:9", "--vs", str(shape)], "no result of llamaslot bench"),
    ):
        result = CliRunner().invoke(cli.main, ["bench", *words])
        assert result.exit_code == 2
        assert said in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_an_earlier_result_of_another_workload_is_compared_with_a_word_of_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the report too."""
    add: Any = import_module("llamaslot.cli.bench")._add_earlier
    same, other = (Result(words, "now", [side("a")]) for words in ("8 users", "9 users"))
    for earlier, is_said in ((same, False), (other, True)):
        result = Result("8 users", "now", [side("b")])
        add(result, earlier)
        assert [its.name for its in result.sides] == ["b", "a"]
        assert ("another workload: 9 users" in result.workload) is is_said
        assert ("another workload" in capsys.readouterr().err) is is_said
