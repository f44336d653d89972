"""All pools of this llamaslot, as configured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llamaslot.backend.backend import Backend
from llamaslot.config.load import Config
from llamaslot.config.values import read_chat_file
from llamaslot.errors import ConfigError
from llamaslot.fleet.pool import Directory, Pool, PoolSettings
from llamaslot.fleet.queue import QueueLimits
from llamaslot.formats.registry import CHAT
from llamaslot.formats.rewrite import Rewriting
from llamaslot.llama.client import LlamaServer
from llamaslot.observe.metrics import Metrics
from llamaslot.scheduling.fairness import Fairness
from llamaslot.scheduling.placement import Rules
from llamaslot.scheduling.prefill_policy import PrefillSharing


class Registry:
    """One pool of one backend at present: the configuration allows no more."""

    def __init__(self, metrics: Metrics, pools: list[Pool]) -> None:
        self.metrics, self.pools = metrics, pools

    @classmethod
    def of(cls, config: Config, url: str) -> Registry:
        """``url``: of the configured backend; that of a managed one is known once it is started. Raises ConfigError
        if a configured file, readable a moment ago, is not readable any more.
        """
        metrics, settings = Metrics(), config.backend
        pool = Pool(_pool_settings(config), metrics)
        api = LlamaServer(url, settings.resolve_api_key(), config.timeouts.watchdog_s, name=settings.name)
        backend = pool.add(settings.name, api)
        backend.cache_misses.tells_texts = config.log.prompts
        return cls(metrics, [pool])

    @property
    def backends(self) -> Iterator[Backend]:
        return (backend for pool in self.pools for backend in pool.backends.values())

    def pool_for(self, model: object = None) -> Pool:
        """The pool that serves ``model``, as named in a request. With one pool any name is accepted, as in
        llama-server.
        """
        return self.pools[0]

    async def open(self) -> None:
        """Open all stores. Raises LlamaslotError with the remedy if one cannot be used."""
        for pool in self.pools:
            await pool.open()

    def start(self) -> None:
        """Start to connect to the backends."""
        for pool in self.pools:
            pool.start()

    async def close(self, save_s: float) -> None:
        """Save dirty slots, for at most ``save_s`` seconds, and end all tasks."""
        for pool in self.pools:
            await pool.close(save_s)


def _pool_settings(config: Config) -> PoolSettings:
    settings, store = config.backend, config.store
    directory = None
    if settings.slot_save_path is not None:
        directory = Directory(settings.slot_save_path, store.quota, store.max_files, store.min_free)
    return PoolSettings(
        settings.name,
        store.meta_dir,
        store.idle_save_s,
        rules=_rules(config),
        limits=_limits(config),
        directory=directory,
        prewarm=_chat_bodies(config),
    )


def _limits(config: Config) -> QueueLimits:
    queue = config.queue
    fairness = Fairness(
        queue.user_max_running,
        queue.user_max_waiting,
        queue.small_request_max_overtake_s,
        queue.return_grace_s,
    )
    return QueueLimits(queue.max_waiting, queue.max_wait_s, fairness)


def _rules(config: Config) -> Rules:
    routing, prefill = config.routing, config.prefill
    sharing = PrefillSharing(prefill.decode_share, prefill.chunk_s, prefill.starvation_s, prefill.max_yield_s)
    return Rules(
        routing.similarity_min,
        routing.small_prompt_tokens,
        prefill.chunk_threshold_s,
        sharing,
        is_isolated=config.cache.isolation == "per_user",
    )


def _chat_bodies(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """The bodies named in ``prewarm``, rewritten as requests are. Raises ConfigError if a file, readable a moment
    ago, is not readable any more.
    """
    try:
        bodies = [(path.name, read_chat_file(path)) for path in config.prewarm]
    except ValueError as error:
        raise ConfigError("prewarm", [str(error)]) from error
    rewriting = Rewriting(config.rules if bodies else ())
    for _, body in bodies:
        rewriting.apply(body, CHAT)
    return bodies
