"""What the users of a benchmark do: who asks when, and how long prompts and answers are. Without any text.

A workload is made of a few numbers (``team``) or of a journal (``recorded``).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

#: Tokens that templates put around each message, at most.
_AROUND = 16
#: A prompt of a journal goes on with a conversation if it is at most so many tokens longer, or half as long again.
_MOST_NEW = 4000
#: A text shorter than this is none that a user would send.
_LEAST_NEW = 8


class Turn(Struct, frozen=True):
    """One request. ``n_new``: tokens of text that come to the conversation; ``n_answer``: tokens of answer asked for.

    It is sent ``think_s`` after the answer before it, and ``after_s`` after that was asked for, whichever is later;
    for the first turn both count from the beginning.
    """

    n_new: int
    n_answer: int
    think_s: float = 0.0
    after_s: float = 0.0


class Conversation(Struct, frozen=True):
    """Turns of one user, each with all that went before."""

    user: str
    turns: tuple[Turn, ...]

    def n_tokens(self) -> int:
        """Of the last prompt and its answer, at most; without the shared system prompt."""
        return sum(turn.n_new + turn.n_answer + 2 * _AROUND for turn in self.turns)


class Workload(Struct, frozen=True):
    """``n_shared``: tokens of the system prompt with which all conversations begin."""

    conversations: tuple[Conversation, ...]
    n_shared: int

    @property
    def n_requests(self) -> int:
        return sum(len(conversation.turns) for conversation in self.conversations)

    @property
    def n_users(self) -> int:
        return len({conversation.user for conversation in self.conversations})

    @property
    def n_context(self) -> int:
        """Tokens that the longest conversation takes in a slot."""
        return self.n_shared + _AROUND + max(conversation.n_tokens() for conversation in self.conversations)

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts together, roughly: what a server without any cache computes."""
        n = 0
        for conversation in self.conversations:
            so_far = self.n_shared
            for turn in conversation.turns:
                so_far += turn.n_new
                n += so_far
                so_far += turn.n_answer
        return n

    def fitted(self, n_ctx: int) -> Workload:
        """The same with shorter texts, so that every conversation fits into ``n_ctx`` tokens, with room for an estimate
        of lengths that is a little wrong. Raises ValueError if the answers alone leave no room.
        """
        room = int(n_ctx * 0.95)
        if self.n_context <= room:
            return self
        factor = 1.0
        for conversation in self.conversations:
            n_fixed = sum(turn.n_answer + 2 * _AROUND for turn in conversation.turns) + _AROUND
            n_text = self.n_shared + sum(turn.n_new for turn in conversation.turns)
            n_least = _LEAST_NEW * (len(conversation.turns) + 1)
            if n_fixed + n_least > room:
                raise ValueError(
                    f"{len(conversation.turns)} turns with answers of {conversation.turns[0].n_answer} tokens do not "
                    f"fit into a context of {n_ctx:,} tokens: fewer --turns, or a smaller --answer"
                )
            factor = min(factor, (room - n_fixed - n_least) / n_text)
        return Workload(
            tuple(
                replace(
                    conversation,
                    turns=tuple(
                        replace(turn, n_new=_scaled(turn.n_new, factor)) for turn in conversation.turns
                    ),
                )
                for conversation in self.conversations
            ),
            int(self.n_shared * factor),
        )


def _scaled(n: int, factor: float) -> int:
    return max(_LEAST_NEW, int(n * factor))


def team(
    *,
    users: int,
    turns: int,
    context: int,
    question: int,
    answer: int,
    think_s: float,
    shared: int,
    seed: int,
) -> Workload:
    """Users who each have one conversation: a first prompt of half to one and a half times ``context`` tokens, of these
    ``shared`` in a system prompt of all, then questions of ``question`` tokens after ``think_s`` seconds on average.
    """
    rng = random.Random(seed)
    sizes = [context * (0.5 + i / max(1, users - 1)) for i in range(users)] if users > 1 else [float(context)]
    rng.shuffle(sizes)
    conversations = []
    for number, size in enumerate(sizes, 1):
        first = Turn(max(_LEAST_NEW, int(size) - shared), answer, think_s=rng.uniform(0, think_s))
        rest = (
            Turn(question, answer, think_s=min(rng.expovariate(1 / think_s), 4 * think_s) if think_s else 0.0)
            for _ in range(turns - 1)
        )
        conversations.append(Conversation(f"user{number}", (first, *rest)))
    return Workload(tuple(conversations), shared)


def recorded(journal: Iterable[Mapping[str, Any]], *, answer: int, longest_pause_s: float) -> Workload:
    """The shape of what a journal has: its users, the times and lengths of their prompts. Answers, which it does not
    tell, have ``answer`` tokens. Raises ValueError if it has no request of a user.

    Which prompts belong to one conversation is guessed by their lengths, whatever was found again at that time. Times
    in which nothing was asked are shortened to ``longest_pause_s``.
    """
    asked = sorted(
        (float(decision["at"]), str(decision["user"]), int(decision["n_tokens"]))
        for decision in journal
        if decision.get("user") and int(decision.get("n_tokens") or 0) > 0
    )
    if not asked:
        raise ValueError("no request of a user is in it")
    began: dict[tuple[str, int], list[tuple[float, Turn]]] = {}
    lengths: dict[str, dict[int, int]] = defaultdict(dict)  # of each user's conversations: tokens so far
    now, last_at = 0.0, asked[0][0]
    for at, user, n_tokens in asked:
        now, last_at = now + min(at - last_at, longest_pause_s), at
        parents = [
            (n, number) for number, n in lengths[user].items() if 0 <= n_tokens - n <= max(_MOST_NEW, n // 2)
        ]
        n_before, number = max(parents, default=(0, len(lengths[user])))
        turns = began.setdefault((user, number), [])
        since = turns[-1][0] if turns else 0.0
        n_new = max(_LEAST_NEW, n_tokens - n_before - _AROUND)
        turns.append((now, Turn(n_new, answer, after_s=now - since)))
        lengths[user][number] = n_before + n_new + answer
    names = {user: f"user{i}" for i, user in enumerate(lengths, 1)}  # no person's name goes into a report
    return Workload(
        tuple(
            Conversation(names[user], tuple(turn for _, turn in turns)) for (user, _), turns in began.items()
        ),
        0,
    )
