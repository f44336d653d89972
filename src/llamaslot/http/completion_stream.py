"""Sends one request to llama-server, in its slot, and relays or assembles the answer."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

import orjson
from aiohttp import web
from msgspec import Struct
from msgspec.structs import replace

from llamaslot.backend.exclusive import UnpinnedRequest
from llamaslot.backend.feedback import ReportedCounts
from llamaslot.backend.lease import Lease
from llamaslot.backend.lease_states import STOPPED, RetryPlacement
from llamaslot.backend.long_prompt import Prefilling
from llamaslot.backend.slot_content import is_far_off
from llamaslot.cache.content import NOTHING, Content
from llamaslot.errors import JSON_TYPE, UpstreamError
from llamaslot.fleet.failover import Attempts
from llamaslot.fleet.model_context import ModelContext
from llamaslot.formats.stream_to_json import Doubt
from llamaslot.http.client_stream import SSE_HEADERS, Downstream
from llamaslot.http.forwarded_headers import to_client
from llamaslot.http.in_flight import in_flight
from llamaslot.http.parse import ClientRequest, ParsedRequest
from llamaslot.http.response_headers import of_expected_reuse, of_reuse
from llamaslot.http.stream_reader import Put, Reading
from llamaslot.llama.answers import Response, error_of, media_type_of
from llamaslot.llama.sse import data_of
from llamaslot.scheduling.plan import PrefillStats, Source

log = logging.getLogger(__name__)

_FAILED = 500  # the status for an error event that comes instead of an answer


class RetryNonStreamed(Struct, frozen=True):
    """Returned instead of an assembled answer that is in doubt: the request must be repeated as the client sent it.
    ``prefill_stats``: what was computed of the prompt in this slot.
    """

    prefill_stats: PrefillStats | None


class Answering:
    """One request in its slot: ``begin`` sends it and reads up to its first token, ``finish`` relays the rest."""

    def __init__(
        self,
        attempts: Attempts,
        context: ModelContext,
        down: Downstream,
        client_request: ClientRequest,
        parsed: ParsedRequest,
        lease: Lease,
        here: PrefillStats | None,
        before: PrefillStats | None,
        unpinned: UnpinnedRequest | None,
        *,
        in_one_piece: bool,
    ) -> None:
        """``here``: what llamaslot has computed of the prompt in this slot ahead of the request; ``before``: the same
        in slots that the request had before. ``in_one_piece``: request a JSON answer from llama-server, not a stream.
        """
        self.attempts, self.backend, self.context = attempts, attempts.backend, context
        self.down, self.client_request, self.parsed = down, client_request, parsed
        self.lease, self.here, self.unpinned = lease, here, unpinned
        self.prefill_stats = self._in_all(here, before)  # for the figures that the client gets
        may_assemble = not (client_request.is_streaming or in_one_piece) and self.backend.streams_are_known
        self.is_assembled = may_assemble and client_request.format.can_assemble(client_request.body)
        self.first_byte_s: float | None = None
        self.first_token_s: float | None = None  # None if llamaslot could not detect it
        self._is_reuse_told = self._is_noted = False
        self._first: list[bytes] | None = None

    def _in_all(self, here: PrefillStats | None, before: PrefillStats | None) -> PrefillStats | None:
        if before is None:
            in_all = here
        else:  # no prefill here: tokens that the request finds of its own earlier work are not reused
            n = self.lease.forecast.n_expected
            in_all = before.then(here if here is not None else PrefillStats(n, n, 0.0))
        n_answers = 1 + self.parsed.request.n_children
        return replace(in_all, n_answers=n_answers) if in_all is not None else None

    @property
    def is_streamed(self) -> bool:
        """True if llama-server is asked for a stream, so that its first token can be detected."""
        return self.client_request.is_streaming or self.is_assembled

    async def begin(self, stack: contextlib.AsyncExitStack, *, may_replan: bool) -> None:
        """Send the request, and read the answer up to the first token. Meanwhile the client gets the progress of its
        prompt.

        Raises UpstreamError if llama-server answers with an error. Raises Preempted if the slot is needed for another
        user and nothing of the answer was sent. With ``may_replan`` raises RetryPlacement if the slot does not hold
        what was expected: then llama-server is idle again, and has computed almost nothing.
        """
        self._upstream, asked = await self._send(stack, self._body()), self.client_request
        self._reading = reading = Reading(
            self._upstream,
            asked.format,
            self.prefill_stats,
            self.down.errors,
            n_answers=self.parsed.n_prompts * (1 + self.parsed.request.n_children),
            wants_progress=asked.wants_progress,
            assembly=asked.format.assembly(asked.body) if self.is_assembled else None,
            start=self._stream_start(),
        )
        if not self._has_events:
            return
        is_looked_at = False
        may_stop = self._is_one_prompt and not self.parsed.is_head  # else its slot's content would be unknown
        while (events := await self._next_or_stop(can_stop=is_looked_at and may_stop)) is not None:
            if reading.has_token or reading.is_over or reading.has_failed:
                self._answer_begins(events)
                return
            if reading.n_found is not None:
                if may_replan and not is_looked_at and self._is_misplaced(reading.n_found):
                    raise RetryPlacement(await self._stopped(reading.n_found, is_misplaced=True))
                if not is_looked_at:
                    self._holds_prompt()
                    await self._tell_reuse()
                is_looked_at = True
                self.lease.set_progress(reading.n_processed)
                n_reused = self.prefill_stats.n_reused if self.prefill_stats is not None else reading.n_found
                self.down.note(Prefilling(reading.n_processed, self.parsed.request.n_tokens, n_reused, 0.0))
            may_stop = may_stop and not events  # never send an answer's beginning twice
            if events:  # progress events, for a client that requested them
                self.down.is_answered = True
                await self._tell_reuse(at_last=True)
                await self.down.begin(headers=to_client(self._upstream, SSE_HEADERS))
            await self.down.write(b"".join(events))

    def _answer_begins(self, events: list[bytes]) -> None:
        """The answer begins with ``events``. Raises UpstreamError if they are an error, and another backend may do
        better.
        """
        self.lease.mark_decoding()
        if self._reading.has_token:
            self.first_token_s = time.monotonic() - self.client_request.started
        self._first = events
        if self._reading.has_failed and self.attempts.is_worth_another(_FAILED):
            self.lease.finish(None)
            raise UpstreamError(_FAILED, orjson.dumps(data_of(b"".join(events))))

    async def _next_or_stop(self, *, can_stop: bool) -> list[bytes] | None:
        """As ``_next``; with ``can_stop`` raises Preempted if the slot is needed for another user."""
        if not can_stop:
            self.lease.forbid_preemption()
            return await self._next()
        if (events := await self.lease.unless_preempted(self._next())) is not STOPPED:
            return events
        assert self._reading.n_found is not None, "only what has begun can be stopped"
        done = await self._stopped(self._reading.n_found, is_misplaced=False)
        self.lease.raise_if_preempted(done)
        raise RetryPlacement(done)  # the slot is no longer needed, but this request has stopped

    async def _stopped(self, n_found: int, *, is_misplaced: bool) -> PrefillStats:
        """Cancel the request at llama-server, which has found ``n_found`` tokens of the prompt in the slot. Returns
        what was computed of the prompt in this slot.
        """
        await self._sent.__aexit__(None, None, None)
        await self.backend.executor.stopped(self.lease, n_found, is_misplaced=is_misplaced)
        n_done = self.lease.content.n_tokens if self.lease.content is not None else 0
        own = PrefillStats(min(n_found, n_done), n_done, self.lease.now() - self.lease.sent_at)
        return own if self.here is None else self.here.then(own)

    async def _next(self, put: Put | None = None) -> list[bytes] | None:
        """As ``Reading.next``. If llama-server reports an error, the slot's content counts as unknown."""
        try:
            return await self._reading.next(put)
        except UpstreamError:
            self.lease.finish(None)
            raise

    @property
    def n_reused(self) -> int | None:
        """How many tokens of the prompt were not computed for this request; None until llama-server has reported it."""
        if (n_found := self._reading.n_reused) is None:
            return None
        n_found = min(n_found, self.parsed.prompts[0].n_tokens) if self.parsed.is_head else n_found
        return n_found if self.prefill_stats is None else min(self.prefill_stats.n_reused, n_found)

    @property
    def source(self) -> Source:
        """Where the reused tokens came from: slot, snapshot, or nothing."""
        assert self.lease.plan is not None
        return self.lease.plan.source if self._n_reused_or_expected else Source.COLD

    @property
    def _n_reused_or_expected(self) -> int:
        return n_reused if (n_reused := self.n_reused) is not None else self._n_expected

    @property
    def _n_expected(self) -> int:
        stats = self.prefill_stats
        return stats.n_reused if stats is not None else self.lease.forecast.n_expected

    async def _tell_reuse(self, *, at_last: bool = False) -> None:
        """Report the reuse to the client once llama-server has reported it: in headers, or, after they are sent, in
        comments.

        ``at_last``: the answer follows. If the reuse is still unknown, the forecast is sent instead, in a header of its
        own.
        """
        if self._is_reuse_told or not (at_last or self.n_reused is not None):
            return
        self._is_reuse_told = True
        if self.n_reused is None:
            headers = of_expected_reuse(self._n_reused_or_expected)
        else:
            headers = of_reuse(self.source, self.n_reused)
        await self.down.write(self.down.add_headers(headers))

    def _stream_start(self) -> bytes:
        return self.client_request.format.stream_start(
            self.client_request.id, self.client_request.body, self.parsed.request.n_tokens, self._n_expected
        )

    def _body(self) -> dict[str, Any]:
        """The body for llama-server. With ``return_progress`` a stream reports the reuse at once, and llama-server
        notices within one batch that its client has left.
        """
        if self.is_assembled:
            return self.client_request.format.streamed(self.client_request.body)
        if self.client_request.is_streaming and self.client_request.may_set("return_progress"):
            return {**self.client_request.body, "return_progress": True}
        return self.client_request.body

    async def _send(self, stack: contextlib.AsyncExitStack, body: dict[str, Any]) -> Response:
        """Send the body to llama-server. Raises UpstreamError."""
        lease = self.lease
        # After llamaslot's own prefill the slot holds only what the request may use, even with ``no_cache``. Content
        # that is not known may have been computed with other LoRA scales.
        may_reuse = self.here is not None or not (lease.request.no_cache or lease.content is None)
        body = {**body, "id_slot": lease.slot_id}
        if self.client_request.may_set("cache_prompt"):
            body["cache_prompt"] = may_reuse
        lease.begin_request()
        self._sent = self.client_request.post(body)
        upstream = await stack.enter_async_context(self._sent)
        lease.mark_processing()
        if upstream.status == 200:
            return upstream
        error = await error_of(upstream)
        await self.backend.executor.refused(lease, error.status)
        raise error

    @property
    def _has_events(self) -> bool:
        return media_type_of(self._upstream) == "text/event-stream"

    @property
    def _is_one_prompt(self) -> bool:
        return len(self.parsed.prompts) == 1 and not self.parsed.request.n_children

    def _is_misplaced(self, n_found: int) -> bool:
        """True if the slot holds much less of a single prompt than expected."""
        if not self._is_one_prompt:
            return False
        n_expected = self.here.n_tokens if self.here is not None else self.lease.forecast.n_expected
        return is_far_off(self.lease, n_expected, n_found)

    # -- the answer ----------------------------------------------------------------------------------------------

    async def finish(self) -> web.StreamResponse | RetryNonStreamed:
        """Send the rest of the answer, and learn from it. The slot is released before the client can read the end."""
        self._holds_prompt()
        if self._has_events and not self.is_assembled:
            last = await self._relay()
            self._settle()
            self._log()
            return await self.down.end(last)
        payload = await self._assemble() if self._has_events else await self._reading.whole()
        if isinstance(payload, RetryNonStreamed):
            return payload
        self.first_byte_s = time.monotonic() - self.client_request.started
        self._is_reuse_told = False  # a JSON answer is complete, and nothing of it has been sent
        await self._tell_reuse(at_last=True)
        self._settle()
        self._log()
        headers = to_client(self._upstream, self.down.headers)
        if self.is_assembled:
            headers["Content-Type"] = JSON_TYPE
        return web.Response(status=200, body=payload, headers=headers)

    def _holds_prompt(self) -> None:
        before = self.lease.content or NOTHING
        tokens = self.parsed.left_in_slot
        holds = Content(
            tokens, False, True, before.checkpoints, before.snapshot, before.n_more, before.namespace
        )
        self.lease.confirm(self._with_media(holds, before) if self.parsed.is_head else holds)

    @staticmethod
    def _with_media(holds: Content, before: Content) -> Content:
        """Return the content of a slot after a prompt with media: its tokens up to the first medium, then an unknown
        number. It is not dirty, because it is never saved. It has checkpoints only where something was computed ahead.
        """
        return replace(
            holds,
            is_exact=False,
            is_dirty=False,
            checkpoints=before.checkpoints,
            snapshot=None,
            n_more=0,
            has_media=True,
        )

    async def _relay(self) -> bytes:
        """Relay events as they come; only the numbers that ``prefill_stats`` corrects are changed. Returns the last
        bytes, which the caller sends with the end of the answer.

        llama-server releases the slot before it sends the last event. So the lease is released before the client can
        read that event: the client may send its next request, or close the connection, at once.
        """
        headers = to_client(self._upstream, SSE_HEADERS)
        events = self._first
        while events is not None:
            if self.first_byte_s is None:
                self.down.is_answered = True
                self.first_byte_s = time.monotonic() - self.client_request.started
                await self._tell_reuse(at_last=True)
                await self.down.begin(headers=headers, is_more=any(events))
            if self._reading.is_over:
                if self.unpinned is not None:
                    await self.unpinned.settle()
                self._settle()
            if self._reading.has_ended:
                return b"".join([*events, self._reading.rest])
            await self.down.write(b"".join(events))
            events = await self._next(self.down.put)
        return self._reading.rest

    async def _assemble(self) -> bytes | RetryNonStreamed:
        """Return the JSON answer assembled from the stream, or RetryNonStreamed if it is in doubt. Raises
        UpstreamError.
        """
        reading, events = self._reading, self._first
        assert reading.assembly is not None
        while events is not None and not reading.is_over:
            events = await self._next(self.down.put)
        if (doubt := reading.assembly.doubt) is None:
            return reading.assembled()
        log.info(
            "%s: cannot build a JSON answer from llama-server's stream (%s), repeating the request without streaming",
            self.client_request.id, doubt.value,
        )  # fmt: skip
        if doubt is Doubt.UNKNOWN:
            self.backend.streams_are_known = False
        self._settle()
        return RetryNonStreamed(self._done_here())

    def _done_here(self) -> PrefillStats | None:
        """Return what was computed of the prompt in this slot, ahead of the request and by the request itself."""
        timings = self._reading.timings or {}
        if "cache_n" not in timings:
            return self.here
        n_found, seconds = int(timings["cache_n"]), float(timings["prompt_ms"]) / 1000
        own = PrefillStats(n_found, n_found + int(timings["prompt_n"]), seconds)
        return own if self.here is None else self.here.then(own)

    def _settle(self) -> None:
        """Record what the slot holds now, and release the lease. Idempotent."""
        if self.lease.is_released:
            return
        parsed, n_found = self.parsed, self._reading.n_reused
        if self._reading.has_failed:
            self.lease.finish(None)
            self.lease.release()
            return
        told, before = self._reported(n_found), self.lease.content or NOTHING
        if parsed.is_head and self.here is not None and n_found is not None:
            self.context.compare_head(self.client_request.format, self.here.n_tokens, n_found)
        self.backend.executor.settle(self.lease, told, self.here, parsed.left_in_slot)
        if parsed.is_head and self.lease.content is not None:
            self.lease.set_content(self._with_media(self.lease.content, before))
        self.lease.release()
        if told.n_prompt is not None:
            prompt = parsed.prompts[0]
            self.context.compare(self.client_request.format, self.client_request.body, prompt, told.n_prompt)

    def _reported(self, n_found: int | None) -> ReportedCounts:
        """Return the counts from which the backend learns. For several prompts, or a prompt that is known only up to a
        medium, only the number of tokens that were found in the slot.
        """
        parsed, reading, timings = self.parsed, self._reading, self._reading.timings
        if parsed.is_head and n_found is not None:
            n_found = min(n_found, parsed.prompts[0].n_tokens)
        if len(parsed.prompts) != 1 or parsed.is_head:
            return ReportedCounts(n_found)
        if not timings:
            return ReportedCounts(n_found, reading.n_prompt, n_predicted=reading.n_predicted)
        n_predicted = int(timings.get("predicted_n", 0))
        if n_found is None:
            return ReportedCounts(None, reading.n_prompt, n_predicted=n_predicted)
        n_computed = int(timings["prompt_n"])
        return ReportedCounts(
            n_found,
            n_found + n_computed,
            n_computed,
            float(timings["prompt_ms"]) / 1000,
            n_predicted,
            float(timings["predicted_ms"]) / 1000 if n_predicted else None,
        )

    def note(self) -> int:
        """Pass the figures of the answer to the history, at the first call only; if the client has left, the figures so
        far. Returns how many tokens of the prompt were computed.
        """
        prefill_stats, reading = self.prefill_stats, self._reading
        n_computed = prefill_stats.n_tokens - prefill_stats.n_reused if prefill_stats is not None else 0
        if reading.timings is not None:
            n_computed += int(reading.timings.get("prompt_n", 0))
        elif prefill_stats is not None:
            n_computed += self.lease.request.n_tokens - prefill_stats.n_tokens
        elif self.n_reused is not None:
            n_computed = max(self.lease.request.n_tokens - self.n_reused, 0)
        if (flight := in_flight(self.down.request)) is not None and not self._is_noted:
            self._is_noted = True
            prefill_s = prefill_stats.seconds if prefill_stats is not None else 0.0
            flight.answered(self.source.value, self.n_reused, n_computed, prefill_s, self.first_token_s)
            decoded_s = time.monotonic() - self.client_request.started - (self.first_token_s or 0.0)
            so_far = {"predicted_ms": decoded_s * 1000} if reading.n_events else {}
            flight.timed(reading.timings or so_far, reading.n_predicted or reading.n_events)
            if reading.has_failed:
                flight.error = UpstreamError(_FAILED, b"an error in the stream of its answer")
        return n_computed

    def _log(self) -> None:
        """Log one line about the answer: where it ran, what was reused, and how long the client waited."""
        first_s, prefill_stats, n_computed = self.first_byte_s or 0.0, self.prefill_stats, self.note()
        self.backend.metrics.first_byte_s.observe(first_s)
        if not log.isEnabledFor(logging.INFO):
            return
        log.info(
            "%s: answered user %s from slot %s (source %s): %d of %d prompt tokens computed%s, first byte after %.2f s,"
            " complete after %.2f s",
            self.client_request.id, self.lease.request.user.id, self.lease.slot_name, self.source.value,
            n_computed, self.lease.request.n_tokens,
            f" ({prefill_stats.seconds:.2f} s of it before the request itself)" if prefill_stats is not None else "",
            first_s, time.monotonic() - self.client_request.started,
        )  # fmt: skip
