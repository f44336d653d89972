"""The classes of the fake llama-server: slots, tasks, and the results that a task sends to its client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from tests.support.fake_model import BadInput, unpack


class State(Enum):
    IDLE = "IDLE"
    STARTED = "STARTED"
    PREFILL = "PREFILL"
    WAITS = "WAITS"  # one of the n answers, until the prompt is through
    DECODE = "DECODE"


@dataclass(frozen=True, slots=True)
class Times:
    """What a task has done when it sent a result: an earlier event must not show later steps."""

    n_computed: int
    n_predicted: int
    prompt_s: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Begin:
    index: int


@dataclass(frozen=True, slots=True)
class Progress:
    index: int
    total: int
    cache: int
    processed: int
    times: Times


@dataclass(frozen=True, slots=True)
class Token:
    index: int
    id: int
    text: str
    times: Times
    top: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    index: int
    stop_type: str
    times: Times


@dataclass(frozen=True, slots=True)
class Failed:
    index: int
    error: BadInput


Result = Begin | Progress | Token | Done | Failed


@dataclass(eq=False)
class Task:
    """One prompt to complete. ``slot`` is what the body asked for; ``landed`` is where it ran."""

    id: int
    index: int
    tokens: bytes
    n_predict: int
    results: asyncio.Queue[Result | None]
    slot: int | None = None
    cache_prompt: bool = True
    progress: bool = False
    n_probs: int = 0
    stop: tuple[str, ...] = ()
    user_marks: tuple[int, ...] = ()  # where user messages begin: known to the chat routes only
    children: list[Task] = field(default_factory=list)
    parent: Task | None = None
    landed: int | None = None
    was_deferred: bool = False
    is_behind_its_own: bool = False  # deferred for another prompt of the same array, as all of them are
    cancelled: bool = False
    ended: bool = False
    n_cache: int = 0
    n_computed: int = 0
    generated: list[int] = field(default_factory=list)
    n_told: int = 0  # letters of the answer that were streamed, or could have been
    tops: list[tuple[dict[str, Any], ...]] = field(default_factory=list)
    prompt_s: float = 0.0
    predicted_s: float = 0.0
    truncated: bool = False
    stopping_word: str = ""
    fails: tuple[int, BadInput] | None = None  # a fault on order: after so many tokens

    @property
    def n_prompt(self) -> int:
        return len(self.tokens) // 4

    def times(self) -> Times:
        return Times(self.n_computed, len(self.generated), self.prompt_s, self.predicted_s)

    def ids(self) -> list[int]:
        return unpack(self.tokens)


@dataclass(eq=False)
class Call:
    """Something short that runs between two steps: a slot action, or a question."""

    run: Callable[[], Any]
    future: asyncio.Future[Any]
    slot: int | None = None  # waits for this slot to be idle
    name: str = ""
    cost_s: Callable[[Any], float] = lambda _: 0.0


class FakeSlot:
    """A slot, and what it holds: ``tokens`` as bytes of int32."""

    def __init__(self, number: int) -> None:
        self.id = number
        self.state = State.IDLE
        self.tokens = b""
        self.checkpoints: list[int] = []
        self.lowest = 0  # with a sliding window: the lowest position whose KV is still there
        self.origins: frozenset[str] = frozenset()
        self.task: Task | None = None
        self.last_task: Task | None = None
        self.last_used = -1
        self.was_erased = False  # the last thing that happened to this slot was an erase
        self.sampled: int | None = None

    @property
    def is_processing(self) -> bool:
        return self.state is not State.IDLE

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) // 4

    def clear(self) -> None:
        self.tokens, self.checkpoints, self.origins, self.lowest = b"", [], frozenset(), 0

    def cut(self, n_tokens: int) -> None:
        self.tokens = self.tokens[: 4 * n_tokens]
        self.checkpoints = [at for at in self.checkpoints if at <= n_tokens]
        if not n_tokens:
            self.origins = frozenset()

    def __repr__(self) -> str:
        return f"<FakeSlot {self.id} {self.state.value} {self.n_tokens} tok>"


@dataclass(frozen=True)
class Shape:
    """What a llama-server was started with."""

    n_slots: int = 4
    n_ctx: int = 16384
    batch: int = 2048
    ubatch: int = 512
    kind: str = "dense"  # or "swa", "recurrent"
    window: int = 512  # of the sliding kind
    sps: float = 0.10
    unified: bool = False  # unified KV with idle slots cleared: launching any task clears every idle slot
    checkpoints_in_file: bool = True  # False: builds up to b11434
    stale_checkpoints: bool = False  # b9713: neither erase nor restore takes a slot's checkpoints away
    bytes_per_token: int = 64
    answer_tokens: int = 16  # the length of an answer that the client does not limit
