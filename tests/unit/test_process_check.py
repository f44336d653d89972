"""How it is found out that the process of a llama-server is alive, and when it need not be asked."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from bench.virtual import VirtualLoop
from llamaslot.backend.connect import ServerSession
from llamaslot.backend.presence import Presence
from llamaslot.backend.process_check import SUSPECT_S, ProcessCheck
from llamaslot.backend.slot_table import SlotTable
from llamaslot.errors import BackendDown, BackendRestarted
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.llama.answers import Props
from llamaslot.scheduling.rates import Rates
from llamaslot.scheduling.settings import QueueLimits, SchedulingSettings
from llamaslot.tasks import TaskOwner, outcome


class Asked:
    """A server that is asked for its properties, and answers when it is told to. ``is_connected``: its connections
    are open afterwards.
    """

    def __init__(self) -> None:
        self.n, self.is_connected, self.answers = 0, True, asyncio.Event()
        self.error: BackendDown | None = None

    async def props(self) -> Props:
        self.n += 1
        number = self.n
        await self.answers.wait()
        if self.error is not None and number == 1:
            raise self.error
        return Props(1, 4_096, "", f"answer {number}", is_connected=lambda: self.is_connected)


class Unloaded:
    """A model that is unloaded as soon as no request has a lease. To wait until it is loaded would last for ever."""

    def use_if_loaded(self, name: str) -> bool:
        return False

    async def serving(self, name: str) -> None:
        raise AssertionError("the holder of a lease waits for itself")


class Owner:
    """A backend that is connected to the process that has given answer 1."""

    def __init__(self) -> None:
        self.table = SlotTable("gpu0", 1, 1024, settings=SchedulingSettings(), rates=Rates())
        self.session = ServerSession(self.table, Props(1, 4_096, "", "answer 1"), "model")
        self.lost_tables: list[SlotTable] = []

    def lost(self, table: SlotTable) -> None:
        self.lost_tables.append(table)

    def doubt(self) -> None:
        pass

    def suspect(self) -> None:
        pass


def check_of(asked: Asked, owner: Owner | None = None, presence: Presence | None = None) -> ProcessCheck:
    leases = Dispatcher(SchedulingSettings(), QueueLimits(), lambda: 0.0).add("gpu0")
    return ProcessCheck(
        cast("Any", asked), leases, presence or Presence("gpu0"), cast("Any", owner or Owner())
    )


def is_only() -> bool:
    return False


async def ask(check: ProcessCheck, n: int) -> list[asyncio.Task[Props | BackendDown]]:
    owner = TaskOwner()
    tasks = [owner.spawn(outcome(check.ask, BackendDown), "ask") for _ in range(n)]
    await asyncio.sleep(0)
    return tasks


async def told(task: asyncio.Task[Props | BackendDown]) -> str:
    answer = await task
    return answer.boot_id if isinstance(answer, Props) else str(answer)


async def test_requests_that_come_before_the_answer_share_it() -> None:
    """A burst costs one question."""
    asked = Asked()
    check = check_of(asked)
    tasks = await ask(check, 5)
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["answer 1"] * 5
    assert (await check.ask()).boot_id == "answer 2"


async def test_after_a_failure_each_asks_again() -> None:
    """The error of one request is not that of others."""
    asked = Asked()
    check = check_of(asked)
    asked.error = BackendDown("is gone")
    tasks = await ask(check, 3)
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["is gone", "answer 2", "answer 3"]


async def test_after_a_cancelled_question_each_asks_again() -> None:
    """Canceling a request that only waits for the answer has no effect on others."""
    asked = Asked()
    check = check_of(asked)
    first, second, third = await ask(check, 3)
    second.cancel()
    await asyncio.wait([second])
    first.cancel()
    await asyncio.wait([first])
    asked.answers.set()
    assert await told(third) == "answer 2"


async def test_an_answer_of_a_process_that_died_meanwhile_is_not_shared() -> None:
    """Its connection is closed. Another process may have its port."""
    asked = Asked()
    check = check_of(asked)
    tasks = await ask(check, 2)
    asked.is_connected = False
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["answer 1", "answer 2"]


async def test_another_process_is_found_out_before_anything_is_done_in_a_leased_slot() -> None:
    """And llamaslot connects to it. What has a lease is placed again."""
    asked, owner = Asked(), Owner()
    check = check_of(asked, owner)
    asked.answers.set()
    await check.confirm(owner.table, is_only)
    assert owner.lost_tables == []
    with pytest.raises(BackendRestarted):
        await check.confirm(owner.table, is_only)
    assert owner.lost_tables == [owner.table]


async def test_a_lease_of_an_earlier_process_needs_no_question() -> None:
    """Its slots are gone."""
    asked, owner = Asked(), Owner()
    with pytest.raises(BackendRestarted):
        await check_of(asked, owner).confirm(Owner().table, is_only)
    assert asked.n == 0


async def test_a_new_connection_is_trusted_while_an_older_one_is_open() -> None:
    """However long ago the process has told its properties."""
    asked, owner = Asked(), Owner()
    check = check_of(asked, owner)
    asked.answers.set()
    await check.confirm(owner.table, is_only)
    assert check.at_connection(owner.table, is_only) is None
    asked.is_connected = False
    question = check.at_connection(owner.table, is_only)
    assert question is not None
    with pytest.raises(BackendRestarted):
        await question
    assert asked.n == 2


async def test_the_holder_of_a_lease_never_waits_until_a_model_is_loaded() -> None:
    """It only asks the process."""
    asked, owner, presence = Asked(), Owner(), Presence("gpu0")
    presence.on_demand = Unloaded()
    asked.answers.set()
    await check_of(asked, owner, presence).confirm(owner.table, is_only)
    assert asked.n == 1


# -- what proves that it is alive, and how long is waited -------

PROPS = Props(2, 4_096, "", "mark", is_connected=lambda: True)


class Timed:
    """A backend, and the llama-server that it asks: answers after ``takes_s`` seconds with ``told``. ``log``: what the
    check has told the backend.
    """

    def __init__(self) -> None:
        self.url, self.told, self.takes_s, self.log = "http://llama", PROPS, 0.0, list[str]()
        self.loop = VirtualLoop()
        self.leases = Dispatcher(SchedulingSettings(), QueueLimits(), self.loop.time).add("gpu0")
        self.table = SlotTable("gpu0", 2, 4_096, settings=SchedulingSettings(), rates=Rates())
        self.session = ServerSession(self.table, PROPS, "m")
        api, own = cast("Any", self), cast("Any", self)
        self.check = ProcessCheck(api, self.leases, Presence("gpu0"), own)

    async def props(self) -> Props:
        await asyncio.sleep(self.takes_s)
        if self.takes_s > 9.0:
            raise BackendDown("does not answer")
        return self.told

    def lost(self, table: SlotTable) -> None:
        self.log.append("lost")

    def doubt(self) -> None:
        self.log.append("doubt")

    def suspect(self) -> None:
        self.log.append("suspect")

    def confirm(self, table: SlotTable, *, is_only: bool = False) -> None:
        try:
            self.loop.run(self.check.confirm(table, lambda: is_only))
        finally:
            self.loop.close()


@pytest.mark.parametrize(
    ("told_s", "worked_s", "is_sleeping", "is_connected", "proves"),
    [
        (0.4, 0.4, False, True, True),
        (0.6, 0.4, False, True, False),
        (0.4, 0.6, False, True, False),
        (0.4, 0.4, True, True, False),
        (0.4, 0.4, False, False, False),
    ],
    ids=["all of it", "it told long ago", "it worked long ago", "it sleeps", "its connection is closed"],
)
def test_what_proves_that_it_is_alive_and_awake(
    told_s: float, worked_s: float, is_sleeping: bool, is_connected: bool, proves: bool
) -> None:
    """What it told half a second ago at most, if it has worked since or shortly before."""
    it, now = Timed(), 100.0
    told = Props(2, 4_096, "", "mark", is_sleeping=is_sleeping, is_connected=lambda: is_connected)
    it.leases.now = lambda: now - told_s
    it.check.has_told(it.session, told)
    it.leases.now, it.leases._worked_at = lambda: now, now - worked_s
    assert it.check.use_if_proved() is proves
    it.loop.close()


def test_what_a_process_tells_proves_nothing_of_the_next() -> None:
    """An answer that comes after another connection was made."""
    it = Timed()
    it.check.has_told(it.session, PROPS)
    assert it.check.at_connection(it.table, is_only) is None
    it.check.clear()
    it.table.is_current = False
    it.check.has_told(it.session, PROPS)
    it.table.is_current = True
    asking = it.check.at_connection(it.table, is_only)
    assert asking is not None
    it.loop.run(cast("Any", asking))
    it.loop.close()


def test_a_request_that_another_can_take_does_not_wait_for_one_that_hangs() -> None:
    """Longer than two seconds; then that one gets no more."""
    it = Timed()
    it.takes_s = SUSPECT_S + 1.0
    with pytest.raises(BackendDown, match="http://llama does not answer"):
        it.confirm(it.table)
    assert it.log == ["suspect"]


@pytest.mark.parametrize(("takes_s", "log"), [(SUSPECT_S + 1.0, []), (10.0, ["doubt"])])
def test_the_only_one_may_take_long(takes_s: float, log: list[str]) -> None:
    """Until the question fails: then it is looked at at once."""
    it = Timed()
    it.takes_s = takes_s
    if log:
        with pytest.raises(BackendDown):
            it.confirm(it.table, is_only=True)
    else:
        it.confirm(it.table, is_only=True)
    assert it.log == log
