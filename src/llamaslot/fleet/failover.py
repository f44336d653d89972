"""Sends a request to another backend if the first one fails, as long as no byte of an answer has reached its client.

An answer begins with llama-server's status, headers or events. llamaslot's own comments in a waiting stream, and the
status 200 before them, are no answer, because they are the same for every backend.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

from llamaslot.backend.backend import Backend
from llamaslot.backend.lease import Lease
from llamaslot.errors import BackendDown, BackendRestarted, UpstreamError, is_servers_own
from llamaslot.fleet.pool import Pool

log = logging.getLogger(__name__)

_ATTEMPTS = 3
_NO_OTHER_BACKEND = contextlib.nullcontext()
_GIVEN_UP = "llama-server restarted again and again while it had this request; its log may say why"


class Answer(Protocol):
    """The answer to a request."""

    @property
    def status(self) -> int:
        """The status that the client gets."""
        ...


A = TypeVar("A", bound=Answer)


class Attempts:
    """The attempts to serve one request, and the backend that the request depends on now. In three cases another
    attempt follows, unless an answer has begun or no other backend can take the request:

    1. llama-server has restarted, so its process is not the one whose slot was leased. Nothing was computed.
    2. The backend is down, or goes down without closing its connections. If it has closed the connection while it
       computed the prompt, the prompt may be the reason, so only one other backend is tried (``BadPrompts``).
    3. llama-server has answered with an error of its own (5xx). It answers some mistakes of clients in the same way,
       so one other backend is tried. If that one succeeds, the first one is blamed; else the client gets the error.
    """

    def __init__(
        self,
        id_: str,
        pool: Pool,
        raw: bytes,
        is_answered: Callable[[], bool],
        *,
        is_once: bool = False,
        follows_restarts: bool = True,
    ) -> None:
        """``id_`` is the request's id for the log, ``raw`` its body. ``is_answered`` returns True once any byte of an
        answer was sent. ``is_once``: the request may change something, so it is never sent again.
        ``follows_restarts``: after a restart of llama-server the request is tried again; otherwise BackendRestarted
        ends the attempts.
        """
        self.id, self.pool, self.prompt = id_, pool, raw
        self.is_answered, self._is_once = is_answered, is_once
        self._follows_restarts = follows_restarts
        # Finds the pool before another attempt: the model may belong to another pool by then.
        self.pool_again: Callable[[], Awaitable[Pool]] | None = None
        self.lease: Lease | None = None  # the last lease of the request
        self.avoids: frozenset[str] = frozenset()  # names of backends that have answered it with an error
        self._asked: Backend | None = None  # the backend that is used without a lease
        self._error: UpstreamError | None = None  # the answer of the backend in ``avoids``
        self._n_ended = 0  # llama-servers that have ended while they computed the request

    @property
    def backend(self) -> Backend:
        """The backend of the request's last lease. Before the first lease it is any backend, preferably one that is
        up.
        """
        if self.lease is not None:
            return self.pool.backend_of(self.lease)
        if self._asked is None:
            self._asked = self.pool.any_backend(self.avoids)
        return self._asked

    def leased(self, lease: Lease) -> None:
        """Record that the request has got ``lease``, and depends on its backend from now on."""
        self.lease = lease

    def check_process(self) -> Awaitable[None] | None:
        """Check that the connection for the request leads to the process of its lease; see ``Pool.check_process``.
        None without a lease.
        """
        return self.pool.check_process(self.lease) if self.lease is not None else None

    def check(self, prompt: bytes) -> None:
        """Raise DeadlyPrompt if ``prompt`` has made llama-servers crash. ``prompt`` is what the request has in common
        with later repetitions of it: its tokens, if they are known.
        """
        self.prompt = prompt
        self.pool.bad_prompts.check(prompt)

    async def look_up_pool(self) -> None:
        """Find the pool of the request again, because its model may belong to another pool now. Raises as
        ``pool_again`` does.
        """
        if self.pool_again is not None:
            self.pool, self._asked = await self.pool_again(), None

    async def run(self, attempt: Callable[[], Awaitable[A]]) -> A:
        """Call ``attempt`` until it succeeds, at most three times, and return its answer. Raises what the last attempt
        raises, DeadlyPrompt, and BackendDown if llama-server restarts again and again. Canceling is safe if canceling
        ``attempt`` is.
        """
        for n in range(_ATTEMPTS):
            if n:
                await self.look_up_pool()
            try:
                async with self._kept():
                    answer = await attempt()
            except BackendRestarted:
                if not self._follows_restarts:
                    raise
                if self.lease is not None:
                    self.backend.lost(self.lease.table)
            except BackendDown as error:
                if not self._moves(error):
                    raise
            except UpstreamError as error:
                if not self.is_worth_another(error.status):
                    self._has_answered(error.status)
                    raise
                self._avoid(error)
            else:
                self._has_answered(answer.status)
                return answer
        raise BackendDown(_GIVEN_UP)

    def is_worth_another(self, status: int) -> bool:
        """True if an answer with this ``status`` must not reach the client yet, because another backend may answer
        without an error.
        """
        if not is_servers_own(status) or self._error is not None or self._is_once or self.is_answered():
            return False
        is_refused = self.pool.bad_prompts.is_refused(self.prompt)
        return not is_refused and self.pool.has_healthy_besides(self.backend)

    def _avoid(self, error: UpstreamError) -> None:
        self._error, self.avoids = error, frozenset({self.backend.name})
        self.backend.metrics.failovers.inc()
        log.warning(
            "%s: backend %s has failed, another backend takes the request: %s",
            self.id, self.backend.name, error.without_text,
        )  # fmt: skip
        self.lease = self._asked = None

    def _has_answered(self, status: int) -> None:
        """Learn from the status of an answer. If it is the second error, the request is the cause, not the backend."""
        known, is_error = self.pool.bad_prompts, is_servers_own(status)
        if self._error is not None:
            if is_error:
                known.was_refused(self.prompt)
            else:
                for name in self.avoids:
                    self.pool.blame(name, self._error)
        if not is_error:
            if self.lease is not None:
                self.backend.suspicion.has_worked()
            known.was_answered(self.prompt)

    def _may_move(self, failed: Backend) -> bool:
        """True if another backend can take the request."""
        return not self.is_answered() and self.pool.may_try_elsewhere(failed)

    def _moves(self, error: BackendDown) -> bool:
        """Return True if another backend takes the request after ``error``. Then no request goes to the failed backend
        until it has answered a question. Raises DeadlyPrompt.
        """
        failed, lease = self.backend, self.lease
        if lease is not None and lease.was_computing and not isinstance(error, _WentDown):
            self._n_ended += 1
            self.pool.bad_prompts.has_ended_server(self.prompt, self._n_ended - 1)
        if self._is_once or not self._may_move(failed):
            return False
        failed.suspect()
        failed.metrics.failovers.inc()
        log.warning(
            "%s: backend %s has failed, another backend takes the request: %s", self.id, failed.name, error
        )
        self.lease = self._asked = None
        return True

    def _kept(self) -> contextlib.AbstractAsyncContextManager[None]:
        """A context manager. If the backend goes down without closing its connections, and another backend can take the
        request, it cancels its block and raises the backend's error as ``_WentDown``.
        """
        return self._ends_with_backend() if len(self.pool.backends) > 1 else _NO_OTHER_BACKEND

    @contextlib.asynccontextmanager
    async def _ends_with_backend(self) -> AsyncIterator[None]:
        limit, down = asyncio.timeout(None), list[Exception]()

        def went_down(which: Backend, error: Exception) -> None:
            if self._depends_on(which) and not down and self._may_move(which):
                down.append(error)
                limit.reschedule(asyncio.get_running_loop().time())

        try:
            with self.pool.calls_when_down(went_down):
                async with limit:
                    yield
        except TimeoutError:
            if not limit.expired():
                raise
            raise _WentDown(str(down[0])) from None

    def _depends_on(self, backend: Backend) -> bool:
        """True if ``backend`` works on the request."""
        given = self.pool.backend_of(self.lease) if self.lease is not None else self._asked
        return given is backend


class _WentDown(BackendDown):
    """Raised when a backend does not answer but has not closed its connection, and the request was taken from it."""
