"""Long prompts beside everybody else: who needs little comes first, and the long one gets to its end all the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamaslot.cache.ids import head
from llamaslot.cache.reuse import CacheKind
from llamaslot.scheduling.request import Request
from tests.support.mainloop import ACTION_S, BATCH_S, CHUNK_S, DISK_S, Paced, long, short, talk

EVERY = pytest.mark.parametrize("cache_kind", list(CacheKind))
POLL_S = 0.03  # until a server that has become idle is seen to be so, and what is sent arrives


def waits_s(cache_kind: CacheKind) -> float:
    """How long somebody else's prefill may stand in the way of a request that needs little."""
    return (CHUNK_S if cache_kind is CacheKind.DENSE else BATCH_S) + POLL_S


def beside(cache_kind: CacheKind, *, is_low: bool, **more: float) -> Paced:
    """A conversation in one of two slots, and room for a long prompt in the other: in the higher one, or the lower."""
    house = Paced(cache_kind, 2, **more)  # type: ignore[arg-type]
    if not is_low:
        filler = house.come(short("filler", n=60))
        house.until_leased(filler)
    house.talk()
    assert house.slots[talk(0).id] == (0 if is_low else 1)
    house.begin()
    return house


# -- who comes first ---------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("is_low", [True, False], ids=["in the lower slot", "in the higher slot"])
def test_a_short_request_waits_for_no_more_than_a_chunk(cache_kind: CacheKind, is_low: bool) -> None:
    """Of a model that can go back to any token; of others for no more than a batch. llama-server alone would compute
    the long prompt first wherever that has the lower slot. And the long one goes on from where it was."""
    with beside(cache_kind, is_low=is_low) as house:
        stranger = long("stranger", 8000)
        client = house.come(stranger)
        n_asked = 0
        for i in range(8):
            house.until(0.35 + 0.77 * i)
            n_asked += 20
            asks = talk(0, n_asked)
            house.wait(house.come(asks))
            assert house.first_s[asks.id] <= waits_s(cache_kind) + 0.02
        assert not client.done(), "it was there all the time"
        house.wait(client)
        assert house.slots[stranger.id] == (1 if is_low else 0)
        assert house.server.n_computed == 8000 + n_asked, "nothing was computed twice"
        n_stopped = house.metrics.interruptions._value.get()
        assert cache_kind is CacheKind.DENSE or n_stopped >= 8, "where it is not cut it is interrupted"
        assert house.first_s[stranger.id] < 8 + 8 * (waits_s(cache_kind) + 0.1), (
            "nor was it kept waiting without need"
        )


@EVERY
def test_so_do_the_steps_of_a_short_request(cache_kind: CacheKind) -> None:
    """Saving what is in its way, erasing and restoring: no batch of the long prompt in between."""
    with Paced(cache_kind, 2) as house:
        house.talk(2)
        house.loop.run(house.idle_save.save_all())
        house.wait(house.come(long("over", 600)))  # in the slot of the first conversation, which is on disk
        house.wait(house.come(talk(1, 5)))  # and the other one has gone on
        house.begin()
        client = house.come(long("stranger", 8000, at=5))
        house.until(1.7)
        asked_at, back = house.now, talk(0, 20)
        house.wait(house.come(back))
        slot = house.slots[back.id]
        works = [work for work in house.main.works if work.ended > asked_at]
        kinds = [work.kind for work in works if work.slot == slot]
        assert kinds[kinds[0] == "save" :] == [
            "erase",
            "restore",
            "batch",
        ]  # or saved before the stranger came
        first_at = asked_at + house.first_s[back.id]
        assert not [
            work
            for work in works
            if work.slot != slot and asked_at + waits_s(cache_kind) < work.ended < first_at
        ]
        assert house.first_s[back.id] <= waits_s(cache_kind) + 3 * ACTION_S + 4 * DISK_S + 0.03
        house.wait(client)
        assert 8020 <= house.server.n_computed <= 8025, (
            "a sliding window needs the last few of a snapshot again"
        )


@EVERY
def test_a_short_request_that_comes_while_the_long_one_waits_is_first_too(cache_kind: CacheKind) -> None:
    """Several at once: none of them waits for more than the first chunk and the others."""
    with Paced(cache_kind, 4) as house:
        house.begin()
        client = house.come(long("stranger", 4000))
        house.until(1.1)
        shorts = [short(f"short {i}", i) for i in range(3)]
        clients = [house.come(job) for job in shorts]
        house.wait(*clients)
        assert max(house.first_s[job.id] for job in shorts) <= waits_s(cache_kind) + 3 * 0.1 + POLL_S
        house.wait(client)
        assert house.server.n_computed == 4000 + 300


