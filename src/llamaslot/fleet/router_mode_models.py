"""The models of one llama-server in router mode. Each is a backend of its own, and is loaded on demand.

llamaslot asks the router to load and unload them, so that slots are saved first. Other programs may load and unload
models too. llamaslot sees that in the router's list of models, which it reads every few seconds, and when the router's
stream of events tells of a change.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from llamaslot.backend.backend import Backend
from llamaslot.backend.presence import note_sleep
from llamaslot.errors import BackendDown, LlamaslotError
from llamaslot.fleet.managed_models import ServedOnDemand
from llamaslot.fleet.on_demand import OnDemand
from llamaslot.llama.router_mode import ModelRouter, ModelServer, RouterModel
from llamaslot.tasks import TaskOwner

Add = Callable[[RouterModel, ModelServer], Backend]
Open = Callable[[Backend], Awaitable[None]]

log = logging.getLogger(__name__)

_LOOK_S = 2.0
_LOOK_WITH_EVENTS_S = 15.0
_END_S = 30.0  # a model's process ends within this; the router kills it after 10 s (stop-timeout)


class RouterModeModel(ServedOnDemand):
    """One model of a router. The router loads and unloads it when llamaslot asks for that."""

    def __init__(self, backend: Backend, router: ModelRouter, model: RouterModel, save_s: float) -> None:
        super().__init__(backend, save_s)
        self._router, self._model, self._state = router, model.name, model.state
        self._idle_save_s = backend.idle_save.idle_save_s
        self._loading: asyncio.Timeout | None = None  # while the router loads the model

    @property
    def is_loaded(self) -> bool:
        """True if the model is loaded. A model that already slept when llamaslot came does not count, because
        connecting to it would wake it.
        """
        is_asleep = self._state == "sleeping"
        return self._state == "loaded" or (is_asleep and self._backend.session is not None)

    async def load(self) -> None:
        """Have the router load the model, and wait until llamaslot is connected to it. Raises BackendDown if that
        failed, or if the router does not answer any more. Then the model is unloaded, unless another program has
        loaded it.
        """
        is_others = self.is_loaded
        try:
            async with asyncio.timeout(None) as self._loading:
                await self._router.load(self._model)
        except (LlamaslotError, TimeoutError) as error:
            why = "the router does not answer" if isinstance(error, TimeoutError) else error
            raise BackendDown(f"{self.name}: was not loaded: {why}") from error
        finally:
            self._loading = None
        self._state = "loaded"
        self._backend.wake()
        try:
            await self._connected(
                lambda: None if self.is_loaded else "was unloaded while llamaslot connected to it"
            )
        except BackendDown:
            if not is_others:
                await self.unload()
            elif self._backend.presence.is_awake:
                self._backend.sleep()
            raise

    async def unload(self) -> None:
        """Save the slots, have the router unload the model, and wait until it has. A failure is logged."""
        leases = self._backend.leases
        leases.is_leaving = True
        try:
            if self.is_loaded:
                await self._backend.save_all(self._save_s)
                await self._router.unload(self._model)
                async with asyncio.timeout(_END_S):
                    while self.is_loaded:
                        await leases.changes.wait()
                log.info(
                    "%s: llamaslot has unloaded this model, because it was idle or another model needs its place",
                    self.name,
                )
        except LlamaslotError as error:
            log.warning("%s: the router did not unload this model: %s", self.name, error)
        except TimeoutError:
            log.warning(
                "%s: the router did not unload this model: it still runs %g s after the request to unload it",
                self.name, _END_S,
            )  # fmt: skip
        finally:
            if self._backend.presence.is_awake:
                self._backend.sleep()
            leases.is_leaving = False

    def note(self, state: str, sleep_s: float | None) -> None:
        """Record the ``state`` that the router tells for this model. ``sleep_s``: after so many idle seconds the model
        falls asleep; None if never or unknown.
        """
        if sleep_s is not None:  # all slots must be saved before the model falls asleep
            self._backend.idle_save.idle_save_s = min(self._idle_save_s, sleep_s / 4)
        # A model that wakes is "loading" too (measured). And this list may be older than what ``load`` has found.
        if state == self._state or (state == "loading" and self.is_loaded):
            return
        was_loaded, self._state = self.is_loaded, state
        if self._backend.session is not None:
            note_sleep(self._backend.leases, state == "sleeping", self._backend.now())
        if was_loaded and not self.is_loaded and self._backend.presence.is_awake:
            self._backend.sleep()
        self._backend.presence.changes.notify()
        self.changes.notify()

    def end_load(self) -> None:
        """Do not wait any longer until the router has loaded the model, because the router does not answer."""
        if self._loading is not None and not self._loading.expired():
            self._loading.reschedule(asyncio.get_running_loop().time())

    def gone(self, why: str) -> None:
        """Record that the router does not answer, for the reason ``why``, so the model's state is unknown."""
        self._state = "unknown"
        self._backend.sleep(why)
        self.changes.notify()

    def back(self) -> None:
        """Record that the router answers again. A call of ``note`` with the model's state follows. The model may have
        been loaded since the router answers.
        """
        if self._state == "unknown":
            self._backend.sleep()


