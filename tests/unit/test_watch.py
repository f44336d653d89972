"""What the watch of a llama-server finds out: that it hangs, answers with errors, is gone, or is another one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, cast

import pytest
from msgspec.structs import replace

from bench.virtual import VirtualLoop
from llamaslot.backend.assist import StandingAside
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.health import Gone, Watch
from llamaslot.backend.presence import Presence
from llamaslot.backend.process_check import SUSPECT_S, ProcessCheck
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, LlamaslotError, NotUnderstood, UpstreamError
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.llama.answers import Props, SlotInfo
from llamaslot.llama.client import LlamaServer
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings

PROPS = Props(2, 4_096, "", "mark", is_connected=lambda: True)
LONG_S = 20.0  # for all limits of the watch


class Server:
    """Answers a question for its properties with ``told``, an answer or an error; None: not at all. ``why``: the
    reason why it is not healthy. ``n_working``: slots at work.
    """

    def __init__(self) -> None:
        self.told: Props | LlamaslotError | None = PROPS
        self.why: str | None = None
        self.n_working = 0

    async def props(self, timeout_s: float = 10.0) -> Props:
        if self.told is None:
            await asyncio.sleep(timeout_s)
            raise BackendDown("does not answer")
        if isinstance(self.told, LlamaslotError):
            raise self.told
        return self.told

    async def why_unhealthy(self, timeout_s: float = 5.0) -> str | None:
        return self.why

    async def slots(self) -> list[SlotInfo]:
        return [SlotInfo(i, i < self.n_working, 0, None) for i in range(2)]


@dataclass
class Watched:
    loop: VirtualLoop
    server: Server
    process: ProcessCheck
    watch: Watch
    session: ServerSession
    are_several: bool = True

    def __post_init__(self) -> None:
        self.process.has_told(self.session, PROPS)
        self.task: asyncio.Task[Gone | None] | None = None

    def after(self, seconds: float) -> Gone | None:
        """Why it is gone so many seconds later; None if it is not."""
        if self.task is None:
            self.task = self.loop.create_task(self.watch.until_gone(self.session, 5.0))
        self.loop.pass_time(seconds)
        return self.task.result() if self.task.done() else None

    @property
    def is_proved(self) -> bool:
        """Its process need not be asked."""
        return self.process._props is not None

    @property
    def is_suspect(self) -> bool:
        return self.watch._leases.is_suspect


@pytest.fixture(name="it")
def _it() -> Iterator[Watched]:
    loop, server = VirtualLoop(), Server()
    leases = Dispatcher(SchedulingSettings(), QueueLimits(), loop.time).add("gpu0")
    table = SlotTable("gpu0", 2, 4_096, settings=SchedulingSettings(), rates=Rates())
    leases.attach(table)
    api = cast(LlamaServer, server)
    process = ProcessCheck(api, leases, Presence("gpu0"), cast("Any", None))
    watch = Watch(api, leases, process, lambda: watched.are_several)
    watched = Watched(loop, server, process, watch, ServerSession(table, PROPS, "m"))
    yield watched
    if watched.task is not None:
        watched.task.cancel()
        loop.run_until_complete(asyncio.wait([watched.task]))
    loop.close()


def test_one_that_is_silent_is_suspect_before_it_counts_as_down(it: Watched) -> None:
    """Others get its requests, and that it answered before proves nothing any more."""
    it.server.told = None
    it.server.why = "does not answer"
    assert it.after(1.5 + SUSPECT_S) is None
    assert not it.is_suspect
    assert it.after(1.0) is None
    assert (it.is_suspect, it.is_proved) == (True, False)
    assert it.after(LONG_S) is Gone.DOWN


def test_the_only_one_is_never_suspect(it: Watched) -> None:
    """No other could take its requests."""
    it.server.told, it.are_several = None, False
    it.server.why = "does not answer"
    assert it.after(9.0) is None
    assert (it.is_suspect, it.is_proved) == (False, True)
    assert it.after(LONG_S) is Gone.DOWN


def test_one_that_is_silent_but_healthy_stays(it: Watched) -> None:
    """It is busy: nothing is suspected once it has said so."""
    it.server.told = None
    assert it.after(2.6 + SUSPECT_S) is None
    assert it.is_suspect
    assert it.after(2.9) is None
    assert not it.is_suspect


def test_one_that_answers_with_errors_of_its_own_is_blamed(
    it: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    """For a pause, though it answers again; an error of the question is none of its own. What the error says, which may
    quote a prompt, is not logged.
    """
    it.server.told = UpstreamError(401, b"{}")
    assert it.after(LONG_S) is None
    assert not it.is_suspect
    it.server.told = UpstreamError(500, b'{"error": {"message": "of a prompt", "type": "server_error"}}')
    assert it.after(LONG_S) is None
    it.server.told = PROPS
    assert it.after(3.0) is None
    assert it.is_suspect
    assert "answers with errors" in caplog.text
    assert "of a prompt" not in caplog.text
    assert it.after(60.0) is None
    assert not it.is_suspect


@pytest.mark.parametrize(
    ("told", "why"),
    [
        (changed(PROPS, boot_id="another"), Gone.RESTARTED),
        (changed(PROPS, n_slots=3), Gone.RESTARTED),
        (NotUnderstood("a page"), Gone.OTHER_PROGRAM),
    ],
)
def test_another_process_is_noticed(it: Watched, told: Props | LlamaslotError, why: Gone) -> None:
    """By its mark; where all builds have the same one, by its slots; or it is no llama-server at all."""
    assert it.after(LONG_S) is None
    it.server.told = told
    assert it.after(LONG_S) is why


def test_what_is_not_understood_was_not_understood_before(it: Watched) -> None:
    """A program that never told its number of slots is still the same."""
    it.session = replace(it.session, props=changed(PROPS, n_slots=None))
    it.server.told = NotUnderstood("a page")
    assert it.after(LONG_S) is None


def test_it_is_probed_again_once_a_slot_is_idle(it: Watched) -> None:
    """But not before the pause of five seconds is over."""
    it.session = replace(it.session, aside=StandingAside("all slots are at work", "", may_end=True))
    assert it.after(4.0) is None
    it.server.n_working = 2
    assert it.after(LONG_S) is None
    it.server.n_working = 1
    assert it.after(LONG_S) is Gone.CAN_BE_PROBED
