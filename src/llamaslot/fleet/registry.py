"""All backends of this llamaslot, the pools that they form, and their snapshot directories, as configured."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from msgspec import convert
from msgspec.structs import replace

from llamaslot.backend.backend import Backend
from llamaslot.backend.connect import ServerSession
from llamaslot.config.load import Config
from llamaslot.config.sections import ModelConfig, StoreConfig
from llamaslot.config.values import read_chat_file
from llamaslot.errors import BackendDown, ConfigError, NotReady
from llamaslot.fleet.pool import Pool, PoolModel, PoolSettings
from llamaslot.fleet.router import Router
from llamaslot.fleet.router_mode_models import RouterModeModels
from llamaslot.formats import CHAT
from llamaslot.formats.rewrite_rules import Rewriting
from llamaslot.llama.answers import Props
from llamaslot.llama.client import LlamaServer
from llamaslot.llama.identity import Identity
from llamaslot.llama.router_mode import ModelRouter, ModelServer, RouterModel
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.settings import PrefillSettings, QueueLimits, SchedulingSettings
from llamaslot.scheduling.snapshot_value import SnapshotStats
from llamaslot.store import Snapshot
from llamaslot.store.quota import Limits
from llamaslot.store.snapshot_store import SnapshotStore

log = logging.getLogger(__name__)


_USUAL_MARK = "<__media__>"  # the same in all processes of builds that have no random mark
_SAME_PROCESS = (
    "it is the same llama-server as %s, under another address: one server is one backend, so this one is not used."
    " Remove it from backends; if they are two servers, start them without LLAMA_MEDIA_MARKER"
)


class Registry:
    """All backends and pools. Backends that serve the same model form a pool. Backends with the same directory share a
    store.

    The model of a backend is known once it is connected, and may be another one after its next connection. Before its
    first connection a backend is in the first pool, which then has no model, or the model of other backends."""

    def __init__(self, metrics: Metrics, settings: PoolSettings) -> None:
        self.metrics, self._settings = metrics, settings
        self._backends: dict[str, Backend] = {}
        self._of_models: dict[str, PoolSettings] = {}
        self._routers: list[RouterModeModels] = []
        self.save_s = 60.0  # the longest time for saving the slots of a model before its router unloads it
        self.stores: dict[Path, SnapshotStore] = {}
        self._processes: dict[str, str] = {}  # by backend: the mark of its llama-server process
        self.pools = [self._new_pool()]
        self.router = Router(self.pools, self._backends)

    @classmethod
    def of(cls, config: Config, urls: Mapping[str, str] | None = None) -> Registry:
        """Return a registry with the backends and stores in ``config``. ``urls``: by name, the URLs of managed
        backends. Raises ConfigError if a configured file has become unreadable since the configuration was checked."""
        registry = cls(Metrics(), _pool_settings(config))
        registry.router.configure(config.models)
        registry._of_models = {
            name: _pool_settings(config, settings) for name, settings in config.models.each.items()
        }
        registry.save_s = config.shutdown.save_s
        for settings in config.backends:
            url = (urls or {}).get(settings.name) or settings.url
            assert url is not None, "a managed backend has a URL once it is there"
            api = LlamaServer(url, settings.resolve_api_key(), config.timeouts.watchdog_s, name=settings.name)
            directory, slot_files = config.directory_of(settings), settings.slot_save_path
            backend = registry.add(settings.name, api, config.store, directory, slot_files)
            backend.cache_misses.tells_texts = config.log.prompts
        return registry

    def add(
        self,
        name: str,
        api: LlamaServer,
        store: StoreConfig,
        directory: Path | None,
        slot_files: Path | None = None,
    ) -> Backend:
        """Add a backend; ``start`` connects to it. ``directory``: where its snapshots are; None without snapshots.
        ``slot_files``: where llama-server writes and reads slot files, if elsewhere."""
        its = self._store(name, store, directory, slot_files) if directory is not None else None
        return self._add(name, api, its, store.meta_dir / f"{name}.rates.json")

    def _add(self, name: str, api: LlamaServer, store: SnapshotStore | None, rates_file: Path) -> Backend:
        pool = self.pools[0]
        self._backends[name] = backend = Backend(
            name,
            api,
            pool.dispatcher.add(name),
            self,
            settings=self._settings.scheduling,
            metrics=self.metrics.of_backend(name),
            rates_file=rates_file,
            idle_save_s=self._settings.idle_save_s,
            store=store,
        )
        pool.backends[name] = backend
        return backend

    def _store(
        self, name: str, settings: StoreConfig, directory: Path, slot_files: Path | None
    ) -> SnapshotStore:
        """Return the store of ``directory``, which is made at the first call. Its files in ``meta_dir`` have the name
        of the first backend that uses it."""
        if (path := _real(directory)) not in self.stores:
            self.stores[path] = self._new_store(name, settings, directory, slot_files)
        self.stores[path].n_backends += 1
        return self.stores[path]

    def _new_store(
        self, name: str, settings: StoreConfig, directory: Path, slot_files: Path | None
    ) -> SnapshotStore:
        return SnapshotStore(
            directory,
            settings.meta_dir,
            name,
            limits=_store_limits(settings),
            landing=slot_files,
            landing_bytes=settings.landing_quota,
            on_drop=self._dropped,
            saves_s=self._saves_s,
        )

    def _new_pool(self) -> Pool:
        return Pool(self._settings, self.metrics, self._backends)

    @property
    def backends(self) -> list[Backend]:
        return list(self._backends.values())

    @property
    def n_snapshots(self) -> int:
        """The number of snapshots in all directories, of all models."""
        return sum(len(store.catalog.snapshots) for store in self.stores.values())

    @property
    def size_bytes(self) -> int:
        """The bytes on disk of all snapshots, in all directories."""
        return sum(store.catalog.size_bytes for store in self.stores.values())

    @property
    def quota_bytes(self) -> int:
        return sum(store.catalog.limits.quota_bytes for store in self.stores.values())

    def backend_named(self, name: str) -> Backend | None:
        return self._backends.get(name)

    def apply(self, config: Config) -> None:
        """Use the limits in ``config`` from now on, for queues and snapshots. If a quota is smaller than before,
        snapshots are evicted in the background."""
        self._settings = replace(self._settings, limits=_limits(config))
        for name, settings in self._of_models.items():
            self._of_models[name] = replace(settings, limits=_limits(config, config.models.each[name]))
        for pool in self.pools:
            names = [name for backend in pool.once_connected for name in _names_of(backend)]
            pool.configure(self._settings_of(names))
        for store in self.stores.values():
            store.catalog.take_limits(_store_limits(config.store))

    async def add_later(self, config: Config, name: str) -> None:
        """Add the backend ``name`` in ``config`` to the running ones. If it is there already and drained, put it into
        service again. Raises LlamaslotError if its store cannot be used; then it is not added."""
        if (backend := self.backend_named(name)) is not None:
            backend.drain.end()
            return
        settings = next(backend for backend in config.backends if backend.name == name)
        assert settings.url is not None, "one that runs already"
        api = LlamaServer(settings.url, settings.resolve_api_key(), config.timeouts.watchdog_s, name=name)
        directory = config.directory_of(settings)
        if directory is not None and (path := _real(directory)) not in self.stores:
            store = self._new_store(name, config.store, directory, settings.slot_save_path)
            await store.open()  # before requests can see the backend: it may fail
            self.stores[path] = store
        backend = self.add(name, api, config.store, directory, settings.slot_save_path)
        backend.cache_misses.tells_texts = config.log.prompts
        try:
            await self._open(backend)
        finally:  # if cancelled, it has learned nothing yet
            backend.start()

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _dropped(self, snapshot: Snapshot) -> None:
        for backend in self._backends.values():
            if (table := backend.leases.table) is not None:
                table.drop_snapshot(snapshot.id)

    def _saves_s(self, stats: SnapshotStats) -> float:
        """Return the seconds that each hit of a snapshot saves, by the speeds of any backend that can use it, because
        all of these have similar speeds."""
        tables = [backend.leases.table for backend in self._backends.values()]
        for table in tables:
            if table is not None and table.has_snapshot(stats.id):
                return table.saves_s(stats)
        rates = next(iter(self._backends.values())).rates
        return stats.saves_s(rates.prefill.seconds, rates.restore.seconds)

    # -- called by backends, as their ``Members`` ----------------------------------------------------------------

    @property
    def are_several(self) -> bool:
        return len(self._backends) > 1

    def check_process(self, backend: Backend, props: Props) -> None:
        """Raise NotReady if another backend has the same llama-server process. Both have the same mark
        (``media_marker``) then, which is random for each process unless the environment sets it."""
        self._processes[backend.name] = mark = props.boot_id
        other = next(
            (name for name, process in self._processes.items() if process == mark and name != backend.name),
            None,
        )
        if other is not None and mark not in ("", _USUAL_MARK):
            del self._processes[backend.name]
            raise NotReady(_SAME_PROCESS % other)

    async def replace_by_models(self, backend: Backend, max_models: int) -> None:
        """Replace ``backend``, a router, by one backend for each of its models. Raises BackendDown if it has no
        models. Canceling is safe."""
        api = backend.api
        router = ModelRouter(api.url, api.api_key, api.watchdog_s, name=backend.name)
        models = await router.models()
        if not models:
            raise BackendDown(
                "llama-server runs in router mode and has no model: start it with --models-dir DIR"
            )
        log.info(
            "%s: llama-server runs in router mode; llamaslot serves its %d models", backend.name, len(models)
        )
        add = partial(self._add_model, backend)
        its = RouterModeModels(backend, router, max_models, add, self._open, self.save_s)
        self._routers.append(its)
        self.router.has_router = self.router.is_on_demand = True
        await its.note(models)
        its.start()
        backend.presence.is_replaced = True
        backend.sleep()
        self._leave(backend, self.pool_of(backend))
        del self._backends[backend.name]

    def _add_model(self, router: Backend, model: RouterModel, server: ModelServer) -> Backend:
        file = router.rates_file.path.with_name(f"{quote(server.name, safe='')}.rates.json")
        new = self._add(server.name, server, router.store, file)
        if new.store is not None:
            new.store.n_backends += 1
        for name in (model.name, *model.aliases):
            self.router.expected.setdefault(name, new.name)
        return new

    def connecting(self, backend: Backend, session: ServerSession) -> None:
        """Put the backend into the pool of its model. There are five cases:

        1. llamaslot stands aside, so the model is not proved, and the backend last had a proved model of the same
           name: it stays in its pool.
        2. A pool has this model: the backend joins that pool.
        3. No pool has it, and the backend's pool has no model yet: this becomes the pool's model.
        4. No pool has it, and no other backend has served the model of the backend's pool: the pool has this model
           from now on.
        5. Otherwise a new pool is made."""
        model, old = PoolModel.of(session), self.pool_of(backend)
        last = backend.last_session
        was_proved = last is not None and last.is_assisted and last.model_name == session.model_name
        if model.identity is None and was_proved:
            return
        new = next(
            (pool for pool in self.pools if pool.model is not None and pool.model.is_same(model)), None
        )
        if new is None:
            is_shared = any(other is not backend for other in old.once_connected)
            new = self._started_pool() if old.model is not None and is_shared else old
            new.model = model
        if new is not old:
            self._move(backend, old, new)
        new.configure(self._settings_of((*session.names, backend.name)))
        self.router.note_names(backend, session, new)

    def _settings_of(self, names: Collection[str]) -> PoolSettings:
        """Return the settings of a pool. ``names``: the names of its model and its backends; the first configured one
        counts."""
        return next((settings for name, settings in self._of_models.items() if name in names), self._settings)

    def _started_pool(self) -> Pool:
        pool = self._new_pool()
        self.pools.append(pool)
        pool.start()
        return pool

    def _move(self, backend: Backend, old: Pool, new: Pool) -> None:
        if backend.last_session is not None:
            log.warning(
                "%s: llama-server serves another model than before; the backend now gets requests for that model",
                backend.name,
            )
        backend.abandoned_slots.end_gone()
        new.join(backend)
        self._leave(backend, old)

    def _leave(self, backend: Backend, old: Pool) -> None:
        old.remove(backend)
        if not old.backends:
            self.pools.remove(old)
            old.retire()
        elif not old.once_connected:
            old.model = None

    def connected(self, backend: Backend, session: ServerSession) -> None:
        self.pool_of(backend).connected(session)
        if backend.store is not None:
            backend.store.keep_learned()

    def disconnected(self, backend: Backend, error: BackendDown | None) -> None:
        self._processes.pop(backend.name, None)
        self.pool_of(backend).disconnected(backend, error)

    def pool_of(self, backend: Backend) -> Pool:
        return next(pool for pool in self.pools if backend.name in pool.backends)

    # -- life ----------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open all stores. Raises LlamaslotError, with a remedy, if one cannot be used. Warns if a disk
        will be full before the snapshots reach the quota."""
        for store in self.stores.values():
            await store.open()
            if (note := await asyncio.to_thread(store.beyond_disk)) is not None:
                log.warning("the disk has too little free space for the quota: %s", note)
        for backend in self._backends.values():
            await self._open(backend)

    async def _open(self, backend: Backend) -> None:
        await backend.open()
        if self.router.are_several and backend.store is not None:
            # Otherwise snapshots of models that are not connected yet would count as those of unknown models.
            _expect(backend, backend.store)

    def start(self) -> None:
        """Connect to the backends."""
        for pool in self.pools:
            pool.start()
        for backend in self._backends.values():
            backend.start()

    async def close(self, save_s: float) -> None:
        """Save dirty slots for at most ``save_s`` seconds, and end all tasks."""
        for models in self._routers:
            await models.stop_loading()
        await asyncio.gather(*(backend.save_all(save_s) for backend in self._backends.values()))
        for pool in self.pools:
            await pool.close()
        for backend in self._backends.values():
            await backend.close()
        for models in self._routers:
            await models.close()
        for store in self.stores.values():
            await store.close()


