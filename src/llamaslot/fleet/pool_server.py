"""Asks small questions about the model of a pool (its template, its tokens) of any of its backends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import orjson

from llamaslot.backend.backend import Backend
from llamaslot.errors import BackendDown, UpstreamError, is_servers_own
from llamaslot.llama.client import LlamaServer
from llamaslot.tasks import TaskOwner

T = TypeVar("T")
Question = Callable[[LlamaServer], Awaitable[T]]

_ASK_NEXT_S = 0.25  # a backend that has not answered for so long may hang: the next one is asked too


class PoolServer:
    """Asks questions as ``LlamaServer`` does, if all backends of a pool have the same answer to them.

    The backend that answered last is asked first. If it is down, or does not answer within ``_ASK_NEXT_S``, the next
    one is asked too, and the first answer counts. If it answers with an error of its own (5xx), one other backend is
    asked. Raises BackendDown if all are down. Canceling is safe.
    """

    def __init__(self, backends: Callable[[], Sequence[Backend]], tasks: TaskOwner) -> None:
        """``backends`` returns the backends that can be asked about the pool's model, at least one, the best first. The
        one that has answered last is asked before them. ``tasks`` runs the question to a second backend while the first
        has not answered.
        """
        self._backends, self._tasks = backends, tasks
        self._last: Backend | None = None  # the backend that has answered last

    async def apply_template(self, body: Mapping[str, Any], raw: bytes | None = None) -> str:
        return await self._first_answer(lambda api: api.apply_template(body, raw))

    async def tokenize(self, content: str, *, add_special: bool, parse_special: bool = True) -> bytes:
        return await self._first_answer(
            lambda api: api.tokenize(content, add_special=add_special, parse_special=parse_special)
        )

    async def ask(
        self, path: str, body: Mapping[str, Any], timeout_s: float | None = None
    ) -> tuple[int, Any]:
        """Post ``body`` to a route that computes nothing. Returns status and JSON (None if the answer is no JSON)."""

        async def asked(api: LlamaServer) -> tuple[int, Any]:
            status, answer = await api.ask(path, body, timeout_s)
            if is_servers_own(status):
                raise UpstreamError(status, orjson.dumps(answer))
            return status, answer

        try:
            return await self._first_answer(asked)
        except UpstreamError as error:
            return error.status, orjson.loads(error.payload)

    async def _first_answer(self, question: Question[T]) -> T:
        backends = self._backends()
        if len(backends) == 1:
            return await question(backends[0].api)
        return await self._ask(sorted(backends, key=lambda backend: backend is not self._last), question)

    async def _ask(self, backends: Sequence[Backend], question: Question[T]) -> T:
        first, others = backends[0], backends[1:]
        if not others:
            return await self._one(first, question)
        loop, limit = asyncio.get_running_loop(), asyncio.timeout(None)
        second: asyncio.Task[T | Exception] | None = None
        failure: UpstreamError | None = None
        is_waiting = True

        def ask_next() -> None:
            nonlocal second
            second = self._tasks.spawn(self._outcome(others, question), "ask the next backend")
            second.add_done_callback(has_answered)

        def has_answered(task: asyncio.Task[T | Exception]) -> None:
            if is_waiting and not task.cancelled() and not isinstance(task.result(), BackendDown):
                limit.reschedule(loop.time())

        timer = loop.call_later(_ASK_NEXT_S, ask_next)
        try:
            async with limit:
                return await self._one(first, question)
        except TimeoutError:
            if not limit.expired():
                raise
            first.doubt()
        except BackendDown:
            first.suspect()
        except UpstreamError as error:
            if not is_servers_own(error.status):
                raise
            failure = error
        finally:
            is_waiting = False
            timer.cancel()
            if second is not None and not limit.expired():
                second.cancel()
        if failure is not None:
            return await self._asked_again(first, others[0], question, failure)
        if second is None or second.cancelled() or second.cancelling():
            return await self._ask(others, question)
        outcome = second.result()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def _asked_again(
        self, first: Backend, other: Backend, question: Question[T], failure: UpstreamError
    ) -> T:
        """Ask ``other``, because ``first`` has answered with an error of its own (``failure``). If ``other`` answers
        without such an error, ``first`` is suspected, because the question was not the cause.
        """
        try:
            answer = await self._one(other, question)
        except BackendDown:
            raise failure from None
        except UpstreamError as error:
            if not is_servers_own(error.status):
                first.suspicion.blame(failure)
            raise
        first.suspicion.blame(failure)
        return answer

    async def _one(self, backend: Backend, question: Question[T]) -> T:
        answer = await question(backend.api)
        self._last = backend
        return answer

    async def _outcome(self, backends: Sequence[Backend], question: Question[T]) -> T | Exception:
        try:
            return await self._ask(backends, question)
        except Exception as error:  # returned to the task that has asked the first backend
            return error
