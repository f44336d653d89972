"""Which checks ``llamaslot doctor`` makes.

If a llamaslot serves the configuration, doctor asks it, and touches no slot. Else doctor tries each llama-server in
idle slots, whose contexts it saves first and restores at the end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llamaslot.cli.check import check
from llamaslot.cli.doctor.findings import Finding
from llamaslot.cli.doctor.machine import holder, of_check, of_machine
from llamaslot.cli.doctor.probing import ServerProbes
from llamaslot.cli.doctor.running import of_backend, of_journal
from llamaslot.cli.running import NotRunning, Refused, Running
from llamaslot.config.load import Config
from llamaslot.config.sections import BackendConfig
from llamaslot.errors import BackendDown, LlamaslotError
from llamaslot.llama.client import LlamaServer

_PORTS = (8080, 9931)  # of a llama-server without --port: newer builds have the second


def examined(path: Path, config: Config, budget_s: float | None) -> Iterator[Finding]:
    """Yield all findings about a configuration. ``budget_s``: most seconds for filling a slot of a llama-server to its
    end; None: no limit. Raises ConfigError.
    """
    yield from of_check(check(path))
    yield from of_machine(config)
    running = Running.with_config(config)
    status, said = _status(running)
    yield from said
    if status is None:
        for settings in config.backends:
            yield from _tried(settings, budget_s)
    elif status:
        with running.understood():
            yield from _served(config, status, running.get("journal?n=1000")["decisions"], budget_s)


def _served(
    config: Config, status: dict[str, Any], decisions: list[dict[str, Any]], budget_s: float | None
) -> Iterator[Finding]:
    """Yield the findings about a running llamaslot: from its status and its journal, and from probes of the
    llama-servers that it has drained.
    """
    settings_of = {settings.name: settings for settings in config.backends}
    for backend in status["backends"]:
        configured = settings_of.get(backend["name"])
        if configured is not None and configured.url is not None and backend["drain"] == "drained":
            yield from _tried(configured, budget_s, is_served=False)
            continue
        yield from of_backend(backend)
        if backend["health"] == "down" and configured is not None:
            yield from _elsewhere(configured)
        if backend["health"] == "up":
            told = "llamaslot serves: not tried behind its back"
            if configured is None or configured.url is not None:  # one that llamaslot starts is never tried
                told += f"; llamaslot drain {backend['name']}, and run this again"
            yield Finding(f"{backend['name']}: batch, context shift", "skipped", told)
    yield from of_journal(status, decisions)


def _status(running: Running) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return the status of the running llamaslot, and a finding about that. The status is None if no llamaslot runs,
    and empty if it refuses to show it.
    """
    check = "llamaslot"
    try:
        status = running.get("status")
        with running.understood():
            return status, [Finding(check, "ok", f"{status['version']} serves on {running.where}")]
    except NotRunning:
        return None, [Finding(check, "ok", f"does not run on {running.where}: llama-server is tried")]
    except Refused as error:
        remedy = (
            "LLAMASLOT_KEY=<a key made with --admin> llamaslot doctor …" if error.status in (401, 403) else ""
        )
        return {}, [Finding(check, "skipped", f"serves, and does not tell more: {error}", remedy)]


def _tried(settings: BackendConfig, budget_s: float | None, *, is_served: bool = True) -> Iterator[Finding]:
    """Yield the findings from probes of one llama-server. ``is_served``: False if its llamaslot has drained it, so that
    the probes may use its slots.
    """
    directory = settings.slot_save_path
    if settings.url is None:
        yield Finding(
            f"{settings.name}: slots",
            "skipped",
            "llamaslot starts this llama-server: start llamaslot, then ask again",
        )
        return
    if is_served and directory is not None and (pid := holder(directory)) is not None:
        told = f"another llamaslot (pid {pid}) uses {directory}: nothing is tried behind its back"
        yield Finding(f"{settings.name}: slots", "skipped", told, "run doctor with its configuration")
        return
    try:
        yield from asyncio.run(probed(settings, budget_s))
    except BackendDown as error:
        yield Finding(f"{settings.name}: connection", "fault", str(error))
        yield from _elsewhere(settings)


async def probed(settings: BackendConfig, budget_s: float | None) -> list[Finding]:
    """Probe a llama-server and return the findings. ``budget_s``: as in ``examined``. Raises BackendDown if it does not
    answer at all. Canceling gives the slots back first.
    """
    assert settings.url is not None, "a server of its own"
    api = LlamaServer(settings.url, settings.resolve_api_key(), 60.0, name=settings.name)
    probes = ServerProbes(settings, api, budget_s)
    try:
        await probes.examine()
    except LlamaslotError as error:
        if not probes.findings:
            raise
        probes.findings.append(
            Finding(f"{settings.name}: connection", "fault", f"lost while it was tried: {error}")
        )
    finally:
        await api.close()
    return probes.findings


def _elsewhere(settings: BackendConfig) -> Iterator[Finding]:
    """Yield a finding if a llama-server answers on a default port of llama-server that is not the port of ``url``."""
    if settings.url is None:
        return
    parts = urlsplit(settings.url)
    for port in _PORTS:
        url = f"{parts.scheme}://{parts.hostname}:{port}"
        if port != parts.port and asyncio.run(_answers(url)):
            yield Finding(
                f"{settings.name}: port", "fault", f"a llama-server answers at {url}, and not at {settings.url}",
                f"backends[].url: {url}, or llama-server --port {parts.port or 80}",
            )  # fmt: skip


async def _answers(url: str) -> bool:
    api = LlamaServer(url)
    try:
        return (await api.props(2.0)).n_slots is not None
    except LlamaslotError:
        return False
    finally:
        await api.close()