def _real(directory: Path) -> Path:
    return Path(os.path.realpath(directory))


def _expect(backend: Backend, store: SnapshotStore) -> None:
    if (model := Identity.from_text(backend.rates.model)) is None:
        return
    snapshots = sorted(store.catalog.snapshots.values(), key=lambda snapshot: snapshot.created_at)
    texts = dict.fromkeys(snapshot.fingerprint for snapshot in reversed(snapshots))
    if (text := next(filter(model.is_same_as, texts), None)) is not None:
        store.catalog.serve(backend.name, text)


def _names_of(backend: Backend) -> tuple[str, ...]:
    session = backend.last_session
    return (*(session.names if session is not None else ()), backend.name)


def _pool_settings(config: Config, model: ModelConfig | None = None) -> PoolSettings:
    """Return the settings of a pool. ``model``: what is configured differently for its model; None for nothing."""
    own = None if model is None else model.prewarm
    return PoolSettings(
        config.store.idle_save_s,
        scheduling=_scheduling(config),
        limits=_limits(config, model),
        prewarm=_chat_bodies(config, config.prewarm if own is None else own),
    )


def _store_limits(settings: StoreConfig) -> Limits:
    return Limits(settings.quota, max_files=settings.max_files, min_free_bytes=settings.min_free)


