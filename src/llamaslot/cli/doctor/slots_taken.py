"""Slots of a llama-server that ``llamaslot doctor`` takes for its probes, and gives back as they were."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from types import MappingProxyType

from llamaslot.errors import LlamaslotError, SlotActionFailed
from llamaslot.llama.answers import SlotInfo
from llamaslot.llama.client import LlamaServer
from llamaslot.store import QuotaExceeded, Reservation
from llamaslot.store.snapshot import PROBE, new_id

_POLLS, _POLL_S = 40, 1.5  # asked more often, llama-server does not notice that its client has left
_ROOM = 1.2  # of the bytes that a probe is expected to need


class ProbeFiles:
    """Names files for probes in ``directory``, with the interface of ``probes.SlotFiles``, and removes each after its
    probe. After a crash the next start of llamaslot removes them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def slot_files(self) -> Path:
        return self._directory

    @property
    def snapshots(self) -> Mapping[str, object]:
        return MappingProxyType({})  # none is evicted for a probe

    async def reserve(self, size_bytes: int) -> Reservation:
        if shutil.disk_usage(self._directory).free < size_bytes * _ROOM:
            raise QuotaExceeded(f"{self._directory} has no room for a probe of {size_bytes:,} bytes")
        id_ = new_id()
        return Reservation(id_, id_ + PROBE, size_bytes)

    async def abandon(self, reservation: Reservation) -> None:
        with contextlib.suppress(OSError):
            await asyncio.to_thread((self._directory / reservation.part_name).unlink)


async def until_idle(api: LlamaServer, slot: int) -> bool:
    """Wait until ``slot`` is idle. Returns False if llama-server works in it for too long."""
    for _ in range(_POLLS):
        if not any(info.id == slot and info.is_processing for info in await api.slots()):
            return True
        await asyncio.sleep(_POLL_S)
    return False


class CannotTake(LlamaslotError):
    """An idle slot holds a context that cannot be saved, so it is left alone."""


class TakenSlots:
    """Takes idle slots for probes. The context of a slot is saved first, and restored at the end, unless another client
    works there for a minute. ``directory``: llama-server's directory for slot files, as seen from here; None if
    unknown.
    """

    def __init__(self, api: LlamaServer, directory: Path | None) -> None:
        self._api, self._directory = api, directory
        self._held = dict[int, str]()  # slot -> the file with its content
        self.left_files: list[str] = []  # that llama-server wrote and that are not in ``directory``
        self.lost: list[str] = []  # slots that could not be given back, with the reason

    @contextlib.asynccontextmanager
    async def given_back(self) -> AsyncIterator[TakenSlots]:
        """A context manager: in its block slots may be taken, at its end they are given back. Canceling gives them back
        first.
        """
        try:
            yield self
        finally:
            await self._give_back()

    async def take(self, info: SlotInfo) -> int:
        """Save the context of an idle slot and empty the slot. Returns its number. Raises CannotTake if the context
        cannot be saved; SlotActionFailed with status 501 if llama-server has no ``--slot-save-path``.
        """
        if not info.n_tokens:
            return info.id
        name = new_id() + PROBE
        try:
            await self._api.save(info.id, name)
        except SlotActionFailed as error:
            if error.status_upstream == 501:
                raise
            raise CannotTake(f"slot {info.id} holds {info.n_tokens:,} tokens, and {error}") from error
        self._held[info.id] = name
        return info.id

    async def _give_back(self) -> None:
        for slot, name in self._held.items():
            try:
                await self._restore(slot, name)
            except LlamaslotError as error:
                self.lost.append(f"slot {slot}: {error}")
            if self._directory is None or not (file := self._directory / name).exists():
                self.left_files.append(name)
                continue
            with contextlib.suppress(OSError):
                await asyncio.to_thread(file.unlink)
        self._held.clear()

    async def _restore(self, slot: int, name: str) -> None:
        # A probe that was left early is computed to the end of its batch.
        if not await until_idle(self._api, slot):
            raise CannotTake("another client works there now")
        await self._api.erase(slot)
        await self._api.restore(slot, name)