@EVERY
def test_a_long_prompt_that_comes_behind_a_short_one_waits_for_it(cache_kind: CacheKind) -> None:
    """It has not been held back yet, however long ago anybody has prefilled; its slot is the lower one."""
    with beside(cache_kind, is_low=False) as house:
        house.until(10.0)
        asks, stranger = talk(0, 150), long("stranger", 2000)
        clients = [house.come(asks), house.come(stranger)]
        house.wait(*clients)
        assert house.slots[stranger.id] < house.slots[asks.id]
        assert house.first_s[asks.id] <= 0.15 + POLL_S


@EVERY
def test_no_request_is_first_any_more_once_its_answer_has_begun(cache_kind: CacheKind) -> None:
    """It streams for a minute: meanwhile the long prompt is computed, but for the share of the stream."""
    with Paced(cache_kind, 2, answer_s=60.0) as house:
        house.begin()
        stream = house.come(short("stream"))
        house.until(0.2)
        stranger = long("stranger", 3000)
        client = house.come(stranger)
        house.until(6.0)
        assert house.first_s[stranger.id] < 3.8
        assert not client.done() or not stream.done()


@EVERY
def test_one_whose_answer_does_not_begin_is_first_for_a_while_only(cache_kind: CacheKind) -> None:
    """It may use nothing cached, and has more to compute than it looked: after a second the long prompt goes on."""
    with Paced(cache_kind, 2, max_yield_s=100.0) as house:
        house.begin()
        client = house.come(long("stranger", 6000, 1))
        house.until(0.5)
        cold = long("cold", 6000, 2, no_cache=True)
        house.table.can_erase = False  # so it computes everything itself
        house.come(cold)
        house.until(1.5)
        slot = house.slots["stranger"]
        assert not [op for op in house.server.pending if op.slot == slot], "it is held back"
        house.until(2.7)
        assert [op for op in house.server.pending if op.slot == slot]
        house.wait(client)


# -- the long one gets its share ---------------------------------------------------------------------------------------


async def asks_again_and_again(house: Paced, i: int, seconds: float) -> None:
    """A user who follows up as soon as he has got his answer."""
    until, n = house.now + seconds, 0
    while house.now < until:
        n += 150
        await house.ask(talk(i, n))


@EVERY
def test_a_long_prompt_gets_a_chunk_every_while(cache_kind: CacheKind) -> None:
    """Three users leave no gap between their requests: after ``max_yield_s`` it goes on by right, for a chunk."""
    with Paced(cache_kind, 4, answer_s=0.001) as house:
        filler = house.come(short("filler", n=60))
        house.until_leased(filler)
        house.talk(3)
        house.begin()
        stranger = long("stranger", 3000)
        client = house.come(stranger)
        users = [house.start(asks_again_and_again(house, i, 40.0), f"user {i}") for i in range(3)]
        house.wait(client)
        slot = house.slots[stranger.id]
        assert slot == 0, "else the server itself would compute the others first, whatever it is sent"
        began = [work.began for work in house.main.of(slot)]
        gaps = [later - prefill_stats for prefill_stats, later in pairwise([house.began, *began])]
        assert max(gaps) <= 2.0 + 2 * BATCH_S + CHUNK_S
        assert sum(gap > 1.0 for gap in gaps) >= 4, "it was held back"
        assert house.first_s[stranger.id] < 3000 / 256 * 3.0
        house.wait(*users)


@EVERY
def test_a_prompt_that_is_hardly_long_is_not_held_back_for_long(cache_kind: CacheKind) -> None:
    """Three users leave no gap between their requests: it waits as long as it takes itself, and not for two seconds."""
    with Paced(cache_kind, 4, answer_s=0.001) as house:
        filler = house.come(short("filler", n=60))
        house.until_leased(filler)
        house.talk(3)
        house.begin()
        users = [house.start(asks_again_and_again(house, i, 6.0), f"user {i}") for i in range(3)]
        house.until(1.0)
        stranger = long("stranger", 300)
        house.wait(house.come(stranger))
        assert house.slots[stranger.id] == 0, "else the server itself would compute the others first"
        assert house.first_s[stranger.id] <= 2 * 0.3 + 3 * 0.15 + 4 * BATCH_S
        house.wait(*users)


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    cache_kind=st.sampled_from(list(CacheKind)),
    shorts=st.lists(st.tuples(st.floats(0, 1.5), st.integers(2, 190), st.booleans()), max_size=25),
    n=st.integers(500, 5000),
)
def test_whatever_comes_the_long_prompt_ends(
    cache_kind: CacheKind, shorts: list[tuple[float, int, bool]], n: int
) -> None:
    """Short requests at random: each is served soon, the long prompt in bounded time, and nothing is computed twice."""
    with Paced(cache_kind, 4, answer_s=0.05) as house:
        house.begin()
        stranger = long("stranger", n)
        client, n_new, clients = house.come(stranger), n, []
        for i, (after_s, n_short, is_left) in enumerate(shorts):
            house.loop.pass_time(after_s)
            job = short(f"short {i}", i, n_short)
            clients.append(house.come(job))
            n_new += n_short
            if is_left:
                house.loop.pass_time(0.01)
                house.leave(clients[-1])
            house.check()
        house.wait(client, *(one for one in clients if not one.cancelled()))
        busy_s = sum(work.seconds for work in house.main.works)
        n_chunks = n / 256 + 1 + len(shorts)
        assert house.first_s[stranger.id] <= busy_s + 2.0 * n_chunks
        assert house.server.n_computed <= n_new + len(shorts)


