"""llamaslot's main job as black-box runs: each uses a Stack over HTTP and returns figures; tests say what they must be.

The same functions run small in ``make test`` and in full size in ``make soak``. They also run against llama-server
alone (``Stack(alone=True)``) to show that the figures mean something.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.real import RealServer
from tests.support.rounding import Answers, answers_of
from tests.support.stack import Stack
from tests.support.users import (
    SPECIALS,
    Client,
    Meter,
    Tally,
    Team,
    Turn,
    User,
    rendered,
    symbols,
    tally,
    words,
)


@asynccontextmanager
async def clients(stack: Stack) -> AsyncIterator[tuple[Client, Client]]:
    """Two clients: one of the address that users ask, one of llama-server itself."""
    async with Client(stack.url) as front, Client(stack.server.url) as server:
        yield front, server


@asynccontextmanager
async def team_of(
    stack: Stack, n_users: int, n_context: int | Sequence[int], *, seed: int = 1
) -> AsyncIterator[tuple[Team, Meter]]:
    """A team at work on a stack, and the meter that counts what llama-server computes from now on."""
    async with clients(stack) as (front, server):
        team = Team(n_users, n_context, client=front, server=server, seed=seed)
        await team.check_counts()
        meter = Meter(stack.server.metrics)
        await meter.resume()
        yield team, meter


async def take_turns(
    stack: Stack,
    *,
    n_users: int = 12,
    n_context: int | Sequence[int] = 6500,
    n_turns: int = 4,
    at_a_time: int = 4,
    seed: int = 1,
) -> Tally:
    """A team of more users than slots, a few at a time, interleaved at random."""
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        turns = await team.run(n_turns, at_a_time=at_a_time)
        return tally(turns, await meter.total())


async def restart(stack: Stack, what: str, meter: Meter) -> None:
    """A clean restart of ``llama-server``, ``llamaslot`` or ``both``; the meter goes on counting."""
    if what in ("llamaslot", "both"):
        await stack.llamaslot.stop()
    if what in ("llama-server", "both"):
        await meter.pause()
        await stack.server.restart()
        await meter.resume()
    if what in ("llamaslot", "both"):
        await stack.llamaslot.start()
    elif not stack.alone:
        await stack.llamaslot.healthy()


async def take_turns_over_restarts(
    stack: Stack,
    *,
    n_users: int = 12,
    n_context: int = 6500,
    whats: Sequence[str] = ("llama-server", "llamaslot", "both"),
    quiet_s: float | None = 5.0,
    seed: int = 1,
) -> dict[str, Tally]:
    """One turn of each user, then for each restart another turn of each, in another order.

    A clean restart comes between turns, ``quiet_s`` after the last answer, or (None) once everything is saved. A
    llama-server that is told to stop does not save its slots, so what llamaslot has not saved by then is lost.
    """
    figures = {}
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        await team.round()
        for what in whats:
            await quiet(stack, quiet_s)
            await restart(stack, what, meter)
            before = await meter.total()
            turns = await team.round()
            figures[what] = tally(turns, await meter.total() - before)
    return figures


async def quiet(stack: Stack, seconds: float | None) -> None:
    """Wait for ``seconds``, or (None) until llamaslot has saved all that is worth it."""
    if seconds is not None:
        await asyncio.sleep(seconds)
        return
    async with asyncio.timeout(ALL_SAVED_S):
        while True:
            status = await stack.status()
            if not any(slot["is_worth_saving"] for slot in status["backends"][0]["slots"]):
                return
            await asyncio.sleep(0.1)


ALL_SAVED_S = 60.0  # on a busy machine


@dataclass(frozen=True, slots=True)
class Killed:
    """What was reused after llama-server was killed."""

    tally: Tally  # of the turns after the kill, against an unlimited cache
    n_on_disk: int  # of those turns' prompts, the tokens that snapshots held at the moment of the kill

    @property
    def of_disk(self) -> float:
        """The share of what was on disk that was reused."""
        n_reused = self.tally.n_prompt - self.tally.n_computed
        return n_reused / self.n_on_disk if self.n_on_disk else 1.0

    def __str__(self) -> str:
        return f"{self.tally}; {self.of_disk:.4f} of the {self.n_on_disk} tokens on disk"


async def kill_server(
    stack: Stack,
    *,
    n_users: int = 12,
    n_context: int = 6500,
    is_asking: bool = False,
    quiet_s: float | None = 5.0,
    seed: int = 1,
) -> Killed:
    """SIGKILL llama-server after the last answer (see ``quiet``), or, with ``is_asking``, while all users ask.

    Then each user has one more turn. Users whose request ended with the server ask the same again.
    """
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        await team.round()
        asking = None
        if is_asking:
            asking = asyncio.get_running_loop().create_task(team.round())
            await asyncio.sleep(team.rng.uniform(0.05, 1.5))
        else:
            await quiet(stack, quiet_s)
        await stack.server.kill()
        if asking is not None:
            await asking
        held = [tokens for _, tokens in snapshot_files(stack.server.save_dir)]
        await stack.server.start()
        if not stack.alone:
            await stack.llamaslot.healthy()
        await meter.resume()
        before = await meter.total()
        n_on_disk = 0
        for user in team.users:
            prompt = ids(rendered(user.messages))
            n_on_disk += max((min(shared(prompt, other), len(prompt) - 1) for other in held), default=0)
        turns = await team.round()
        return Killed(tally(turns, await meter.total() - before), n_on_disk)


def ids(text: str) -> list[int]:
    """The token ids of the generated models: bytes, then the three special tokens."""
    return [255 + ord(symbol) if ord(symbol) <= len(SPECIALS) else ord(symbol) for symbol in symbols(text)]


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """The longest common prefix in tokens."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def snapshot_files(directory: Path) -> list[tuple[Path, list[int]]]:
    """Each finished snapshot, that is, each with a sidecar, and its tokens from the header of the slot file."""
    found = []
    for path in directory.glob("*.kv"):
        if not path.with_suffix(".json").exists():
            continue
        try:
            with path.open("rb") as file:
                head = file.read(12)
                body = memoryview(file.read(4 * int.from_bytes(head[8:12], "little"))).cast("i")
        except FileNotFoundError:
            continue
        assert head[:4] == (0x67677371).to_bytes(4, "little"), f"{path} is no slot file"
        found.append((path, list(body[3 : 3 + body[2]])))
    return found