class RouterModeModels:
    """The models of a router, as backends that replace ``backend``; only its name and its connection are still used.
    ``add`` makes a backend for a model that the router has named for the first time. ``open_`` reads the backend's
    learned rates.
    """

    def __init__(
        self, backend: Backend, router: ModelRouter, max_models: int, add: Add, open_: Open, save_s: float
    ) -> None:
        self.name, self._backend, self._router, self._save_s = backend.name, backend, router, save_s
        self._add, self._open = add, open_
        self.on_demand = OnDemand((), max_models or None, None)
        self._models: dict[str, RouterModeModel] = {}
        self._tasks, self._loading = TaskOwner(), TaskOwner()
        self._news = asyncio.Event()
        self._has_events = self._is_gone = False

    def start(self) -> None:
        """Follow the router from now on, and load models on demand. Call ``note`` before."""
        self._loading.spawn(self.on_demand.run(), f"{self.name}: load on demand")
        self._tasks.spawn(self._look_on(), f"{self.name}: list of models")
        self._tasks.spawn(self._listen(), f"{self.name}: events")

    async def stop_loading(self) -> None:
        """From now on load and unload no model. Waits for models that are being unloaded."""
        await self._loading.close()
        await self.on_demand.close()

    async def close(self) -> None:
        """End all tasks. The slots of the models have been saved before."""
        await self._tasks.close()
        await self._router.close()
        await self._backend.close()

    async def note(self, models: Sequence[RouterModel]) -> None:
        """Take over the router's list of models: make backends for new ones, and give each model its state."""
        new = [self._included(model) for model in models if model.name not in self._models]
        for backend in new:
            await self._open(backend)
            backend.start()
        for model in models:
            self._models[model.name].note(model.state, model.sleep_s)
        listed = {model.name for model in models}
        for name, known in self._models.items():
            if name not in listed:
                known.note("unlisted", None)

    def _included(self, model: RouterModel) -> Backend:
        server = self._router.server_of(model.name)
        backend = self._add(model, server)
        backend.presence.on_demand = self.on_demand
        backend.sleep()
        known = self._models[model.name] = RouterModeModel(backend, self._router, model, self._save_s)
        server.on_unloaded = self._unloaded(known)
        self.on_demand.add(known)
        return backend

    def _unloaded(self, model: RouterModeModel) -> Callable[[], None]:
        def is_unloaded() -> None:
            model.note("unloaded", None)
            self._news.set()

        return is_unloaded

    async def _look_on(self) -> None:
        while True:
            try:
                async with asyncio.timeout(_LOOK_WITH_EVENTS_S if self._has_events else _LOOK_S):
                    await self._news.wait()
            except TimeoutError:
                pass
            self._news.clear()
            try:
                models = await self._router.models()
            except LlamaslotError as error:
                self._note_gone(error)
                continue
            if self._is_gone:
                self._is_gone = False
                self._backend.metrics.is_up.set(True)
                log.info("%s: the router answers again, so its models are served again", self.name)
                self.on_demand.forgive()
                for model in self._models.values():
                    model.back()
            await self.note(models)

    def _note_gone(self, error: LlamaslotError) -> None:
        if not self._is_gone:
            self._is_gone = True
            self._backend.metrics.is_up.set(False)
            log.warning(
                "%s: the router does not answer, and its models are not served until it does: %s",
                self.name, error,
            )  # fmt: skip
            for model in self._models.values():
                model.gone(f"does not answer as a router ({error})")
        if isinstance(error, BackendDown):
            for model in self._models.values():
                model.end_load()

    async def _listen(self) -> None:
        while True:
            with contextlib.suppress(LlamaslotError):  # also raised by a build without this route
                async with contextlib.aclosing(self._router.changes()) as changes:
                    async for _ in changes:
                        self._has_events = True
                        self._news.set()
            self._has_events = False
            self._news.set()
            await asyncio.sleep(_LOOK_S)
