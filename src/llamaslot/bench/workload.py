"""The workload of a benchmark: which user asks when, and how long prompts and answers are. And its run on a server,
with texts from a folder or made up.

A workload is made from a few numbers (``team``) or from a journal (``recorded``). It has no text.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from llamaslot.bench.result import Request, Run
from llamaslot.bench.target import BenchError, Target

#: Tokens that templates put around each message, at most.
_AROUND = 16
#: A prompt of a journal goes on with a conversation if it is at most so many tokens longer, or half as long again.
_MOST_NEW = 4000
#: A text shorter than this is none that a user would send.
_LEAST_NEW = 8


class Turn(Struct, frozen=True):
    """One request of a conversation. ``n_new``: tokens that its question adds to the conversation; ``n_answer``: most
    tokens of the answer. It is sent ``think_s`` after the end of the previous answer, but not before ``after_s`` after
    the previous request was sent. For the first turn both times count from the beginning of the run.
    """

    n_new: int
    n_answer: int
    think_s: float = 0.0
    after_s: float = 0.0


class Conversation(Struct, frozen=True):
    """The turns of one conversation of a user. Each request contains all messages before it."""

    user: str
    turns: tuple[Turn, ...]

    def n_tokens(self) -> int:
        """Return the most tokens that the last prompt and its answer can have, without the shared system prompt."""
        return sum(turn.n_new + turn.n_answer + 2 * _AROUND for turn in self.turns)


class Workload(Struct, frozen=True):
    """The conversations of all users of a benchmark. ``n_shared``: tokens of the system prompt with which all of them
    begin.
    """

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
        """The most tokens that the longest conversation takes in a slot."""
        return self.n_shared + _AROUND + max(conversation.n_tokens() for conversation in self.conversations)

    @property
    def n_prompt(self) -> int:
        """The approximate number of tokens of all prompts together: those that a server without a cache computes."""
        n = 0
        for conversation in self.conversations:
            so_far = self.n_shared
            for turn in conversation.turns:
                so_far += turn.n_new
                n += so_far
                so_far += turn.n_answer
        return n

    def fitted(self, n_ctx: int) -> Workload:
        """Return the workload with texts so short that every conversation fits into 95 % of ``n_ctx`` tokens: the
        lengths are estimates. Returns this workload if it fits already. Raises ValueError if the answers alone leave no
        room.
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
    """Return a workload of ``users`` who each have one conversation of ``turns`` requests. The first prompt has 0.5 to
    1.5 times ``context`` tokens, of these ``shared`` in a system prompt that all users have. Each later question has
    ``question`` tokens, and follows the answer after ``think_s`` seconds on average.
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
    """Return a workload with the users of a journal, and the times and lengths of their prompts. Every answer has
    ``answer`` tokens, as a journal does not have their lengths. Raises ValueError if no request in it has a user.

    Which prompts belong to one conversation is guessed from their lengths alone, not from what was reused at that time.
    Times without any request are shortened to ``longest_pause_s``.
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


# -- a run -------------------------------------------------------------------------------------------------------

_PROBE_CHARS = 3000


