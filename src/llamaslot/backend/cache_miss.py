"""Explains cache misses: finds the place where a long prompt diverges from the cached prompt that it could have
continued.

Two different conversations diverge too, which is normal and costs nothing. A divergence is expensive if the text
behind it is the same in both prompts: a date in the system prompt, an id, tools in another order, an old message that
was shortened. So the tokens behind the divergence are compared.

The search runs beside the request, once the request has its slot, and only if many tokens must be computed although
many are cached.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from itertools import islice
from typing import Any

from msgspec import Struct

from llamaslot.backend.lease import Lease
from llamaslot.cache.content import Content
from llamaslot.cache.ids import NEGLIGIBLE_TOKENS, WIDTH, common, count, head
from llamaslot.errors import LlamaslotError
from llamaslot.formats.base import Format
from llamaslot.formats.prompt_location import Whereabouts, whereabouts
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import BackendMetrics
from llamaslot.scheduling.request import Request
from llamaslot.tasks import TaskOwner
from llamaslot.tokens.tokenizer import Prompt

log = logging.getLogger(__name__)

#: A miss is reported only if at least so many tokens are computed again because of it.
LOST_MIN = 1024
#: A miss is not reported if this part of the prompt is reused.
ENOUGH = 0.9

_WINDOW = 24  # 24 equal tokens in a row are not chance
_MOST_PROBES = 1000  # searches for such a window; each takes 0.05 ms in a context of 60,000 tokens
_SAME_CONVERSATION = 0.7  # the part of the tokens behind the divergence that must be common to both prompts
_SAME_SYSTEM = 0.5  # the same for the system part; less, because tools may be in another order

_AT_ONCE = 8  # requests examined at the same time; others are not examined, because these show the cause
_N_HOLDERS = 16  # slots and snapshots that are compared closely
_N_SNAPSHOTS = 256  # snapshots considered: those that share most with the prompt, and the most recent
# Between two of these: a thread that computes delays each wake-up of the event loop, and 16 comparisons take 26 ms.
_PAUSE_S = 0.02
_N_OF_A_KIND = 5  # snapshots taken of those nearest in length, and of the most recent
_EXCERPT = 80  # characters shown on each side of the difference
_EXCERPT_TOKENS = 80  # tokens detokenized for that; each has at least one character


class Holder(Struct, frozen=True):
    """A slot or snapshot with cached tokens, of which the prompt shares the first ``n_shared``. ``name`` is for the
    log, such as ``slot 2``.
    """

    name: str
    tokens: bytes
    n_shared: int

    @property
    def n_tokens(self) -> int:
        return count(self.tokens)


async def holders(lease: Lease, contents: list[Content]) -> list[Holder]:
    """Return the slots and snapshots whose tokens are compared with the prompt of ``lease``. All are in namespaces
    that the request may reuse.

    ``contents`` has the content of each slot, in order, at the time when the lease was given. Of the snapshots these
    are taken: the one that shares most, five nearest in length, and the five most recent; the conversation's previous
    turn is usually among these. Canceling is safe.
    """
    request, index = lease.request, lease.table.model_snapshots.in_namespaces
    found = [
        Holder(f"slot {i}", content.tokens, common(content.tokens, request.tokens))
        for i, content in enumerate(contents)
        if content.tokens and request.may_use(content)
    ]
    hits = index.match(request.tokens, request.reads, _N_SNAPSHOTS)
    nearest = sorted(hits, key=lambda hit: abs(hit.n_tokens - request.n_tokens))[:_N_OF_A_KIND]
    namespaces = {namespace.text for namespace in request.reads}
    usable = (
        snapshot
        for snapshot in reversed(lease.table.model_snapshots.snapshots.values())
        if snapshot.namespace in namespaces
    )
    long = (snapshot for snapshot in islice(usable, _N_SNAPSHOTS) if snapshot.n_tokens > LOST_MIN)
    ids = [
        *(hit.holder for hit in (*hits[:1], *nearest)),
        *(snapshot.id for snapshot in islice(long, _N_OF_A_KIND)),
    ]
    for id_ in dict.fromkeys(ids):
        await asyncio.sleep(0)  # the tokens of a snapshot take a millisecond: let other tasks run first
        with contextlib.suppress(KeyError):  # dropped meanwhile
            tokens = index.tokens(id_)
            found.append(Holder(f"snapshot {id_}", tokens, common(tokens, request.tokens)))
    return found


class CacheMisses:
    """Finds the places where the prompts of one backend's requests diverge from cached prompts. ``tells_texts``: True
    if the log and the journal may show the text there.
    """

    def __init__(self, api: LlamaServer, metrics: BackendMetrics, tasks: TaskOwner) -> None:
        self._api, self._metrics, self._tasks = api, metrics, tasks
        self.tells_texts = False
        self._n_under_way = 0

    def examine(self, lease: Lease, prompt: Prompt, body: Mapping[str, Any], format_: Format) -> None:
        """Start a task that looks for the cached prompt which the request of ``lease`` misses. Returns at once; the
        task writes its result to the journal, the log and the metrics. Call it before anything is done in the slot.
        Without effect if the request reuses enough, or while eight other requests are examined.
        """
        request, plan = lease.request, lease.plan
        if plan is None or request.no_cache or self._n_under_way >= _AT_ONCE:
            return
        if request.n_tokens - plan.n_reused < LOST_MIN or plan.n_reused >= ENOUGH * request.n_tokens:
            return
        self._n_under_way += 1
        # The content of all slots as it is now; that of the lease's own slot will change.
        contents = [slot.content for slot in lease.table.slots]
        self._tasks.spawn(self._examine(lease, contents, prompt, body, format_), f"{request.id} diverges")

    async def _examine(
        self, lease: Lease, contents: list[Content], prompt: Prompt, body: Mapping[str, Any], format_: Format
    ) -> None:
        """Find the place where the prompt diverges from a cached prompt, and report it. Canceling is safe: nothing is
        reported then.
        """
        try:
            with contextlib.suppress(LlamaslotError):  # llama-server is gone and cannot detokenize
                held = await holders(lease, contents)
                if (found := await _worst(lease.request, held)) is not None:
                    await self._report_changed(lease, *found, prompt, body, format_)
                elif (left := _left_behind(lease, held)) is not None:
                    await self._report_left_behind(lease, left, prompt, body, format_)
        finally:
            self._n_under_way -= 1

    async def _report_changed(
        self,
        lease: Lease,
        holder: Holder,
        parted: Parting,
        prompt: Prompt,
        body: Mapping[str, Any],
        format_: Format,
    ) -> None:
        """Report a prompt that has changed in one place only: before and behind this place it has the same tokens as
        the cached prompt of ``holder``.
        """
        where, texts = await self._where(prompt, parted.at, body, format_), await self._texts(lease, holder)
        self._metrics.cache_misses.labels(where.where).inc()
        log.info(
            "%s: cache miss: the prompt differs from the context of %s (%d tokens) at token %d, in %s; behind the"
            " difference the two have %d tokens in common, which are computed again%s",
            lease.request.id, holder.name, parted.n_held, parted.at, where, parted.n_lost, _quoted(texts),
        )  # fmt: skip
        _note(lease, "changed", holder, parted.n_lost, where, texts)

    async def _report_left_behind(
        self, lease: Lease, holder: Holder, prompt: Prompt, body: Mapping[str, Any], format_: Format
    ) -> None:
        """Report a prompt that leaves a cached prompt for good. Either the user went back in the conversation, or this
        model can only rewind to a checkpoint, so that tokens before the divergence must be computed again.
        """
        request, at, n_lost = lease.request, holder.n_shared, _n_behind_checkpoint(lease, holder)
        has_left_much = can_lose(request.n_tokens, at, holder.n_tokens) and at < ENOUGH * request.n_tokens
        if n_lost < LOST_MIN and not has_left_much:
            return
        where = await self._where(prompt, at, body, format_)
        has_gone_back = where.is_last_turn and holder.n_tokens - at > LOST_MIN
        if n_lost < LOST_MIN and not has_gone_back:
            return  # another conversation with the same beginning
        texts = await self._texts(lease, holder)
        if has_gone_back:
            log.info(
                "%s: the conversation goes back to %s: its prompt differs from the context of %s (%d tokens) at token"
                " %d; %d common tokens before the difference are computed again%s",
                request.id, where, holder.name, holder.n_tokens, at, n_lost, _quoted(texts),
            )  # fmt: skip
        else:
            log.info(
                "%s: cache miss: the prompt differs from the context of %s (%d tokens) at token %d, in %s; this model"
                " rewinds to checkpoints only, so %d common tokens before the difference are computed again%s",
                request.id, holder.name, holder.n_tokens, at, where, n_lost, _quoted(texts),
            )  # fmt: skip
        _note(lease, "went back" if has_gone_back else "checkpoint", holder, n_lost, where, texts)

    async def _where(self, prompt: Prompt, at: int, body: Mapping[str, Any], format_: Format) -> Whereabouts:
        if prompt.text is None:  # a list of ids
            return Whereabouts("prompt")
        return whereabouts(prompt.text, await self._offset(prompt.text, prompt.tokens, at), body, format_)

    async def _offset(self, text: str, tokens: bytes, at: int) -> int:
        """Return the index of the character in ``text`` at which token ``at`` begins. Only the shorter part of the
        prompt, before or behind this token, is detokenized.
        """
        if at > count(tokens) // 2:
            return max(len(text) - len(await self._api.detokenize(tokens[at * WIDTH :])), 0)
        before = await self._api.detokenize(head(tokens, at))
        bos = before.find(text[:16]) if text else 0  # BOS is a token, but in no text
        return min(len(before) - max(bos, 0), len(text))

    async def _texts(self, lease: Lease, holder: Holder) -> dict[str, str] | None:
        """Return the text before the difference, the text behind it in the prompt, and the text behind it in the
        cached prompt. None if texts may not be shown.
        """
        if not self.tells_texts:
            return None
        at, tokens = holder.n_shared, lease.request.tokens
        begin, end = max(at - _EXCERPT_TOKENS, 0), at + _EXCERPT_TOKENS
        before, now, earlier = [
            await self._api.detokenize(piece)
            for piece in (
                tokens[begin * WIDTH : at * WIDTH],
                tokens[at * WIDTH : end * WIDTH],
                holder.tokens[at * WIDTH : end * WIDTH],
            )
        ]
        return {"before": before[-_EXCERPT:], "now": now[:_EXCERPT], "earlier": earlier[:_EXCERPT]}


def _quoted(texts: dict[str, str] | None) -> str:
    return (
        f"; text before it {texts['before']!r}, text now {texts['now']!r}, text earlier {texts['earlier']!r}"
        if texts
        else ""
    )


def _note(
    lease: Lease, why: str, holder: Holder, n_lost: int, where: Whereabouts, texts: dict[str, str] | None
) -> None:
    told: dict[str, object] = {
        "why": why,
        "at": holder.n_shared,
        "where": where.where,
        "message": where.message,
        "role": where.role,
        "holder": holder.name,
        "n_held": holder.n_tokens,
        "n_lost": n_lost,
    }
    lease.recorder.diverged({**told, "text": texts} if texts else told)


async def _worst(request: Request, held: list[Holder]) -> tuple[Holder, Parting] | None:
    """Return the holder that costs the request most tokens by diverging from its prompt, and the divergence. None if
    too few tokens are lost. The comparisons run in a thread, with pauses. Canceling is safe.
    """
    n_best = max((holder.n_shared for holder in held), default=0)
    if n_best >= ENOUGH * request.n_tokens:
        return None
    close = [holder for holder in held if can_lose(request.n_tokens, holder.n_shared, holder.n_tokens)]
    close.sort(key=lambda holder: abs(holder.n_tokens - request.n_tokens))
    found = list[tuple[Holder, Parting]]()
    for holder in close[:_N_HOLDERS]:
        await asyncio.sleep(_PAUSE_S)
        parted = await asyncio.to_thread(parting, request.tokens, holder.tokens, n_best, request.n_system)
        if parted is not None:
            found.append((holder, parted))
    return max(found, key=lambda pair: pair[1].n_lost, default=None)


def _left_behind(lease: Lease, held: list[Holder]) -> Holder | None:
    """Return the holder that shares most tokens with the prompt, if both have further tokens behind the common ones,
    and the common ones are more than the system part. Otherwise None.
    """
    best = max(held, key=lambda holder: holder.n_shared, default=None)
    if best is None or best.n_shared in (best.n_tokens, lease.request.n_tokens):
        return None
    return best if best.n_shared >= lease.request.n_system + NEGLIGIBLE_TOKENS else None


def _n_behind_checkpoint(lease: Lease, holder: Holder) -> int:
    """Return the number of tokens that the prompt shares with ``holder``, but that must be computed again because this
    model cannot rewind to their end.
    """
    plan = lease.plan
    if plan is None or lease.table.rewind_model.is_rewindable:
        return 0
    if holder.name not in (f"slot {plan.slot.id}", f"snapshot {plan.snapshot}"):
        return 0  # the request does not resume from this holder, for other reasons
    return max(holder.n_shared - plan.n_reused, 0)


class Parting(Struct, frozen=True):
    """The place where a prompt diverges from a cached one. ``at``: the number of tokens that both begin with.
    ``n_held``: the length of the cached prompt in tokens. ``n_lost``: the tokens of the prompt behind the divergence
    that the cached prompt has too, but that cannot be reused.
    """

    at: int
    n_held: int
    n_lost: int


def can_lose(n_prompt: int, n_shared: int, n_held: int) -> bool:
    """True if prompt and holder both have more than ``LOST_MIN`` tokens behind their common prefix, so that a close
    look is worth it.
    """
    return min(n_prompt, n_held) - n_shared > LOST_MIN


def parting(tokens: bytes, held: bytes, n_best: int, n_system: int) -> Parting | None:
    """Compare a prompt's ``tokens`` with the cached tokens ``held``. Returns the divergence if both are the same
    conversation, or have much the same system part, and at least ``LOST_MIN`` tokens must be computed again because of
    the difference. Otherwise None.

    ``n_best``: the tokens of the longest cached prefix that any holder has. ``n_system``: the tokens of system part
    and tools, 0 if unknown. Usually takes 1 ms for 60,000 tokens on each side; 50 ms if many short pieces are common.
    """
    n = common(tokens, held)
    if not can_lose(count(tokens), n, count(held)):
        return None
    runs = alike(tokens, held, n)
    n_alike = sum(end - begin for begin, end in runs)
    n_in_system = sum(max(min(end, n_system) - begin, 0) for begin, end in runs)
    is_same = n_alike >= _SAME_CONVERSATION * (min(count(tokens), count(held)) - n)
    if not is_same and not (n < n_system and n_in_system >= _SAME_SYSTEM * (n_system - n)):
        return None
    n_lost = sum(max(end - max(begin, n_best), 0) for begin, end in runs)
    return Parting(n, count(held), n_lost) if n_lost >= LOST_MIN else None


def alike(tokens: bytes, held: bytes, n: int) -> list[tuple[int, int]]:
    """Return the pieces of ``tokens`` behind the first ``n`` tokens that ``held`` also has anywhere behind its first
    ``n``. Each piece is a range [begin, end) in ``tokens``, ascending. Their order in ``held`` does not matter, and
    short pieces are left out.
    """
    behind = held[n * WIDTH :]
    runs: list[tuple[int, int]] = []
    at, n_probes = n, 0
    while True:
        step = 4
        while True:
            begin = at + step
            window = tokens[begin * WIDTH : (begin + _WINDOW) * WIDTH]
            if count(window) < _WINDOW or n_probes >= _MOST_PROBES:
                return runs
            n_probes += 1
            if (where := _find(behind, window)) >= 0:
                break
            step += step // 2 + 4
        # The windows before this one are not common, but the common piece may begin before this window.
        while begin > at and where > 0 and _at(tokens, begin - 1) == _at(behind, where - 1):
            begin, where = begin - 1, where - 1
        end = begin + common(tokens, behind[where * WIDTH :], begin)
        runs.append((begin, end))
        at = end
    return runs


def _find(tokens: bytes, window: bytes) -> int:
    """Return the index of the token in ``tokens`` at which ``window`` begins; -1 if ``tokens`` does not contain it."""
    where = tokens.find(window)
    while where > 0 and where % WIDTH:
        where = tokens.find(window, where + 1)
    return where // WIDTH if where >= 0 else -1


def _at(tokens: bytes, i: int) -> bytes:
    return tokens[i * WIDTH : (i + 1) * WIDTH]
