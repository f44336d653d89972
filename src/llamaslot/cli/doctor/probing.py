"""The probes of a llama-server by ``llamaslot doctor``, if no llamaslot serves it now. Each finding is an effect that
was seen, not a flag that was read.

The probes use one or two idle slots. While other slots are working, only short probes are made.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from llamaslot.backend.assist import clears_idle_slots, no_slots, not_understood, wrong_key
from llamaslot.backend.probes import NO_DIRECTORY, NO_SAVE_PATH, Probes, meaningless_tokens
from llamaslot.cache.ids import head, unpack
from llamaslot.cache.reuse import CacheKind
from llamaslot.cli.doctor.findings import Finding, State
from llamaslot.cli.doctor.slots_taken import CannotTake, ProbeFiles, TakenSlots
from llamaslot.cli.doctor.speed import Filled, fill, round_trip
from llamaslot.config.sections import BackendConfig
from llamaslot.errors import LlamaslotError, SlotActionFailed, UpstreamError
from llamaslot.llama.answers import Props, SlotInfo
from llamaslot.llama.client import ACTION_S, LlamaServer
from llamaslot.scheduling.rates import Rates
from llamaslot.sizes import readable_size
from llamaslot.tasks import TaskOwner

_STEP_S = 120.0  # for a probe that is small: longer if another client has taken the slot
_BATCH = 1024
_MORE_TASKS = 20  # each leaves two checkpoints
_MANY_CHECKPOINTS = 8


class ServerProbes:
    """Probes one llama-server. ``budget_s``: most seconds for filling a slot to its end; None: no limit."""

    def __init__(self, settings: BackendConfig, api: LlamaServer, budget_s: float | None) -> None:
        self._name, self._api, self._budget_s = settings.name, api, budget_s
        self._directory = settings.slot_save_path
        files = ProbeFiles(self._directory) if self._directory is not None else None
        self._rates = Rates()
        self._probes = Probes(api, files, self._rates)
        self._taken = TakenSlots(api, self._directory)
        self.findings: list[Finding] = []

    async def examine(self) -> None:
        """Make all probes and add their results to ``findings``. Raises BackendDown if llama-server stops answering.
        Canceling gives the slots back first.
        """
        try:
            props = await self._api.props()
            if props.n_slots is None:
                aside = not_understood("GET /props names no total_slots")
                return self._say("connection", "fault", aside.why, aside.remedy)
            infos = await self._api.slots()
        except UpstreamError as error:
            if error.status in (401, 403):
                aside = wrong_key(str(error))
            elif error.status in (404, 501):
                aside = no_slots(None, str(error))
            else:
                return self._say("connection", "fault", f"llama-server answers {error.status}: {error}")
            return self._say("connection", "fault", aside.why, aside.remedy)
        self._say("connection", "ok", f"{len(infos)} slots of {props.n_ctx:,} tokens at {self._api.url}")
        async with self._taken.given_back():
            await self._examine(props, infos)
        if self._taken.lost:
            self._say("given back", "fault", f"contexts are lost: {'; '.join(self._taken.lost)}")
        if self._taken.left_files:
            names = ", ".join(self._taken.left_files)
            self._say(
                "given back",
                "warning",
                "files of the probes lie in llama-server's directory",
                f"rm {names} there",
            )
        return None

    async def _examine(self, props: Props, infos: list[SlotInfo]) -> None:
        idle = sorted((info for info in infos if not info.is_processing), key=lambda info: info.n_tokens or 0)
        n_busy = len(infos) - len(idle)
        if not idle:
            self._say("slots", "skipped", f"all {n_busy} are working: run it again when one is idle")
            return
        try:
            slot = await self._taken.take(idle[0])
        except SlotActionFailed:
            self._say("slot files", "fault", NO_SAVE_PATH, "llama-server --slot-save-path DIR")
            self._say("slots", "skipped", "all hold contexts, which could not be saved before a probe")
            return
        except CannotTake as error:
            self._say("slots", "skipped", f"left alone: {error}")
            return
        can_save = await self._can_save(slot)
        other = await self._other(idle[1:])
        filled = None
        if n_busy:
            self._say(
                "speed, context shift",
                "skipped",
                f"{n_busy} of {len(infos)} slots are working: run it again when it is quiet",
            )
        else:
            filled = await self._filled(slot, props)
        is_unified = await self._idle_slots(slot, other, idle[1:], len(infos))
        if filled is not None and can_save:
            await self._compute(slot, meaningless_tokens(filled.n_tokens))
            await self._trip(slot, None if is_unified else other, filled, props)
        await self._ram_cache(slot, is_alone=not n_busy and not any(info.n_tokens for info in idle[1:]))
        if can_save:
            await self._files(slot, props, is_quiet=not n_busy)

    def _say(self, check: str, state: State, text: str, remedy: str = "") -> None:
        self.findings.append(Finding(f"{self._name}: {check}", state, text, remedy))

    async def _other(self, idle: list[SlotInfo]) -> int | None:
        for info in idle:
            with contextlib.suppress(LlamaslotError):
                return await self._taken.take(info)
        return None

    # -- slot files --------------------------------------------------------------------------------------------------

    async def _can_save(self, slot: int) -> bool:
        """Save a few tokens of ``slot``, and rename and remove the file. Returns True if that worked; adds a finding
        either way.
        """
        async with asyncio.timeout(_STEP_S):
            can_save = await self._probes.can_save(slot, 0)
        if can_save:
            self._say(
                "slot files", "ok", f"appear in {self._directory}, and this user may rename and remove them"
            )
            return True
        warning = self._probes.warnings[-1]
        if not self._probes.can_erase:
            self._say("slot files", "fault", NO_SAVE_PATH, "llama-server --slot-save-path DIR")
        elif self._directory is None:
            self._say(
                "slot files",
                "fault",
                NO_DIRECTORY,
                "backends[].slot_save_path: DIR, as llama-server's --slot-save-path",
            )
        else:
            remedy = f"llama-server --slot-save-path {self._directory}"
            self._say("slot files", "fault", warning, remedy if "did not appear" in warning else "")
        return False

    async def _files(self, slot: int, props: Props, *, is_quiet: bool) -> None:
        """For a model that cannot rewind to any token, find out whether its slot files can be used, and (if no slot is
        working, ``is_quiet``) whether checkpoints make them large.
        """
        kind = await self._step(lambda: self._probes.cache_kind(slot, props))
        if kind is None or kind is CacheKind.DENSE:
            return
        n_warnings = len(self._probes.warnings)
        await self._step(lambda: self._probes.checkpoints(slot))
        for warning in self._probes.warnings[n_warnings:]:
            self._say(
                "checkpoints", "fault", warning, "llama-server --swa-full" if "--swa-full" in warning else ""
            )
        if is_quiet and len(self._probes.warnings) == n_warnings:
            await self._step(lambda: self._checkpoints(slot, props))

    async def _checkpoints(self, slot: int, props: Props) -> None:
        """Find out how many bytes checkpoints add to each slot file. Compares files that are saved after one, two and
        many prompts in the slot: each prompt leaves two checkpoints, up to --ctx-checkpoints in all.
        """
        n_each, n_first = 8, min(props.n_ctx // 2, 512)
        tokens = meaningless_tokens(n_first + n_each * (_MORE_TASKS + 1))
        await self._api.erase(slot)
        sizes = []
        for i in range(_MORE_TASKS + 1):
            await self._compute(slot, head(tokens, n_first + n_each * i))
            if i in (0, 1, _MORE_TASKS):
                sizes.append(await self._size(slot))
        first, second, many = sizes
        if (pair := second - first) <= 0 or many <= second:
            return self._say("checkpoints", "ok", "slot files hold few")
        n_kept = 2 + round(2 * (many - first) / pair)
        each = pair / 2
        await self._api.erase(slot)
        n_long = min(props.n_ctx - 8, 4096)
        await self._compute(slot, meaningless_tokens(n_long))
        plain = max(await self._size(slot) - 2 * each, 1.0) * props.n_ctx / n_long
        text = (
            f"a conversation keeps {'at least ' if n_kept >= 2 * _MORE_TASKS else ''}{n_kept} of {readable_size(each)}:"
            f" {readable_size(n_kept * each)} in each file, beside {readable_size(plain)} for {props.n_ctx:,} tokens"
        )
        if n_kept > _MANY_CHECKPOINTS and n_kept * each > plain:
            return self._say(
                "checkpoints", "warning", text, f"llama-server --ctx-checkpoints {_MANY_CHECKPOINTS}"
            )
        return self._say("checkpoints", "ok", text)

    async def _size(self, slot: int) -> int:
        room = await self._files_of_probes().reserve(0)
        try:
            return (await self._api.save(slot, room.part_name)).n_bytes
        finally:
            await self._files_of_probes().abandon(room)

    def _files_of_probes(self) -> ProbeFiles:
        assert self._directory is not None, "something was saved there"
        return ProbeFiles(self._directory)

    # -- slots -------------------------------------------------------------------------------------------------------

    async def _ram_cache(self, slot: int, *, is_alone: bool) -> None:
        """Find out whether llama-server has a RAM cache. ``is_alone``: all slots are empty, so the probe may let
        llama-server choose the slot; else it uses ``slot``.
        """
        has = await self._step(lambda: self._probes.has_ram_cache(None if is_alone else slot))
        if has:
            self._say(
                "RAM cache", "fault", "llama-server has one: it moves contexts out of slots, copies them while streams"
                " wait, and loses them with the process",
                "llama-server --cache-ram 0 --no-cache-idle-slots",
            )  # fmt: skip
        elif has is not None:
            self._say("RAM cache", "ok", "none in the way")

    async def _idle_slots(self, slot: int, other: int | None, others: list[SlotInfo], n_slots: int) -> bool:
        """Return True if a task in ``slot`` empties idle slots. False also if that could not be tried."""
        held = {info.id for info in others if info.n_tokens} - {other}
        were_emptied = bool(held) and any(
            info.id in held and not info.n_tokens for info in await self._api.slots()
        )
        if not were_emptied and other is None:
            self._say("idle slots", "skipped", "only one slot could be used")
            return False
        if not were_emptied and other is not None:
            await self._compute(slot, meaningless_tokens(50))
            if not (is_unified := await self._step(lambda: self._probes.is_unified(slot, other))):
                if is_unified is not None:
                    self._say("idle slots", "ok", "keep their contexts while another one works")
                return False
        why = clears_idle_slots(n_slots).why
        self._say(
            "idle slots", "fault", f"{why}: what is saved is empty, and every context is computed again",
            f"llama-server -np {n_slots} --no-kv-unified --no-cache-idle-slots",
        )  # fmt: skip
        return True

    # -- speed -------------------------------------------------------------------------------------------------------

    async def _filled(self, slot: int, props: Props) -> Filled:
        """Fill the slot to its end if that fits into the budget. Adds findings about batch size and context shift."""
        filled = await fill(self._api, slot, props.n_ctx - 5, self._budget_s)
        if filled.batch is not None:
            text = f"{filled.batch:,} tokens in {filled.batch_s:.2f} s: so long streams stand still beside a prompt"
            if filled.batch > _BATCH:
                self._say(
                    "batch", "warning", text,
                    "llama-server -b 512 -ub 512 (larger for GPUs in a pipeline, MoE layers on the CPU, /infill)",
                )  # fmt: skip
            else:
                self._say("batch", "ok", text)
        if filled.n_tokens < props.n_ctx - 5:
            told = f"not tried: filling {props.n_ctx:,} tokens would take about {filled.rest_s:,.0f} s more: --deep"
            self._say("context shift", "skipped", told)
            return filled
        n_more = 12
        body: dict[str, Any] = {
            "prompt": unpack(meaningless_tokens(props.n_ctx - 4)),
            "n_predict": n_more,
            "id_slot": slot,
            "cache_prompt": True,
            "ignore_eos": True,
        }
        status, answer = await self._api.ask("/completion", body, ACTION_S)
        if status != 200:
            self._say("context shift", "skipped", f"the answer at the end of the context was {status}")
        elif answer["tokens_predicted"] >= n_more:
            self._say(
                "context shift", "fault", "an answer that does not fit pushes the beginning out: what is left is no"
                " beginning of any prompt, and is computed again",
                "llama-server without --context-shift",
            )  # fmt: skip
        else:
            self._say("context shift", "ok", "an answer ends where its slot is full")
        return filled

    async def _trip(self, slot: int, other: int | None, filled: Filled, props: Props) -> None:
        room = await self._files_of_probes().reserve(self._rates.size_bytes(filled.n_tokens))
        owner = TaskOwner()
        try:
            trip = await round_trip(self._api, slot, other, room.part_name, owner)
        except SlotActionFailed as error:
            return self._say("save and restore", "fault", f"{error}")
        finally:
            await owner.close()
            await self._files_of_probes().abandon(room)
        text, full_s = trip.told(), trip.save_s * props.n_ctx / filled.n_tokens
        if trip.n_restored != trip.n_saved or not trip.n_saved:
            return self._say(
                "save and restore", "fault", f"saved {trip.n_saved:,} tokens, restored {trip.n_restored:,}"
            )
        disk = "slot_save_path and --slot-save-path on a faster disk"
        if trip.restore_s > max(filled.seconds, 0.1):
            text += f"; computing them takes {filled.seconds:.1f} s only: restoring costs more than it saves"
            return self._say("save and restore", "warning", text, disk)
        if full_s > 10:
            text += (
                f"; a full slot of {props.n_ctx:,} tokens stops all streams for about {full_s:.0f} s per save"
            )
            return self._say("save and restore", "warning", text, f"{disk}, or a larger store.idle_save_s")
        return self._say("save and restore", "ok", text)

    async def _compute(self, slot: int, tokens: bytes) -> None:
        async with contextlib.aclosing(self._api.prefill(slot, tokens)) as events:
            async for _ in events:
                pass

    async def _step(self, probe: Callable[[], Awaitable[Any]]) -> Any:
        """Return the result of a small probe. If llama-server refuses it or takes too long, add a finding and return
        None.
        """
        try:
            async with asyncio.timeout(_STEP_S):
                return await probe()
        except TimeoutError:
            self._say("probe", "skipped", f"not done within {_STEP_S:.0f} s: another client has the slot")
        except (UpstreamError, SlotActionFailed) as error:
            self._say("probe", "skipped", f"refused: {error}")
        return None
