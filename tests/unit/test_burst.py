"""Many requests at once, small ones while every slot holds a long conversation, and long ones: in virtual time."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from bench.virtual import VirtualLoop
from llamaslot.cache.ids import pack
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Request
from llamaslot.scheduling.settings import QueueLimits
from tests.support.house import SETTINGS, House, tokens_of
from tests.support.mainloop import Paced, long, short
from tests.support.stub import Op, StubServer

N_SLOTS, N_CONTEXT, N_ALIKE, ANSWER_S, SAVE_S = 4, 3000, 300, 0.5, 0.06


def pace(op: Op) -> float:
    """A millisecond a token; every slot decodes as fast as if it were alone."""
    seconds = {"answer": ANSWER_S, "save": SAVE_S, "restore": 0.01}
    return seconds.get(op.kind, 0.001 + op.n_tokens / 1000)


@pytest.fixture
def house() -> Iterator[House]:
    settings = replace(SETTINGS, small_prompt_tokens=1024)
    house = House(VirtualLoop(), StubServer(N_SLOTS, pace=pace), settings=settings, limits=QueueLimits())
    for _ in range(20):  # answers of 15 tokens, 30 a second
        house.rates.answer.observe(15, ANSWER_S)
        house.rates.save.observe(N_CONTEXT * 1000, SAVE_S)
        house.rates.restore.observe(N_CONTEXT * 1000, 0.01)
        house.rates.size.observe(N_CONTEXT, N_CONTEXT * 1000)
    yield house
    house.close()


def fill(house: House) -> list[bytes]:
    """A conversation in each slot."""
    contexts = [tokens_of(10_000 * i, N_CONTEXT) for i in range(1, N_SLOTS + 1)]

    async def all_of_them() -> None:
        await asyncio.gather(*(house.ask(Request(f"owner {i}", own)) for i, own in enumerate(contexts)))

    house.loop.run(all_of_them())
    return contexts


def burst_s(house: House, n_requests: int = 8) -> float:
    """Small requests that differ in their last 20 tokens: seconds until all are answered."""
    began = house.loop.time()
    alike = tokens_of(90_000, N_ALIKE)
    jobs = [
        Request(f"title {i}", alike + pack(range(95_000 + 100 * i, 95_020 + 100 * i)))
        for i in range(n_requests)
    ]

    async def all_of_them() -> None:
        await asyncio.gather(*(house.ask(job) for job in jobs))

    house.loop.run(all_of_them())
    return house.loop.time() - began


def come_back(house: House, contexts: list[bytes]) -> int:
    """The owners ask again, one after the other: tokens that are computed for them."""
    before = house.server.n_computed

    async def all_of_them() -> None:
        for i, own in enumerate(contexts):
            await house.ask(Request(f"owner {i} again", own + pack(range(99_000, 99_010))))

    house.loop.run(all_of_them())
    return house.server.n_computed - before


@pytest.mark.parametrize("is_clean", [True, False], ids=["saved", "not saved"])
def test_a_burst_of_small_requests_uses_all_slots(house: House, is_clean: bool) -> None:
    """Eight on four slots take little more than two answers, and nothing that was displaced is computed again."""
    contexts = fill(house)
    if is_clean:
        house.loop.run(house.idle_save.save_all())
    seconds = burst_s(house)
    assert len({house.slots[f"title {i}"] for i in range(8)}) == N_SLOTS
    saves_s = 0.0 if is_clean else N_SLOTS * SAVE_S  # one at a time
    assert seconds <= 2 * (ANSWER_S + N_ALIKE / 1000) + saves_s + 0.1
    assert come_back(house, contexts) <= N_SLOTS * 10
    house.check_nothing_is_left()


def test_a_small_request_that_is_alone_displaces_one_conversation_at_most(house: House) -> None:
    """One after the other, they have the same slot."""
    contexts = fill(house)
    house.loop.run(house.idle_save.save_all())
    for _ in range(5):
        burst_s(house, 1)
    held = [slot.content.n_tokens for slot in house._slots()]
    assert sum(n >= N_CONTEXT for n in held) == N_SLOTS - 1
    assert come_back(house, contexts) <= N_SLOTS * 10


def test_small_requests_wait_for_each_other_where_a_context_costs_more(house: House) -> None:
    """Saving one takes longer than three answers: of four small requests all have the same slot."""
    for _ in range(20):
        house.rates.save.observe(N_CONTEXT * 1000, 30.0)
    fill(house)
    house.loop.run(asyncio.sleep(0))
    burst_s(house, 3)
    assert len({house.slots[f"title {i}"] for i in range(3)}) == 1


@pytest.mark.parametrize("is_decoding", [False, True])
def test_saves_are_done_together_unless_an_answer_is_decoded(house: House, is_decoding: bool) -> None:
    """Each stops every stream, so there is one at a time; with none to stop they do not wait for each other."""
    contexts, n_at_once = fill(house), [0]
    house.rates.save_delay.seconds = 2 * SAVE_S

    def paced(op: Op) -> float:
        n_at_once.append(sum(other.kind == "save" for other in house.server.pending))
        return pace(op)

    house.server.pace = paced

    async def all_of_them() -> None:
        talks = house.start(house.ask(Request("talks", contexts[0] + tokens_of(95_000, 9))), "talks")
        if not is_decoding:
            await talks
        await asyncio.sleep(0.1)
        strangers = (Request(f"stranger {i}", tokens_of(60_000 + 5000 * i, 2000)) for i in range(2))
        await asyncio.gather(talks, *(house.ask(job) for job in strangers))

    house.loop.run(all_of_them())
    assert max(n_at_once) == (1 if is_decoding else 2)
    house.check_nothing_is_left()


# -- long prompts that only wait ---------------------------------------------------------------------------------------


async def _turns(house: Paced, agent: int, n_context: int = 8000, n_turns: int = 4) -> list[float]:
    """One question after the other, each with all that went before; the seconds to the first token of each."""
    first_s = list[float]()
    for turn in range(n_turns):
        n_prompt = n_context + 360 * turn
        tokens = tokens_of(1_000_000 * (agent + 1), n_prompt + 60)
        job = Request(f"agent {agent}, {turn}", tokens[: 4 * n_prompt], max_tokens=60)
        await house.ask(job, tokens[4 * n_prompt :])
        first_s.append(house.first_s[job.id])
    return first_s


@pytest.mark.parametrize("cache_kind", list(CacheKind))
def test_follow_ups_of_a_crowd_find_a_slot(cache_kind: CacheKind) -> None:
    """Six agents of one user begin at once on four slots. Whoever has its first answer goes on: its next question needs
    a fraction of a second, and does not wait for the long prompts of the others, which wait in slots."""
    with Paced(cache_kind, 4) as house:
        house.server.token_s = 0.0002
        house.talk()
        house.begin()
        agents = [house.start(_turns(house, i), f"agent {i}") for i in range(6)]
        house.wait(*agents)
        turns = [agent.result() for agent in agents]
        assert statistics.mean(own[0] for own in turns) <= 1.6 * 3.5 * 1.2, "one at a time"
        assert statistics.mean(seconds for own in turns for seconds in own[1:]) <= 0.15
        assert house.server.n_computed <= 6 * (8000 + 3 * 300) * 1.05


def test_a_long_prompt_leaves_the_last_idle_slot_while_another_waits_in_one() -> None:
    """The one whose turn is next has a slot to be ready in; a third one takes none before that one's turn."""
    with Paced(n_slots=3) as house:
        house.talk(3)
        house.begin()
        clients = [house.come(long(f"long {i}", 4000, i)) for i in range(3)]
        house.until(1.0)
        assert house.dispatcher.n_waiting == 1
        little = short("little")
        house.wait(house.come(little))
        assert house.first_s[little.id] < 1.5, "a chunk, and its own"
        house.wait(*clients)
        assert house.now - house.began < 12.0 * 1.1 + 1.0


