"""Runs a workload on a server, with texts from a folder or made up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path

from llamaslot.bench.result import Request, Run
from llamaslot.bench.target import BenchError, Target
from llamaslot.bench.workload import Conversation, Workload

_PROBE_CHARS = 3000


async def chars_per_token(target: Target, texts: Texts, salt: str) -> float:
    """How many characters of these texts are a token. Asks for one token. Raises BenchError if it is not answered."""
    lengths = []
    for number, n_chars in enumerate(
        (_PROBE_CHARS // 6, _PROBE_CHARS)
    ):  # the template's own tokens cancel out
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
    """One run of a workload. Nothing in its texts was ever sent before: ``salt`` begins each prompt.

    ``on_answer`` is called after each one.
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
        """Raises ContextTooSmall. Canceling ends all requests."""
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
    """Characters of a folder, or sentences of random words. ``folder`` without any text raises ValueError."""

    def __init__(self, folder: Path | None = None) -> None:
        self._source = _read(folder) if folder is not None else ""

    def take(self, n_chars: int, rng: random.Random) -> str:
        """A text of exactly so many characters."""
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
