"""The special tokens of a model, learned from rendered texts: where a text may be cut without changing its tokens.

llama.cpp first splits a text at its special tokens, and tokenizes each piece between two of them separately
(src/llama-vocab.cpp, tokenizer_st_partition). So with a special token S at a position p of a text,

    tokens(text) == tokens(text up to S) + tokens(text from S on, without BOS)

and ``tokens(text up to S)`` is right for every text that is the same up to the *end* of S. Some special tokens remove
the spaces beside them (``lstrip``, ``rstrip``: those of Phi). The cut lies before S, so both texts have S behind it,
and S changes both alike.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, TypeVar

import marisa_trie  # type: ignore[import-not-found]  # compiled, without stubs

from llamaslot.cache.ids import WIDTH, Finder, count, unpack
from llamaslot.tasks import gather

T = TypeVar("T")

# Strings that look like special tokens. Most are none (<div>, [TODO]): llama-server is asked about each.
_CANDIDATE = (
    r"<[^\s<>\"'=();,]{1,64}>|\[/?[A-Z_]{2,40}\]|\[[gs]MASK\]|\[\|[^\s|\[\]]{1,40}\|\]|\]~!?b\[?\]?|\[e~\["
)
_LONGEST = 66  # characters of a candidate
_SLICE = 1 << 16  # characters that are searched at once: 0.4 ms; other tasks run between two slices
_SLICE_BYTES = 1 << 20  # of tokens that are searched at once: 2.5 ms
_LIKELY = re.compile("<[|\uff5c]|[|\uff5c]>|^</?s>$|^\\[|^\\]|turn")
_ALONE = 12  # the first 12 likely candidates are checked one by one, all others in one group
_AT_ONCE = 256  # candidates judged per text: a text full of markup must not cost hundreds of requests
_EXCERPT = 1_500  # characters on each side of a cut that is verified
_JUDGED_MAX = 5_000  # candidates remembered per user; beyond that they are judged again
_USERS_MAX = 256  # users whose special tokens are remembered separately


class TokenizeRoute(Protocol):
    """``POST /tokenize``, which returns packed tokens. With ``parse_special`` false, llama-server reads special tokens
    in ``content`` as plain text. With ``add_special`` it adds BOS (and EOS), if the model wants them.
    """

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes: ...


class TokenSpan(NamedTuple):
    """A special token in a text: its characters [start, end) and its id."""

    start: int
    end: int
    id: int


class SpecialTokens:
    """The special tokens known so far, and the strings known to be no special tokens.

    ``n_version`` grows when a special token is learned or dropped: cuts found before are then outdated. ``proved``: the
    ids of special tokens at which ``prove`` has shown that a text may be cut.
    """

    def __init__(self, server: TokenizeRoute) -> None:
        self._server = server
        self._ids: dict[str, int] = {}
        self._judged: set[str] = set()
        self._dropped: set[str] = set()
        self.proved: set[int] = set()
        self._rebuild()
        self.n_version = 0

    def __len__(self) -> int:
        return len(self._ids)

    def __repr__(self) -> str:
        return f"<Specials {' '.join(sorted(self._ids))}>"

    def _rebuild(self) -> None:
        self._trie = marisa_trie.Trie(self._ids)
        self._longest = max(map(len, self._ids), default=0)
        self._in_tokens = Finder(self._ids.values())
        self._alone: dict[str, bool] = {}  # answers of ``stands_alone``
        # A search for the first two characters of special tokens skips most of a text in C. The trie is searched only
        # where it finds some.
        heads = "|".join(re.escape(head) for head in sorted({text[:2] for text in self._ids}))
        self._heads = re.compile(heads or r"(?!)")

    def find(self, text: str, begin: int = 0) -> list[TokenSpan]:
        """The known special tokens in a text from left to right, the longest at each position, without overlap.

        ``begin``: the character to start at. If a special token starts there, the result is the same as that of the
        whole text from there on. Takes 1.2 ms for 300 kB of chat and code with 300 special tokens.
        """
        return list(self._spans(text, begin))

    def first(self, text: str, begin: int, distance: int) -> TokenSpan | None:
        """The first special token in ``text`` that starts at least ``distance`` characters after ``begin``; None if
        there is none.
        """
        return next((span for span in self._spans(text, begin) if span.start - begin >= distance), None)

    def _spans(self, text: str, position: int) -> Iterator[TokenSpan]:
        search, prefixes, ids, longest = self._heads.search, self._trie.prefixes, self._ids, self._longest
        while hit := search(text, position):
            position = hit.start()
            if matches := prefixes(text[position : position + longest]):
                special = matches[-1]  # prefixes come shortest first
                yield TokenSpan(position, position + len(special), ids[special])
                position += len(special)
            else:
                position += 1

    def id_of(self, special: str) -> int:
        """The id of a special token. Raises KeyError for an unknown one."""
        return self._ids[special]

    def stands_alone(self, special: str) -> bool:
        """True if the string is a known special token, and not the beginning or the middle of a longer one. Then it is
        that token wherever it stands in a text.
        """
        if (answer := self._alone.get(special)) is None:
            is_inside = any(special in each[:-1] for each in self._ids)
            answer = self._alone[special] = special in self._ids and not is_inside
        return answer

    async def locate(self, marks: Sequence[TokenSpan], tokens: bytes, *, may_add: bool) -> list[int] | None:
        """The index in ``tokens`` of each mark, a special token of the text. None if text and tokens do not have the
        same special tokens in the same order. With ``may_add`` the tokens may begin with BOS, which is not in the text.
        Four million tokens take 40 ms, so other tasks run meanwhile. Canceling is safe.
        """
        where, find = list[int](), self._in_tokens.find
        for begin in range(0, len(tokens), _SLICE_BYTES):
            if begin:
                await asyncio.sleep(0)
            where += [begin // WIDTH + i for i in find(tokens[begin : begin + _SLICE_BYTES])]
        if may_add and len(where) == len(marks) + 1 and where[0] == 0:
            del where[0]
        found = unpack(b"".join([tokens[i * WIDTH : (i + 1) * WIDTH] for i in where]))
        return where if found == [mark.id for mark in marks] else None

    def drop(self, special: str) -> bool:
        """Forget a special token and never learn it again, so that no text is cut at it any more. False if it was not
        known.
        """
        if self._ids.pop(special, None) is None:
            return False
        self._dropped.add(special)
        self.n_version += 1
        self._rebuild()
        return True

    async def learn(self, text: str) -> None:
        """Find out which strings in the text are special tokens, and add these. Asks the server about strings that look
        like special tokens and were not judged before. Raises what the requests raise. Canceling is safe: nothing is
        learned.

        A string is special if it is one token with ``parse_special`` and several without. Usually a text has no new
        candidates. Otherwise two requests for each likely candidate, and two for all others together, are sent at once.
        """
        seen = dict[str, None]()
        for begin in range(0, len(text), _SLICE):
            if begin:
                await asyncio.sleep(0)
            seen |= dict.fromkeys(re.findall(_CANDIDATE, text[begin : begin + _SLICE + _LONGEST]))
        candidates = [candidate for candidate in seen if candidate not in self._judged]
        if not candidates:
            return
        candidates.sort(key=lambda c: _LIKELY.search(c) is None)
        del candidates[_AT_ONCE:]
        n_likely = sum(_LIKELY.search(c) is not None for c in candidates[:_ALONE])
        groups = [[c] for c in candidates[:n_likely]] + [candidates[n_likely:]]
        answers = await gather(*(self._judge(group) for group in groups))
        learned = {special: token for answer in answers for special, token in answer.items()}
        if len(self._judged) > _JUDGED_MAX:
            self._judged = self._dropped.union(self._ids)
        fresh = {special: token for special, token in learned.items() if special not in self._judged}
        self._judged.update(candidates)
        if fresh:
            self._ids.update(fresh)
            self.n_version += 1
            self._rebuild()

    async def _judge(self, group: list[str]) -> dict[str, int]:
        """The special tokens among the strings of ``group``, with their ids. All strings are tokenized together, with
        ``parse_special`` and without. If both results are equal, none is special; else each half is judged.
        """
        if not group:
            return {}
        text = "\n".join(group)
        special, plain = await gather(
            self._server.tokenize(text, add_special=False),
            self._server.tokenize(text, add_special=False, parse_special=False),
        )
        if special == plain:
            return {}
        if len(group) == 1:
            return {text: unpack(special)[0]} if count(special) == 1 < count(plain) else {}
        middle = len(group) // 2
        left, right = await gather(self._judge(group[:middle]), self._judge(group[middle:]))
        return left | right

    async def prove(self, text: str, mark: TokenSpan) -> bool:
        """True if the text around ``mark`` gives the same tokens in one piece as when it is cut before ``mark``.

        Finds cases that the reasoning in the module's docstring does not cover: a model that appends EOS, a tokenizer
        with a state. Costs three requests of at most 3,000 characters, once per special token.
        """
        begin = max(0, mark.start - _EXCERPT)
        excerpt = text[begin : mark.end + _EXCERPT]
        whole, head, tail = await gather(
            self._server.tokenize(excerpt, add_special=True),
            self._server.tokenize(excerpt[: mark.end - begin], add_special=True),
            self._server.tokenize(excerpt[mark.start - begin :], add_special=False),
        )
        return bool(head) and unpack(head)[-1] == mark.id and head[:-WIDTH] + tail == whole


class SpecialTokensOfEach:
    """The known special tokens of each user. They are learned separately: otherwise a user could see in the time of
    a request whether another user has used the same strings before.
    """

    def __init__(self, server: TokenizeRoute) -> None:
        self._server = server
        self._known: dict[str, SpecialTokens] = {}  # the most recently used last

    def of(self, whose: str) -> SpecialTokens:
        """The special tokens that are known in the namespace ``whose``; "" is the shared one."""
        if (specials := self._known.pop(whose, None)) is None:
            specials = SpecialTokens(self._server)
        self._known[whose] = specials
        if len(self._known) > _USERS_MAX:
            del self._known[next(iter(self._known))]
        return specials