def test_a_shorter_prompt_takes_the_last_idle_slot() -> None:
    """It comes before the one that waits for its turn."""
    with Paced(n_slots=3) as house:
        house.talk(3)
        house.begin()
        clients = [house.come(long(f"long {i}", 8000, i)) for i in range(2)]
        house.until(1.0)
        clients.append(house.come(long("shorter", 2000, 3)))
        house.until(1.1)
        assert house.dispatcher.n_waiting == 0
        house.wait(*clients)
        assert house.first_s["shorter"] < house.first_s["long 1"]


def test_a_request_overtaken_for_long_takes_any_slot() -> None:
    """Shorter ones that come after it are not computed before it any more."""
    with Paced(n_slots=3, starvation_s=3.0) as house:
        house.talk(3)
        house.begin()
        clients = [house.come(long(f"long {i}", 8000, i)) for i in range(3)]
        house.until(2.9)
        assert house.dispatcher.n_waiting == 1
        house.until(3.5)
        assert house.dispatcher.n_waiting == 0
        house.wait(*clients)


def test_those_that_begin_alike_share_it_while_they_wait_for_the_last_slot() -> None:
    """Twelve requests of four conversations at once: at most one of the four is computed twice."""
    with Paced(n_slots=4) as house:
        house.talk(4)
        house.begin()
        prompts = [
            tokens_of(1_000_000 * (i % 4 + 1), 4000) + tokens_of(30_000_000 + 1000 * i, 100)
            for i in range(12)
        ]
        clients = [house.come(Request(f"{i}", prompt)) for i, prompt in enumerate(prompts)]
        house.wait(*clients)
        assert house.server.n_computed <= (5 * 4000 + 12 * 100) * 1.02  # 25,200 when all took slots at once
