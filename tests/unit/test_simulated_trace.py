"""The default trace has the numbers that it should have."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import pairwise
from statistics import mean, median

import pytest

from bench.simulator.generate import Agents, Recipe, crew, generate, scaled
from bench.simulator.trace import Trace, TraceRequest, Turn

pytestmark = pytest.mark.xdist_group("simulated trace")  # the traces are made once


@functools.cache
def trace(seed: int = 1) -> Trace:
    return generate(seed)


def talks() -> list[list[TraceRequest]]:
    """Conversations without small requests, of three seeds."""
    return [
        requests
        for seed in (1, 2, 3)
        for requests in trace(seed).conversations.values()
        if requests[0].kind is not Turn.SIDE
    ]


def share(of: Turn) -> float:
    kinds = Counter(request.kind for seed in (1, 2, 3) for request in trace(seed).requests)
    return kinds[of] / kinds.total()


def test_sixty_users_arrive_in_the_first_hour() -> None:
    """Each at a time of his own."""
    arrivals = [rounds[0][0].think_s for rounds in trace().rounds.values()]
    assert len(arrivals) == 60
    assert max(arrivals) < 3600
    assert mean(arrivals) == pytest.approx(1800, rel=0.25)


def test_one_request_in_ten_is_a_small_request() -> None:
    """Of 300 tokens that nobody has ever seen, in a conversation of its own."""
    assert share(Turn.SIDE) == pytest.approx(0.1, rel=0.1)
    sides = [request for request in trace().requests if request.kind is Turn.SIDE]
    assert {request.n_prompt for request in sides} == {300}
    assert all(len(trace().conversations[request.conversation]) == 1 for request in sides)


def test_one_turn_in_twelve_goes_back() -> None:
    """Of those that have something to go back to."""
    turns = [request for talk in talks() for request in talk[2:]]
    assert mean(request.kind is Turn.EDIT for request in turns) == pytest.approx(1 / 12, rel=0.1)


def test_an_edit_keeps_a_part_and_adds_one_message() -> None:
    """It goes back behind an earlier answer."""
    for talk in talks():
        for before, request in pairwise(talk):
            if request.kind is Turn.EDIT:
                assert request.keep < before.n_prompt
                assert len(request.add) == 1


def test_one_user_in_ten_sends_five_at_once() -> None:
    """In five conversations; the others send one, in one to three of them."""
    sizes = [{len(requests) for requests in rounds} for rounds in trace().rounds.values()]
    assert sizes.count({5}) == 6
    assert sizes.count({1}) == 54


def test_conversations_have_three_to_sixty_turns_in_the_mean_fourteen() -> None:
    """As drawn: many end before, at 60,000 tokens or with the day."""
    trace = generate(1, Recipe(n_users=20, n_end=10**9, day_s=100_000.0, p_pause=0.0))
    # Those of each user's first day, so that long ones are not missing because the time was over.
    lengths = [
        len(talk)
        for talk in trace.conversations.values()
        if talk[0].kind is not Turn.SIDE and talk[0].round < 100
    ]
    assert min(lengths) == 3
    assert max(lengths) <= 60
    assert mean(lengths) == pytest.approx(14, rel=0.1)


def test_no_conversation_is_longer_than_sixty_thousand_tokens() -> None:
    """And some come near to it."""
    longest = [max(request.n_after for request in talk) for talk in talks()]
    assert max(longest) <= 60_000
    assert sum(n > 50_000 for n in longest) > 20


def test_contexts_start_with_a_system_prompt_and_a_lognormal_first_message() -> None:
    """8,000 to 14,000 tokens that five agents share, then 2,000 to 30,000 own ones with a median of 9,000."""
    own = [talk[0].add[-1].n for talk in talks()]
    systems = {talk[0].n_prompt - talk[0].add[-1].n for talk in talks()}
    assert 2_000 <= min(own) < max(own) <= 30_000
    assert median(own) == pytest.approx(9_000, rel=0.07)
    assert 8_000 <= min(systems) <= max(systems) <= 14_000
    assert len(systems) <= 15


def test_turns_add_a_median_of_seven_hundred_and_one_in_ten_eight_thousand() -> None:
    """The message is the last that a follow-up adds."""
    added = [request.add[-1].n for talk in talks() for request in talk[1:]]
    assert mean(n == 8_000 for n in added) == pytest.approx(0.1, rel=0.15)
    assert median(n for n in added if n != 8_000) == pytest.approx(700, rel=0.05)


def test_answers_have_fifty_to_two_thousand_tokens() -> None:
    """Short ones more often."""
    answers = [request.answer.n for talk in talks() for request in talk]
    assert 50 <= min(answers) < max(answers) <= 2_000
    assert median(answers) == pytest.approx(270, rel=0.1)


def test_people_think_for_twenty_five_seconds_and_one_in_fifteen_goes_away() -> None:
    """For 10 to 90 minutes. (One that lasts until the evening is in no script.)"""
    thinks = [
        requests[0].think_s
        for seed in (1, 2, 3)
        for rounds in trace(seed).rounds.values()
        for requests in rounds[1:]
    ]
    pauses = [seconds for seconds in thinks if seconds >= 600]
    assert len(pauses) / len(thinks) == pytest.approx(1 / 15, rel=0.15)
    assert max(pauses) <= 5_400
    assert median(seconds for seconds in thinks if seconds < 600) == pytest.approx(25, rel=0.05)


def test_agents_are_zipf_and_one_of_them_changes_once() -> None:
    """From some token on: the text before it is still shared."""
    firsts = [request for request in trace().requests if request.kind is Turn.FIRST]
    uses = Counter(request.add[0].key for request in firsts)
    assert set(uses) == {0, 1, 2, 3, 4}
    assert uses[0] > 1.5 * uses[1] > uses[4]
    changed = {request.add[:2] for request in firsts if len(request.add) == 3}
    assert len(changed) == 1
    ((kept, new),) = changed
    lengths = {
        request.add[0].n for request in firsts if request.add[0].key == kept.key and len(request.add) == 2
    }
    assert lengths == {kept.n + new.n}


def test_half_of_the_answers_come_back_reworded() -> None:
    """Then the prefix ends somewhere inside the last answer."""
    kept = [
        (request.keep, before.n_prompt, before.n_after)
        for talk in talks()
        for before, request in pairwise(talk)
        if request.kind is Turn.FOLLOW_UP
    ]
    assert mean(keep < after for keep, _, after in kept) == pytest.approx(0.5, rel=0.1)
    assert all(n_prompt <= keep <= after for keep, n_prompt, after in kept)


def test_a_scaled_trace_has_so_many_times_the_users() -> None:
    """A thousand for 64 slots, say."""
    assert scaled(16).n_users == 960
    assert len(generate(1, scaled(2, Recipe(n_users=3, day_s=600.0, arrival_s=60.0))).rounds) == 6


def test_the_day_is_the_same_for_each_agent_before_it_changes() -> None:
    """A conversation that goes on keeps its old text."""
    agents = Agents((100, 200), (1.0, 0.5), changing=1, changes_s=50.0, changes_at=60)
    assert agents.texts(1, 49.0) == ((1, 200),)
    assert agents.texts(1, 50.0) == ((1, 60), (3, 140))
    assert agents.texts(0, 60.0) == ((0, 100),)


def test_some_conversations_begin_together_if_that_is_wanted() -> None:
    """Four at once with the same system prompt and a message each, which go on in step and then end."""
    recipe = Recipe(n_users=20, p_together=0.02)
    rounds = [requests for one in generate(1, recipe).rounds.values() for requests in one]
    begun = [requests for requests in rounds if len(requests) == 4 and requests[0].kind is Turn.FIRST]
    assert len(begun) == pytest.approx(0.02 * len(rounds), rel=0.4)
    assert all(len({request.add[:-1] for request in requests}) == 1 for requests in begun)
    assert all(len({request.add[-1] for request in requests}) == 4 for requests in begun)
    talks = generate(1, recipe).conversations
    lengths = {tuple(len(talks[request.conversation]) for request in requests) for requests in begun}
    assert lengths <= {(n,) * 4 for n in range(1, 5)}


def test_without_them_the_trace_is_what_it_was() -> None:
    """Figures of before can be compared: those who begin together are drawn by themselves."""
    assert (len(trace().requests), trace().n_final) == (7555, 24_443_954)


def test_a_crew_is_there_for_some_hours() -> None:
    """They arrive in the first eighth of these."""
    recipe = crew(20, 2.0)
    assert (recipe.n_users, recipe.day_s, recipe.arrival_s) == (20, 7200.0, 900.0)
