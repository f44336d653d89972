"""Compares, request by request, how much reuse llamaslot has predicted with how much there was, by its own journal."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import aiohttp

from tests.support.jobs import team_of
from tests.support.stack import Stack
from tests.support.users import Tally, Team, Turn, User, tally


@dataclass(frozen=True, slots=True)
class Prediction:
    """The prediction for one request. ``n_answer``: tokens of the answer before it in the same conversation."""

    source: str
    n_prompt: int
    n_expected: int
    n_reused: int
    n_answer: int

    @property
    def is_good(self) -> bool:
        """True if it predicts at most 1 % of the prompt too much, and too little by no more than the last answer, whose
        tokens llamaslot cannot know.
        """
        is_kept = self.n_reused >= self.n_expected - 0.01 * self.n_prompt
        return is_kept and self.n_reused - self.n_expected <= self.n_answer


@dataclass(frozen=True, slots=True)
class Accuracy:
    predictions: tuple[Prediction, ...]
    tally: Tally  # of first turns, too

    @property
    def ratio(self) -> float:
        return sum(one.is_good for one in self.predictions) / len(self.predictions)

    @property
    def wrong(self) -> list[Prediction]:
        return [one for one in self.predictions if not one.is_good]

    def __str__(self) -> str:
        over = max(one.n_expected - one.n_reused for one in self.predictions)
        beyond = max(one.n_reused - one.n_expected - one.n_answer for one in self.predictions)
        n_by_source = {
            source: sum(one.source == source for one in self.predictions)
            for source in ("resident", "snapshot", "cold")
        }
        return (
            f"{self.ratio:.4f} of {len(self.predictions)} predictions good, {n_by_source};"
            f" at most {over} tokens too many, {beyond} too few beside the last answer; {self.tally}"
        )


async def predict(
    stack: Stack,
    *,
    n_users: int,
    n_context: int,
    n_turns: int,
    n_answer: int = 1000,
    reworded: float = 0.0,
    seed: int = 1,
) -> Accuracy:
    """A team of more users than slots, whose answers have 1 to ``n_answer`` tokens. First turns are left out.

    ``reworded``: the share of answers that the client does not send back unchanged.
    """
    async with team_of(stack, n_users, n_context, seed=seed) as (team, meter):
        rng = random.Random(f"{seed} answers")
        answers, turns = dict[str, int](), await _round(team, rng, n_answer)
        for _ in range(n_turns - 1):
            before = {user.name: user.last.reply.n_predicted for user in team.users}
            for user in team.users:
                if rng.random() < reworded:
                    _reword(user, rng)
            for turn in await _round(team, rng, n_answer):
                answers[turn.reply.headers["x-request-id"]] = before[turn.user]
                turns.append(turn)
        counted = tally(turns, await meter.total())
    assert not any(turn.reply.error for turn in turns), [turn.reply.error for turn in turns]
    url = f"{stack.url}/llamaslot/journal?n=1000"
    async with aiohttp.request("GET", url) as response:
        decisions = {one["id"]: one for one in (await response.json())["decisions"]}
    found = [(decisions[id_], n_last) for id_, n_last in answers.items()]
    return Accuracy(
        tuple(
            Prediction(one["chosen"]["source"], one["n_tokens"], one["n_expected"], one["n_reused"], n_last)
            for one, n_last in found
        ),
        counted,
    )


def _reword(user: User, rng: random.Random) -> None:
    """The client drops the end of the last answer from the conversation."""
    answer = next(message for message in reversed(user.messages) if message["role"] == "assistant")
    answer["content"] = answer["content"][: rng.randrange(len(answer["content"]) + 1)] + "..."


async def _round(team: Team, rng: random.Random, n_answer: int) -> list[Turn]:
    """One turn of each user, four at a time, in an order drawn anew."""
    busy = asyncio.Semaphore(4)

    async def ask(user: User) -> Turn:
        async with busy:
            return await user.turn(team.client, max_tokens=rng.randint(1, n_answer))

    return await asyncio.gather(*map(ask, rng.sample(team.users, len(team.users))))