async def chars_per_token(target: Target, texts: Texts, salt: str) -> float:
    """Return how many characters of ``texts`` are one token of ``target``, from two small requests. Raises BenchError
    if the server does not answer them, or reports no token counts.
    """
    lengths = []
    # The template's own tokens cancel out.
    for number, n_chars in enumerate((_PROBE_CHARS // 6, _PROBE_CHARS)):
        text = texts.take(n_chars, random.Random(f"{salt} {number}"))
        for _ in range(2):
            request = Request("probe", 1, 0.0)
            await target.ask([{"role": "user", "content": text}], 2, request, time.perf_counter())
            if not request.error:
                break
        if request.error:
            raise BenchError(f"{target.base} does not answer a chat: {request.error}")
        if not request.n_prompt:
            raise BenchError(f"{target.base} counts no tokens: its answers have no usage")
        lengths.append(request.n_prompt)
    n_tokens = lengths[1] - lengths[0]
    return (_PROBE_CHARS - _PROBE_CHARS // 6) / n_tokens if n_tokens > 0 else 4.0


class Measurement:
    """One run of a workload on ``target``. Each prompt begins with ``salt``, so that no server has any of them in its
    cache. ``chars``: characters per token. ``on_answer`` is called with each request when its answer has ended.
    """

    def __init__(
        self,
        target: Target,
        workload: Workload,
        texts: Texts,
        *,
        chars: float,
        salt: str,
        on_answer: Callable[[Request], None],
    ) -> None:
        self._target, self._workload, self._texts = target, workload, texts
        self._chars, self._salt, self._on_answer = chars, salt, on_answer
        self._requests: list[Request] = []
        self._numbers = {
            user: i for i, user in enumerate(dict.fromkeys(c.user for c in workload.conversations))
        }

    async def run(self) -> Run:
        """Run the whole workload, and return its requests with their times. Raises ContextTooSmall. Canceling ends all
        requests.
        """
        before = await self._target.computed()
        self._began = time.perf_counter()
        shared = self._text(self._workload.n_shared, "all")
        tasks = []
        try:
            async with asyncio.TaskGroup() as group:
                for number, conversation in enumerate(self._workload.conversations):
                    tasks.append(group.create_task(self._converse(conversation, number, shared)))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        makespan_s = time.perf_counter() - self._began
        after = await self._target.computed()
        self._requests.sort(key=lambda request: request.sent_s)
        if before is None or after is None or after[1] < before[1]:
            return Run(makespan_s, self._requests)
        return Run(makespan_s, self._requests, after[1] - before[1], after[0])

    async def _converse(self, conversation: Conversation, number: int, shared: str) -> None:
        messages = [{"role": "system", "content": f"Run {self._salt}. {shared}"}]
        sent_s = ended_s = 0.0
        n_known = 0
        for count, turn in enumerate(conversation.turns, 1):
            due_s = max(sent_s + turn.after_s, ended_s + turn.think_s)
            await asyncio.sleep(max(0.0, due_s - (time.perf_counter() - self._began)))
            question = f"{number}.{count} {self._text(turn.n_new, f'{number} {count}')}"
            messages.append({"role": "user", "content": question})
            sent_s = time.perf_counter() - self._began
            request = Request(conversation.user, count, sent_s, n_unlimited=n_known)
            self._requests.append(request)
            said = await self._target.ask(
                messages, turn.n_answer, request, self._began, self._numbers[conversation.user]
            )
            ended_s = request.end_s
            messages.append({"role": "assistant", "content": said or "(no answer)"})
            if not request.error:
                n_known = request.n_prompt + max(0, request.n_answer - 1)  # the last token is not computed
            self._on_answer(request)

    def _text(self, n_tokens: int, which: str) -> str:
        return self._texts.take(round(n_tokens * self._chars), random.Random(f"{self._salt} {which}"))


#: Characters of a folder that are used, at most.
_MOST_READ = 64 << 20
_SUFFIXES, _NOUNS, _VERBS, _ADJECTIVES = map(
    str.split,
    (
        ".c .cc .cpp .cs .css .go .h .hpp .html .java .js .json .kt .lua .md .php .py .rb .rs .rst .scala .sh .sql"
        " .swift .toml .ts .tsx .txt .yaml .yml",
        "cache slot server request token prompt answer model file table index stream client user queue batch context"
        " prefix error result value function module test buffer line system message record key path branch commit",
        "reads writes keeps moves returns checks sends loads saves copies finds counts waits opens closes compares",
        "first last long short empty shared local remote small large old new slow quick open busy idle",
    ),
)


class Texts:
    """Texts for prompts: pieces of the files in ``folder``, or sentences of random words if it is None. Raises
    ValueError if the folder has less than 1,000 characters of text.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._source = _read(folder) if folder is not None else ""

    def take(self, n_chars: int, rng: random.Random) -> str:
        """Return a text of exactly ``n_chars`` characters, chosen with ``rng``."""
        if not self._source:
            return _made_up(n_chars, rng)
        pieces, n = [], 0
        while n < n_chars:
            start = rng.randrange(len(self._source))
            piece = self._source[start : start + n_chars - n]
            pieces.append(piece)
            n += len(piece)
        return "".join(pieces)


def _read(folder: Path) -> str:
    files = (
        [folder]
        if folder.is_file()
        else sorted(path for path in folder.rglob("*") if path.suffix in _SUFFIXES)
    )
    pieces, n = [], 0
    for path in files:
        if n >= _MOST_READ:
            break
        if path.is_file():
            text = path.read_text(errors="ignore")
            pieces.append(f"\n# {path.name}\n{text}")
            n += len(text)
    if n < 1000:
        raise ValueError(f"{folder}: less than 1,000 characters of text are in it")
    return "".join(pieces)


def _made_up(n_chars: int, rng: random.Random) -> str:
    sentences, n = [], 0
    while n < n_chars:
        adjectives, nouns = rng.choices(_ADJECTIVES, k=2), rng.choices(_NOUNS, k=2)
        does = f"{rng.choice(_VERBS)} {rng.randrange(1000)}"
        sentence = f"The {adjectives[0]} {nouns[0]} {does} of the {adjectives[1]} {nouns[1]}. "
        sentences.append(sentence)
        n += len(sentence)
    return "".join(sentences)[:n_chars]
