"""The fake llama-server without its HTTP: slots, the task queue, and the main loop that computes step by step.

As in llama.cpp's ``tools/server``: one loop that first takes every queued task, then computes one step (a token for
each decoding slot, then prompt tokens up to the batch size, by slot number). Tasks for a busy slot are deferred; each
*release* of a slot wakes one of them. Save, erase and restore run between two steps and release nothing.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

from tests.support import fake_reuse, fake_stop
from tests.support.fake_clock import Clock, Pace
from tests.support.fake_faults import Faults
from tests.support.fake_model import IM_END, BadInput, FakeModel, common, pack
from tests.support.fake_types import (
    Begin,
    Call,
    Done,
    Failed,
    FakeSlot,
    Progress,
    Result,
    Shape,
    State,
    Task,
    Token,
)


class Engine:
    """The slots and the main loop. ``run`` is the main loop; the routes call everything else."""

    def __init__(
        self,
        shape: Shape,
        model: FakeModel,
        clock: Clock,
        pace: Pace,
        faults: Faults,
        violations: list[str],
    ) -> None:
        self.shape, self.model, self.clock, self.pace, self.faults = shape, model, clock, pace, faults
        self.violations = violations
        self.slots = [FakeSlot(i) for i in range(shape.n_slots)]
        self.queue: deque[Task | Call] = deque()
        self.deferred: deque[Task | Call] = deque()
        self.counters: Counter[str] = Counter()
        self.n_steps = 0
        self.is_stepping = False
        self.last_result_s = clock.now()
        self.on_change: Callable[[], None] = lambda: None
        self._ids = itertools.count()
        self._uses = itertools.count()
        self._wake = asyncio.Event()
        self._may_step = asyncio.Event()
        self._may_step.set()
        self._credits = 0

    # ---- asked by the routes

    def next_id(self) -> int:
        return next(self._ids)

    def post(self, tasks: Iterable[Task]) -> None:
        self.queue.extend(tasks)
        self._wake.set()

    def cancel(self, tasks: Iterable[Task]) -> None:
        """The client has gone. Its running tasks end after the step that is computed now."""
        for task in tasks:
            task.cancelled = True
            for child in task.children:
                child.cancelled = True
        self._wake.set()

    async def ask(self, run: Callable[[], Any], first: bool = True) -> Any:
        """Call ``run`` between two steps, as GET /slots does. Its answer starts the second again after which the server
        detects that clients have gone.
        """
        call = Call(run, asyncio.get_running_loop().create_future())
        self.queue.appendleft(call) if first else self.queue.append(call)
        self._wake.set()
        return await call.future

    async def act(self, slot: int, name: str, run: Callable[[], Any], cost_s: Callable[[Any], float]) -> Any:
        """Run a slot action as soon as the slot is idle."""
        call = Call(run, asyncio.get_running_loop().create_future(), slot % self.shape.n_slots, name, cost_s)
        self.queue.append(call)
        self._wake.set()
        return await call.future

    def hold(self) -> None:
        """Compute nothing until ``allow`` or ``release``. Tasks are still accepted and cancelled."""
        self._may_step.clear()

    def allow(self, n_steps: int) -> None:
        self._credits += n_steps
        self._wake.set()
        self._may_step.set()

    def release(self) -> None:
        self._credits = -1
        self._wake.set()
        self._may_step.set()

    # ---- the main loop

    async def run(self) -> None:
        while True:
            self._wake.clear()
            while self.queue:
                await self._take(self.queue.popleft())
            self._sweep()
            if self.queue:
                continue
            self.on_change()
            if not any(slot.is_processing for slot in self.slots) or not self._may_step.is_set():
                await self._wake.wait()
            else:
                if self._credits > 0:
                    self._credits -= 1
                    if not self._credits:
                        self._may_step.clear()
                await self._step()

    def _sweep(self) -> None:
        """Cancelled tasks leave the deferred queue, or release their slots."""
        kept = [item for item in self.deferred if not (isinstance(item, Task) and item.cancelled)]
        self.deferred = deque(kept)
        for slot in self.slots:
            if slot.task is not None and slot.task.cancelled:
                self._release(slot)

    async def _take(self, item: Task | Call) -> None:
        if isinstance(item, Call):
            await self._call(item)
        elif not item.cancelled:
            self._launch(item)

    async def _call(self, call: Call) -> None:
        if call.slot is not None:
            n_late = sum(not (isinstance(one, Task) and one.is_behind_its_own) for one in self.deferred)
            if call.name and n_late:
                self._violation(f"{call.name} of slot {call.slot} while {n_late} tasks are deferred")
            if self.slots[call.slot].is_processing:
                self._violation(f"{call.name} of slot {call.slot}, which is busy")
                self.deferred.append(call)
                return
        try:
            result = call.run()
        except Exception as error:  # handed to the route that asked
            call.future.set_exception(error)
            call.future.exception()
        else:
            if (cost_s := call.cost_s(result)) > 0:
                await self.clock.sleep(cost_s)
            if not call.future.done():
                call.future.set_result(result)
        self.last_result_s = self.clock.now()
        self.on_change()

    def _launch(self, task: Task) -> None:
        slot = self._slot_for(task)
        siblings = [s for s in self.slots if not s.is_processing and s is not slot][: len(task.children)]
        if slot is None or slot.is_processing or len(siblings) < len(task.children):
            # Prompts of one array queue behind each other by design; all other requests should have waited outside.
            of_same = any(s.task is not None and s.task.results is task.results for s in self.slots)
            if not task.was_deferred and not of_same:
                where = (
                    f"pinned to slot {slot.id}, which is"
                    if task.slot is not None and slot
                    else "while slots are"
                )
                self._violation(f"completion {where} busy")
            task.was_deferred, task.is_behind_its_own = True, task.is_behind_its_own or of_same
            self.deferred.append(task)
            return
        if self.shape.unified:
            for other in self.slots:
                if not other.is_processing and other is not slot:
                    other.clear()
        self._occupy(slot, task, State.STARTED)
        for sibling, child in zip(siblings, task.children, strict=True):
            self._occupy(sibling, child, State.WAITS)

    def _slot_for(self, task: Task) -> FakeSlot | None:
        if task.slot is not None:
            return self.slots[task.slot % self.shape.n_slots]
        best, best_share = None, self.shape.sps
        for slot in self.slots:
            if not slot.is_processing and slot.tokens and task.tokens:
                share = common(slot.tokens, task.tokens) / task.n_prompt
                if share > best_share:
                    best, best_share = slot, share
        if best is None:
            # Among those never used the last one is taken: llama-server compares with <=.
            for slot in self.slots:
                if not slot.is_processing and (best is None or slot.last_used <= best.last_used):
                    best = slot
        return best

    def _occupy(self, slot: FakeSlot, task: Task, state: State) -> None:
        slot.task = slot.last_task = task
        slot.state, slot.was_erased, slot.sampled = state, False, None
        task.landed = slot.id

    def _release(self, slot: FakeSlot) -> None:
        task = slot.task
        assert task is not None
        slot.task, slot.state, slot.sampled = None, State.IDLE, None
        slot.last_used = next(self._uses)
        task.ended = True
        if task.parent is not None:
            slot.clear()
        self._wake_one(slot.id)

    def _wake_one(self, slot: int) -> None:
        """A release wakes one deferred task: the first completion pinned to this slot, else the first of all."""
        if not self.deferred:
            return
        n = self.shape.n_slots
        pinned = (
            i for i in self.deferred if isinstance(i, Task) and i.slot is not None and i.slot % n == slot
        )
        chosen = next(pinned, self.deferred[0])
        self.deferred.remove(chosen)
        self.queue.append(chosen)

    def _violation(self, what: str) -> None:
        self.violations.append(what)

    def _send(self, task: Task, result: Result) -> None:
        self.last_result_s = self.clock.now()
        task.results.put_nowait(result)

    def metrics(self) -> dict[str, float]:
        """The samples of /metrics, named without their prefix."""
        counted = ("prompt_tokens_total", "prompt_tokens_cached_total", "tokens_predicted_total")
        return {
            **{name: self.counters[name] for name in counted},
            "n_decode_total": self.n_steps,
            "requests_processing": sum(slot.is_processing for slot in self.slots),
            "requests_deferred": len(self.deferred),
        }

    # ---- one step

    async def _step(self) -> None:
        decoding = [slot for slot in self.slots if slot.state is State.DECODE]
        for slot in decoding:
            assert slot.sampled is not None
            slot.tokens += pack([slot.sampled])
            slot.lowest = fake_reuse.lowest_live(slot, self.shape)
        room = max(0, self.shape.batch - len(decoding))
        filled: list[tuple[FakeSlot, int]] = []
        for slot in self.slots:
            if not room:
                break
            if slot.state is State.STARTED:
                self._start(slot)
            if slot.state is State.PREFILL:
                task = slot.task
                assert task is not None
                ends = [at for at in fake_reuse.marks(task, self.shape) if at > slot.n_tokens]
                take = min(room, min([*ends, task.n_prompt]) - slot.n_tokens)
                slot.tokens = task.tokens[: 4 * (slot.n_tokens + take)]
                slot.origins |= {self.model.weights}
                room -= take
                filled.append((slot, take))
        self.on_change()
        n_prompt = sum(take for _, take in filled)
        cost_s = self.pace.of_step(n_prompt, len(decoding))
        self.n_steps += 1
        self.is_stepping = True
        await self.clock.sleep(cost_s)
        self.is_stepping = False
        for slot, take in filled:
            self._prefilled(slot, take, cost_s)
        for slot in decoding:
            if slot.task is not None:
                slot.task.predicted_s += cost_s or 0.02
                self._sample(slot)

    def _start(self, slot: FakeSlot) -> None:
        """Look at the prompt: refuse it, or cut the slot back to what can be reused of it."""
        task = slot.task
        assert task is not None
        n_ctx = self.shape.n_ctx
        if not task.n_prompt:
            self._send(task, Done(task.index, "none", task.times()))
            self._release(slot)
            return
        if task.n_prompt >= n_ctx:
            text = (
                f"request ({task.n_prompt} tokens) exceeds the available context size ({n_ctx} tokens), "
                "try increasing it"
            )
            error = BadInput(
                text, kind="exceed_context_size_error", n_prompt_tokens=task.n_prompt, n_ctx=n_ctx
            )
            self._fail(slot, error)
            return
        task.fails = self.faults.take_failure()
        if task.fails is not None and not task.fails[0]:
            self._fail(slot, task.fails[1])
            return
        if self.faults.take_loss():
            slot.clear()
        shared = common(slot.tokens, task.tokens) if task.cache_prompt else 0
        n_cache = fake_reuse.begin(slot, shared, task, self.shape)
        slot.state = State.PREFILL
        for one in (task, *task.children):
            one.n_cache = n_cache
        if task.progress:
            self._send(task, self._progress(task, n_cache))
        else:
            self._send(task, Begin(task.index))

    def _fail(self, slot: FakeSlot, error: BadInput) -> None:
        task = slot.task
        assert task is not None
        for sibling in self.slots:
            if sibling.task in task.children:
                self._release(sibling)
        self._send(task, Failed(task.index, error))
        self._release(slot)

    def _progress(self, task: Task, processed: int) -> Progress:
        cache = self.faults.reported_cache(task.n_cache, task.n_prompt)
        return Progress(task.index, task.n_prompt, cache, processed, task.times())

    def _prefilled(self, slot: FakeSlot, take: int, cost_s: float) -> None:
        task = slot.task
        if task is None:
            return
        task.n_computed += take
        task.prompt_s += cost_s or take / 5000  # a rate to learn even where nothing takes time
        if task.progress:
            self._send(task, self._progress(task, slot.n_tokens))
        slot.lowest = fake_reuse.lowest_live(slot, self.shape)
        if slot.n_tokens in fake_reuse.marks(task, self.shape):
            fake_reuse.note(slot, slot.n_tokens)
        if slot.n_tokens < task.n_prompt:
            return
        self.counters["prompt_tokens_total"] += task.n_computed
        self.counters["prompt_tokens_cached_total"] += task.n_cache
        sharers = [slot]
        for sibling in self.slots:
            child = sibling.task
            if child is not None and child in task.children:
                sibling.tokens, sibling.origins = slot.tokens, slot.origins
                sibling.checkpoints, sibling.lowest = list(slot.checkpoints), slot.lowest
                child.n_computed, child.prompt_s = task.n_computed, task.prompt_s
                sharers.append(sibling)
                if child.progress:
                    self._send(child, self._progress(child, slot.n_tokens))
        for sharer in sorted(sharers, key=lambda s: s.id):
            sharer.state = State.DECODE
            self._sample(sharer)

    def _sample(self, slot: FakeSlot) -> None:
        """Sample the next token. The last token of an answer is never put into the slot."""
        task = slot.task
        assert task is not None
        token = self.model.next_token(slot.tokens, slot.origins)
        if task.n_predict < 0 and len(task.generated) >= self.shape.answer_tokens:
            token = IM_END
        top = self.model.top(slot.tokens, slot.origins, task.n_probs) if task.n_probs else []
        task.generated.append(token)
        task.tops.append(tuple(top))
        slot.sampled = token
        self.counters["tokens_predicted_total"] += 1
        n = len(task.generated)
        text, word = fake_stop.told(task, self.model)
        self._send(task, Token(task.index, token, text, task.times(), tuple(top)))
        if task.fails is not None and n >= task.fails[0]:
            self._fail(slot, task.fails[1])
            return
        task.truncated = slot.n_tokens + 1 >= self.shape.n_ctx
        if word is not None:
            task.stopping_word = word
            self._finish(slot, "word")
        elif token == IM_END:
            self._finish(slot, "eos")
        elif 0 <= task.n_predict <= n or task.truncated:
            self._finish(slot, "limit")

    def _finish(self, slot: FakeSlot, stop_type: str) -> None:
        assert slot.task is not None
        self._send(slot.task, Done(slot.task.index, stop_type, slot.task.times()))
        self._release(slot)