@dataclass(frozen=True, slots=True)
class Pair:
    """One question asked twice: through llamaslot, and of a llama-server without it."""

    through_s: float
    direct_s: float
    n_computed: int


async def compare_alone(
    stack: Stack, direct: RealServer, *, n_context: int = 30_000, n_turns: int = 12, seed: int = 1
) -> list[Pair]:
    """One user asks follow-ups without a pause, in the same conversation on both sides; who is asked first alternates.

    The two llama-servers have the same model and flags; while one is asked the other is idle. Compares times to the
    first token.
    """
    pairs = []
    async with Client(stack.url) as front, Client(direct.url) as other:
        rng_a, rng_b = random.Random(seed), random.Random(seed)
        users = (User("a", n_context, rng_a), front), (User("a", n_context, rng_b), other)
        for number in range(n_turns + 1):
            turns = {}
            for user, client in users if number % 2 else users[::-1]:
                turns[client] = await user.turn(client)
                assert not turns[client].reply.error, turns[client].reply.error
            if number:  # the first is cold
                through, alone = turns[front].reply, turns[other].reply
                pairs.append(Pair(through.ttft_s, alone.ttft_s, through.n_computed))
    return pairs


def median_ratio(pairs: Sequence[Pair]) -> float:
    """The median through llamaslot divided by the median without it."""
    return statistics.median(p.through_s for p in pairs) / statistics.median(p.direct_s for p in pairs)


def ratio_of(pairs: Sequence[Pair]) -> str:
    """One line with both medians and their ratio."""
    through = statistics.median(pair.through_s for pair in pairs) * 1e3
    alone = statistics.median(pair.direct_s for pair in pairs) * 1e3
    return f"{len(pairs)} pairs: {through:.0f} ms through, {alone:.0f} ms direct, ratio {median_ratio(pairs):.3f}"