# -- streams -----------------------------------------------------------------------------------------------------------


def with_stream(cache_kind: CacheKind, **sharing: Any) -> Paced:
    """Somebody streams for ever."""
    house = Paced(cache_kind, 2, **sharing)
    house.main.answers_s[0] = 1000.0
    house.come(short("stream"))
    house.loop.pass_time(1.0)
    house.begin()
    return house


@EVERY
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_streams_get_their_share(cache_kind: CacheKind, share: float) -> None:
    """Of all the time that the prefill takes, in pauses after each chunk; so much is told in the metrics."""
    with with_stream(cache_kind, decode_share=share) as house:
        stranger = long("stranger", 6000)
        house.wait(house.come(stranger))
        works = house.main.of(1)
        took_s = works[-1].ended - works[0].began
        idle_s = took_s - sum(work.seconds for work in works)
        assert idle_s / took_s == pytest.approx(share, abs=0.02)
        gaps_s = [later.began - prefill_stats.ended for prefill_stats, later in pairwise(works)]
        assert sum(gap_s > share * 0.2 for gap_s in gaps_s) >= 9, (
            "often: a stream must not stand still for long"
        )
        assert house.metrics.prefill_pause_s._value.get() == pytest.approx(
            idle_s, abs=0.02 * len(house.server.sent)
        )
        assert house.server.n_computed == 6000


@EVERY
def test_without_streams_there_are_no_pauses(cache_kind: CacheKind) -> None:
    """All of the time is the prefill's."""
    with Paced(cache_kind, 2) as house:
        house.begin()
        stranger = long("stranger", 6000)
        house.wait(house.come(stranger))
        assert house.first_s[stranger.id] == pytest.approx(6.0, abs=0.12)
        assert house.metrics.prefill_pause_s._value.get() == 0


@EVERY
def test_when_the_last_stream_ends_the_pause_does(cache_kind: CacheKind) -> None:
    """At once, and there is no other."""
    with with_stream(cache_kind, decode_share=0.9) as house:
        client = house.come(long("stranger", 6000))
        house.until(1.5)
        assert not [op for op in house.server.pending if op.slot == 1], "it pauses"
        house.leave(next(one for one in house.clients if one is not client))
        left_at = house.now
        house.wait(client)
        works = house.main.of(1, since=left_at)
        assert works[0].began - left_at < POLL_S
        assert max(later.began - prefill_stats.ended for prefill_stats, later in pairwise(works)) < POLL_S


@EVERY
def test_a_share_of_nothing_pauses_never(cache_kind: CacheKind) -> None:
    """``decode_share`` 0: streams get what the server gives them by itself, and no prefill is stopped for them."""
    with with_stream(cache_kind, decode_share=0.0) as house:
        stranger = long("stranger", 6000)
        house.wait(house.come(stranger))
        assert house.first_s[stranger.id] == pytest.approx(6.0, abs=0.15)
        if cache_kind is not CacheKind.DENSE:
            assert house.server.sent == [(1, 5999)]


# -- chunks ---------------------------------------------------------------------------------------------------------


def test_of_a_dense_model_a_prompt_is_sent_in_pieces() -> None:
    """Beside others. Each takes about as long as a chunk, so that nobody has to be waited for; each goes on from the
    last."""
    with Paced(CacheKind.DENSE, 2, answer_s=30.0, decode_share=0.0) as house:
        house.begin()
        streams = house.come(short("streams", n=20))
        house.until(0.1)
        stranger = long("stranger", 6000)
        house.wait(house.come(stranger))
        ends = [n for slot, n in house.server.sent if slot == house.slots[stranger.id]]
        assert ends == sorted(ends)
        assert ends[-1] == 5999
        assert all(
            later - prefill_stats <= CHUNK_S * 1000 + 128 for prefill_stats, later in pairwise([0, *ends])
        )
        assert house.server.n_computed == 6020
        house.wait(streams)


