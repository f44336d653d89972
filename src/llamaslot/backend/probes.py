"""Probes llama-server to find out what it does not report. The probes run in a slot that holds nothing worth
keeping.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from llamaslot.cache.ids import count, head, unpack
from llamaslot.cache.reuse import CacheKind
from llamaslot.errors import SlotActionFailed, SnapshotInvalid, UpstreamError
from llamaslot.llama.answers import Props
from llamaslot.llama.client import ACTION_S, LlamaServer
from llamaslot.llama.identity import N_PROBS, Identity, architecture, gguf_mark, probe_tokens, told_properties
from llamaslot.scheduling.rates import Rates
from llamaslot.store import NotShared, QuotaExceeded, Reservation, prove_shared

log = logging.getLogger(__name__)

_FEW, _MORE = 10, 50  # tokens of two saves; their sizes give the bytes per token
_RAM_PROBE = 64  # tokens of the context that a probe displaces from its slot
_MAX_WINDOW = 8192  # a longer sliding window is not probed: it would take too long at each start

NO_SAVE_PATH = (
    "llama-server runs without --slot-save-path, so nothing is saved: a context whose slot another conversation takes"
    " is computed again. Start llama-server with --slot-save-path DIR, and set its slot_save_path to the same directory"
)
NO_DIRECTORY = (
    "slot_save_path is not set, so nothing is saved: a context whose slot another conversation takes is computed again."
    " Set it to the directory of llama-server's --slot-save-path, as llamaslot sees it; if llama-server runs on another"
    " machine, mount the directory here (NFS)"
)
NO_CHECKPOINTS = (
    "this build of llama-server keeps no checkpoints in slot files: a snapshot ends with its prompt, and the answer"
    " after it is computed again. Builds after b11434 keep them"
)
SNAPSHOTS_UNUSABLE = (
    "this build of llama-server keeps no checkpoints in slot files, without which nothing of a sliding-window model's"
    " snapshot can be reused. So nothing is saved: a context whose slot another conversation takes is computed again."
    " Start llama-server with --swa-full, or use a build after b11434"
)
STALE = (
    "after a restore this build of llama-server resumes from checkpoints of another conversation, and answers wrongly."
    " So nothing is saved or restored: a context whose slot another conversation takes is computed again. Use a newer"
    " build"
)


class SlotFiles(Protocol):
    """The interface of the place where probes save slots: the snapshot catalog, or a substitute in ``llamaslot
    doctor`` that keeps no file.
    """

    @property
    def slot_files(self) -> Path:
        """The directory in which llama-server writes and reads slot files, by the path that llamaslot uses."""
        ...

    @property
    def snapshots(self) -> Mapping[str, object]: ...

    async def reserve(self, size_bytes: int) -> Reservation:
        """Reserve room for a file of ``size_bytes``. Raises QuotaExceeded and SnapshotInvalid."""
        ...

    async def abandon(self, reservation: Reservation) -> None: ...


class Files(Struct, frozen=True):
    """Tells whether slot files of a model that cannot rewind to any token are useful.

    ``keep_checkpoints``: True if files contain the slot's checkpoints, or the probe was not possible. ``cache_kind``:
    the kind that resuming from a restored slot has shown; None if it has shown none. ``are_usable`` is False in two
    cases: without checkpoints in files, nothing of a sliding-window model's file can be reused; and builds such as
    b9713 answer wrongly, because they keep the slot's checkpoints when another conversation is restored, and resume
    from these (measured).
    """

    keep_checkpoints: bool = True
    cache_kind: CacheKind | None = None
    are_usable: bool = True


class Probes:
    """Probes one llama-server. ``warnings``: the findings that prevent reuse, each with its cost and its remedy.

    Every coroutine may raise BackendDown, SlotWedged, UpstreamError and NotUnderstood. Canceling is safe: the slot is
    left with a few dozen meaningless tokens.
    """

    def __init__(self, api: LlamaServer, catalog: SlotFiles | None, rates: Rates) -> None:
        self.api, self.catalog, self.rates = api, catalog, rates
        self.warnings: list[str] = []
        self.can_erase = True
        self.has_others_files = False  # True if other backends save into the same directory
        self.is_cache_kind_sure = False
        self.window: int | None = None  # tokens of a sliding window; None if no model file tells

    async def has_room(self, n_tokens: int) -> bool:
        """Make room for a slot file of ``n_tokens`` by eviction. Returns False, and evicts nothing, if there cannot be
        enough room.
        """
        if self.catalog is None:
            return False
        room = await self._quota(self.rates.size_bytes(n_tokens))
        if room is not None:
            await self.catalog.abandon(room)
        return room is not None

    async def can_save(self, slot: int, n_tokens: int) -> bool:
        """Return True if llama-server can save ``slot`` to a file that llamaslot can read. This saves the slot once to
        find out. If False, a warning tells why. ``n_tokens``: the number of tokens in the slot.
        """
        if not n_tokens:
            await self._fill(slot, _FEW)
        if self.catalog is None:
            self.warnings.append(NO_DIRECTORY)
            if not n_tokens:
                await self._try_erase(slot)
            return False

        async def save(name: str) -> None:
            await self.api.save(slot, name)

        async def restore(name: str) -> None:
            await self.api.erase(slot)
            try:
                await self.api.restore(slot, name)
            except SlotActionFailed as error:
                raise NotShared(
                    f"llama-server saves into {directory}, but cannot restore a file that llamaslot has renamed there"
                    f" ({error}): it would not find what other servers save. Mount that directory without a cache of"
                    " its entries, or give this server a directory of its own"
                ) from error

        directory = self.catalog.slot_files
        room = await self._quota(self.rates.size_bytes(n_tokens)) if n_tokens else None
        try:
            # A restore is tried only in a slot without a context, because a failed restore would lose the context.
            # If the room was reserved in a landing place, the file is written there through a link.
            name = room.part_name if room is not None else None
            can_lose = self.has_others_files and not n_tokens
            await prove_shared(directory, save, restore if can_lose else None, name)
        except SlotActionFailed as error:
            self.can_erase = error.status_upstream != 501
            self.warnings.append(NO_SAVE_PATH if not self.can_erase else f"slots cannot be saved: {error}")
            return False
        except (NotShared, UpstreamError) as error:
            self.warnings.append(f"nothing is kept on disk: {error}")
            return False
        finally:
            if room is not None:
                await self.catalog.abandon(room)
        return True

    async def _try_erase(self, slot: int) -> None:
        try:
            await self.api.erase(slot)
        except SlotActionFailed:
            self.can_erase = False

    async def _quota(self, size_bytes: int) -> Reservation | None:
        assert self.catalog is not None
        with contextlib.suppress(QuotaExceeded, SnapshotInvalid):
            return await self.catalog.reserve(size_bytes)
        return None

    async def size(self, slot: int) -> None:
        """Learn the bytes per token from two small saves. With a wrong guess the first save could exceed the quota, or
        evict everything.

        Does nothing if snapshots of this model have shown the size. Each probe reserves its estimated size, which may
        evict snapshots; without room the probe is left out. If there are no snapshots yet, a probe reserves nothing.
        """
        assert self.catalog is not None
        if self.rates.size.bytes(_MORE) is not None:
            return
        for n_tokens in (_FEW, _MORE):
            await self._fill(slot, n_tokens)
            room = await self._quota(self.rates.size_bytes(n_tokens) if self.catalog.snapshots else 0)
            if room is None:
                return
            try:
                saved = await self.api.save(slot, room.part_name)
                self.rates.size.observe(saved.n_tokens, saved.n_bytes)
            except SlotActionFailed as error:
                log.warning(
                    "%s: llamaslot estimates how large snapshots are, because a trial save failed: %s",
                    self.api.name, error,
                )  # fmt: skip
            finally:
                await self.catalog.abandon(room)

    async def cache_kind(self, slot: int, props: Props) -> CacheKind:
        """Return how the model can rewind. The GGUF file tells it, if that can be read, and a rewind in the slot
        verifies it.
        """
        known = await architecture(Path(props.model_path)) if props.model_path else None
        self.is_cache_kind_sure, self.window = known is not None, known.window if known is not None else None
        window = known.window if known is not None else 0
        n_tokens = window + 256 if window else _MORE
        cache_kind = known.cache_kind if known is not None else CacheKind.DENSE
        if n_tokens > min(_MAX_WINDOW, props.n_ctx // 2):
            return cache_kind
        tokens = await self._fill(slot, n_tokens)
        n_back = n_tokens // 4  # far enough before the checkpoints at the end
        n_reused = 0
        async with contextlib.aclosing(self.api.prefill(slot, head(tokens, n_back))) as events:
            async for event in events:
                n_reused = event.cache
                break
        if n_reused >= n_back - 1:
            return CacheKind.DENSE  # also SWA with --swa-full
        cache_kind = CacheKind.SWA if cache_kind is CacheKind.SWA else CacheKind.RECURRENT
        hint = "; --swa-full avoids that if there is memory for it" if cache_kind is CacheKind.SWA else ""
        log.info(
            "%s: a context of this model (cache kind %s) can be continued only at its exact end or at a checkpoint near"
            " it; a prompt that differs earlier is computed again%s",
            self.api.name, cache_kind.value, hint,
        )  # fmt: skip
        return cache_kind

    async def checkpoints(self, slot: int) -> Files:
        """Find out whether slot files of a model that cannot rewind to any token are useful."""
        assert self.catalog is not None
        # They begin with other tokens than the contexts of other probes.
        mine, other = meaningless_tokens(102)[8:], meaningless_tokens(101)[4:]
        parted = head(mine, 98) + head(other, 2)
        await self._prefill(slot, mine)
        if not await self._prefill(slot, parted):
            return Files()  # this build creates no checkpoints
        room = await self._quota(self.rates.size_bytes(count(parted)))
        if room is None:
            return Files()

        async def reused(tokens: bytes) -> int:
            await self.api.erase(slot)
            await self.api.restore(slot, room.part_name)
            return await self._prefill(slot, tokens)

        try:
            await self.api.save(slot, room.part_name)
            await self._prefill(slot, head(other, 20))  # now the slot has a checkpoint at 16, and no other
            if await reused(head(mine, 20) + head(other, 2)):  # the file has no checkpoint this early
                return self._useless(STALE)
            is_kept = await reused(mine) > 0
            is_end_enough = await reused(parted + head(other, 2)) == count(parted)
        except SlotActionFailed as error:
            log.info(
                "%s: llamaslot assumes that slot files hold checkpoints, because a trial save or restore failed: %s",
                self.api.name, error,
            )  # fmt: skip
            return Files()
        finally:
            await self.catalog.abandon(room)
        cache_kind = CacheKind.RECURRENT if is_end_enough else CacheKind.SWA
        if not is_kept and not is_end_enough:
            return self._useless(SNAPSHOTS_UNUSABLE)
        if not is_kept:
            self.warnings.append(NO_CHECKPOINTS)
        return Files(is_kept, cache_kind)

    def _useless(self, why: str) -> Files:
        self.warnings.append(why)
        return Files(False, are_usable=False)

    async def identity(self, slot: int, props: Props, model: Mapping[str, Any], lora: list[Any]) -> Identity:
        """Return the identity of the model. The probe's tokens stay in the slot."""
        tokens = probe_tokens(_n_vocab(model))
        behaviour = await self.api.top_logprobs(slot, tokens, N_PROBS)
        mark = await gguf_mark(Path(props.model_path)) if props.model_path else None
        assert props.n_slots is not None, "a server that is understood"
        return Identity(told_properties(model, props.n_slots, lora), behaviour, mark)

    async def is_unified(self, slot: int, other: int) -> bool:
        """True if ``slot``, which holds the probe's tokens, is empty after a task in ``other``: then the KV cache is
        unified.
        """
        await self._fill(other, _FEW)
        left = next((info.n_tokens for info in await self.api.slots() if info.id == slot), None)
        return not left

    async def has_ram_cache(self, slot: int | None = None) -> bool:
        """Return True if llama-server finds a context again that was displaced from its slot (``--cache-ram``).

        Three small requests run in ``slot``, or, with None, where llama-server chooses. What they displace there goes
        to the RAM cache, if there is one, as it would without llamaslot. The second one keeps less than half of the
        first one's context, so llama-server copies that context to the RAM cache. The third one resumes from it
        (tools/server/server-context.cpp: get_available_slot). Builds differ in whether they search the RAM cache for a
        request that names its slot (xllamacpp 2026.10: yes).
        """
        mine, other = meaningless_tokens(102)[8:], meaningless_tokens(101)[4:]
        first = head(mine, _RAM_PROBE)
        await self._complete(first, slot)
        await self._complete(head(first, _RAM_PROBE // 4) + head(other, _RAM_PROBE // 2), slot)
        return await self._complete(first + head(other, 8), slot) >= _RAM_PROBE // 2

    async def moves_reasoning(self, slot: int) -> bool:
        """Return True if a stream of a chat may have the reasoning in another field than the same answer without a
        stream: ``--reasoning-format deepseek-legacy`` on builds of 2025 (chat.cpp, ``reasoning_in_content``). Only an
        answer tells the flag; ``/props`` names another default (measured, xllamacpp 2026.10).
        """
        settings = (await self._answer(meaningless_tokens(_FEW), slot)).get("generation_settings") or {}
        return bool(settings.get("reasoning_format") == "deepseek-legacy")

    async def _complete(self, tokens: bytes, slot: int | None) -> int:
        """Compute ``tokens`` as ``_answer`` does. Returns the number of reused tokens."""
        timings = (await self._answer(tokens, slot)).get("timings")
        return int(timings["cache_n"]) if timings else 0

    async def _answer(self, tokens: bytes, slot: int | None) -> Mapping[str, Any]:
        """Compute ``tokens`` as a prompt in ``slot``, or, with None, where llama-server chooses. Returns the answer."""
        body: dict[str, Any] = {"prompt": unpack(tokens), "n_predict": 0, "cache_prompt": True}
        if slot is not None:
            body["id_slot"] = slot
        _, answer = await self.api.ask("/completion", body, ACTION_S)
        return answer if isinstance(answer, dict) else {}

    async def _fill(self, slot: int, n_tokens: int) -> bytes:
        """Compute ``n_tokens`` meaningless tokens in ``slot``, and return them."""
        tokens = meaningless_tokens(n_tokens)
        await self._prefill(slot, tokens)
        return tokens

    async def _prefill(self, slot: int, tokens: bytes) -> int:
        """Compute ``tokens`` in ``slot``, as a chunk of a prefill is computed. Returns the number of reused tokens.
        Learns the speed of prefill, and the cost of a request besides that.
        """
        n_reused, took_s, now = 0, 0.0, asyncio.get_running_loop().time
        began = now()
        async with contextlib.aclosing(self.api.prefill(slot, tokens)) as events:
            async for event in events:
                n_reused = event.cache
                if event.processed > event.cache:
                    self.rates.prefill.observe(event.cache, event.processed, event.seconds)
                took_s = event.seconds
        self.rates.request.observe(now() - began - took_s)
        return n_reused


def meaningless_tokens(n_tokens: int) -> bytes:
    """Return ``n_tokens`` tokens without meaning, for a probe."""
    tokens = (probe_tokens(256) * (n_tokens // 50 + 1))[: n_tokens * 4]
    assert count(tokens) == n_tokens
    return tokens


def _n_vocab(model: Mapping[str, Any]) -> int:
    return int((model.get("meta") or {}).get("n_vocab") or 256)
