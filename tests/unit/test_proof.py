"""How a backend shows that the process of its llama-server is alive."""

from __future__ import annotations

import asyncio

import pytest

from llamaslot.backend.health import Presence, Proof
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


@pytest.fixture
def proof() -> Proof:
    dispatcher = Dispatcher(SchedulingSettings(), QueueLimits(), lambda: 0.0)
    return Proof(Presence("gpu0"), dispatcher.add("gpu0"))


async def ask(proof: Proof, asked: Asked, n: int) -> list[asyncio.Task[Props | BackendDown]]:
    owner = TaskOwner()
    tasks = [owner.spawn(outcome(lambda: proof.ask(asked.props), BackendDown), "ask") for _ in range(n)]
    await asyncio.sleep(0)
    return tasks


async def told(task: asyncio.Task[Props | BackendDown]) -> str:
    answer = await task
    return answer.boot_id if isinstance(answer, Props) else str(answer)


async def test_requests_that_come_before_the_answer_share_it(proof: Proof) -> None:
    """A burst costs one question."""
    asked = Asked()
    tasks = await ask(proof, asked, 5)
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["answer 1"] * 5
    assert (await proof.ask(asked.props)).boot_id == "answer 2"


async def test_after_a_failure_each_asks_again(proof: Proof) -> None:
    """The error of one request is not that of others."""
    asked = Asked()
    asked.error = BackendDown("is gone")
    tasks = await ask(proof, asked, 3)
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["is gone", "answer 2", "answer 3"]


async def test_after_a_cancelled_question_each_asks_again(proof: Proof) -> None:
    """Canceling a request that only waits for the answer has no effect on others."""
    asked = Asked()
    first, second, third = await ask(proof, asked, 3)
    second.cancel()
    await asyncio.wait([second])
    first.cancel()
    await asyncio.wait([first])
    asked.answers.set()
    assert await told(third) == "answer 2"


async def test_an_answer_of_a_process_that_died_meanwhile_is_not_shared(proof: Proof) -> None:
    """Its connection is closed. Another process may have its port."""
    asked = Asked()
    tasks = await ask(proof, asked, 2)
    asked.is_connected = False
    asked.answers.set()
    assert [await told(task) for task in tasks] == ["answer 1", "answer 2"]
