"""What users ask: requests in rounds, their tokens as texts that are made on the spot. Read and written as files.

A trace file is JSON lines. The first is ``{"seed": 1, "name": "..."}``, each other one a request:

    {"user": 3, "round": 7, "think_s": 25.1, "conversation": 12, "kind": "follow-up",
     "keep": 12400, "add": [[88, 120], [89, 700]], "answer": [90, 350]}

``keep`` tokens of what the conversation has had so far (its last prompt and the answer to it) are the beginning of
the prompt; behind them come the texts of ``add``, each a key and how many of its first tokens. Requests of one user
and round are sent at once, ``think_s`` after the last answer of its previous round (in its first round: after the
start).
"""

from __future__ import annotations

import enum
import functools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson

VOCABULARY = 131_072


class Turn(enum.StrEnum):
    """What kind of request it is. An edit goes back to an earlier message and branches there."""

    FIRST = "first"
    FOLLOW_UP = "follow-up"
    EDIT = "edit"
    SIDE = "side"


class Text(NamedTuple):
    """The first ``n`` tokens of the text with that key. Two keys have nothing in common."""

    key: int
    n: int


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a script; see the module for ``keep``, ``add`` and ``think_s``."""

    user: int
    round: int
    think_s: float
    conversation: int
    kind: Turn
    keep: int
    add: tuple[Text, ...]
    answer: Text

    @property
    def n_prompt(self) -> int:
        return self.keep + sum(text.n for text in self.add)

    @property
    def n_after(self) -> int:
        """Tokens of the prompt and its answer."""
        return self.n_prompt + self.answer.n

    def to_json(self) -> dict[str, object]:
        return {
            "user": self.user,
            "round": self.round,
            "think_s": round(self.think_s, 3),
            "conversation": self.conversation,
            "kind": self.kind.value,
            "keep": self.keep,
            "add": [list(text) for text in self.add],
            "answer": list(self.answer),
        }


@dataclass(frozen=True)
class Trace:
    """``requests`` in the order of users and rounds."""

    name: str
    seed: int
    requests: tuple[TraceRequest, ...]

    @functools.cached_property
    def rounds(self) -> dict[int, list[list[TraceRequest]]]:
        """For each user its rounds in order."""
        users: dict[int, dict[int, list[TraceRequest]]] = {}
        for request in self.requests:
            users.setdefault(request.user, {}).setdefault(request.round, []).append(request)
        return {user: [rounds[i] for i in sorted(rounds)] for user, rounds in sorted(users.items())}

    @functools.cached_property
    def conversations(self) -> dict[int, list[TraceRequest]]:
        """For each conversation its requests in their order."""
        found: dict[int, list[TraceRequest]] = {}
        for rounds in self.rounds.values():
            for request in (request for requests in rounds for request in requests):
                found.setdefault(request.conversation, []).append(request)
        return found

    def n_system(self, conversation: int) -> int:
        """Tokens of system part and tools: all texts that its first prompt begins with but the last."""
        return sum(text.n for text in self.conversations[conversation][0].add[:-1])

    @property
    def n_final(self) -> int:
        """Tokens of all conversations at their ends, small requests left out: what "all contexts" are."""
        lasts = (requests[-1] for requests in self.conversations.values())
        return sum(last.n_after for last in lasts if last.kind is not Turn.SIDE)

    def check(self) -> None:
        """Raise ValueError for a request that keeps more than its conversation has, or comes from two users."""
        for requests in self.conversations.values():
            n = 0
            for request in requests:
                if request.keep > n or request.user != requests[0].user or not request.n_prompt:
                    raise ValueError(f"conversation {request.conversation}, round {request.round}")
                n = request.n_after

    def text(self, text: Text) -> bytes:
        """The tokens of a text; the shorter one of two with the same key is the beginning of the longer one."""
        return _text(self.seed, text.key, text.n)

    def write(self, path: Path) -> None:
        lines = [{"name": self.name, "seed": self.seed}, *(request.to_json() for request in self.requests)]
        path.write_bytes(b"".join(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines))

    @classmethod
    def read(cls, path: Path) -> Trace:
        """Raises OSError, and ValueError or KeyError for what is no trace."""
        lines = map(orjson.loads, path.read_bytes().splitlines())
        head = next(lines)
        trace = cls(head["name"], head["seed"], tuple(_requests(lines)))
        trace.check()
        return trace


def _requests(lines: Iterable[dict[str, Any]]) -> Iterator[TraceRequest]:
    for line in lines:
        add = tuple(Text(*text) for text in line.pop("add"))
        yield TraceRequest(kind=Turn(line.pop("kind")), add=add, answer=Text(*line.pop("answer")), **line)


def _text(seed: int, key: int, n: int) -> bytes:
    # One draw of 32 n bits: shorter draws of the same generator are its beginning.
    bits = random.Random(seed << 64 | key).getrandbits(32 * n) if n else 0
    return (bits & _mask(n)).to_bytes(4 * n, "little")


@functools.lru_cache(maxsize=64)
def _mask(n: int) -> int:
    """Cuts each of ``n`` words of 32 bits to a token of the vocabulary."""
    return int.from_bytes((VOCABULARY - 1).to_bytes(4, "little") * n, "little")
