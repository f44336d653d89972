"""``llamaslot run`` in front of the real llama.cpp, under a stand-in for llama-swap."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path

import aiohttp
import pytest

from tests.support import models
from tests.support.figures import Figure
from tests.support.forked import LLAMASLOT, forked
from tests.support.inprocess import letters
from tests.support.leftovers import nothing_left
from tests.support.supervised import CHAT, ENGINE, Supervised, tagged

__all__ = ["nothing_left"]
pytestmark = pytest.mark.real

Messages = list[dict[str, str]]


def question(seed: int, n: int = 6000) -> Messages:
    return [{"role": "user", "content": letters(seed, n)}]


async def follow_up(it: Supervised, messages: Messages, seed: int) -> tuple[int, int]:
    """Ask on. Returns prompt tokens, and those that the server has computed for it."""
    before = await it.computed()
    answer = await it.chat(messages)
    n_prompt = answer["usage"]["prompt_tokens"]
    n_computed = round(await it.computed() - before)
    said = answer["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": letters(seed, 40)}]
    return n_prompt, n_computed


def saved(store: Path) -> list[Path]:
    """The parts of a store that have a snapshot."""
    return sorted({file.parent for file in store.glob("*/ls-*.json")})


async def none_left(tag: str) -> None:
    """Nothing of a command is alive any more; what ends asynchronously gets the time that llama-swap gives."""
    async with asyncio.timeout(10):
        while tagged(tag):  # noqa: ASYNC110 - no event comes for it
            await asyncio.sleep(0.05)


async def test_two_models_in_turn_keep_their_conversations(tmp_path: Path, figure: Figure) -> None:
    """Each swap ends one with all its processes and starts the other; follow-ups find their context on disk."""
    store = tmp_path / "store"
    swapped = [Supervised.of(models.dense(tmp_path, seed), store) for seed in (1, 2)]
    talks = {(model, user): question(10 * model + user) for model in (0, 1) for user in (0, 1)}
    n_prompt = n_computed = 0
    for turn in range(2):
        for model, it in enumerate(swapped):
            await it.start()
            statuses = await it.healthy()
            assert set(statuses[:-1]) <= {503}, "as llama-server while it loads"
            for user in (0, 1):
                n, computed = await follow_up(it, talks[model, user], 100 * turn + user)
                if turn:
                    n_prompt, n_computed = n_prompt + n, n_computed + computed
            assert await it.stop() == 0
            assert tagged(it.tag) == []
    figure(
        f"{n_computed} of {n_prompt} prompt tokens computed after a swap, reused {1 - n_computed / n_prompt:.4f}"
    )
    assert n_computed <= 0.02 * n_prompt


async def test_after_a_kill_nothing_is_left_and_what_was_saved_is_found(tmp_path: Path) -> None:
    """SIGKILL of llamaslot's group, which its llama-server does not belong to."""
    it = Supervised.of(models.dense(tmp_path), tmp_path / "store")
    messages = question(1)
    async with it:
        await follow_up(it, messages, 2)
        async with asyncio.timeout(20):
            while not saved(tmp_path / "store"):  # noqa: ASYNC110 - another process saves it
                await asyncio.sleep(0.05)
        await it.kill()
        await none_left(it.tag)
        await it.start()
        await it.healthy()
        n_prompt, n_computed = await follow_up(it, messages, 3)
    assert n_computed <= 0.02 * n_prompt


async def test_its_end_is_that_of_its_llama_server(tmp_path: Path) -> None:
    """Killed: 128 and the signal's number, and one line that says so; nothing else of it stays."""
    it = Supervised.of(models.dense(tmp_path), tmp_path / "store")
    async with it:
        engine = max(it.offspring)  # its guard process was started before it
        os.kill(engine, signal.SIGKILL)
        assert await it.ended() == 128 + signal.SIGKILL
    assert "llama-server was killed by SIGKILL" in it.output
    await none_left(it.tag)


async def test_a_second_one_of_the_same_model_has_a_part_of_its_own(tmp_path: Path) -> None:
    """It says so, and answers."""
    model, store = models.dense(tmp_path), tmp_path / "store"
    async with Supervised.of(model, store) as one, Supervised.of(model, store) as two:
        await asyncio.gather(one.chat(question(1, 3000)), two.chat(question(1, 3000)))
        assert await two.stop() == 0
        assert await one.stop() == 0
    assert "keeps its contexts apart" in two.output
    assert "keeps its contexts apart" not in one.output
    assert len(saved(store)) == 2


async def test_a_key_of_llama_server_is_one_of_clients(tmp_path: Path) -> None:
    """With `--api-key` llamaslot asks for it too, and knows it."""
    it = Supervised.of(models.dense(tmp_path), tmp_path / "store", flags=("--api-key", "sesame"))
    async with it:
        for key, status in (("sesame", 200), ("simsim", 401)):
            body, headers = (
                {"messages": question(1, 300), "max_tokens": 1},
                {"Authorization": f"Bearer {key}"},
            )
            async with aiohttp.request("POST", it.url + CHAT, json=body, headers=headers) as answer:
                assert answer.status == status


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "llama-server's command line is missing: llamaslot run -- llama-server"),
        (
            ("-m", "m.gguf"),
            "llamaslot run has no option -m; llama-server's own command line stands behind --",
        ),
        (("--", "no-llama-server", "-m", "m"), "there is no program no-llama-server"),
        (("--", *ENGINE), "names no model"),
        (("--", *ENGINE, "-m", "/none/m.gguf"), "the model file /none/m.gguf does not exist"),
        (
            ("--listen", "here", "--", *ENGINE, "-np", "1", "-m", "{model}"),
            "--listen here: should be HOST:PORT",
        ),
        (
            ("--stop-s", "nan", "--", *ENGINE, "-np", "1", "-m", "{model}"),
            "should be a number of seconds, such as 9",
        ),
        (("--quota", "much", "--", *ENGINE, "-np", "1", "-m", "{model}"), "--quota: should be a size"),
        (
            ("--listen", "127.0.0.1:{taken}", "--", *ENGINE, "-np", "1", "-m", "{model}"),
            "listen: 127.0.0.1:{taken} is in use",
        ),
        (
            ("--store", "{model}/store", "--", *ENGINE, "-np", "1", "-m", "{model}"),
            "the store {model}/store cannot be used",
        ),
        (("--", "docker", "run", "llama-server", "-m", "{model}"), "docker: neither the port nor the files"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
async def test_a_wrong_command_line_is_one_clear_message(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    """Exit status 2, and nothing was started."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"model": str(models.dense(tmp_path)), "taken": str(taken.getsockname()[1])}
        out, err = tmp_path / "out", tmp_path / "err"
        words = ("run", *(word.format(**known) for word in words))
        state = {"XDG_STATE_HOME": str(tmp_path), "STATE_DIRECTORY": str(tmp_path)}
        status = await forked(LLAMASLOT, words, out=out, err=err, **state).wait()
    said = said.format(**known)
    told = err.read_text()
    lines = [line for line in told.splitlines() if " INFO " not in line and line and "sage: " not in line]
    lines = [line for line in lines if not line.startswith("Try 'llamaslot")]
    assert (status, out.read_text()) == (2, "")
    assert said in "\n".join(lines)
    assert len(lines) == 1 + ("fault" in told), told
