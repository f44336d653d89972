"""Where several conversations part."""

from __future__ import annotations

from collections.abc import Callable

from llamaslot.backend.snapshot_candidates import branch_of
from llamaslot.cache.ids import MIN_SHARED_TOKENS, common, pack

SYSTEM = pack(range(1000))
PROMPT = SYSTEM + pack(range(5000, 5200))


def holders(*others: bytes) -> list[tuple[int, Callable[[], bytes]]]:
    return [(common(PROMPT, tokens), lambda tokens=tokens: tokens) for tokens in others]  # type: ignore[misc]


def own(first: int, n: int = 300) -> bytes:
    return pack(range(first, first + n))


def test_two_others_part_where_their_system_prompt_ends() -> None:
    """They share it with the prompt, and nothing more."""
    assert branch_of(holders(SYSTEM + own(10_000), SYSTEM + own(20_000))) == 1000


def test_one_other_is_not_enough() -> None:
    """What it shares may be chance, and what it holds can be cut."""
    assert branch_of(holders(SYSTEM + own(10_000))) == 0
    assert branch_of([]) == 0


def test_a_slot_and_its_snapshot_are_one_conversation() -> None:
    """Also when the slot has gone further."""
    assert branch_of(holders(SYSTEM + own(10_000), SYSTEM + own(10_000, 900))) == 0


def test_the_first_words_of_a_question_are_no_part_of_it() -> None:
    """One of the two shares three more tokens with the prompt."""
    assert branch_of(holders(SYSTEM + PROMPT[4000:4012] + own(10_000), SYSTEM + own(20_000))) == 1000


def test_its_own_conversation_is_not_what_others_share() -> None:
    """It goes on from 1,100 tokens of its own; the others know 1,000 of them."""
    assert branch_of(holders(PROMPT[: 4 * 1100], SYSTEM + own(10_000), SYSTEM + own(20_000))) == 1000


def test_what_the_prompt_only_goes_on_from_is_no_other_conversation() -> None:
    """Its own slot and its own snapshot, and what was answered there."""
    so_far = PROMPT[: 4 * 1100]
    assert branch_of(holders(so_far, so_far, so_far + own(10_000, 50))) == 0


def test_short_prefixes_are_none() -> None:
    """Every prompt begins with the same role."""
    short = PROMPT[: 4 * (MIN_SHARED_TOKENS - 1)]
    assert branch_of(holders(short + own(10_000), short + own(20_000))) == 0
