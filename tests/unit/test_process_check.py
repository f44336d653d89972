"""How it is found out that the process of a llama-server is alive, and when it need not be asked."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from llamaslot.backend.presence import Presence
from llamaslot.backend.process_check import ProcessCheck
from llamaslot.errors import BackendDown
from llamaslot.fleet.dispatcher import Dispatcher
from llamaslot.llama.answers import Props
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


def check_of(asked: Asked) -> ProcessCheck:
    dispatcher = Dispatcher(SchedulingSettings(), QueueLimits(), lambda: 0.0)
    return ProcessCheck(cast("Any", asked), dispatcher.add("gpu0"), Presence("gpu0"), cast("Any", None))


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