@pytest.mark.parametrize(("batch", "is_cut"), [(128, False), (240, False), (1024, True)])
def test_alone_it_is_sent_as_a_whole_where_batches_are_short(batch: int, is_cut: bool) -> None:
    """As soon as it is known how many tokens the server computes at once, and if two such batches, for which a request
    that comes meanwhile might have to wait, take no longer than a chunk."""
    with Paced(CacheKind.DENSE, 2, batch=batch) as house:
        house.begin()
        house.wait(house.come(long("stranger", 6000)), house.come(short("first", n=20)))
        house.server.sent.clear()
        house.wait(house.come(long("stranger", 6000, at=2)))
        ends = [n for _, n in house.server.sent]
        assert (len(ends) > 8) if is_cut else (ends == [5999])


@pytest.mark.parametrize("n_alike", [0, 1500, 2900])
def test_a_request_beside_a_whole_prompt_waits_for_two_batches_at_most(n_alike: int) -> None:
    """One that needs little; one that begins with what was computed before; and with what is being computed."""
    with Paced(CacheKind.DENSE, 3, answer_s=0.001) as house:
        house.wait(house.come(long("first", 6000, at=2)))
        house.begin()
        stranger = long("stranger", 6000)
        client = house.come(stranger)
        house.until(2.0)
        other = Request("other", head(stranger.tokens, n_alike) + short("own").tokens)
        house.wait(house.come(other))
        # What is alike is computed by the stranger, and its snapshot saved and restored.
        still_s = max(n_alike / 1000 - 2.0, 0.0) + (5 * (ACTION_S + DISK_S) if n_alike else 0.0)
        assert house.first_s[other.id] <= 2 * BATCH_S + POLL_S + 0.1 + still_s
        assert not client.done()
        house.wait(client)
        assert house.server.n_computed <= 6000 + 100, "nothing is computed twice"
        assert house.metrics.interruptions._value.get() == 1


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_on_others_it_is_sent_as_a_whole_and_interrupted(cache_kind: CacheKind) -> None:
    """Each end of a prompt would leave checkpoints: it ends where the job has a boundary, and at the last token but
    one. It is sent once, and once more for each interruption."""
    with Paced(cache_kind, 2, answer_s=0.001) as house:
        house.begin()
        job = long("stranger", 6000, boundaries=(2000, 4500))
        client = house.come(job)
        for at in (1.0, 3.0):
            house.until(at)
            house.wait(house.come(short(f"short at {at}", round(at))))
        house.wait(client)
        slot = house.slots[job.id]
        sent = [n for to, n in house.server.sent if to == slot]
        assert sent == [2000, 2000, 4500, 4500, 5999]
        assert house.server.n_computed == 6200
        assert house.metrics.interruptions._value.get() == 2
        assert house.server.slots_[slot].checkpoints[:2] == (1996, 4496)


def test_what_a_piece_costs_is_learned() -> None:
    """To send the prompt once more: a few milliseconds. And how fast the server is, from each piece: they take about
    as long as a chunk soon."""
    with Paced(CacheKind.DENSE, 2, batch=4096) as house:  # too large to be sent whole
        house.server.token_s = 0.0001
        house.begin()
        house.wait(house.come(long("stranger", 60_000)))
        assert house.rates.prefill.seconds(0, 1000) == pytest.approx(0.1, rel=0.05)
        assert house.rates.interruption.seconds < 0.02
        ends = [n for _, n in house.server.sent]
        assert all(4500 < later - prefill_stats <= 5200 for prefill_stats, later in pairwise(ends[1:-1]))


@pytest.mark.parametrize("cache_kind", [CacheKind.SWA, CacheKind.RECURRENT])
def test_what_an_interruption_costs_is_learned(cache_kind: CacheKind) -> None:
    """The rest of the batch that is computed just then."""
    with Paced(cache_kind, 2, batch=1024, answer_s=0.001) as house:
        house.begin()
        client = house.come(long("stranger", 40_000))
        for i in range(15):
            house.until(0.1 + 2.05 * i)
            house.wait(house.come(short(f"short {i}", i)))
        assert 0.3 < house.rates.interruption.seconds < 1.1
        assert house.rates.prefill.seconds(0, 1000) == pytest.approx(1.0, rel=0.05)
        house.wait(client)


def test_one_that_is_nearly_through_is_not_interrupted() -> None:
    """Once it was, it would be idle no sooner than at its end."""
    with Paced(CacheKind.RECURRENT, 2) as house:
        house.begin()
        client = house.come(long("stranger", 2000))
        house.until(1.97)
        house.wait(house.come(short("short")), client)
        assert house.server.sent == [(0, 1999)]
        assert house.metrics.interruptions._value.get() == 0
