"""Decides which models are loaded. The first request for a model loads it. At most ``max_loaded`` models are loaded at
a time, and a model that has been idle for ``idle_unload_s`` is unloaded.

A request waits in ``serving`` until its model is loaded. If all places are taken, a model is unloaded by these rules:

1. If any model is idle, the least recently used of the idle ones is unloaded at once.
2. Otherwise the least recently used model is chosen, among those that have been loaded for at least as long as loading
   them took. So at most half of the time is spent on loading, however many requests come. Its running requests
   go on to their end. New requests for it wait behind the requests that already wait for other models.

``unload`` saves the slots first, so a conversation that comes back finds its context on disk.

The models of a llama-server in router mode may also be loaded and unloaded by other programs: ``is_loaded`` tells.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from msgspec import Struct, field

from llamaslot.errors import BackendDown
from llamaslot.tasks import ChangeEvent, TaskOwner

# For so long after ``use_if_loaded`` a model is not idle, although no request runs yet: its prompt is being tokenized.
_ON_ITS_WAY_S = 1.0
# The first and the longest pause after a model could not be loaded; each is twice the last. Without a pause each
# request for it would unload another model.
_RETRY_S, _RETRY_AT_LAST_S = 1.0, 60.0


class Loadable(Protocol):
    """A model that can be loaded and unloaded. ``changes`` is notified when the model may have become idle, or a
    request may wait for it.
    """

    @property
    def name(self) -> str: ...
    @property
    def changes(self) -> ChangeEvent: ...
    @property
    def is_at_work(self) -> bool:
        """True if a request runs on the model."""
        ...

    @property
    def n_waiting(self) -> int:
        """The number of requests that wait for a slot of the model."""
        ...

    @property
    def is_loaded(self) -> bool | None:
        """True if the model is loaded, by llamaslot or another program. None if only llamaslot loads it."""
        ...

    async def load(self) -> None:
        """Load the model and wait until it serves. Raises BackendDown if that failed; then the model is unloaded.
        Canceling unloads it.
        """
        ...

    async def unload(self) -> None:
        """Save the model's slots, and unload it if it is loaded. Never canceled: canceling could leave the model
        loaded.
        """
        ...


class State(enum.Enum):
    UNLOADED = "unloaded"
    LOADING = "loading"
    LOADED = "loaded"
    LEAVING = "leaving"  # it is unloaded once its running requests have ended; new ones wait
    UNLOADING = "unloading"


NEXT = {
    State.UNLOADED: {State.LOADING},
    State.LOADING: {State.LOADED, State.UNLOADED},
    State.LOADED: {State.LEAVING, State.UNLOADING},
    State.LEAVING: {State.UNLOADING},
    State.UNLOADING: {State.UNLOADED},
}


class _Model(Struct):
    """The state of one model. ``used_at``: when its last request began or ended. ``asked_at``: when ``use_if_loaded``
    was called for a request that does not run yet. ``since``: when the present state began. ``load_s``: the seconds
    that its last loading took. ``retry_at``: the model is not loaded before this time.
    """

    its: Loadable
    used_at: float = -math.inf
    asked_at: float = -math.inf
    was_running: bool = False
    since: float = -math.inf
    load_s: float = 0.0
    state: State = State.UNLOADED
    failure: BackendDown | None = None
    n_failures: int = 0
    retry_at: float = -math.inf
    waiters: list[asyncio.Future[None]] = field(default_factory=list)
    loading: asyncio.Task[None] | None = None

    def go(self, state: State, now: float) -> None:
        assert state in NEXT[self.state], (
            f"{self.its.name} is {self.state.value} and cannot become {state.value}"
        )
        self.state, self.since = state, now


class OnDemand:
    """Loads and unloads models. ``max_loaded``: how many models are loaded at a time; None: all. ``idle_unload_s``:
    the seconds without use after which a model is unloaded; None: never.
    """

    def __init__(
        self,
        models: Iterable[Loadable],
        max_loaded: int | None,
        idle_unload_s: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models: dict[str, _Model] = {}
        self._max = max_loaded if max_loaded is not None else math.inf
        self._idle_unload_s = idle_unload_s if idle_unload_s is not None else math.inf
        self._now = now
        self._wanted: dict[
            str, None
        ] = {}  # models that requests wait for, in the order of the first requests
        self._changed = ChangeEvent()
        self._subscriptions = contextlib.ExitStack()
        self._tasks = TaskOwner()
        self._is_closed = False
        for model in models:
            self.add(model)

    def add(self, loadable: Loadable) -> None:
        """Add one more model that is loaded on demand."""
        self._models[loadable.name] = _Model(loadable)
        self._subscriptions.enter_context(loadable.changes.subscribed(self._changed.notify))

    def forgive(self) -> None:
        """End all pauses after failures: let each model be loaded again at once."""
        for model in self._models.values():
            model.n_failures, model.retry_at = 0, -math.inf

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def state(self, name: str) -> State:
        return self._models[name].state

    # -- for requests --------------------------------------------------------------------------------------------

    def use_if_loaded(self, name: str) -> bool:
        """True if the model is loaded. Then this call counts as a use, so that the model stays loaded for a while. If
        False, the request must wait in ``serving``.
        """
        model = self._models[name]
        if model.state is not State.LOADED or model.its.is_loaded is False:
            return False
        model.used_at = model.asked_at = self._now()
        return True

    async def serving(self, name: str) -> None:
        """Wait until the model is loaded. Raises BackendDown if it cannot be loaded. Canceling is safe: other requests
        go on waiting for it.
        """
        if self.use_if_loaded(name):
            return
        model = self._models[name]
        if model.state is State.UNLOADED and self._now() < model.retry_at:
            assert model.failure is not None, "set with retry_at"
            raise model.failure
        if self._is_closed:
            raise _stopping()
        future = asyncio.get_running_loop().create_future()
        model.waiters.append(future)
        self._wanted.setdefault(name)
        self._changed.notify()
        try:
            await future
        finally:
            if future in model.waiters:
                model.waiters.remove(future)

    # -- decisions, without an await -----------------------------------------------------------------------------

    def _decide(self, now: float) -> None:
        """Begin each loading and unloading that is due. Called whenever something has changed."""
        self._look(now)
        for name, model in self._models.items():
            if model.its.is_loaded is False and model.state in (State.LOADED, State.LEAVING):
                self._begin_unload(model, now)
            elif model.its.is_loaded and model.state is State.UNLOADED and now >= model.retry_at:
                self._begin_load(name, model, now)
        for name in list(self._wanted):
            model = self._models[name]
            if model.state is State.LOADED:
                self._served(model)
            elif model.state is State.UNLOADED and now >= model.retry_at and self._n_taken() < self._max:
                self._begin_load(name, model, now)
        for model in self._that_go(now):
            if self._is_idle(model, now):
                self._begin_unload(model, now)
            elif model.state is State.LOADED:
                model.go(State.LEAVING, now)

    def _begin_load(self, name: str, model: _Model, now: float) -> None:
        model.go(State.LOADING, now)
        model.loading = self._tasks.spawn(self._load(model), f"{name}: load")

    def _begin_unload(self, model: _Model, now: float) -> None:
        model.go(State.UNLOADING, now)
        self._tasks.spawn(self._unload(model), f"{model.its.name}: unload")

    def _look(self, now: float) -> None:
        """Update the time of each model's last use, and the models that requests wait for, in ``serving`` or in the
        queue for slots.
        """
        for name, model in self._models.items():
            is_running = model.its.is_at_work
            if is_running or model.was_running:
                model.used_at, model.asked_at = now, -math.inf
            model.was_running = is_running
            if model.waiters or (model.its.n_waiting and model.state is not State.LOADED):
                self._wanted.setdefault(name)
            else:
                self._wanted.pop(name, None)

    def _n_taken(self) -> int:
        return sum(model.state is not State.UNLOADED for model in self._models.values())

    def _that_go(self, now: float) -> Iterator[_Model]:
        """Yield the models to unload: those that are leaving already, then as many as must make room for models that
        requests wait for, and those that have been idle for too long.
        """
        yield from [model for model in self._models.values() if model.state is State.LEAVING]
        going = sum(model.state in (State.LEAVING, State.UNLOADING) for model in self._models.values())
        unloaded = [self._models[name] for name in self._wanted if self._models[name].state is State.UNLOADED]
        n_needed = sum(now >= model.retry_at for model in unloaded) - (self._max - self._n_taken()) - going
        loaded = sorted(
            (model for model in self._models.values() if model.state is State.LOADED),
            key=lambda model: (not self._is_idle(model, now), model.used_at),
        )
        for model in loaded:
            is_idle = self._is_idle(model, now)
            if n_needed > 0 and (is_idle or now - model.since >= model.load_s):
                n_needed -= 1
                yield model
            elif is_idle and now - model.used_at >= self._idle_unload_s:
                yield model

    def _is_idle(self, model: _Model, now: float) -> bool:
        return not (model.its.is_at_work or model.its.n_waiting or now - model.asked_at < _ON_ITS_WAY_S)

    def _next_s(self, now: float) -> float | None:
        """Return the seconds until the decision made at ``now`` may change only because time passes; None if it will
        not. ``now`` must be the time of that decision. With a later time, events that became due in between would be
        missed.
        """
        at = list[float]()
        for model in self._models.values():
            if model.state in (State.LOADED, State.LEAVING):
                at.append(model.asked_at + _ON_ITS_WAY_S)
            if model.state is State.LOADED:
                at += [model.since + model.load_s, model.used_at + self._idle_unload_s]
            elif model.state is State.UNLOADED:
                at.append(model.retry_at)
        later = [time_ for time_ in at if now < time_ < math.inf]
        return min(later) - now if later else None

    def _served(self, model: _Model) -> None:
        self._wanted.pop(model.its.name, None)
        model.used_at = model.asked_at = self._now()
        for future in model.waiters:
            if not future.done():
                future.set_result(None)
        model.waiters.clear()

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Load and unload models until cancelled. Call ``close`` afterwards."""
        with self._subscriptions:
            while True:
                now = self._now()
                self._decide(now)
                await self._changed.wait(self._next_s(now))

    async def close(self) -> None:
        """Stop models that are being loaded, and wait for models that are being saved and unloaded. Waiting requests
        get BackendDown, and so do later ones whose models are not loaded.
        """
        self._is_closed = True
        for model in self._models.values():
            self._fail(model, _stopping())
            if model.loading is not None:
                model.loading.cancel()
        await self._tasks.all_ended()

    async def _load(self, model: _Model) -> None:
        began = self._now()
        try:
            await model.its.load()
        except BackendDown as error:
            model.n_failures += 1
            model.retry_at = self._now() + min(
                _RETRY_AT_LAST_S, _RETRY_S * 2 ** min(model.n_failures - 1, 30)
            )
            model.go(State.UNLOADED, self._now())
            self._fail(model, error)
        except BaseException:
            model.go(State.UNLOADED, self._now())
            self._fail(model, BackendDown(f"{model.its.name}: was not loaded"))
            raise
        else:
            model.n_failures, model.load_s = 0, self._now() - began
            model.used_at = self._now()
            model.go(State.LOADED, self._now())
        finally:
            model.loading = None
            self._changed.notify()

    def _fail(self, model: _Model, error: BackendDown) -> None:
        model.failure = error
        for future in model.waiters:
            if not future.done():
                future.set_exception(error)
        model.waiters.clear()

    async def _unload(self, model: _Model) -> None:
        try:
            await model.its.unload()
        finally:
            model.go(State.UNLOADED, self._now())
            self._changed.notify()


def _stopping() -> BackendDown:
    return BackendDown("llamaslot is stopping")
