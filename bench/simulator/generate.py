"""The default trace: a team of people with agents, over a working day. Seeded; each user has its own random numbers.

Chosen here: the spread (sigma) of what is lognormal is 0.8 for the first message, 0.7 for later ones, 1.0 for
thinking; answers are lognormal with a median of 250; in two turns of three a user goes on in the same conversation;
half of the answers come back re-tokenized. Sixty users ask more of four slots than these can give at once, so there
is a queue most of the time, and a script takes that into account: written for people who wait for nothing it would
not end with the day.

None of the default trace's conversations begin together on purpose. With ``p_together`` some do, as those of an agent
that starts several others: at once, with the same system prompt and short tasks; they go on in step for a few turns.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from bench.simulator.trace import Text, Trace, TraceRequest, Turn


@dataclass(frozen=True, slots=True)
class Recipe:
    """The numbers of a trace. Times in seconds, lengths in tokens."""

    n_users: int = 60
    day_s: float = 8 * 3600.0
    arrival_s: float = 3600.0
    n_agents: int = 5
    zipf: float = 1.2
    system: tuple[int, int] = (8_000, 14_000)
    start: tuple[int, int] = (2_000, 30_000)
    start_median: float = 9_000.0
    turn_median: float = 700.0
    large_turn: int = 8_000
    p_large: float = 1 / 10
    answer: tuple[int, int] = (50, 2_000)
    answer_median: float = 250.0
    turns: tuple[int, int] = (3, 60)
    turns_mean: float = 14.0
    n_end: int = 60_000
    think_median_s: float = 25.0
    p_pause: float = 1 / 15
    pause_s: tuple[float, float] = (600.0, 5_400.0)
    p_edit: float = 1 / 12
    p_side: float = 1 / 10
    n_side: int = 300
    side_answer: tuple[int, int] = (10, 60)
    n_live: tuple[int, int] = (1, 3)
    p_switch: float = 1 / 3
    burst_each: int = 10  # one user in so many sends as many requests at once as ...
    n_burst: int = 5
    usual_answer_s: float = 100.0  # from a request to the end of its answer, as a script expects it
    p_reworded: float = 0.5  # answers that come back re-tokenized: the prefix ends somewhere inside them
    p_together: float = 0.0  # of a user's rounds: conversations that begin at once, ...
    n_together: int = 4  # so many of them, ...
    turns_together: tuple[int, int] = (1, 4)  # for so long


def generate(seed: int, recipe: Recipe | None = None, name: str = "default") -> Trace:
    """The trace of that seed; the same one each time."""
    recipe = recipe or Recipe()
    agents = Agents.draw(random.Random(f"{seed} agents"), recipe)
    requests: list[TraceRequest] = []
    for user in range(recipe.n_users):
        requests += _User(seed, user, recipe, agents).requests()
    trace = Trace(name, seed, tuple(requests))
    trace.check()
    return trace


def crew(n_users: int, hours: float, recipe: Recipe | None = None) -> Recipe:
    """The recipe with so many users, and for so long; they arrive over the first eighth of it."""
    recipe = recipe or Recipe()
    return replace(recipe, n_users=n_users, day_s=hours * 3600, arrival_s=hours * 450)


def scaled(factor: int, recipe: Recipe | None = None) -> Recipe:
    """The recipe with so many times the users."""
    recipe = recipe or Recipe()
    return replace(recipe, n_users=recipe.n_users * factor)


@dataclass(frozen=True, slots=True)
class Agents:
    """System prompts and tools. One of them is another from ``changes_s`` on, and from ``changes_at`` tokens on."""

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    changing: int
    changes_s: float
    changes_at: int

    @classmethod
    def draw(cls, rng: random.Random, recipe: Recipe) -> Agents:
        lengths = tuple(rng.randint(*recipe.system) for _ in range(recipe.n_agents))
        changing = rng.randrange(recipe.n_agents)
        return cls(
            lengths,
            tuple(rank**-recipe.zipf for rank in range(1, recipe.n_agents + 1)),
            changing,
            recipe.day_s * rng.uniform(0.3, 0.7),
            int(lengths[changing] * rng.uniform(0.1, 0.9)),
        )

    def texts(self, agent: int, clock_s: float) -> tuple[Text, ...]:
        n = self.lengths[agent]
        if agent != self.changing or clock_s < self.changes_s:
            return (Text(agent, n),)
        return Text(agent, self.changes_at), Text(len(self.lengths) + agent, n - self.changes_at)


@dataclass(slots=True)
class _Conversation:
    id: int
    system: tuple[Text, ...]
    n_turns_left: int
    n_held: int = 0  # tokens of the last prompt and its answer
    n_last_answer: int = 0
    is_short: bool = False  # begins with a message like the later ones
    messages: list[int] = field(default_factory=list)  # where each message of the user begins

    @property
    def is_new(self) -> bool:
        return not self.messages


class _User:
    """One user's script. Keys of texts and conversations are its own: a million for each user."""

    def __init__(self, seed: int, user: int, recipe: Recipe, agents: Agents) -> None:
        self.user, self.recipe, self.agents = user, recipe, agents
        self.rng = random.Random(f"{seed} user {user}")
        self._together = random.Random(f"{seed} user {user} together")  # without it the rest is as before
        self._serial = itertools.count((user + 1) * 1_000_000)
        self._clock_s = 0.0
        self._at: int = 0

    def requests(self) -> Iterator[TraceRequest]:
        rng, recipe = self.rng, self.recipe
        is_burst = recipe.burst_each > 0 and self.user % recipe.burst_each == recipe.burst_each - 1
        n_live = recipe.n_burst if is_burst else rng.randint(*recipe.n_live)
        think_s = rng.uniform(0, recipe.arrival_s)
        self._clock_s = think_s
        live = [self._conversation() for _ in range(n_live)]
        others: list[_Conversation] = []  # that have begun together
        for round_ in itertools.count():
            if self._clock_s >= recipe.day_s:
                return
            if not is_burst and not others and self._together.random() < recipe.p_together:
                others = self._begin_together()
            if others:
                yield from (self._turn_together(talk, round_, think_s) for talk in others)
                others = others if others[0].n_turns_left else []
            else:
                for i in range(n_live) if is_burst else [self._choose(n_live)]:
                    yield self._request(live, i, round_, think_s)
            think_s = self._think_s()
            self._clock_s += recipe.usual_answer_s + think_s

    def _begin_together(self) -> list[_Conversation]:
        recipe, system = self.recipe, self._conversation().system
        n_turns = self.rng.randint(*recipe.turns_together)
        ids = itertools.islice(self._serial, recipe.n_together)
        return [_Conversation(id_, system, n_turns, is_short=True) for id_ in ids]

    def _turn_together(self, talk: _Conversation, round_: int, think_s: float) -> TraceRequest:
        request = self._turn(talk, round_, think_s)
        assert request is not None, "so few turns always fit"
        return request

    def _choose(self, n_live: int) -> int:
        if self.rng.random() < self.recipe.p_switch:
            self._at = self.rng.randrange(n_live)
        return self._at

    def _request(self, live: list[_Conversation], i: int, round_: int, think_s: float) -> TraceRequest:
        rng, recipe = self.rng, self.recipe
        if rng.random() < recipe.p_side:
            texts = (self._text(recipe.n_side),)
            answer = self._text(rng.randint(*recipe.side_answer))
            id_ = next(self._serial)
            return TraceRequest(self.user, round_, think_s, id_, Turn.SIDE, 0, texts, answer)
        request = self._turn(live[i], round_, think_s)
        if request is None:  # it is over: another one in its place
            live[i] = self._conversation()
            request = self._turn(live[i], round_, think_s)
            assert request is not None, "a first turn always fits"
        return request

    def _turn(self, talk: _Conversation, round_: int, think_s: float) -> TraceRequest | None:
        """The next turn; None when the conversation has come to its end."""
        rng, recipe = self.rng, self.recipe
        if talk.n_turns_left == 0:
            return None
        answer = self._text(self._n_answer())
        if talk.is_new:
            kind, keep = Turn.FIRST, 0
            add = (*talk.system, self._text(self._n_message() if talk.is_short else self._n_start()))
            at = sum(text.n for text in talk.system)
        elif len(talk.messages) > 1 and rng.random() < recipe.p_edit:
            kind = Turn.EDIT
            del talk.messages[rng.randrange(1, len(talk.messages)) + 1 :]
            keep = at = talk.messages.pop()
            add = (self._text(self._n_message()),)
        else:
            kind, keep, add = Turn.FOLLOW_UP, *self._reworded(talk)
            at = talk.n_held
            add = (*add, self._text(self._n_message()))
        n_prompt = keep + sum(text.n for text in add)
        if not talk.is_new and n_prompt + answer.n > recipe.n_end:
            return None
        talk.messages.append(at)
        talk.n_held, talk.n_last_answer = n_prompt + answer.n, answer.n
        talk.n_turns_left -= 1
        return TraceRequest(self.user, round_, think_s, talk.id, kind, keep, add, answer)

    def _reworded(self, talk: _Conversation) -> tuple[int, tuple[Text, ...]]:
        """What is kept of prompt and answer, and what the rest of the answer has become."""
        if self.rng.random() >= self.recipe.p_reworded:
            return talk.n_held, ()
        n_lost = self.rng.randint(1, talk.n_last_answer)
        return talk.n_held - n_lost, (self._text(n_lost),)

    def _conversation(self) -> _Conversation:
        rng, recipe = self.rng, self.recipe
        agent = rng.choices(range(recipe.n_agents), self.agents.weights)[0]
        least, most = recipe.turns
        # Geometric above the least: the mean of what is added is mean - least.
        extra = recipe.turns_mean - least
        drawn = int(math.log(1 - rng.random()) / math.log(extra / (1 + extra))) if extra > 0 else 0
        n_turns = min(least + drawn, most)
        return _Conversation(next(self._serial), self.agents.texts(agent, self._clock_s), n_turns)

    def _n_start(self) -> int:
        return self._lognormal(self.recipe.start_median, 0.8, *self.recipe.start)

    def _n_answer(self) -> int:
        return self._lognormal(self.recipe.answer_median, 0.8, *self.recipe.answer)

    def _n_message(self) -> int:
        if self.rng.random() < self.recipe.p_large:
            return self.recipe.large_turn
        return self._lognormal(self.recipe.turn_median, 0.7, 10, self.recipe.large_turn)

    def _lognormal(self, median: float, sigma: float, least: int, most: int) -> int:
        while True:  # drawn again, not clipped: no heap at the ends
            n = int(median * math.exp(self.rng.gauss(0, sigma)))
            if least <= n <= most:
                return n

    def _think_s(self) -> float:
        if self.rng.random() < self.recipe.p_pause:
            return self.rng.uniform(*self.recipe.pause_s)
        return self.recipe.think_median_s * math.exp(self.rng.gauss(0, 1.0))

    def _text(self, n: int) -> Text:
        return Text(next(self._serial), n)