def _limits(config: Config, model: ModelConfig | None = None) -> QueueLimits:
    """Return the limits of a queue. ``model``: what is configured differently for its model; None for nothing."""
    queue = config.queue
    if model is not None:
        queue = queue.model_copy(
            update={key: getattr(model.queue, key) for key in model.queue.model_fields_set}
        )
    return convert(queue, QueueLimits, from_attributes=True)


def _scheduling(config: Config) -> SchedulingSettings:
    routing, prefill = config.routing, config.prefill
    return SchedulingSettings(
        similarity_min=routing.similarity_min,
        small_prompt_tokens=routing.small_prompt_tokens,
        chunk_threshold_s=prefill.chunk_threshold_s,
        prefill=convert(prefill, PrefillSettings, from_attributes=True),
        is_isolated=config.cache.isolation == "per_user",
    )


def _chat_bodies(config: Config, files: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Return the bodies in ``files``, each with its file's name, after the rewrite rules. Raises ConfigError if a file
    has become unreadable since the configuration was checked."""
    try:
        bodies = [(path.name, read_chat_file(path)) for path in files]
    except ValueError as error:
        raise ConfigError("prewarm", [str(error)]) from error
    rewriting = Rewriting(config.rules if bodies else ())
    for _, body in bodies:
        rewriting.apply(body, CHAT)
    return bodies