async def ask_while_saved(
    stack: Stack,
    *,
    n_users: int = 5,
    n_context: int = 6500,
    n_rounds: int = 20,
    at_most_s: float = 0.1,
    seed: int = 1,
) -> Tally:
    """One user more than slots. The newcomer takes the slot used longest ago, and its owner asks again while it is
    being saved.

    ``at_most_s``: the owner asks at most this many seconds after the newcomer, drawn anew each time.
    """
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        order = team.users[:]
        turns = [await user.turn(team.client) for user in order]
        for _ in range(n_rounds):
            # `order` is oldest first: its first one was evicted longest ago, its second one is the next victim.
            newcomer, owner = order[0], order[1]

            async def late(user: User = owner) -> Turn:
                await asyncio.sleep(team.rng.uniform(0, at_most_s))
                return await user.turn(team.client)

            turns += await asyncio.gather(newcomer.turn(team.client), late())
            order = [*order[2:], newcomer, owner]
        return tally(turns, await meter.total())


async def ask_at_idle_save(
    stack: Stack,
    *,
    n_context: int = 6500,
    n_rounds: int = 20,
    idle_save_s: float,
    spread_s: float = 0.1,
    seed: int = 1,
) -> Tally:
    """Four users ask follow-ups together just when the idle save of their contexts is due, at most ``spread_s`` before
    or after.
    """
    async with team_of(stack, 4, n_context, seed=seed) as (team, meter):
        turns = await team.round()
        for _ in range(n_rounds):
            await asyncio.sleep(idle_save_s + team.rng.uniform(-spread_s, spread_s))
            turns += await team.round()
        return tally(turns, await meter.total())


async def exchange_model(
    stack: Stack, path: Path, other: Path, reference: RealServer, *, n_users: int = 8, n_context: int = 3000
) -> Answers:
    """Turns; then another GGUF of the same shape under the same path; then two more rounds of turns. ``reference``,
    which serves the other model and computes each prompt cold, says which answers are right.
    """
    asked = []
    async with team_of(stack, n_users, n_context) as (team, _), Client(reference.url) as cold:
        await team.round()
        await team.round()
        await quiet(stack, None if not stack.alone else 0.0)
        await stack.server.stop()
        exchange(path, other)
        await stack.server.start()
        if not stack.alone:
            await stack.llamaslot.healthy()
        for _ in range(2):
            bodies = {user.name: user.body(stream=False, cache_prompt=False) for user in team.users}
            # One at a time, so that rounding is the exception: a context that was decoded still rounds otherwise than
            # one that is computed as a prompt, and one answer of some dozen runs parted from the cold one.
            turns = await team.round(at_a_time=1)
            asked += [(bodies[turn.user], turn.reply) for turn in turns]
        return await answers_of(asked, cold)


def exchange(path: Path, other: Path) -> None:
    """Put another GGUF under the same path. A process that has opened or mapped the old file keeps all of it."""
    temporary = path.with_suffix(".new")
    shutil.copyfile(other, temporary)
    temporary.replace(path)


async def ask_many(
    stack: Stack, *, n_context: int = 3000, n_rounds: int = 3, seed: int = 1
) -> tuple[Tally, int]:
    """Other clients ask with ``n`` = 3, and with a list of three prompts, between the turns of as many users as slots.

    Returns the users' tally without the cost of the others' prompts, and the number of answers to the others.
    """
    async with team_of(stack, 4, n_context, seed=seed) as (team, meter):
        turns = await team.round()
        n_others, n_answers = 0.0, 0
        for _ in range(n_rounds):
            for body in (
                {"prompt": words(team.rng, 500), "n": 3},
                {"prompt": [words(team.rng, 400) for _ in range(3)]},
            ):
                before = await meter.total()
                answer = await team.client.post("/v1/completions", {**body, "max_tokens": 5})
                n_others += await meter.total() - before
                n_answers += len(answer["choices"])
                turns += await team.round()
        return tally(turns, await meter.total() - n_others), n_answers
